//! Images that nobody uses: removed when their file system fills up, or when they have lain there too long.
//!
//! The rules are the kubelet's (Kubernetes documentation, "Garbage Collection: Image lifecycle"), with one more: an image
//! that no registry has, one that was built or imported here, is never removed. This node may share its engine with
//! people, and what they built could not be fetched again.
//!
//! Dead containers need no such task: a worker keeps one for its log while its Pod is there, and removes them with it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::config::{ImageGarbage, ImageSettings};
use crate::events::Events;
use crate::node::machine::Extent;
use crate::pod::volumes::images::ImageVolumes;
use crate::runtime::types::{Image, ImageId};
use crate::runtime::{Kind, Runtime, RuntimeError};
use crate::shutdown::Ticks;
use crate::telemetry::chain;

/// How often it is looked (the kubelet's value).
pub const INTERVAL: Duration = Duration::from_secs(5 * 60);

/// What is known of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    /// When it was first seen; nothing is known of the time before this process.
    detected: Timestamp,
    /// When a container that uses it was last seen, if ever.
    used: Option<Timestamp>,
}

/// What is known of all images.
#[derive(Clone, Debug, Default)]
pub struct Records {
    images: BTreeMap<ImageId, Record>,
    since: Option<Timestamp>,
}

impl Records {
    /// Takes in which images there are and which are used.
    pub fn observe(&mut self, images: &[Image], used: &BTreeSet<ImageId>, now: Timestamp) {
        self.since.get_or_insert(now);
        let present: BTreeSet<_> = images.iter().map(|image| &image.id).collect();
        self.images.retain(|id, _| present.contains(id));
        for image in images {
            let record = self.images.entry(image.id.clone()).or_insert(Record { detected: now, used: None });
            if used.contains(&image.id) {
                record.used = Some(now);
            }
        }
    }

    /// Those that may be removed, the longest unused first.
    fn candidates<'a>(&self, images: &'a [Image], used: &BTreeSet<ImageId>) -> Vec<(&'a Image, Record)> {
        let eligible = images.iter().filter(|image| !used.contains(&image.id) && !image.digests.is_empty());
        let mut list: Vec<_> = eligible.filter_map(|image| Some((image, *self.images.get(&image.id)?))).collect();
        list.sort_by_key(|(image, record)| (record.used, record.detected, image.id.clone()));
        list
    }
}

/// A file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// All of it.
    pub capacity: u64,
    /// What is free of it.
    pub available: u64,
}

/// What is to be removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// In this order, whatever becomes of the space.
    pub old: Vec<ImageId>,
    /// After them in this order, until so much is free.
    pub spare: Vec<(ImageId, u64)>,
    /// Bytes that are to be had from [`Choice::spare`]; 0 where there is enough.
    pub wanted: u64,
}

/// What is to be removed now, `wanted` bytes of it for want of space.
pub fn choose(
    policy: &ImageGarbage,
    records: &Records,
    (images, used): (&[Image], &BTreeSet<ImageId>),
    wanted: u64,
    now: Timestamp,
) -> Choice {
    let age = |since: Timestamp| now.duration_since(since).unsigned_abs();
    let mut candidates = records.candidates(images, used);
    // Of what was used before this process nothing is known, so it has to have watched as long.
    let watched = policy.max_age.filter(|max| records.since.is_some_and(|since| age(since) > *max));
    let is_old = |record: &Record| watched.is_some_and(|max| age(record.used.unwrap_or(record.detected)) > max);
    let old = candidates.extract_if(.., |(_, record)| is_old(record)).map(|(image, _)| image.id.clone()).collect();
    let spare = candidates.into_iter().filter(|(_, record)| wanted > 0 && age(record.detected) >= policy.min_age);
    Choice { old, spare: spare.map(|(image, _)| (image.id.clone(), image.size)).collect(), wanted }
}

