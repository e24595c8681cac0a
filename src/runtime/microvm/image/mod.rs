//! Images for microVMs: each is turned once into a read-only file system image that all VMs share.
//!
//! ```text
//! registry --manifest, config, layers--.                              .--> block() --> a VM's drive
//! (registry)                           '-> unpack --tree--> mkfs.erofs --> images/<id> (shelf)
//! Docker daemon --docker save----------^   (unpack, tree, archive, layer)  (erofs)
//! (daemon)
//! ```
//! An image's id is the digest of its config, as with Docker, so the same reference means the same id to both drivers.
//!
//! *Where an image comes from.* Present is what this store holds under that name, or else what the Docker daemon of this
//! host has under it, if there is one: that is brought over when a VM needs it ([`Blocks::block`]). So an image that was
//! built or loaded into Docker runs with pull policy `IfNotPresent` or `Never` and no registry is asked. A pull always
//! asks the registry, with the credentials given; the daemon's copy never stands in for a refusal.
//!
//! *What is trusted.* A digest, once the content has it. A layer is hostile: see `unpack`. Everything is bounded by
//! [`Limits`]; what an image may not exceed there is refused with the figure.
//!
//! *What survives.* Whatever has its final name is whole (see `shelf`): a crash leaves what is swept at the next start,
//! when each image is looked at again and dropped if it is damaged. Pins do not survive: a driver that starts anew asks
//! for the block of each image its VMs use, before anything is removed.

mod archive;
mod config;
mod daemon;
mod erofs;
mod error;
mod layer;
pub(in crate::runtime) mod plain;
mod registry;
mod shelf;
mod tree;
mod unpack;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use oci_client::Reference;
use tokio::sync::Semaphore;

pub use self::config::ImageConfig;
use self::daemon::Daemon;
use self::erofs::Mkfs;
use self::layer::Blob;
pub(super) use self::layer::digest_of;
use self::shelf::{Scratch, Shelf, Stored};
use crate::runtime::reference::parse;
use crate::runtime::registry::{client, credentials, others_may_succeed, tries};
use crate::runtime::stats::ImageFs;
use crate::runtime::types::{Image, ImageId, RegistryAuth};
use crate::runtime::{ImageStore, Kind, Result, RuntimeError, blocking};
use crate::turns::Turns;

/// Most of what an image may have. Each default is several times what the largest images in use have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Layers (512).
    pub layers: usize,
    /// Bytes of its config (4 MiB).
    pub config: u64,
    /// Bytes of its layers as they are fetched (32 GiB).
    pub compressed: u64,
    /// Bytes of its files, those too that a higher layer hides (64 GiB).
    pub unpacked: u64,
    /// Files and directories, counted likewise (4 million).
    pub entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { layers: 512, config: 4 << 20, compressed: 32 << 30, unpacked: 64 << 30, entries: 4 << 20 }
    }
}

/// How a store works.
#[derive(Clone, Debug)]
pub struct Options {
    /// `mkfs.erofs`, by its path or for `PATH` to find.
    pub mkfs: PathBuf,
    /// Registries (`host:port`) that are spoken to in plain HTTP.
    pub insecure_registries: Vec<String>,
    /// Socket of a Docker daemon whose images count as present; `None` for none.
    pub docker: Option<PathBuf>,
    /// What an image may have.
    pub limits: Limits,
    /// Images unpacked at once; that is work for a core and a disk.
    pub builds_in_flight: usize,
}

impl Default for Options {
    /// `mkfs.erofs` from `PATH`, no plain registries, no daemon, as many builds as cores.
    fn default() -> Self {
        Self {
            mkfs: "mkfs.erofs".into(),
            insecure_registries: Vec::new(),
            docker: None,
            limits: Limits::default(),
            builds_in_flight: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// The images on this host. Clones are handles to the same store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    options: Options,
    mkfs: Mkfs,
    daemon: Option<Daemon>,
    shelf: Shelf,
    /// Whoever makes or removes an image has the turn for its id.
    turns: Turns<String>,
    builds: Semaphore,
    index: Mutex<Index>,
}

/// What is there, as the shelf has it.
#[derive(Debug, Default)]
struct Index {
    images: BTreeMap<ImageId, Stored>,
    /// `registry/repository:tag` and `registry/repository@digest`.
    names: BTreeMap<String, ImageId>,
    /// How many use an image now.
    pins: HashMap<ImageId, usize>,
}

/// An image as a VM uses it. It cannot be removed while one of these is held.
#[derive(Debug)]
pub struct BlockImage {
    /// The file to be attached, read-only. A hard link to it in another directory of the same file system is as good.
    pub path: PathBuf,
    /// How its containers run if nothing else is said.
    pub config: ImageConfig,
    _pin: Option<Pin>,
}

/// Keeps an image from being removed while it is held.
pub struct Pin {
    store: Arc<Inner>,
    id: ImageId,
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Pin").field(&self.id.as_str()).finish()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut index = self.store.index();
        if let Some(count) = index.pins.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                index.pins.remove(&self.id);
            }
        }
    }
}

