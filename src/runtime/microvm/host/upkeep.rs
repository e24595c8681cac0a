//! What machines that run need now and then: a console that does not fill the host's disk, and a clock that is right.

use std::sync::Arc;

use futures::future::join_all;

use super::Inner;
use super::guest::HostVm;
use crate::runtime::microvm::machine::trim_consoles;
use crate::telemetry::chain;

/// How many looks at a console go by until the clock is set.
const LOOKS: u32 = 30;

/// Goes on for as long as there are VMs to look after.
pub(super) async fn keep(inner: Arc<Inner>) {
    loop {
        for _ in 0..LOOKS {
            tokio::time::sleep(inner.options.upkeep).await;
            trim_consoles(running(&inner).iter().map(|vm| vm.machine().dir().clone()).collect()).await;
        }
        join_all(running(&inner).iter().map(|vm| set_clock(vm))).await;
    }
}

fn running(inner: &Inner) -> Vec<Arc<HostVm>> {
    inner.running().values().cloned().collect()
}

async fn set_clock(vm: &HostVm) {
    let machine = vm.machine().dir().id();
    match vm.set_clock().await {
        Ok(behind) => tracing::debug!(%machine, behind_ns = behind, "set the clock of a guest"),
        // Whoever needs the guest is told so; the next round may do better.
        Err(error) => tracing::debug!(%machine, error = chain(&error), "failed to set the clock of a guest"),
    }
}
