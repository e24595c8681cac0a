//! The store's files. Whatever is there under its final name is whole: it was made aside, written to the disk, renamed.
//!
//! ```text
//! images/<hex>/{rootfs.erofs, record.json}   an image, by the digest of its config
//! names/<hash>.json                          what a name means (a name moves by one rename)
//! tmp/<number>                               being made, or on its way out
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::layer::digest_of;
use super::{config, erofs};
use crate::file;
use crate::runtime::types::ImageId;
use crate::telemetry::chain;

/// What files of this layout say of themselves; others are not read, and their images are fetched again.
const FORMAT: u32 = 1;
const ROOTFS: &str = "rootfs.erofs";
const RECORD: &str = "record.json";

/// What is written beside an image.
#[derive(Debug, Deserialize, Serialize)]
struct Record {
    format: u32,
    /// The image's config, byte for byte: its digest is the image's id.
    config: String,
    /// Bytes of the file system image.
    size: u64,
    /// [`erofs::head`] of it.
    head: String,
}

/// What is written for a name.
#[derive(Debug, Deserialize, Serialize)]
struct Name {
    name: String,
    image: String,
}

/// An image that is there.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) path: PathBuf,
    pub(super) config: Arc<config::Read>,
    pub(super) size: u64,
}

/// What was there when the store was opened.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) images: BTreeMap<ImageId, Stored>,
    pub(super) names: BTreeMap<String, ImageId>,
}

/// The store's directory. Everything here waits for the disk.
#[derive(Debug)]
pub(super) struct Shelf {
    root: PathBuf,
    next: AtomicU64,
}

impl Shelf {
    /// Opens or makes the directory, throws away what was half made, and drops what is damaged.
    pub(super) fn open(root: &Path) -> io::Result<(Self, Found)> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for part in ["images", "names", "tmp"] {
            builder.create(root.join(part))?;
        }
        for left in fs::read_dir(root.join("tmp"))? {
            file::remove_tree(&left?.path())?;
        }
        let shelf = Self { root: root.to_owned(), next: AtomicU64::new(0) };
        let mut found = Found::default();
        for entry in fs::read_dir(root.join("images"))? {
            let path = entry?.path();
            match stored(&path) {
                Ok((id, stored)) => drop(found.images.insert(id, stored)),
                Err(error) => {
                    tracing::warn!(image = %path.display(), error = chain(&error), "a damaged image is dropped");
                    file::remove_tree(&path)?;
                }
            }
        }
        for entry in fs::read_dir(root.join("names"))? {
            let path = entry?.path();
            let name = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Name>(&bytes).ok());
            let name = name.map(|name| (name.name, ImageId::from(name.image)));
            match name.filter(|(name, id)| shelf.name_file(name) == path && found.images.contains_key(id)) {
                Some((name, id)) => drop(found.names.insert(name, id)),
                None => fs::remove_file(&path)?,
            }
        }
        Ok((shelf, found))
    }

    /// An empty directory to make something in, on the same file system.
    pub(super) fn scratch(&self) -> io::Result<Scratch> {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed).to_string();
            let path = self.root.join("tmp").join(number);
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Scratch { path: Some(path) }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Puts an image in place, whose file system image is complete and on the disk already.
    pub(super) fn put(&self, id: &ImageId, config: &str, image: &Path) -> io::Result<Stored> {
        let read = config::read(config.as_bytes())?;
        let record = Record {
            format: FORMAT,
            config: config.to_owned(),
            size: fs::metadata(image)?.len(),
            head: erofs::head(image)?,
        };
        let making = self.scratch()?;
        fs::rename(image, making.path().join(ROOTFS))?;
        write(&making.path().join(RECORD), &serde_json::to_vec(&record)?)?;
        sync(making.path())?;
        let place = self.place(id);
        file::remove_tree(&place)?;
        fs::rename(making.path(), &place)?;
        making.keep();
        sync(&self.root.join("images"))?;
        Ok(Stored { path: place.join(ROOTFS), config: Arc::new(read), size: record.size })
    }

    /// Takes an image away, and its names. What uses its file goes on doing so.
    pub(super) fn take(&self, id: &ImageId, names: &[String]) -> io::Result<()> {
        let aside = self.scratch()?;
        match fs::rename(self.place(id), aside.path().join("image")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // From here on the image is gone; names without one are dropped at the next start, whatever happens now.
        names.iter().try_for_each(|name| file::remove(&self.name_file(name)))
    }

    /// Lets a name mean an image, whatever it meant before.
    pub(super) fn name(&self, name: &str, id: &ImageId) -> io::Result<()> {
        let making = self.scratch()?;
        let file = making.path().join("name");
        write(&file, &serde_json::to_vec(&Name { name: name.to_owned(), image: id.to_string() })?)?;
        fs::rename(file, self.name_file(name))?;
        sync(&self.root.join("names"))
    }

    fn place(&self, id: &ImageId) -> PathBuf {
        self.root.join("images").join(id.as_str().trim_start_matches("sha256:"))
    }

    fn name_file(&self, name: &str) -> PathBuf {
        let hash = digest_of(name.as_bytes());
        self.root.join("names").join(format!("{}.json", hash.trim_start_matches("sha256:")))
    }
}

/// A directory that goes with everything in it when this is dropped: in the background, where there is one.
#[derive(Debug)]
pub(super) struct Scratch {
    path: Option<PathBuf>,
}

impl Scratch {
    pub(super) fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(""))
    }

    /// It has another name now.
    fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Some(path) = self.path.take() else { return };
        let clear = move || {
            if let Err(error) = file::remove_tree(&path) {
                tracing::warn!(path = %path.display(), error = chain(&error), "failed to clean up after an image");
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(clear)),
            Err(_) => clear(),
        }
    }
}

/// An image as it lies there.
fn stored(path: &Path) -> io::Result<(ImageId, Stored)> {
    let broken = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let record: Record = serde_json::from_slice(&fs::read(path.join(RECORD))?)?;
    if record.format != FORMAT {
        return Err(broken("another version of this program made it"));
    }
    let digest = digest_of(record.config.as_bytes());
    if path.file_name().is_none_or(|name| *name != *digest.trim_start_matches("sha256:")) {
        return Err(broken("its config is another image's"));
    }
    let config = config::read(record.config.as_bytes())?;
    let rootfs = path.join(ROOTFS);
    if fs::metadata(&rootfs)?.len() != record.size || erofs::head(&rootfs)? != record.head {
        return Err(broken("its file system is not the one that was made"));
    }
    Ok((ImageId::from(digest), Stored { path: rootfs, config: Arc::new(config), size: record.size }))
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
