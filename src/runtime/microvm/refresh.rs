//! Files that were copied into a guest follow those of the host: a configMap that changes does so in the guest.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::sleep;

use super::copy;
use super::sandbox::Sandbox;
use super::vm::Vm;
use super::volumes::Volume;
use crate::runtime::{Result, blocking};
use crate::telemetry::chain;

/// How often they are compared. A look at a link or a file each, of those Pods that have any.
const PAUSE: Duration = Duration::from_secs(2);

/// Pushes what has changed, for as long as the sandbox is there and its VM runs.
pub(super) async fn follow(sandbox: Weak<Sandbox>, vm: Arc<dyn Vm>) {
    let mut pushed: HashMap<String, String> = HashMap::new();
    loop {
        let Some(known) = sandbox.upgrade() else { return };
        let volumes: Vec<_> = known.record().volumes.iter().map(|(name, one)| (name.clone(), one.clone())).collect();
        drop(known);
        for (name, volume) in volumes {
            let Volume::Copied(path) = &volume else { continue };
            let before = pushed.get(&name).cloned();
            match refresh(vm.as_ref(), &name, path, before.clone()).await {
                Ok(now) => drop(pushed.insert(name, now)),
                Err(error) => tracing::warn!(volume = name, error = chain(&error), "a guest has old files"),
            }
        }
        sleep(PAUSE).await;
    }
}

/// Pushes the files unless they are those of `before`; by what they are known now.
async fn refresh(vm: &dyn Vm, name: &str, path: &std::path::Path, before: Option<String>) -> Result<String> {
    let place = path.to_owned();
    let tried = || format!("failed to read {} for the guest", path.display());
    let now = blocking(tried(), move || copy::fingerprint(&place)).await?;
    // At the first look it is not known what the guest has: an earlier process pushed it, or the files changed since.
    if before.as_ref() != Some(&now) {
        let place = path.to_owned();
        let copied = blocking(tried(), move || copy::read(&place)).await?;
        vm.push_files(name, copied.layout, copied.files).await?;
    }
    Ok(now)
}