impl BlockImage {
    /// An image that nobody can remove.
    pub(super) fn unpinned(path: PathBuf, config: ImageConfig) -> Self {
        Self { path, config, _pin: None }
    }
}

/// Holds images that VMs can use.
#[async_trait]
pub trait Blocks: ImageStore {
    /// The image as a drive, which stays until what is returned is dropped. An image that only the Docker daemon has is
    /// brought over first, which takes as long as unpacking it does.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none of that id.
    async fn block(&self, id: &ImageId) -> Result<BlockImage>;
}

#[async_trait]
impl Blocks for Store {
    async fn block(&self, id: &ImageId) -> Result<BlockImage> {
        self.pinned_or_copied(id).await
    }
}

/// Where the parts of an image are to be had.
enum Source<'a> {
    Registry { client: &'a oci_client::Client, reference: &'a Reference, resolved: Box<registry::Resolved> },
    Daemon(&'a Daemon),
}

impl Source<'_> {
    /// Config and layers; the layers' files lie below `folder`.
    async fn fetch(self, id: &ImageId, folder: &Path, limits: &Limits) -> Result<(Vec<u8>, Vec<Blob>)> {
        match self {
            Self::Registry { client, reference, resolved } => {
                let layers = registry::fetch(client, reference, resolved.manifest.layers, folder).await?;
                Ok((resolved.config, layers))
            }
            Self::Daemon(daemon) => daemon.save(id, folder, limits).await,
        }
    }
}

