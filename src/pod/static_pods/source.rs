//! The files of static Pods: read at once, when the kernel tells of a change, and now and then in case it does not.

use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Key, SEEN, StaticError, StaticPods, key, read};
use crate::telemetry::chain;

/// Most bytes of a file (the kubelet's value).
const LONGEST: u64 = 10 << 20;
/// How soon a path that is not there, or cannot be watched, is looked at again.
const UNWATCHED: Duration = Duration::from_secs(1);
/// Room for the kernel's notices; what they say does not matter.
const NOTICES: usize = 4096;

/// Reads the Pods in `path`, a directory or one file, until `stop`; at least every `every`.
pub async fn run(folder: Folder, every: Duration, pods: watch::Sender<StaticPods>, stop: CancellationToken) {
    let mut folder = folder;
    loop {
        // Begun before the look, so that nothing that happens after it is missed.
        let notices = notices(&folder.path);
        let looked = tokio::task::spawn_blocking(move || {
            let found = folder.look();
            (folder, found)
        });
        // Its failure would be a panic in there.
        let Ok((same, found)) = looked.await else { return };
        folder = same;
        pods.send_if_modified(|known| {
            let changed = !known.read || !known.pods.keys().eq(found.keys());
            *known = StaticPods { read: true, pods: found };
            changed
        });
        let pause = if notices.is_ok() { every } else { UNWATCHED.min(every) };
        let change = async {
            match &notices {
                Ok(notices) => noticed(notices).await,
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            // Cancel-safe: everything is looked at anew.
            () = change => {}
            // Cancel-safe: a timer.
            () = tokio::time::sleep(pause) => {}
            // Cancel-safe: a token stays cancelled.
            () = stop.cancelled() => return,
        }
    }
}

fn notices(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let queue = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let flags = WatchFlags::CLOSE_WRITE
        | WatchFlags::CREATE
        | WatchFlags::DELETE
        | WatchFlags::MOVED_FROM
        | WatchFlags::MOVED_TO
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF;
    inotify::add_watch(&queue, path, flags)?;
    // Deprecated for types whose descriptor may change under it, which that of an OwnedFd cannot.
    #[allow(deprecated)]
    let queue = AsyncFd::with_interest(queue, Interest::READABLE)?;
    Ok(queue)
}

async fn noticed(queue: &AsyncFd<OwnedFd>) {
    loop {
        let Ok(mut ready) = queue.readable().await else { return std::future::pending().await };
        let mut notices = [0; NOTICES];
        if ready.try_io(|queue| Ok(rustix::io::read(queue.get_ref(), &mut notices)?)).is_ok() {
            return;
        }
    }
}

/// A directory of static Pods, or one file.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    node: String,
    /// What was last made of each file.
    known: BTreeMap<PathBuf, Known>,
}

#[derive(Debug)]
struct Known {
    pod: Option<Arc<Pod>>,
    complaint: Option<String>,
}

impl Folder {
    /// The files in `path`, for the node of that name.
    pub fn new(path: &Path, node: &str) -> Self {
        Self { path: path.to_owned(), node: node.to_owned(), known: BTreeMap::new() }
    }