/// How much has to go so that the use falls to the low mark; 0 unless it has reached the high one. Percentages are whole,
/// as a kubelet counts them.
fn excess(policy: &ImageGarbage, space: Space) -> u64 {
    let (capacity, available) = (u128::from(space.capacity), u128::from(space.available.min(space.capacity)));
    if capacity == 0 {
        return 0;
    }
    let used_percent = 100 - available * 100 / capacity;
    // At a high mark of 100 nothing is ever collected for want of space.
    if policy.high_percent >= 100 || used_percent < u128::from(policy.high_percent) {
        return 0;
    }
    let free_then = capacity * u128::from(100 - policy.low_percent.min(100)) / 100;
    u64::try_from(free_then.saturating_sub(available)).unwrap_or(u64::MAX)
}

/// Removes images now and then.
pub struct Collector {
    runtime: Arc<dyn Runtime>,
    policy: ImageGarbage,
    records: Records,
    events: Option<Events>,
    /// The images that Pods' volumes show.
    shown: Option<Arc<ImageVolumes>>,
    /// The last look failed.
    failed: bool,
}

impl Collector {
    /// One that goes by these settings.
    pub fn new(runtime: Arc<dyn Runtime>, settings: &ImageSettings) -> Self {
        Self {
            runtime,
            policy: settings.garbage.clone(),
            records: Records::default(),
            events: None,
            shown: None,
            failed: false,
        }
    }

    /// The same that tells of what goes wrong, on the Node.
    pub fn telling(self, events: Events) -> Self {
        Self { events: Some(events), ..self }
    }

    /// The same that also keeps what volumes of Pods show, and removes what they have shown.
    pub fn beside(self, shown: Arc<ImageVolumes>) -> Self {
        Self { shown: Some(shown), ..self }
    }

    /// Those of `images` that volumes show.
    async fn shown(&self, images: &[Image]) -> Result<BTreeSet<ImageId>, RuntimeError> {
        let Some(shown) = &self.shown else { return Ok(BTreeSet::new()) };
        let found = shown.used(images.iter().map(|image| &image.id)).await;
        found.map_err(|e| RuntimeError::new(Kind::Internal, "failed to look which images volumes show").with_source(e))
    }

    /// Removes the files of images that are gone.
    async fn clear_shown(&self) -> Result<(), RuntimeError> {
        let Some(shown) = &self.shown else { return Ok(()) };
        let images = self.runtime.list_images().await?;
        if let Err(error) = shown.prune(images.iter().map(|image| &image.id)).await {
            tracing::warn!(error = chain(&error), "failed to remove what volumes have shown");
        }
        Ok(())
    }

    fn tell(&self, reason: &str, text: String) {
        if let Some(events) = &self.events {
            events.node_warning(reason, text);
        }
    }

    /// As a kubelet: once is no news, since a start may come before the runtime's.
    fn note(&mut self, outcome: Result<(), RuntimeError>) {
        let failed = std::mem::replace(&mut self.failed, outcome.is_err());
        let Err(error) = outcome else { return };
        tracing::warn!(error = chain(&error), "failed to look for images that nobody uses");
        if failed {
            self.tell("ImageGCFailed", chain(&error));
        }
    }

    /// Looks every `interval` until `stop`; others may use it in between.
    pub async fn run(collector: Arc<Mutex<Self>>, interval: Duration, stop: CancellationToken) {
        let mut ticks = Ticks::new(interval, stop);
        while ticks.next().await {
            let mut collector = collector.lock().await;
            let outcome = collector.collect(Timestamp::now()).await;
            collector.note(outcome);
        }
    }

    /// Looks once.
    ///
    /// # Errors
    /// The runtime does not answer. An image that cannot be removed is logged and passed over.
    pub async fn collect(&mut self, now: Timestamp) -> Result<(), RuntimeError> {
        let space = self.space().await?;
        if space.is_some_and(|space| space.capacity == 0) {
            self.tell("InvalidDiskCapacity", "invalid capacity 0 on image filesystem".to_owned());
        }
        let wanted = space.map_or(0, |space| excess(&self.policy, space));
        self.remove_for(wanted, now).await
    }

    /// Removes every image that may go.
    ///
    /// # Errors
    /// As [`Collector::collect`].
    pub async fn delete_unused(&mut self, now: Timestamp) -> Result<(), RuntimeError> {
        self.remove_for(u64::MAX, now).await
    }

