//! How much space directories take: walked in the background, remembered for a minute.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::runtime::stats::DiskUsage;

/// How long a figure holds: a walk reads every inode.
const FRESH: Duration = Duration::from_secs(60);
/// Between two looks at what is old: some ask for figures far more often, and to list all directories takes longer than to tell
/// their figures.
const LOOK: Duration = Duration::from_secs(1);
/// Of `st_blocks` (stat(2)).
const BLOCK: u64 = 512;

/// Figures by directory.
#[derive(Debug, Default)]
pub struct Disk {
    measured: Mutex<HashMap<PathBuf, DiskUsage>>,
    looked: Mutex<Option<Instant>>,
    walking: AtomicBool,
}

impl Disk {
    fn measured(&self) -> MutexGuard<'_, HashMap<PathBuf, DiskUsage>> {
        // A figure is never half written, so a panic elsewhere does not spoil it.
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the directory took when it was last measured.
    pub fn usage(&self, directory: &Path) -> Option<DiskUsage> {
        self.measured().get(directory).copied()
    }

    /// Whether a [`walk`](Self::walk) is worth a try: at most once a second.
    pub fn is_due(&self) -> bool {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let due = looked.is_none_or(|at| at.elapsed() >= LOOK);
        if due {
            *looked = Some(Instant::now());
        }
        due
    }

    /// The work of measuring those of `directories` whose figures are old, and of forgetting all others; `None` if there
    /// is none, or another walk is under way.
    pub fn walk(disk: &Arc<Self>, directories: HashSet<PathBuf>) -> Option<impl FnOnce() + Send + 'static> {
        let now = Timestamp::now();
        let fresh = |usage: &DiskUsage| now.duration_since(usage.time).unsigned_abs() < FRESH;
        let old: Vec<PathBuf> = {
            let mut measured = disk.measured();
            measured.retain(|directory, _| directories.contains(directory));
            directories.into_iter().filter(|directory| !measured.get(directory).is_some_and(fresh)).collect()
        };
        if old.is_empty() || disk.walking.swap(true, Ordering::SeqCst) {
            return None;
        }
        let walking = Walking(Arc::clone(disk));
        Some(move || {
            for directory in old {
                let usage = measure(&directory);
                walking.0.measured().insert(directory, usage);
            }
        })
    }
}

/// A walk is under way for as long as this lives.
struct Walking(Arc<Disk>);

impl Drop for Walking {
    fn drop(&mut self) {
        self.0.walking.store(false, Ordering::SeqCst);
    }
}

/// Blocks and inodes of everything below; what cannot be read, or goes away meanwhile, does not count.
fn measure(directory: &Path) -> DiskUsage {
    let mut usage = DiskUsage { time: Timestamp::now(), bytes: 0, inodes: 0 };
    let mut linked = HashSet::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            // Of the entry itself, wherever a link points.
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.nlink() > 1 && !metadata.is_dir() && !linked.insert((metadata.dev(), metadata.ino())) {
                continue;
            }
            usage.bytes += metadata.blocks() * BLOCK;
            usage.inodes += 1;
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_measured_once_a_minute_and_files_with_two_names_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("below")).unwrap();
        fs::write(path("below/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(path("below/file"), path("again")).unwrap();
        std::os::unix::fs::symlink("/", path("out")).unwrap();
        let disk = Arc::new(Disk::default());
        let all = || HashSet::from([directory.path().to_owned()]);
        let walk = Disk::walk(&disk, all()).unwrap();
        assert!(Disk::walk(&disk, all()).is_none(), "one at a time");
        walk();
        let usage = disk.usage(directory.path()).unwrap();
        assert_eq!(usage.inodes, 3);
        assert!((100_000..200_000).contains(&usage.bytes), "{usage:?}");
        assert!(Disk::walk(&disk, all()).is_none(), "fresh");
        assert!(Disk::walk(&disk, HashSet::new()).is_none());
        assert_eq!(disk.usage(directory.path()), None, "forgotten");
    }

    #[test]
    fn a_walk_is_due_at_first_and_a_second_after_the_last_look() {
        let disk = Disk::default();
        assert!(disk.is_due() && !disk.is_due());
        *disk.looked.lock().unwrap() = Some(Instant::now().checked_sub(LOOK).unwrap());
        assert!(disk.is_due() && !disk.is_due());
    }
}
