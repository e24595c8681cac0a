//! Files that were copied into a guest follow those of the host: a configMap that changes does so in the guest.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::sleep;

use super::copy;
use super::sandbox::Sandbox;
use super::vm::Vm;
use super::volumes::{Places, Volume};
use crate::runtime::{Result, blocking};
use crate::telemetry::chain;

/// How often they are compared. A look at a link or a file each, of those Pods that have any.
const PAUSE: Duration = Duration::from_secs(2);

/// Pushes what has changed, for as long as the sandbox is there and its VM runs.
pub(super) async fn follow(sandbox: Weak<Sandbox>, vm: Arc<dyn Vm>, places: Places) {
    let mut pushed: HashMap<String, String> = HashMap::new();
    // What is wrong with a volume may be so for long, and is told once.
    let mut complaints: HashMap<String, String> = HashMap::new();
    loop {
        let Some(known) = sandbox.upgrade() else { return };
        let volumes: Vec<_> = known.record().volumes.iter().map(|(name, one)| (name.clone(), one.clone())).collect();
        drop(known);
        for (name, volume) in volumes {
            let Volume::Copied(path) = &volume else { continue };
            let before = pushed.get(&name).cloned();
            match refresh(vm.as_ref(), &name, (path, &places), before.clone()).await {
                Ok(now) => {
                    complaints.remove(&name);
                    pushed.insert(name, now);
                }
                Err(error) => {
                    let text = chain(&error);
                    if complaints.get(&name) != Some(&text) {
                        tracing::warn!(volume = name, error = text, "a guest has old files");
                        complaints.insert(name, text);
                    }
                }
            }
        }
        sleep(PAUSE).await;
    }
}

/// Pushes the files unless they are those of `before`; by what they are known now.
async fn refresh(vm: &dyn Vm, name: &str, (path, places): (&Path, &Places), before: Option<String>) -> Result<String> {
    let place = path.to_owned();
    let tried = || format!("failed to read {} for the guest", path.display());
    let now = blocking(tried(), move || copy::fingerprint(&place)).await?;
    // At the first look it is not known what the guest has: an earlier process pushed it, or the files changed since.
    if before.as_ref() != Some(&now) {
        let (place, places) = (path.to_owned(), places.clone());
        let copied = blocking(tried(), move || copy::read_shared(&places, &place)).await?;
        vm.push_files(name, copied.layout, copied.files).await?;
    }
    Ok(now)
}
