//! The drivers of this node side by side, and what Pods and the API server are told of them.

use std::path::Path;
use std::sync::Arc;

use tracing::{debug, info, warn};

use super::machines;
use crate::config::{RuntimeKind, Settings};
use crate::metrics::Metrics;
use crate::network::uplink::Uplink;
use crate::pod::drivers::{Drivers, MICROVM};
use crate::runtime::cri::{CriOptions, CriRuntime};
use crate::runtime::docker::{DockerOptions, DockerRuntime};
use crate::runtime::fake::FakeRuntime;
use crate::runtime::handler::{Handlers, Named};
use crate::runtime::keepers::Keepers;
use crate::runtime::late::Late;
use crate::runtime::microvm::vmms::Survey;
use crate::runtime::traced::Traced;
use crate::runtime::{Kind, Runtime, RuntimeError};

/// Why there are no microVMs beside CNI plugins.
const BY_PLUGINS: &str = "CNI plugins make the network of its Pods (--cni-conf-dir), which no microVM can be plugged into; \
                          nodes with a network of their own have microVMs";

/// What runs Pods here.
pub(super) struct Made {
    /// All drivers as one.
    pub(super) runtime: Arc<dyn Runtime>,
    /// Which of them runs which Pod.
    pub(super) drivers: Drivers,
}

/// What drivers are made from.
pub(super) struct Maker<'a> {
    pub(super) settings: &'a Settings,
    pub(super) owner: &'a str,
    pub(super) keepers: &'a Keepers,
    pub(super) uplink: Arc<Uplink>,
}

/// The drivers that were asked for and that this host can have; each connects when it is first used.
pub(super) async fn make(
    settings: &Settings,
    (owner, keepers): (&str, &Keepers),
    uplink: Uplink,
    metrics: &Metrics,
) -> Made {
    let kind = settings.runtime.kind;
    if kind == RuntimeKind::Fake {
        let runtime = metrics.register(|registry| Traced::new(FakeRuntime::new(), registry));
        return Made { runtime: Arc::new(runtime), drivers: Drivers::only(kind.name()) };
    }
    let maker = Maker { settings, owner, keepers, uplink: Arc::new(uplink) };
    if kind == RuntimeKind::Cri {
        let runtime = metrics.register(|registry| Traced::new(maker.cri(), registry));
        return Made { runtime: Arc::new(runtime), drivers: Drivers::only(kind.name()) };
    }
    let survey = match kind {
        RuntimeKind::Microvm => Survey::of(&settings.runtime.microvm).await,
        _ => Survey::of_wanted(&settings.runtime.microvm).await,
    };
    let usable = match settings.pods.cni {
        Some(_) => Vec::new(),
        None => survey.usable(settings.runtime.microvm.vmm),
    };
    let (machines, mut drivers) = machines::make(&maker, &survey, &usable);
    if settings.pods.cni.is_some() {
        drivers.missing.values_mut().for_each(|why| BY_PLUGINS.clone_into(why));
    }
    let docker = maker.has_docker().then(|| named(RuntimeKind::Docker.name(), maker.docker()));
    if docker.is_some() {
        drivers.offered.push(RuntimeKind::Docker.name().to_owned());
    }
    // The node's own comes first, for people who read the Node's status.
    drivers.offered.sort_by_key(|handler| *handler != drivers.own);
    let mut all: Vec<Named> = docker.into_iter().chain(machines).collect();
    let own = match all.iter().position(|driver| driver.handler == drivers.own) {
        Some(place) => all.remove(place),
        None => named(&drivers.own, without(drivers.missing.get(&drivers.own).cloned().unwrap_or_default())),
    };
    tell(settings, &drivers);
    let images = RuntimeKind::Docker.name();
    let runtime = metrics.register(|registry| Traced::new(Handlers::new(own, all, images), registry));
    Made { runtime: Arc::new(runtime), drivers }
}

pub(super) fn named(handler: &str, driver: Late) -> Named {
    Named { handler: handler.to_owned(), runtime: Arc::new(driver) }
}

/// A driver that this host does not have, though the node was told to run Pods with it.
fn without(why: String) -> Late {
    Late::new(move || {
        let text = format!("no microVM can be run: {why}");
        Box::pin(async move { Err(RuntimeError::new(Kind::Unsupported, text)) })
    })
}

/// What an operator should know at the start.
fn tell(settings: &Settings, drivers: &Drivers) {
    let microvm = &settings.runtime.microvm;
    match drivers.missing.get(MICROVM) {
        None => info!(vmm = drivers.vmm, guest = %microvm.guest_image.display(), "Pods may be microVMs"),
        Some(why) if microvm.guest_image_was_told || settings.runtime.kind == RuntimeKind::Microvm => {
            warn!(why, "this node has no microVMs");
        }
        Some(why) => debug!(why, "this node has no microVMs"),
    }
}

impl Maker<'_> {
    /// Whether there is a Docker daemon to speak of. One that the operator chose may also come later.
    pub(super) fn has_docker(&self) -> bool {
        self.settings.runtime.kind == RuntimeKind::Docker || Path::new(&self.docker_socket()).exists()
    }

    pub(super) fn docker_socket(&self) -> String {
        let endpoint = &self.settings.runtime.docker_endpoint;
        endpoint.strip_prefix("unix://").unwrap_or(endpoint).to_owned()
    }

    fn cri(&self) -> Late {
        let pods = &self.settings.pods;
        let options = CriOptions {
            endpoint: self.settings.runtime.cri_endpoint.clone(),
            log_max_size: pods.log_max_size,
            log_max_files: pods.log_max_files,
            keepers: self.keepers.clone(),
            ..CriOptions::new(self.owner, pods.root_dir.join("cri-logs"))
        };
        let cable = Arc::clone(&self.uplink);
        Late::new(move || {
            let (options, cable) = (options.clone(), cable.clone());
            Box::pin(async move {
                let cri: Arc<dyn Runtime> = Arc::new(CriRuntime::connect(options, cable).await?);
                Ok(cri)
            })
        })
    }

    fn docker(&self) -> Late {
        let settings = self.settings;
        let options = DockerOptions {
            socket: self.docker_socket().into(),
            log_max_size: settings.pods.log_max_size.to_string(),
            log_max_files: settings.pods.log_max_files,
            sandbox_image: settings.runtime.sandbox_image.clone(),
            insecure_registries: settings.images.insecure_registries.clone(),
            keepers: self.keepers.clone(),
            ..DockerOptions::new(self.owner)
        };
        let cable = Arc::clone(&self.uplink);
        Late::new(move || {
            let (options, cable) = (options.clone(), cable.clone());
            Box::pin(async move {
                let docker: Arc<dyn Runtime> = Arc::new(DockerRuntime::connect(options, cable).await?);
                Ok(docker)
            })
        })
    }
}