    /// The Pods now, by UID. A file that cannot be read, or is half written, leaves its Pod as it is; one that is gone
    /// takes it along.
    fn look(&mut self) -> BTreeMap<String, Arc<Pod>> {
        match self.files() {
            Ok(files) => {
                self.known.retain(|file, _| files.contains(file));
                for file in files {
                    self.look_at(file);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.known.clear(),
            Err(error) => {
                tracing::warn!(path = %self.path.display(), error = chain(&error), "failed to look for static Pods");
            }
        }
        let mut taken: BTreeMap<Key, &Path> = BTreeMap::new();
        let mut pods = BTreeMap::new();
        for (file, pod) in self.known.iter().filter_map(|(file, known)| Some((file, known.pod.as_ref()?))) {
            match taken.insert(key(pod), file) {
                None => drop(pods.insert(pod.metadata.uid.clone().unwrap_or_default(), Arc::clone(pod))),
                Some(first) => {
                    taken.insert(key(pod), first);
                    tracing::warn!(first = %first.display(), second = %file.display(), "two files name the same Pod; the first is run");
                }
            }
        }
        pods
    }

    /// Regular files that are not hidden, and links to such.
    fn files(&self) -> io::Result<Vec<PathBuf>> {
        if !std::fs::metadata(&self.path)?.is_dir() {
            return Ok(vec![self.path.clone()]);
        }
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            let entry = entry?;
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            if !hidden && std::fs::metadata(entry.path()).is_ok_and(|found| found.is_file()) {
                files.push(entry.path());
            }
        }
        Ok(files)
    }

    fn look_at(&mut self, file: PathBuf) {
        let made = content(&file).and_then(|text| read(&text, &file, &self.node));
        let known = self.known.entry(file).or_insert(Known { pod: None, complaint: None });
        match made {
            Ok(mut pod) => {
                known.complaint = None;
                if known.pod.as_ref().is_none_or(|before| before.metadata.uid != pod.metadata.uid) {
                    let seen = Timestamp::now().to_string();
                    pod.metadata.annotations.get_or_insert_default().insert(SEEN.to_owned(), seen);
                    known.pod = Some(Arc::new(pod));
                }
            }
            Err(error) => {
                let complaint = chain(&error).to_string();
                if known.complaint.as_ref() != Some(&complaint) {
                    tracing::warn!(error = complaint, "a file makes no static Pod");
                    known.complaint = Some(complaint);
                }
            }
        }
    }
}

fn content(file: &Path) -> Result<String, StaticError> {
    let failed = |source| StaticError::Read { file: file.to_owned(), source };
    let mut text = String::new();
    let read = std::fs::File::open(file).map_err(failed)?.take(LONGEST + 1).read_to_string(&mut text);
    match read.map_err(failed)? as u64 {
        length if length > LONGEST => Err(failed(io::Error::other(format!("it has more than {LONGEST} bytes")))),
        _ => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str, image: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{containers: [{{name: c, image: {image}}}]}}\n"
        )
    }

    fn names(pods: &BTreeMap<String, Arc<Pod>>) -> Vec<String> {
        let mut names: Vec<_> = pods.values().map(|pod| key(pod).1).collect();
        names.sort();
        names
    }

    #[test]
    fn files_come_and_go_and_a_broken_one_keeps_its_pod() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut folder = Folder::new(directory.path(), "n");
        assert!(folder.look().is_empty());
        std::fs::write(path("a.yaml"), text("a", "i")).unwrap();
        std::fs::write(path(".hidden.yaml"), text("h", "i")).unwrap();
        std::fs::create_dir(path("below")).unwrap();
        let first = folder.look();
        assert_eq!(names(&first), ["a-n"]);
        let seen = |pods: &BTreeMap<String, Arc<Pod>>| {
            pods.values().next().unwrap().metadata.annotations.clone().unwrap()[SEEN].clone()
        };
        std::fs::write(path("a.yaml"), "apiVersion: v1\nki").unwrap();
        let kept = folder.look();
        assert_eq!((kept.keys().collect::<Vec<_>>(), seen(&kept)), (first.keys().collect(), seen(&first)));
        std::fs::write(path("a.yaml"), text("a", "j")).unwrap();
        assert_ne!(folder.look().keys().collect::<Vec<_>>(), first.keys().collect::<Vec<_>>());
        std::fs::write(path("b.yaml"), text("a", "k")).unwrap();
        let twins = folder.look();
        let image = twins.values().next().unwrap().spec.as_ref().unwrap().containers[0].image.clone();
        assert_eq!((twins.len(), image.as_deref()), (1, Some("j")), "the first of two");
        std::fs::remove_file(path("a.yaml")).unwrap();
        std::fs::remove_file(path("b.yaml")).unwrap();
        assert!(folder.look().is_empty());
        drop(directory);
        assert!(folder.look().is_empty(), "a directory that is not there is an empty one");
    }

    #[tokio::test]
    async fn a_change_is_noticed_long_before_the_next_look() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.yaml");
        let (sender, mut pods) = watch::channel(StaticPods::default());
        let stop = CancellationToken::new();
        let hour = Duration::from_secs(3600);
        let folder = Folder::new(directory.path(), "n");
        let reading = crate::shutdown::owned(run(folder, hour, sender, stop.clone()));
        let soon = Duration::from_secs(10);
        let until = async |pods: &mut watch::Receiver<StaticPods>, count: usize| {
            let seen = tokio::time::timeout(soon, pods.wait_for(|pods| pods.read && pods.pods.len() == count)).await;
            seen.expect("in time").expect("the source lives");
        };
        until(&mut pods, 0).await;
        std::fs::write(&file, text("a", "i")).unwrap();
        until(&mut pods, 1).await;
        std::fs::remove_file(&file).unwrap();
        until(&mut pods, 0).await;
        // Moved into place, as editors and configuration management do.
        let aside = directory.path().join(".aside");
        std::fs::write(&aside, text("b", "i")).unwrap();
        std::fs::rename(&aside, &file).unwrap();
        until(&mut pods, 1).await;
        stop.cancel();
        reading.await.unwrap();
    }
}
