//! Files of the node that were copied into a guest follow those of the host: a configMap that changes does so in the guest.
//! What an operator shares stays as it was at the start: nobody says when such a tree is whole.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::copy;
use super::sandbox::Sandbox;
use super::vm::Vm;
use super::volumes::{Places, Volume};
use crate::runtime::{Result, blocking};
use crate::telemetry::chain;

/// How often they are compared. A look at a link or a file each, of those Pods that have any.
const PAUSE: Duration = Duration::from_secs(2);
/// The longest pause before what has failed is tried again: a push may be of 16 MiB, read from the disk each time.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);

/// A volume whose files could not be pushed.
#[derive(Debug)]
struct Complaint {
    /// Told once, as it may be so for long.
    text: String,
    failures: u32,
    again_at: Instant,
}

/// How long to wait after so many failures in a row: twice as long each time.
fn pause_after(failures: u32) -> Duration {
    PAUSE.saturating_mul(2_u32.saturating_pow(failures)).min(LONGEST_PAUSE)
}

/// Pushes what has changed, for as long as the sandbox is there and its VM runs.
pub(super) async fn follow(sandbox: Weak<Sandbox>, vm: Arc<dyn Vm>, places: Places) {
    let mut pushed: HashMap<String, String> = HashMap::new();
    let mut complaints: HashMap<String, Complaint> = HashMap::new();
    loop {
        let Some(known) = sandbox.upgrade() else { return };
        let volumes: Vec<_> = known.record().volumes.iter().map(|(name, one)| (name.clone(), one.clone())).collect();
        drop(known);
        for (name, volume) in volumes {
            let Volume::Copied(path) = &volume else { continue };
            if !places.renews(path) {
                continue;
            }
            if complaints.get(&name).is_some_and(|complaint| Instant::now() < complaint.again_at) {
                continue;
            }
            let before = pushed.get(&name).cloned();
            match refresh(vm.as_ref(), &name, (path, &places), before.clone()).await {
                Ok(now) => {
                    complaints.remove(&name);
                    pushed.insert(name, now);
                }
                Err(error) => {
                    let text = chain(&error);
                    let known = complaints.get(&name);
                    if known.is_none_or(|known| known.text != text) {
                        tracing::warn!(volume = name, error = text, "a guest has old files");
                    }
                    let failures = known.map_or(0, |known| known.failures).saturating_add(1);
                    let again_at = Instant::now() + pause_after(failures);
                    complaints.insert(name, Complaint { text, failures, again_at });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_for_long_is_tried_seldom() {
        assert_eq!([0, 1, 2, 5].map(|failures| pause_after(failures).as_secs()), [2, 4, 8, 64]);
        assert_eq!([6, 31, 32, u32::MAX].map(pause_after), [LONGEST_PAUSE; 4]);
    }
}
