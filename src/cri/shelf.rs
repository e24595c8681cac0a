//! What a CRI client wants back and no driver keeps: labels, annotations, log paths. One directory for each object, named by what
//! identifies it, so it is there before the object is and is found again from what a driver lists.
//!
//! ```text
//! <root>/sandboxes/<hash>/record    RunPodSandboxRequest      hosts, resolv.conf beside it
//! <root>/containers/<hash>/record   CreateContainerRequest    without what may be secret
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lambdalet_proto::cri::Message;
use lambdalet_proto::cri::v1::{CreateContainerRequest, RunPodSandboxRequest};
use sha2::{Digest as _, Sha256};
use tracing::warn;

use super::failure::CriError;
use super::filter;
use crate::file::{self, Synced};
use crate::runtime::types::{ContainerStatus, SandboxStatus};
use crate::telemetry::chain;

/// Name of the file that holds the message.
const RECORD: &str = "record";
/// What it is called before it is whole.
const UNFINISHED: &str = "record.new";

/// Characters of an id that may be abbreviated. Shorter ones may count, and then a whole one that is gone is the beginning
/// of another.
const LONG: usize = 32;

/// What identifies a sandbox or container, above and below the seam.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    /// The Pod's UID.
    pub(super) uid: String,
    /// The container's name; empty for a sandbox.
    pub(super) container: String,
    /// Which attempt.
    pub(super) attempt: u32,
}

impl Key {
    /// What a Pod's sandboxes take turns at: they share its address.
    pub(super) fn of_sandboxes(uid: &str) -> Self {
        Self { uid: uid.to_owned(), container: String::new(), attempt: 0 }
    }

