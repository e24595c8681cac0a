//! The end of the guest: containers first, then the disk, then the machine.

use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::unistd::sync;
use tokio::time::{sleep, timeout};

use crate::guest::Guest;

/// Between the answer and the end, so that the answer arrives.
const GOODBYE: Duration = Duration::from_millis(50);
/// What a container is asked to end with, unless its spec says otherwise.
const ASK: &str = "SIGTERM";

impl Guest {
    /// Ends every container: asks, waits up to `grace`, kills.
    pub(crate) async fn end_containers(&self, grace: Duration) {
        let running: Vec<_> = self.containers().values().filter(|container| container.runs()).cloned().collect();
        for container in &running {
            let signal = if container.spec.stop_signal.is_empty() { ASK } else { &container.spec.stop_signal };
            // An unknown signal asks nothing; the kill below follows.
            let _ = self.signal_container(&container.spec.id, signal, false);
        }
        let all = async {
            for container in &running {
                let _ = container.exited().await;
            }
        };
        if timeout(grace, all).await.is_err() {
            for container in &running {
                self.cgroups.kill(&container.spec.id);
            }
        }
    }

    /// Ends the machine, once the answer is on its way. The VMM is told to end at a reboot, which needs no ACPI.
    pub(crate) fn end_machine(self: Arc<Self>) {
        tokio::task::spawn(async move {
            sleep(GOODBYE).await;
            let _ = tokio::task::spawn_blocking(move || {
                sync();
                // What is still in use is whole on disk: it was synced.
                let _ = umount2(&self.scratch(), MntFlags::MNT_DETACH);
                if self.stand_in {
                    // The host goes on.
                    let _ = self.cgroups.forget();
                    std::process::exit(0)
                }
                reboot(RebootMode::RB_AUTOBOOT)
            })
            .await;
        });
    }
}
