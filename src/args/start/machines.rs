//! The drivers of microVMs: one for each VMM that works here, on the same images, network and guest.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::OnceCell;

use super::drivers::{Maker, named};
use crate::node::owner;
use crate::pod::drivers::{Drivers, MICROVM};
use crate::pod::guest::Bounds;
use crate::runtime::handler::Named;
use crate::runtime::late::Late;
use crate::runtime::microvm::host::{HostOptions, HostVms};
use crate::runtime::microvm::image::{self, Store};
use crate::runtime::microvm::logs::LogLimits;
use crate::runtime::microvm::machine::pin::Pins;
use crate::runtime::microvm::machine::{AssetDirs, MAX_IMAGE_SLOTS, VmmUser};
use crate::runtime::microvm::vmms::{Survey, Vmm};
use crate::runtime::microvm::volumes::Places;
use crate::runtime::microvm::{MicrovmOptions, MicrovmRuntime};
use crate::runtime::{Result, Runtime};

/// The images of guests of every VMM, opened when the first driver is.
struct Images {
    root: std::path::PathBuf,
    options: image::Options,
    store: OnceCell<Store>,
}

impl Images {
    async fn open(&self) -> Result<Store> {
        let open = || Store::open(&self.root, self.options.clone());
        self.store.get_or_try_init(open).await.cloned()
    }
}

/// The drivers, and what is said of them. One whose VMM does not work any more but that has left sandboxes is made too, so
/// that these are found and removed; no Pod is given to it.
pub(super) fn make(maker: &Maker<'_>, survey: &Survey, usable: &[Vmm]) -> (Vec<Named>, Drivers) {
    let settings = maker.settings;
    let first = usable.first().copied();
    let full_name = |vmm: Vmm| format!("{MICROVM}-{}", vmm.name());
    let handler = |vmm: Vmm| if first.unwrap_or(Vmm::Qemu) == vmm { MICROVM.to_owned() } else { full_name(vmm) };
    let images = images(maker);
    let pins = settings.runtime.microvm.pin_cpus.then(Pins::of_host).unwrap_or_default();
    let (mut made, mut offered, mut missing) = (Vec::new(), Vec::new(), BTreeMap::new());
    for vmm in Vmm::ALL {
        let works = usable.contains(&vmm);
        if works {
            offered.push(handler(vmm));
        } else {
            missing.insert(full_name(vmm), survey.missing(Some(vmm)));
        }
        if works || has_left(&vmm.root(&settings.pods.root_dir)) {
            made.push(named(&handler(vmm), driver(maker, vmm, (&images, &pins))));
        }
    }
    if first.is_none() {
        missing.insert(MICROVM.to_owned(), survey.missing(None));
    }
    offered.sort();
    let guests = Bounds {
        host_paths: settings.runtime.microvm.host_paths.clone(),
        images: usize::from(MAX_IMAGE_SLOTS),
        assets: AssetDirs::new(settings.runtime.microvm.asset_dirs.clone()),
    };
    let vmm = first.map(|vmm| vmm.name().to_owned()).unwrap_or_default();
    let own = settings.runtime.kind.name().to_owned();
    (made, Drivers { own, offered, missing, vmm, guests })
}

/// Images are made from those of the Docker daemon where there is one, else from a registry's.
fn images(maker: &Maker<'_>) -> Arc<Images> {
    let options = image::Options {
        docker: maker.has_docker().then(|| maker.docker_socket().into()),
        insecure_registries: maker.settings.images.insecure_registries.clone(),
        ..image::Options::default()
    };
    let root = Vmm::Qemu.root(&maker.settings.pods.root_dir).join("images");
    Arc::new(Images { root, options, store: OnceCell::new() })
}

/// Whether there are sandboxes, or microVMs without one: guests that waited for Pods, or of which a template was to be made.
fn has_left(root: &Path) -> bool {
    let is_there = |place| std::fs::read_dir(root.join(place)).is_ok_and(|mut entries| entries.next().is_some());
    ["sandboxes", "vms/default", "vms/making"].into_iter().any(is_there)
}

fn driver(maker: &Maker<'_>, vmm: Vmm, (images, pins): (&Arc<Images>, &Pins)) -> Late {
    let settings = maker.settings;
    let (microvm, root_dir) = (settings.runtime.microvm.clone(), &settings.pods.root_dir);
    let root = vmm.root(root_dir);
    let vms = HostOptions {
        kernel: microvm.kernel_image.clone(),
        assets: AssetDirs::new(microvm.asset_dirs.clone()),
        cgroup: owner::cgroup_root(maker.owner),
        taps: Some(maker.uplink.clone()),
        pins: pins.clone(),
        warm: microvm.warm,
        ..HostOptions::new(root.clone(), microvm.guest_image.clone())
    };
    let options = MicrovmOptions {
        owner: maker.owner.to_owned(),
        root,
        places: Places {
            files: microvm.files.clone().unwrap_or_else(|| root_dir.join("secrets")),
            pods: microvm.pods.clone().unwrap_or_else(|| root_dir.join("pods")),
            host_paths: microvm.host_paths.clone(),
        },
        logs: LogLimits {
            segment: settings.pods.log_max_size,
            segments: u64::from(settings.pods.log_max_files).max(1),
        },
    };
    let images = Arc::clone(images);
    Late::new(move || {
        let (vms, options, images, microvm) = (vms.clone(), options.clone(), Arc::clone(&images), microvm.clone());
        Box::pin(async move {
            let manager = vmm.manager(&microvm, VmmUser::default());
            let vms = HostVms::open(vms, manager).await?;
            let store = images.open().await?;
            let driver: Arc<dyn Runtime> =
                Arc::new(MicrovmRuntime::open(options, Arc::new(vms), Arc::new(store)).await?);
            Ok(driver)
        })
    })
}
