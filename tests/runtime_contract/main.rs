//! The contract of the runtime seam, one case per promise, the same cases for every driver.
//!
//! The fake is always tested. Docker is when `LAMBDALET_TEST_DOCKER=1` (a daemon at /var/run/docker.sock, root, and a
//! static /bin/busybox are needed); what is made there is owned by the test and removed with it. MicroVMs are when
//! `LAMBDALET_TEST_GUEST` names a guest too (hack/guest), beside Docker and with its images, as on a node that has both.
//! A containerd is, through CRI, when `LAMBDALET_TEST_CONTAINERD` names its socket (hack/containerd starts one).

// Helpers of a test are test code too, but only what bears #[test] is spared by the lint.
#![allow(clippy::unwrap_used)]

mod bench;
mod block_images;
mod containers;
mod docker_only;
mod events;
mod execs;
mod images;
mod isolation;
mod logs;
mod machines;
mod registry;
mod sandboxes;
mod stats;
mod streams;

/// Runs each case against both drivers, cleans up after it, and checks that nothing is left.
macro_rules! contract {
    ($($room:ident: $($case:ident)*;)*) => {
        mod fake {
            $($(#[tokio::test]
            async fn $case() {
                crate::bench::run(Some(crate::bench::Bench::fake()), crate::$room::$case).await;
            })*)*
        }
        mod handled {
            $($(#[tokio::test]
            async fn $case() {
                crate::bench::run(Some(crate::bench::Bench::handled()), crate::$room::$case).await;
            })*)*
        }
        mod microvm_in_memory {
            $($(#[tokio::test]
            async fn $case() {
                crate::bench::run(Some(crate::bench::Bench::microvm_in_memory().await), crate::$room::$case).await;
            })*)*
        }
        mod docker {
            $($(#[tokio::test]
            async fn $case() {
                crate::bench::run(crate::bench::Bench::docker().await, crate::$room::$case).await;
            })*)*
        }
        mod cri {
            $($(#[tokio::test]
            async fn $case() {
                crate::bench::run(crate::bench::Bench::cri().await, crate::$room::$case).await;
            })*)*
        }
        mod microvm {
            $($(#[test]
            fn $case() {
                crate::bench::on_a_host(|| async {
                    let bench = crate::bench::Bench::microvm(crate::bench::Templates::Shared).await;
                    crate::bench::run(bench, crate::$room::$case).await;
                });
            })*)*
        }
    };
}

contract! {
    sandboxes:
        a_sandbox_that_runs_is_ready_and_says_whose_it_is
        running_a_ready_sandbox_again_returns_it
        a_stopped_sandbox_gives_way_to_a_new_one
        each_attempt_is_a_sandbox_of_its_own
        stopping_a_sandbox_ends_what_runs_in_it_and_may_be_repeated
        removing_a_sandbox_takes_its_containers_along
        unknown_ids_may_be_stopped_and_removed_but_have_no_status
        a_list_can_be_narrowed_to_one_pod
        a_sandbox_on_the_hosts_network_has_no_address
        a_sandbox_is_given_other_limits_as_it_runs
        a_run_that_was_dropped_can_be_repeated
        many_sandboxes_can_be_run_at_once;
    containers:
        a_container_is_created_then_runs_then_has_exited
        creating_the_same_attempt_again_returns_it
        a_container_needs_a_sandbox_that_is_there_and_ready
        a_container_needs_an_image_that_is_there
        starting_a_running_container_is_fine_and_an_exited_one_is_not
        a_command_that_does_not_exist_exits_with_127_and_says_so
        a_command_that_may_not_run_exits_with_128_and_says_so
        the_exit_code_is_the_process_own
        a_stop_lets_the_process_end_by_itself
        a_process_that_ignores_the_signal_is_killed_after_the_grace
        no_grace_kills_at_once
        stopping_what_does_not_run_is_fine
        a_running_container_can_be_removed_and_is_gone
        two_removals_at_once_both_succeed
        a_start_that_nobody_waits_for_does_not_fail_the_container
        a_container_that_joined_the_processes_of_another_ends_with_it
        a_target_must_be_there_and_run
        what_the_caller_wrote_on_a_container_reads_back
        a_container_is_given_other_limits_as_it_runs
        what_has_exited_or_never_was_is_given_no_limits;
    logs:
        binary_bytes_arrive_as_they_were_written
        a_long_line_arrives_whole_in_parts
        the_last_line_needs_no_newline
        a_tail_counts_lines_and_not_records
        a_tail_of_nothing_is_nothing
        both_streams_are_told_apart
        since_is_exact_below_the_second
        following_ends_when_the_container_has_exited
        following_from_a_tail_misses_nothing
        a_container_that_never_started_has_an_empty_log
        an_unknown_container_has_no_log;
    streams:
        an_exec_tells_both_streams_apart_and_its_code
        what_is_written_to_an_exec_comes_back_to_the_last_byte
        an_exec_delivers_only_what_was_asked_for
        an_exec_without_stdin_reads_its_end
        what_cannot_be_executed_is_invalid_and_says_why
        streams_need_a_container_that_runs
        a_terminal_has_the_size_it_was_given
        the_end_of_input_reaches_a_process_at_a_terminal
        an_exit_code_does_not_wait_for_its_output_to_be_read
        a_process_may_run_on_after_it_closed_its_streams
        a_removed_container_ends_its_execs
        many_execs_run_at_once
        an_attached_client_speaks_with_the_process
        standard_input_stays_open_for_the_next_client
        a_client_attached_without_input_only_listens
        an_attached_client_hears_the_last_words
        a_port_is_reached_and_each_direction_is_closed_by_itself
        hundreds_of_connections_can_be_open_at_once
        a_port_where_nothing_listens_is_invalid_and_says_so
        a_paused_container_waits_until_it_is_thawed
        a_paused_container_can_be_stopped_and_removed;
    stats:
        what_runs_is_told_with_what_it_uses
        statistics_follow_what_comes_and_goes;
    events:
        what_happens_to_a_container_is_told
        an_owner_is_told_of_its_own_objects_only;
    images:
        an_image_is_found_by_reference_and_by_id
        an_absent_image_is_none_and_its_removal_is_fine
        an_image_in_use_is_not_removed
        a_reference_that_does_not_parse_is_invalid;
}

