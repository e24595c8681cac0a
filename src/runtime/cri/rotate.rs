//! Keeps the logs of containers within bounds: a file that has grown is renamed, and the runtime told to open another.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lambdalet_proto::cri::v1;
use tokio::time::sleep;
use tracing::warn;

use super::client::{CriClient, ask};
use super::logs::{LogFiles, segments};
use super::{CriOptions, spec};
use crate::runtime::labels;
use crate::runtime::{Result, blocking};
use crate::telemetry::chain;

/// How often sizes are looked at (a kubelet's `containerLogMonitorInterval`).
const INTERVAL: Duration = Duration::from_secs(10);

/// Looks at the running containers of this owner until it is dropped.
pub(super) async fn run(client: CriClient, logs: LogFiles, options: CriOptions) {
    loop {
        sleep(INTERVAL).await;
        // A runtime that does not answer is the node's concern, and told there.
        let Ok(running) = running(&client, &logs, &options.owner).await else { continue };
        for (id, path) in running {
            if let Err(error) = look(&client, &id, path, &options).await {
                warn!(container = id, error = chain(&error), "a container's log could not be rotated");
            }
        }
    }
}

async fn running(client: &CriClient, logs: &LogFiles, owner: &str) -> Result<Vec<(String, PathBuf)>> {
    let filter = v1::ContainerFilter {
        state: Some(v1::ContainerStateValue { state: v1::ContainerState::ContainerRunning.into() }),
        label_selector: [(labels::OWNER.to_owned(), owner.to_owned())].into(),
        ..v1::ContainerFilter::default()
    };
    let request = v1::ListContainersRequest { filter: Some(filter) };
    let listed = ask!(client.runtime, list_containers(request), || "failed to list containers".to_owned()).await?;
    let path = |container: v1::Container| {
        let facts = spec::facts(owner, &container.labels, &container.annotations)?;
        Some((container.id, logs.of_container(&facts.pod.uid, &facts.container, facts.attempt)))
    };
    Ok(listed.containers.into_iter().filter_map(path).collect())
}

async fn look(client: &CriClient, id: &str, path: PathBuf, options: &CriOptions) -> Result<()> {
    let (most, files) = (options.log_max_size, options.log_max_files);
    let tried = format!("failed to rotate the log {}", path.display());
    let rotated = path.clone();
    if !blocking(tried.clone(), move || rotate(&rotated, most, files)).await? {
        return Ok(());
    }
    let request = v1::ReopenContainerLogRequest { container_id: id.to_owned() };
    let reopened = ask!(client.runtime, reopen_container_log(request), || tried.clone()).await;
    if reopened.is_err() {
        // It goes on in the file that it has, which must keep its name to be found, unless there is another by now.
        blocking(tried, move || if path.exists() { Ok(()) } else { fs::rename(numbered(&path, 1), &path) }).await?;
    }
    reopened.map(drop)
}

/// Renames a file that is larger than `most` bytes, and those before it, of which `files` are kept together with the next;
/// whether the runtime is to open another.
fn rotate(path: &Path, most: u64, files: u32) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(found) if found.len() > most => {}
        Ok(_) => return Ok(false),
        // Whoever renamed it did not live to tell the runtime, which still writes there.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(numbered(path, 1).exists()),
        Err(error) => return Err(error),
    }
    // The oldest first, so that no name is taken.
    let there = segments(path)?;
    let kept = usize::try_from(files.max(2) - 1).unwrap_or(usize::MAX);
    for (at, segment) in there.iter().enumerate() {
        let number = there.len() - at;
        if number > kept {
            fs::remove_file(segment)?;
        } else {
            fs::rename(segment, numbered(path, number))?;
        }
    }
    Ok(true)
}

fn numbered(path: &Path, number: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_has_grown_makes_way_and_the_oldest_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        assert!(!rotate(&path, 2, 3).unwrap(), "nothing is there");
        for round in 1..=4 {
            fs::write(&path, "xx").unwrap();
            assert!(!rotate(&path, 2, 3).unwrap(), "it is not larger yet");
            fs::write(&path, format!("xx{round}")).unwrap();
            assert!(rotate(&path, 2, 3).unwrap());
        }
        let read = |number| fs::read_to_string(numbered(&path, number)).unwrap();
        assert_eq!((read(1), read(2)), ("xx4".to_owned(), "xx3".to_owned()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_rotation_that_was_cut_off_is_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        fs::write(numbered(&path, 1), "xxx").unwrap();
        assert!(rotate(&path, 2, 3).unwrap(), "the runtime is to open another file");
        assert!(numbered(&path, 1).exists() && !path.exists(), "nothing is renamed twice");
    }
}