    async fn remove_for(&mut self, wanted: u64, now: Timestamp) -> Result<(), RuntimeError> {
        let images = self.runtime.list_images().await?;
        let containers = self.runtime.list_containers(None).await?;
        let mut used: BTreeSet<_> = containers.into_iter().map(|container| container.image).collect();
        used.extend(images.iter().filter(|image| image.pinned).map(|image| image.id.clone()));
        used.extend(self.shown(&images).await?);
        self.records.observe(&images, &used, now);
        let choice = choose(&self.policy, &self.records, (&images, &used), wanted, now);
        for id in &choice.old {
            self.remove(id).await;
        }
        let mut freed = 0;
        for (id, size) in &choice.spare {
            if freed >= choice.wanted {
                break;
            }
            if self.remove(id).await {
                freed += size;
            }
        }
        self.clear_shown().await?;
        if freed < choice.wanted && choice.wanted < u64::MAX {
            tracing::warn!(
                wanted = choice.wanted,
                freed,
                "the images' file system is fuller than imageGCHighThresholdPercent allows, and no more images can go: \
                 look for logs, volumes and other data"
            );
            let text = format!(
                "Failed to garbage collect required amount of images. Attempted to free {} bytes, but only found {freed} \
                 bytes eligible to free.",
                choice.wanted
            );
            self.tell("FreeDiskSpaceFailed", text);
        }
        Ok(())
    }

    /// The file system of the images, where it is one of this host.
    async fn space(&self) -> Result<Option<Space>, RuntimeError> {
        let place = match self.runtime.image_fs_info().await {
            Ok(info) => info.path,
            Err(error) if error.kind() == Kind::Unsupported => return Ok(None),
            Err(error) => return Err(error),
        };
        let measured = tokio::task::spawn_blocking(move || Extent::measure(&place)).await;
        match measured {
            Ok(Ok(extent)) => Ok(Some(Space { capacity: extent.bytes, available: extent.bytes_free })),
            Ok(Err(error)) => {
                Err(RuntimeError::new(Kind::Internal, "failed to measure the images' file system").with_source(error))
            }
            Err(error) => {
                Err(RuntimeError::new(Kind::Internal, "failed to measure the images' file system").with_source(error))
            }
        }
    }

