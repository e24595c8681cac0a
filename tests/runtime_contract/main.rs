//! The contract of the runtime seam, one case per promise, the same cases for every driver.
//!
//! The fake is always tested. Docker is when `LAMBDALET_TEST_DOCKER=1` (a daemon at /var/run/docker.sock, root, and a
//! static /bin/busybox are needed); what is made there is owned by the test and removed with it.

// Helpers of a test are test code too, but only what bears #[test] is spared by the lint.
#![allow(clippy::unwrap_used)]

mod bench;
mod containers;
mod docker_only;
mod events;
mod images;
mod logs;
mod registry;
mod sandboxes;

/// Runs each case against both drivers, cleans up after it, and checks that nothing is left.
macro_rules! contract {
    ($($room:ident: $($case:ident)*;)*) => {
        mod fake {
            $($(#[tokio::test]
            async fn $case() {
                crate::bench::run(Some(crate::bench::Bench::fake()), crate::$room::$case).await;
            })*)*
        }
        mod docker {
            $($(#[tokio::test]
            async fn $case() {
                crate::bench::run(crate::bench::Bench::docker().await, crate::$room::$case).await;
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
        what_the_caller_wrote_on_a_container_reads_back;
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
    ($($case:ident)*) => {
        mod docker_itself {
            $(#[tokio::test]
            async fn $case() {
                crate::bench::run(crate::bench::Bench::docker().await, crate::docker_only::$case).await;
            })*
        }
    };
}

on_docker! {
    a_sandbox_whose_holder_was_killed_is_not_ready_and_is_replaced
    a_sandbox_without_its_holder_can_still_be_removed
    members_share_the_sandboxs_host_name_and_network
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
    an_image_can_be_pulled_by_its_digest
}