/// Cases that only a real engine can answer.
macro_rules! on_docker {
    ($($room:ident: $($case:ident)*;)*) => {
        mod docker_itself {
            $($(#[tokio::test]
            async fn $case() {
                crate::bench::run(crate::bench::Bench::docker().await, crate::$room::$case).await;
            })*)*
        }
    };
}

on_docker! {
    block_images:
        an_image_of_the_daemon_is_present_and_becomes_a_block_image
        a_block_image_keeps_the_digests_of_its_original;
    docker_only:
        a_sandbox_whose_holder_was_killed_is_not_ready_and_is_replaced
        a_sandbox_without_its_holder_can_still_be_removed
        the_image_of_the_holders_is_pinned_and_no_other
        members_share_the_sandboxs_host_name_and_network
        a_container_sees_the_processes_of_its_target
        the_pods_cgroup_has_its_limits_and_goes_with_the_sandbox
        rights_reach_the_process
        mounts_are_as_asked
        the_last_value_of_a_variable_wins
        too_much_memory_is_told_as_such
        a_terminals_log_reads_as_lines
        a_driver_that_starts_anew_finds_everything
        a_daemon_that_is_not_there_is_unavailable
        a_pull_from_nowhere_is_unavailable
        a_plain_registry_is_pulled_from_if_the_operator_listed_it
        the_right_credentials_are_found_among_several
        an_image_can_be_pulled_by_its_digest;
    execs:
        a_session_that_is_dropped_ends_its_process_and_children
        a_process_that_left_the_session_on_purpose_is_spared
        an_exec_that_nobody_waits_for_leaves_nothing
        what_an_earlier_process_left_running_is_ended_and_no_exec_of_others
        an_exec_ends_although_its_child_holds_the_streams
        a_slow_reader_loses_nothing
        nothing_is_read_ahead_of_a_client
        a_terminals_bytes_arrive_as_they_are
        a_process_that_stops_reading_is_told_to_the_writer
        a_port_of_the_other_loopback_address_is_reached
        a_port_of_the_hosts_network_is_reached;
    stats:
        the_kernels_figures_are_told;
}

/// Cases that only machines of this host can answer, each with whose templates it has.
macro_rules! on_machines {
    ($($room:ident: $($templates:ident $case:ident)*;)*) => {
        mod machines_themselves {
            $($(#[test]
            fn $case() {
                crate::bench::on_a_host(|| async {
                    let bench = crate::bench::Bench::microvm(crate::bench::Templates::$templates).await;
                    crate::bench::run_changing(bench, crate::$room::$case).await;
                });
            })*)*
        }
    };
}

on_machines! {
    machines:
        Shared a_driver_that_starts_anew_takes_its_machines_over_and_loses_no_line
        Shared a_machine_that_ended_while_no_driver_ran_is_told_as_ended
        Shared a_vmm_that_is_killed_takes_its_sandbox_along
        Shared a_guest_that_dies_takes_its_sandbox_along
        Shared an_agent_that_is_killed_takes_its_sandbox_along
        Own the_first_guest_is_booted_and_a_spoilt_template_is_replaced
        Shared a_guest_is_reached_by_host_and_neighbours_and_reaches_them
        Shared a_guest_cannot_speak_as_another
        Shared a_guests_clock_is_set_right
        Shared clones_of_one_template_are_strangers
        Waiting guests_that_have_waited_are_strangers
        Waiting a_guest_that_has_waited_is_its_pods
        Waiting guests_that_wait_end_with_their_driver_or_by_the_next
        Shared a_part_of_a_volume_and_an_image_are_shown
        Shared machines_that_come_and_go_leave_nothing;
    isolation:
        Shared a_machine_has_the_weight_of_its_pod
        Shared a_fork_bomb_stays_in_its_guest
        Shared a_memory_bomb_ends_its_container_alone
        Shared a_full_disk_is_its_guests_own;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn gigabyte() {
    bench::run(bench::Bench::docker().await, execs::a_gigabyte_goes_through_an_exec_both_ways).await;
}