    async fn remove(&self, id: &ImageId) -> bool {
        match self.runtime.remove_image(id).await {
            Ok(()) => {
                tracing::info!(image = %id, "removed an image that nobody uses");
                true
            }
            Err(error) => {
                // One of somebody else's containers may use it.
                tracing::debug!(image = %id, error = chain(&error), "an image is kept");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::runtime::ImageStore as _;
    use crate::runtime::fake::FakeRuntime;

    const MINUTE: i64 = 60;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn image(name: &str, size: u64) -> Image {
        Image { tags: vec![format!("{name}:1")], digests: vec![format!("{name}@sha256:1")], size, ..Image::new(name) }
    }

    fn ids(names: &[&str]) -> BTreeSet<ImageId> {
        names.iter().map(|name| ImageId::from(*name)).collect()
    }

    fn policy() -> ImageGarbage {
        ImageGarbage::default()
    }

    #[test]
    fn a_full_file_system_loses_what_was_unused_longest_until_the_low_mark() {
        let images = [image("a", 10), image("b", 20), image("c", 30), image("busy", 40)];
        let mut records = Records::default();
        records.observe(&images, &ids(&["b", "busy"]), at(0));
        records.observe(&images, &ids(&["a", "busy"]), at(10 * MINUTE));
        let used = ids(&["busy"]);
        let chosen = |available| {
            let space = Space { capacity: 1000, available };
            choose(&policy(), &records, (&images, &used), excess(&policy(), space), at(20 * MINUTE))
        };
        assert_eq!(chosen(160), Choice::default(), "84 percent are used");
        let choice = chosen(150);
        assert_eq!(choice.wanted, 50);
        let order: Vec<_> = choice.spare.iter().map(|(id, _)| id.as_str()).collect();
        assert_eq!(order, ["c", "b", "a"], "never used, then used first");
    }

    #[test]
    fn what_is_new_or_was_built_here_stays() {
        let built = Image { digests: Vec::new(), ..image("built", 10) };
        let images = [built, image("fresh", 10)];
        let mut records = Records::default();
        records.observe(&images, &ids(&[]), at(0));
        let chosen = |second| choose(&policy(), &records, (&images, &ids(&[])), 1000, at(second)).spare;
        assert_eq!(chosen(MINUTE), []);
        assert_eq!(chosen(2 * MINUTE), [("fresh".into(), 10)]);
    }

    #[test]
    fn what_is_too_old_goes_whatever_the_space_but_not_right_after_a_start() {
        let images = [image("old", 10), image("used", 10)];
        let mut records = Records::default();
        let policy = ImageGarbage { max_age: Some(Duration::from_secs(3600)), ..policy() };
        records.observe(&images, &ids(&["used"]), at(0));
        let chosen = |records: &Records, second| choose(&policy, records, (&images, &ids(&[])), 0, at(second)).old;
        assert_eq!(chosen(&records, 3600), []);
        records.observe(&images, &ids(&["used"]), at(1800));
        assert_eq!(chosen(&records, 3601), ["old".into()]);
        assert_eq!(chosen(&records, 5401), ["old".into(), "used".into()]);
    }

    #[test]
    fn a_high_mark_of_a_hundred_switches_it_off() {
        let policy = ImageGarbage { high_percent: 100, ..policy() };
        assert_eq!(excess(&policy, Space { capacity: 100, available: 0 }), 0);
        assert_eq!(excess(&self::policy(), Space { capacity: 0, available: 0 }), 0);
    }

    #[tokio::test]
    async fn what_no_registry_has_and_what_is_pinned_survive_their_age() {
        let fake = FakeRuntime::new();
        let (built, pinned) = (fake.add_image("built:1"), fake.add_pulled_image("pinned:1"));
        fake.pin_image(&pinned);
        let pulled = fake.add_pulled_image("pulled:1");
        let garbage = ImageGarbage { max_age: Some(Duration::from_secs(60)), ..policy() };
        let settings = ImageSettings { garbage, ..ImageSettings::default() };
        let mut collector = Collector::new(Arc::new(fake.clone()), &settings);
        collector.collect(at(0)).await.unwrap();
        collector.collect(at(60)).await.unwrap();
        assert!(fake.image_status(pulled.as_str()).await.unwrap().is_some());
        collector.collect(at(61)).await.unwrap();
        assert!(fake.image_status(pulled.as_str()).await.unwrap().is_none());
        for kept in [&built, &pinned] {
            assert!(fake.image_status(kept.as_str()).await.unwrap().is_some());
        }
    }

    proptest! {
        #[test]
        fn nothing_in_use_and_nothing_more_than_needed_is_chosen(
            sizes in prop::collection::vec(1u64..100, 1..12),
            used in prop::collection::btree_set(0usize..12, 0..6),
            available in 0u64..1000,
            high in 1u8..100,
        ) {
            let images: Vec<_> = sizes.iter().enumerate().map(|(at, size)| image(&format!("i{at:02}"), *size)).collect();
            let used: BTreeSet<ImageId> = used.iter().map(|at| format!("i{at:02}").into()).collect();
            let mut records = Records::default();
            records.observe(&images, &used, at(0));
            let policy = ImageGarbage { high_percent: high, low_percent: high / 2, ..policy() };
            let space = Space { capacity: 1000, available };
            let choice = choose(&policy, &records, (&images, &used), excess(&policy, space), at(600));
            prop_assert!(choice.old.is_empty());
            prop_assert!(choice.spare.iter().all(|(id, _)| !used.contains(id)));
            if 100 - available / 10 < u64::from(high) {
                prop_assert_eq!(choice.wanted, 0);
                prop_assert!(choice.spare.is_empty());
            } else {
                prop_assert_eq!(available + choice.wanted, (1000 * u64::from(100 - high / 2) / 100).max(available));
            }
        }
    }
}