    fn directory(&self) -> String {
        let Self { uid, container, attempt } = self;
        let hash = Sha256::digest(format!("{uid}\0{container}\0{attempt}"));
        hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

impl From<&SandboxStatus> for Key {
    fn from(status: &SandboxStatus) -> Self {
        Self { uid: status.pod.uid.clone(), container: String::new(), attempt: status.attempt }
    }
}

impl From<&ContainerStatus> for Key {
    fn from(status: &ContainerStatus) -> Self {
        Self { uid: status.pod.uid.clone(), container: status.name.clone(), attempt: status.attempt }
    }
}

/// A message that is kept.
pub(super) trait Record: Message + Default + PartialEq {
    /// What it is about, if it says so.
    fn key(&self) -> Option<Key>;
    /// What the client wrote on it, if it has a config.
    fn labels(&self) -> Option<&HashMap<String, String>>;
}

impl Record for RunPodSandboxRequest {
    fn key(&self) -> Option<Key> {
        let metadata = self.config.as_ref()?.metadata.as_ref()?;
        Some(Key { uid: metadata.uid.clone(), container: String::new(), attempt: metadata.attempt })
    }

    fn labels(&self) -> Option<&HashMap<String, String>> {
        Some(&self.config.as_ref()?.labels)
    }
}

impl Record for CreateContainerRequest {
    fn key(&self) -> Option<Key> {
        let pod = self.sandbox_config.as_ref()?.metadata.as_ref()?;
        let metadata = self.config.as_ref()?.metadata.as_ref()?;
        Some(Key { uid: pod.uid.clone(), container: metadata.name.clone(), attempt: metadata.attempt })
    }

    fn labels(&self) -> Option<&HashMap<String, String>> {
        Some(&self.config.as_ref()?.labels)
    }
}

/// All records of a kind, on disk and in memory.
#[derive(Debug)]
pub(super) struct Shelf<R> {
    directory: PathBuf,
    inner: Mutex<Inner<R>>,
}

#[derive(Debug)]
struct Inner<R> {
    records: HashMap<Key, Arc<R>>,
    /// The ids there are, so that a unique beginning of one is enough to name it.
    ids: BTreeMap<String, Key>,
}

impl<R: Record> Shelf<R> {
    /// Reads what is there. A record that cannot be read is left out with a warning, and goes with the next sweep.
    pub(super) fn open(directory: PathBuf) -> Result<Self, CriError> {
        let mut making = fs::DirBuilder::new();
        // What is in it came over a socket that only root may use.
        making.recursive(true).mode(0o700).create(&directory).map_err(CriError::file("make", &directory))?;
        let mut records = HashMap::new();
        for entry in fs::read_dir(&directory).map_err(CriError::file("read", &directory))? {
            let path = entry.map_err(CriError::file("read", &directory))?.path().join(RECORD);
            match read::<R>(&path) {
                Ok((key, record)) => drop(records.insert(key, Arc::new(record))),
                Err(cause) => warn!(path = %path.display(), error = chain(&cause), "a record that cannot be read"),
            }
        }
        Ok(Self { directory, inner: Mutex::new(Inner { records, ids: BTreeMap::new() }) })
    }

    /// Keeps a record; one of the same key is replaced.
    pub(super) fn keep(&self, key: &Key, record: R) -> Result<Arc<R>, CriError> {
        let place = self.place(key);
        fs::create_dir_all(&place).map_err(CriError::file("make", &place))?;
        write(&place, UNFINISHED, RECORD, &record.encode_to_vec())?;
        let record = Arc::new(record);
        self.lock().records.insert(key.clone(), Arc::clone(&record));
        Ok(record)
    }

    /// The record, if there is one.
    pub(super) fn of(&self, key: &Key) -> Option<Arc<R>> {
        self.lock().records.get(key).cloned()
    }

    /// Where more may be put that goes with the record.
    pub(super) fn place(&self, key: &Key) -> PathBuf {
        self.directory.join(key.directory())
    }

    /// The object of this record has this id from now on, and no other. If the record was forgotten meanwhile, so is the id.
    pub(super) fn named(&self, id: &str, key: Key) {
        let mut inner = self.lock();
        inner.ids.retain(|_, known| *known != key);
        if inner.records.contains_key(&key) {
            inner.ids.insert(id.to_owned(), key);
        }
    }

    /// This is there, with or without a record.
    pub(super) fn found(&self, id: &str, key: Key) {
        self.lock().ids.insert(id.to_owned(), key);
    }

    /// The Pod of all that has these labels; `None` if nothing has them, or things of several Pods, or none are named: what
    /// has no record has no labels.
    pub(super) fn only_pod(&self, selector: &HashMap<String, String>) -> Option<String> {
        if selector.is_empty() {
            return None;
        }
        let inner = self.lock();
        let labelled = |record: &R| record.labels().is_some_and(|labels| filter::labelled(labels, selector));
        let mut uids = inner.records.iter().filter(|(_, record)| labelled(record)).map(|(key, _)| &key.uid);
        let first = uids.next()?;
        uids.all(|uid| uid == first).then(|| first.clone())
    }

    /// What this id stands for.
    pub(super) fn key_of(&self, id: &str) -> Option<Key> {
        self.lock().ids.get(id).cloned()
    }

    /// The id that a client means: it may write only as much of one as no other begins with.
    pub(super) fn id(&self, asked: &str) -> String {
        let inner = self.lock();
        let mut beginning = inner.ids.range(asked.to_owned()..).take_while(|(id, _)| id.starts_with(asked));
        match (beginning.next(), beginning.next()) {
            (Some((id, _)), None) if !asked.is_empty() && id.len() >= LONG => id.clone(),
            _ => asked.to_owned(),
        }
    }

    /// Forgets the record and all beside it. One that cannot be removed from disk is swept at the next start.
    pub(super) fn forget(&self, key: &Key) {
        {
            let mut inner = self.lock();
            inner.records.remove(key);
            inner.ids.retain(|_, known| known != key);
        }
        let place = self.place(key);
        if let Err(cause) = file::remove_tree(&place) {
            warn!(path = %place.display(), error = chain(&cause), "failed to remove a record");
        }
    }

    /// Every key there is a record of.
    pub(super) fn keys(&self) -> Vec<Key> {
        self.lock().records.keys().cloned().collect()
    }

    /// Forgets all but these.
    pub(super) fn sweep(&self, there: &[Key]) {
        for key in self.keys().iter().filter(|key| !there.contains(key)) {
            self.forget(key);
        }
        let known: Vec<_> = there.iter().map(|key| self.place(key)).collect();
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if !known.contains(&path)
                && let Err(cause) = file::remove_tree(&path)
            {
                warn!(path = %path.display(), error = chain(&cause), "failed to remove what is left of a record");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<R>> {
        // Each change is made in one go.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read<R: Record>(path: &Path) -> io::Result<(Key, R)> {
    let record = R::decode(&*fs::read(path)?).map_err(io::Error::other)?;
    let key = record.key().ok_or_else(|| io::Error::other("it does not say what it is about"))?;
    Ok((key, record))
}

/// Writes a file that is either there whole or not at all.
pub(super) fn write(place: &Path, unfinished: &str, name: &str, bytes: &[u8]) -> Result<(), CriError> {
    let (aside, path) = (place.join(unfinished), place.join(name));
    file::replace(&path, &aside, bytes, Synced::No).map_err(CriError::file("write", &path))
}

#[cfg(test)]
mod tests {
    use lambdalet_proto::cri::v1::{PodSandboxConfig, PodSandboxMetadata};

    use super::*;

    fn request(uid: &str, attempt: u32) -> RunPodSandboxRequest {
        let metadata = PodSandboxMetadata { uid: uid.to_owned(), attempt, ..Default::default() };
        let labels = HashMap::from([("app".to_owned(), "web".to_owned())]);
        let config = PodSandboxConfig { metadata: Some(metadata), labels, ..Default::default() };
        RunPodSandboxRequest { config: Some(config), runtime_handler: "docker".to_owned() }
    }

    fn key(uid: &str, attempt: u32) -> Key {
        Key { uid: uid.to_owned(), container: String::new(), attempt }
    }

    #[test]
    fn a_record_is_there_after_a_restart_and_gone_after_it_was_forgotten() {
        let root = tempfile::tempdir().unwrap();
        let open = || Shelf::<RunPodSandboxRequest>::open(root.path().join("sandboxes")).unwrap();
        let shelf = open();
        shelf.keep(&key("a", 0), request("a", 0)).unwrap();
        shelf.keep(&key("a", 1), request("a", 1)).unwrap();
        fs::write(shelf.place(&key("a", 1)).join("hosts"), "x").unwrap();
        let again = open();
        assert_eq!(again.of(&key("a", 1)).as_deref(), Some(&request("a", 1)));
        again.forget(&key("a", 1));
        assert!(!again.place(&key("a", 1)).exists());
        assert_eq!(open().keys(), [key("a", 0)]);
    }

    #[test]
    fn a_sweep_takes_what_is_not_there_any_more_and_what_cannot_be_read() {
        let root = tempfile::tempdir().unwrap();
        let open = || Shelf::<RunPodSandboxRequest>::open(root.path().to_owned()).unwrap();
        let shelf = open();
        shelf.keep(&key("a", 0), request("a", 0)).unwrap();
        shelf.keep(&key("b", 0), request("b", 0)).unwrap();
        fs::create_dir(root.path().join("torn")).unwrap();
        fs::write(root.path().join("torn").join(RECORD), [0xff]).unwrap();
        let shelf = open();
        shelf.sweep(&[key("b", 0)]);
        assert_eq!(shelf.keys(), [key("b", 0)]);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_beginning_that_only_one_id_has_is_enough() {
        let root = tempfile::tempdir().unwrap();
        let shelf = Shelf::<RunPodSandboxRequest>::open(root.path().to_owned()).unwrap();
        let (one, two) = (format!("abc1{}", "0".repeat(60)), format!("abc2{}", "0".repeat(60)));
        for id in [one.as_str(), &two, "count-10"] {
            shelf.found(id, key(id, 0));
        }
        let table =
            [("abc1", one.as_str()), (&one, &one), ("abc", "abc"), ("", ""), ("x", "x"), ("count-1", "count-1")];
        for (asked, meant) in table {
            assert_eq!(shelf.id(asked), meant, "{asked}");
        }
        shelf.forget(&key(&two, 0));
        assert_eq!(shelf.id("a"), one);
    }

    #[test]
    fn a_record_has_one_id_and_one_that_is_forgotten_has_none() {
        let root = tempfile::tempdir().unwrap();
        let shelf = Shelf::<RunPodSandboxRequest>::open(root.path().to_owned()).unwrap();
        shelf.keep(&key("a", 0), request("a", 0)).unwrap();
        shelf.named("before", key("a", 0));
        shelf.named("now", key("a", 0));
        assert_eq!((shelf.key_of("before"), shelf.key_of("now")), (None, Some(key("a", 0))));
        shelf.forget(&key("a", 0));
        shelf.named("late", key("a", 0));
        assert_eq!(shelf.key_of("late"), None);
    }

    #[test]
    fn labels_may_lead_to_one_pod() {
        let root = tempfile::tempdir().unwrap();
        let shelf = Shelf::<RunPodSandboxRequest>::open(root.path().to_owned()).unwrap();
        let of = |app: &str| shelf.only_pod(&HashMap::from([("app".to_owned(), app.to_owned())]));
        assert_eq!(of("web"), None);
        shelf.keep(&key("a", 0), request("a", 0)).unwrap();
        shelf.keep(&key("a", 1), request("a", 1)).unwrap();
        assert_eq!((of("web"), of("db")), (Some("a".to_owned()), None));
        shelf.keep(&key("b", 0), request("b", 0)).unwrap();
        assert_eq!(of("web"), None);
    }

    #[test]
    fn only_its_owner_can_read_a_record() {
        use std::os::unix::fs::PermissionsExt as _;
        let root = tempfile::tempdir().unwrap();
        let shelf = Shelf::<RunPodSandboxRequest>::open(root.path().join("s")).unwrap();
        shelf.keep(&key("a", 0), request("a", 0)).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&root.path().join("s")), 0o700);
        assert_eq!(mode(&shelf.place(&key("a", 0)).join(RECORD)), 0o600);
    }
}
