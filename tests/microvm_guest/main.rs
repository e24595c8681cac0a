//! The agent of a guest, through the node's client: every verb, in a virtual machine.
//!
//! `LAMBDALET_TEST_GUEST=DIR` (made by hack/guest) boots one under QEMU, without KVM; `LAMBDALET_TEST_AGENT=FILE` runs the
//! agent in namespaces of this host instead, which takes a tenth of the time and has no limits (root is needed). Without
//! either nothing is tested, and the test says so.

// Helpers of a test are test code too, but only what bears #[test] is spared by the lint.
#![allow(clippy::unwrap_used)]

mod bench;
mod containers;
mod session;
mod streams;
mod volumes;

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use bench::Bench;
use futures::FutureExt;

/// Runs cases one after the other on one guest, for a boot is what costs, and gives the names of those that fail.
macro_rules! cases {
    ($bench:expr, $($room:ident: $($case:ident)*;)*) => {{
        let mut failed: Vec<&str> = Vec::new();
        $($(
            let started = Instant::now();
            if AssertUnwindSafe($room::$case($bench)).catch_unwind().await.is_err() {
                failed.push(stringify!($case));
                $bench.clean().await;
            }
            println!("  {} {} ms", stringify!($case), started.elapsed().as_millis());
        )*)*
        failed
    }};
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_verb_works_in_a_guest() {
    let Some(mut bench) = Bench::guest().await else { return };
    let mut failed = all(&mut bench).await;
    failed.extend(limits(&mut bench).await);
    assert!(failed.is_empty(), "failed: {failed:?}");
    session::a_shutdown_ends_the_machine(bench).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_verb_works_in_namespaces_of_this_host() {
    let Some(mut bench) = Bench::namespaces().await else { return };
    let failed = all(&mut bench).await;
    assert!(failed.is_empty(), "failed: {failed:?}");
    session::a_shutdown_ends_the_machine(bench).await;
}

async fn all(bench: &mut Bench) -> Vec<&'static str> {
    cases! { bench,
        session:
            hello_is_answered_and_the_guest_takes_its_identity
            of_ipv6_an_interface_has_a_part_by_its_address
            calls_that_are_given_up_do_not_end_the_session;
        containers:
            a_container_runs_and_its_exit_code_and_log_are_told
            a_command_that_is_not_there_exits_with_127_and_one_that_may_not_run_with_128
            a_user_of_the_image_runs_with_the_rights_of_the_spec
            root_file_systems_are_their_containers_own
            what_is_the_kernels_is_hidden
            a_container_sees_its_own_processes_only_unless_they_are_shared
            a_signal_ends_a_container_and_what_it_started
            a_frozen_container_gets_no_time
            statistics_are_counted
            a_deep_tree_is_counted_and_removed
            events_tell_what_happens;
        streams:
            a_command_has_its_streams_and_its_exit_code
            a_command_that_has_closed_its_outputs_reads_on
            a_command_that_is_given_up_while_it_starts_ends
            a_pipe_in_the_place_of_the_users_holds_up_no_command
            a_command_with_a_terminal_has_a_size
            a_command_ends_with_whoever_waits_for_it
            an_attached_client_speaks_to_the_process
            a_port_is_reached_and_each_direction_closed
            a_port_of_the_other_loopback_address_is_reached
            a_log_is_followed_and_read_again_from_an_offset;
        volumes:
            files_are_pushed_and_exchanged_at_once
            a_volume_is_shared_and_read_back
            what_a_volume_on_the_disk_holds_is_counted
            an_image_that_was_left_in_a_slot_gives_way;
        session: a_node_that_comes_back_finds_all_as_it_was;
    }
}

/// What takes controllers, which a host has elsewhere.
async fn limits(bench: &mut Bench) -> Vec<&'static str> {
    cases! { bench,
        containers:
            too_much_memory_is_told_as_such
            too_many_processes_are_refused;
    }
}