impl Store {
    /// Opens the store in the directory `root`, which is made if it is missing. What an earlier process left half made is
    /// removed, and so are images that are damaged. One process has a directory at a time.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if `mkfs.erofs` is not installed, [`Kind::Internal`] if the directory cannot be used.
    pub async fn open(root: &Path, options: Options) -> Result<Self> {
        let mkfs = Mkfs::find(&options.mkfs)?;
        let daemon = options.docker.as_deref().map(Daemon::at).transpose()?;
        let tried = format!("failed to open the image store {}", root.display());
        let path = root.to_owned();
        let (shelf, found) = blocking(tried, move || Shelf::open(&path)).await?;
        let index = Index { images: found.images, names: found.names, pins: HashMap::new() };
        let inner = Inner {
            root: root.to_owned(),
            builds: Semaphore::new(options.builds_in_flight.max(1)),
            options,
            mkfs,
            daemon,
            shelf,
            turns: Turns::default(),
            index: Mutex::new(index),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    async fn pinned_or_copied(&self, id: &ImageId) -> Result<BlockImage> {
        if let Some(block) = self.pinned(id) {
            return Ok(block);
        }
        let absent = || RuntimeError::new(Kind::NotFound, format!("there is no image {id}"));
        let daemon = self.inner.daemon.as_ref().ok_or_else(absent)?;
        let known = daemon.image(id.as_str()).await.filter(|image| image.id == *id).ok_or_else(absent)?;
        // Under its digests, which mean this image for ever: so it is known that a registry has it.
        let digests = known.digests.iter().filter_map(|digest| Some(name(&parse(digest).ok()?))).collect();
        let _turn = self.inner.turns.turn(id.as_str()).await;
        self.build(id, Source::Daemon(daemon)).await?;
        self.name(id, digests).await?;
        self.pinned(id).ok_or_else(absent)
    }

    fn pinned(&self, id: &ImageId) -> Option<BlockImage> {
        let mut index = self.inner.index();
        let stored = index.images.get(id)?;
        let (path, config) = (stored.path.clone(), stored.config.image.clone());
        *index.pins.entry(id.clone()).or_default() += 1;
        let pin = Pin { store: Arc::clone(&self.inner), id: id.clone() };
        Some(BlockImage { path, config, _pin: Some(pin) })
    }

    async fn pull_with(&self, reference: &Reference, auth: Option<&RegistryAuth>) -> Result<ImageId> {
        let client = client(&self.inner.options.insecure_registries);
        let limits = &self.inner.options.limits;
        let resolved = registry::resolve(&client, reference, &credentials(auth), limits).await?;
        let id = ImageId::from(digest_of(&resolved.config));
        let repository = format!("{}/{}", reference.registry(), reference.repository());
        let mut names: Vec<_> = resolved.digests.iter().map(|digest| format!("{repository}@{digest}")).collect();
        names.push(name(reference));
        let _turn = self.inner.turns.turn(id.as_str()).await;
        // Whoever asked for the same image meanwhile finds it there.
        self.build(&id, Source::Registry { client: &client, reference, resolved: Box::new(resolved) }).await?;
        self.name(&id, names).await?;
        Ok(id)
    }

    /// Makes the image unless it is there. The caller has its turn.
    ///
    /// Dropping the future leaves a directory that is removed in the background.
    async fn build(&self, id: &ImageId, source: Source<'_>) -> Result<()> {
        if self.inner.index().images.contains_key(id) {
            return Ok(());
        }
        let tried = format!("failed to prepare image {id}");
        let inner = Arc::clone(&self.inner);
        let scratch = Arc::new(blocking(tried.clone(), move || inner.shelf.scratch()).await?);
        let (config, layers) = source.fetch(id, scratch.path(), &self.inner.options.limits).await?;
        let wrong = |why: &str| RuntimeError::new(Kind::Internal, format!("{tried}: {why}"));
        if digest_of(&config) != id.as_str() {
            return Err(wrong("its config is not the one that was named"));
        }
        let config = String::from_utf8(config).map_err(|error| wrong("its config is no text").with_source(error))?;
        let read = config::read(config.as_bytes());
        let read = read.map_err(|error| wrong("its config makes no sense").with_source(error))?;
        if read.diff_ids.len() != layers.len() {
            return Err(wrong("its config and its manifest name different numbers of layers"));
        }
        let shutting_down = |error| RuntimeError::new(Kind::Unavailable, "shutting down").with_source(error);
        let _permit = self.inner.builds.acquire().await.map_err(shutting_down)?;
        let tree = scratch.path().join("tree");
        self.unpack(&tried, &scratch, layers, read.diff_ids).await?;
        let image = scratch.path().join("image");
        self.inner.mkfs.make(&tree, &image).await?;
        let (inner, its_id) = (Arc::clone(&self.inner), id.clone());
        // Once this has begun it goes on to its end, whoever waits: so the index knows what is on the shelf.
        blocking(tried, move || {
            let stored = inner.shelf.put(&its_id, &config, &image)?;
            inner.index().images.insert(its_id, stored);
            drop(scratch);
            Ok(())
        })
        .await
    }

    async fn unpack(
        &self,
        tried: &str,
        scratch: &Arc<Scratch>,
        layers: Vec<Blob>,
        diff_ids: Vec<String>,
    ) -> Result<()> {
        let given_up = GivenUp::default();
        let flag = Arc::clone(&given_up.0);
        let limits = self.inner.options.limits;
        // The thread holds the directory as long as it writes into it.
        let scratch = Arc::clone(scratch);
        let work = move || {
            let tree = scratch.path().join("tree");
            std::fs::create_dir(&tree)?;
            let unpacked = unpack::unpack(&layers, &diff_ids, &tree, &limits, &flag);
            Ok(unpacked.map_err(|(at, error)| (diff_ids.get(at).cloned().unwrap_or_default(), error)))
        };
        blocking(tried.to_owned(), work).await?.map_err(|(layer, error)| {
            RuntimeError::new(Kind::Internal, format!("{tried}: layer {layer} is not taken")).with_source(error)
        })
    }

    /// Lets the names mean this image. The caller has its turn.
    async fn name(&self, id: &ImageId, names: Vec<String>) -> Result<()> {
        let (inner, id) = (Arc::clone(&self.inner), id.clone());
        blocking(format!("failed to name image {id}"), move || {
            for name in names {
                if inner.index().names.get(&name) != Some(&id) {
                    inner.shelf.name(&name, &id)?;
                    inner.index().names.insert(name, id.clone());
                }
            }
            Ok(())
        })
        .await
    }
}

impl Inner {
    fn index(&self) -> MutexGuard<'_, Index> {
        // Each change is one insertion or removal, so a panic elsewhere does not spoil it.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells a thread that nobody waits for it, once this is dropped.
#[derive(Debug, Default)]
struct GivenUp(Arc<AtomicBool>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Index {
    /// The image of a name or an id.
    fn find(&self, name: &str) -> Option<Image> {
        let id = self.names.get(name).cloned().unwrap_or_else(|| ImageId::from(name));
        self.describe(&id)
    }

    fn describe(&self, id: &ImageId) -> Option<Image> {
        let stored = self.images.get(id)?;
        let names = self.names.iter().filter(|(_, named)| *named == id).map(|(name, _)| familiar(name));
        let (digests, tags) = names.partition(|name: &String| name.contains('@'));
        let config = stored.config.image.clone();
        Some(Image {
            id: id.clone(),
            tags,
            digests,
            size: stored.size,
            user: config.user,
            entrypoint: config.entrypoint,
            command: config.cmd,
            environment: config.env,
            pinned: false,
        })
    }
}

/// The name under which an image is kept: with a digest the tag says nothing.
fn name(reference: &Reference) -> String {
    let repository = format!("{}/{}", reference.registry(), reference.repository());
    match reference.digest() {
        Some(digest) => format!("{repository}@{digest}"),
        None => format!("{repository}:{}", reference.tag().unwrap_or("latest")),
    }
}

/// A name as people write it, and Docker shows it.
fn familiar(name: &str) -> String {
    let short = name.strip_prefix("docker.io/").unwrap_or(name);
    short.strip_prefix("library/").filter(|_| short.len() < name.len()).unwrap_or(short).to_owned()
}

#[async_trait]
impl ImageStore for Store {
    async fn pull_image(&self, reference: &str, auths: &[RegistryAuth]) -> Result<ImageId> {
        let parsed = parse(reference)?;
        let mut refused = RuntimeError::new(Kind::Internal, format!("failed to pull image {reference}"));
        for auth in tries(auths) {
            match self.pull_with(&parsed, auth).await {
                Ok(id) => return Ok(id),
                Err(error) if others_may_succeed(&error) => refused = error,
                Err(error) => return Err(error),
            }
        }
        Err(refused)
    }

    async fn image_status(&self, reference: &str) -> Result<Option<Image>> {
        let is_id = reference.starts_with("sha256:");
        let name = if is_id { reference.to_owned() } else { name(&parse(reference)?) };
        if let Some(image) = self.inner.index().find(&name) {
            return Ok(Some(image));
        }
        match &self.inner.daemon {
            Some(daemon) => Ok(daemon.image(&name).await),
            None => Ok(None),
        }
    }

    async fn list_images(&self) -> Result<Vec<Image>> {
        let index = self.inner.index();
        Ok(index.images.keys().filter_map(|id| index.describe(id)).collect())
    }

    async fn image_fs_info(&self) -> Result<ImageFs> {
        let used = self.inner.index().images.values().map(|stored| stored.size).sum();
        Ok(ImageFs { path: self.inner.root.clone(), used: Some(used) })
    }

    async fn remove_image(&self, id: &ImageId) -> Result<()> {
        let _turn = self.inner.turns.turn(id.as_str()).await;
        let tried = format!("failed to remove image {id}");
        let (stored, names) = {
            let mut index = self.inner.index();
            if let Some(users) = index.pins.get(id) {
                return Err(RuntimeError::new(Kind::AlreadyExists, format!("{tried}: {users} containers use it")));
            }
            let Some(stored) = index.images.remove(id) else { return Ok(()) };
            let names: Vec<_> =
                index.names.iter().filter(|(_, named)| *named == id).map(|(name, _)| name.clone()).collect();
            (stored, names)
        };
        let (inner, its_id) = (Arc::clone(&self.inner), id.clone());
        blocking(tried, move || {
            let taken = inner.shelf.take(&its_id, &names);
            let mut index = inner.index();
            match taken {
                Ok(()) => index.names.retain(|_, named| *named != its_id),
                // Still there, and still good.
                Err(_) if stored.path.exists() => drop(index.images.insert(its_id, stored)),
                Err(_) => {}
            }
            taken
        })
        .await
    }
}

#[cfg(test)]
mod tests;
