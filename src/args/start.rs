//! Starts the rooms and waits for the end.

pub(super) mod cri;
mod drivers;
mod function_server;
mod machines;
mod network;
mod standalone;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use kube::Client;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::{Mutex, watch};
use tracing::{info, warn};

use self::drivers::Made;
use super::flags::Plan;
use super::identity;
use crate::apiserver::ApiServer;
use crate::apiserver::reload::Reload;
use crate::config::{RuntimeKind, Settings, configuration};
use crate::events::{self, Events};
use crate::function_server::Supply;
use crate::kubelet_api::{self, KubeletApi};
use crate::memory;
use crate::metrics::Metrics;
use crate::network::bridge::Bridge;
use crate::network::cni::Cni;
use crate::network::uplink::Uplink;
use crate::node::owner::{self, Owner, Witness};
use crate::node::{self, NodeHandle, health};
use crate::pod::addresses::Addresses;
use crate::pod::admission::Admission;
use crate::pod::capacity::Capacity;
use crate::pod::classes::RuntimeClasses;
use crate::pod::crew::Environments;
use crate::pod::directory::Directory;
use crate::pod::drivers::Drivers;
use crate::pod::eviction::{Orders, manager};
use crate::pod::files::DnsSettings;
use crate::pod::garbage::{self, Collector};
use crate::pod::images::Images;
use crate::pod::inputs::Inputs;
use crate::pod::inputs::objects::{DEFAULT_TTL, Objects};
use crate::pod::mirror::{self, Mirrors};
use crate::pod::publish::{PublishCounters, Publisher};
use crate::pod::static_pods::StaticPods;
use crate::pod::static_pods::source::{self, Folder};
use crate::pod::translate::Host;
use crate::pod::volumes::VolumeManager;
use crate::pod::{self, Fronts, PodLoop, node_shutdown};
use crate::retry::Retry;
use crate::runtime::keepers::Keepers;
use crate::runtime::{self, Runtime};
use crate::shutdown::Tasks;

/// How long tasks have to end when Pods are left running: time to finish a request, not to end a Pod.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long they have with `--drain-on-exit`: the longest grace period that is honoured then.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10 * 60);

/// How long the processes of execs have to end then; each is killed well before.
const EXECS_PATIENCE: Duration = Duration::from_secs(3);

/// Pulls at once where the operator sets no limit.
const UNLIMITED_PULLS: usize = 64;

/// What the rooms are made from.
#[derive(Clone)]
struct Parts {
    settings: Arc<Settings>,
    api: Arc<ApiServer>,
    /// To ask the API server about callers: what strangers make busy keeps neither lease nor status waiting.
    reviews: Client,
    owner: String,
    metrics: Metrics,
    runtime: Arc<dyn Runtime>,
    drivers: Drivers,
    /// What makes the Pods' network, if it is not this node.
    plugins: Option<Cni>,
    directory: Arc<Directory>,
    node: NodeHandle,
    keepers: Keepers,
    tasks: Tasks,
    events: Events,
    /// True once the host goes down.
    shutting_down: watch::Sender<bool>,
    /// Where the function server has its replicas from.
    supply: watch::Sender<Supply>,
    /// SHA-256 of what lets a caller in where there is no API server to ask.
    local_token: Option<[u8; 32]>,
}

impl Parts {
    fn is_standalone(&self) -> bool {
        self.local_token.is_some()
    }
}

/// Runs the node until a signal or a failure.
pub(super) async fn node(plan: Plan) -> anyhow::Result<()> {
    let Plan { settings, kubeconfig, warnings: _ } = plan;
    let Some(kubeconfig) = kubeconfig else { return standalone::node(settings).await };
    let (api, reload) = identity::connect(&settings, &kubeconfig).await?;
    let api = Arc::new(api);
    info!(node = %settings.node.name, server = %api.url, runtime = settings.runtime.kind.name(), "starting");
    let owner = owner::owner(&api, &settings.pods.root_dir, &settings.node.name).await?;
    raise_open_files();
    let (tasks, supervisor) = Tasks::new();
    let patience = if settings.node.drain_on_exit { DRAIN_PATIENCE } else { PATIENCE };
    start_rooms(settings, (api, reload), owner, &tasks).await?;
    supervisor.run(patience).await
}

/// Keeps no more of the program in memory than is run.
fn stay_small(tasks: &Tasks) {
    let closing = tasks.closing();
    tasks.spawn_companion("code", async move {
        // Cancel-safe: nothing is half done.
        closing.run_until_cancelled(memory::let_go_of_code()).await;
        Ok(())
    });
}

/// Lets this process open as many files as it may: shells hand out 1024, for the sake of programs with `select`, and a
/// node with many streams has more.
fn raise_open_files() {
    let limits = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, ..limits });
    if let Err(cause) = raised {
        warn!(limit = ?limits.current, error = %cause, "failed to raise the number of files that may be open at once");
    }
}

/// Wires every room to its neighbours.
async fn start_rooms(
    settings: Settings,
    (api, reload): (Arc<ApiServer>, Reload),
    Owner { word: owner, witness }: Owner,
    tasks: &Tasks,
) -> anyhow::Result<()> {
    let metrics = Metrics::new();
    let plugins = network::plugins(&settings);
    let (uplink, bridge) = Uplink::by_plugins(plugins.clone());
    let keepers = Keepers::default();
    let Made { runtime, drivers } = drivers::make(&settings, (&owner, &keepers), uplink, &metrics).await;
    let mut settings = settings;
    settings.node.runtime_handlers.clone_from(&drivers.offered);
    let settings = Arc::new(settings);
    let health = health::spawn((Arc::clone(&runtime), plugins.clone()), health::INTERVAL, tasks);
    let events = events(&settings, &api, &metrics, tasks);
    let shutting_down = watch::Sender::new(false);
    let params = node::Params {
        api: Arc::clone(&api),
        settings: Arc::new(settings.node.clone()),
        runtime: Arc::clone(&runtime),
        health,
        events: events.clone(),
        shutting_down: shutting_down.subscribe(),
        host_address: node::default_route_address,
    };
    let node = node::spawn(params, tasks)?;
    let reviews = reload.client(kubelet_api::REVIEWS_AT_ONCE);
    identity::keep(&settings, &api, reload, &node.facts, tasks);
    if let Some(witness) = witness {
        remember_node(witness, &node, tasks);
    }
    let directory = Arc::new(Directory::of_root(&settings.pods.root_dir));
    let parts = Parts {
        settings,
        api,
        reviews,
        owner,
        metrics,
        runtime,
        drivers,
        plugins,
        directory,
        node,
        keepers,
        tasks: tasks.clone(),
        events,
        shutting_down,
        supply: function_server::supply(),
        local_token: None,
    };
    serve(parts, bridge).await
}

/// Has the owner's record know the Node.
fn remember_node(witness: Witness, node: &NodeHandle, tasks: &Tasks) {
    let (registration, closing) = (node.registration.clone(), tasks.closing());
    tasks.spawn_companion("owner", async move {
        witness.run(registration, closing).await;
        Ok(())
    });
}

/// Listens to clients and takes Pods.
async fn serve(parts: Parts, bridge: watch::Sender<Option<Bridge>>) -> anyhow::Result<()> {
    serve_api(&parts).await?;
    function_server::serve(&parts).await?;
    cri::beside(&parts).await?;
    let tasks = parts.tasks.clone();
    stay_small(&tasks);
    tasks.spawn("pods", pods(parts, bridge));
    Ok(())
}

/// Takes events; the task behind it writes them.
fn events(settings: &Settings, api: &ApiServer, metrics: &Metrics, tasks: &Tasks) -> Events {
    let dropped = metrics.register(events::dropped_counter);
    let (events, writer) = events::events(api.client.clone(), &settings.node.name, dropped);
    let closing = tasks.closing();
    tasks.spawn_companion("events", async move {
        writer.run(closing).await;
        Ok(())
    });
    events
}

/// The node's HTTPS API.
async fn serve_api(parts: &Parts) -> anyhow::Result<()> {
    let serving = &parts.settings.serving;
    let params = kubelet_api::Params {
        listen: SocketAddr::new(serving.address, serving.port),
        node_name: parts.settings.node.name.clone(),
        tls: kubelet_api::TlsParams {
            serving: identity::serving(&parts.settings, &parts.node.facts),
            client_ca_file: serving.client_ca_file.clone(),
            min_version: serving.tls_min_version,
            cipher_suites: serving.tls_cipher_suites.clone(),
        },
        access: kubelet_api::Access {
            anonymous: serving.anonymous,
            local_token: parts.local_token,
            token_webhook: serving.token_review,
            token_ttl: serving.token_review_ttl,
            authorization: match serving.authorize {
                true => kubelet_api::Authorization::Webhook,
                false => kubelet_api::Authorization::AlwaysAllow,
            },
            authorized_ttl: serving.authorized_ttl,
            unauthorized_ttl: serving.unauthorized_ttl,
        },
        client: parts.reviews.clone(),
        targets: parts.directory.clone(),
        runtime: parts.runtime.clone(),
        images: parts.runtime.clone(),
        metrics: parts.metrics.clone(),
        limits: kubelet_api::Limits { stream_idle: serving.stream_idle, ..kubelet_api::Limits::default() },
        about: kubelet_api::About {
            configuration: configuration::in_effect(&parts.settings),
            flags: kubelet_api::flags_of(std::env::args()),
            root_dir: parts.settings.pods.root_dir.clone(),
            ..kubelet_api::About::default()
        },
    };
    let api = KubeletApi::bind(params).await?;
    let (draining, keepers) = (parts.tasks.draining(), parts.keepers.clone());
    parts.tasks.spawn("node API", async move {
        api.serve(draining).await;
        // No client is left, so what ran for one ends now; this process sees to it as long as it is there.
        end_execs(&keepers).await;
        Ok(())
    });
    Ok(())
}

/// Waits for the ends of what clients had started in containers, once no client is left.
async fn end_execs(keepers: &Keepers) {
    if tokio::time::timeout(EXECS_PATIENCE, keepers.idle()).await.is_err() {
        warn!("what clients had started in containers did not end in time");
    }
}

/// The Pod network and the Pod loop on it.
async fn pods(parts: Parts, bridge: watch::Sender<Option<Bridge>>) -> anyhow::Result<()> {
    let Parts { settings, api, tasks, .. } = &parts;
    let draining = tasks.draining();
    let Some((addresses, own)) = network::open(&parts, &bridge).await? else { return Ok(()) };
    let (drain, drained) = watch::channel(false);
    // Of Pods whose containers were removed behind this node's back, while it was away.
    remove_empty_cgroups(&owner::cgroup_root(&parts.owner));
    let replicas = match own {
        Some((ipams, bridge)) => function_server::open(&parts, ipams, bridge).await,
        None => None,
    };
    let mut shared = shared(&parts, addresses, drained).await?;
    shared.runtime_name = tokio::select! {
        // Cancel-safe: it only asks.
        name = runtime_name(&parts) => name,
        () = draining.cancelled() => return Ok(()),
    };
    let shared = Arc::new(shared);
    let images = collect_garbage(&parts, &shared);
    evict(&parts, &shared, images)?;
    await_shutdown(&parts, &shared);
    let (statics, work) = static_pods(&parts);
    let pods = PodLoop::new(Arc::clone(&shared), api.client.clone(), drain).with_static_pods(statics, work);
    let pods = if parts.is_standalone() { pods.without_api_server() } else { pods };
    pods.run(draining, settings.node.drain_on_exit).await;
    parts.runtime.close().await;
    if settings.node.drain_on_exit {
        if let Some(replicas) = replicas {
            replicas.end().await;
        }
        take_down(&shared, &bridge).await;
    } else {
        remove_empty_cgroups(&shared.host.cgroup_root);
    }
    Ok(())
}

/// What the ids of containers begin with. A CRI runtime tells its own name once it answers, and has no containers to tell
/// of before; a kubelet does not even start without it.
async fn runtime_name(parts: &Parts) -> String {
    let kind = parts.settings.runtime.kind;
    if kind != RuntimeKind::Cri {
        return kind.name().to_owned();
    }
    let mut retry = Retry::new("learn the container runtime's name");
    loop {
        match parts.runtime.version().await {
            Ok(version) => return version.name,
            Err(error) => tokio::time::sleep(retry.failed(crate::telemetry::chain(&error))).await,
        }
    }
}

/// Removes the cgroups of Pods that nothing is in, and the owner's if nothing is left in that.
fn remove_empty_cgroups(root: &str) {
    if let Err(error) = runtime::remove_empty_cgroup_root(root) {
        warn!(error = crate::telemetry::chain(&error), "failed to remove the empty cgroups of sandboxes");
    }
}

/// Removes images that nobody uses.
fn collect_garbage(parts: &Parts, shared: &pod::Shared) -> Arc<Mutex<Collector>> {
    let collector = Collector::new(parts.runtime.clone(), &parts.settings.images);
    let collector = collector.telling(parts.events.clone()).beside(Arc::clone(shared.volumes.images()));
    let collector = Arc::new(Mutex::new(collector));
    let (running, draining) = (Arc::clone(&collector), parts.tasks.draining());
    parts.tasks.spawn("image garbage", async move {
        Collector::run(running, garbage::INTERVAL, draining).await;
        Ok(())
    });
    collector
}

/// Evicts Pods when the node runs short of something.
fn evict(parts: &Parts, shared: &Arc<pod::Shared>, images: Arc<Mutex<Collector>>) -> anyhow::Result<()> {
    let observe = manager::observer(parts.settings.pods.root_dir.clone()).context("failed to measure this host")?;
    let manager = manager::Manager::new(Arc::clone(shared), &parts.settings.node, observe, images);
    let draining = parts.tasks.draining();
    parts.tasks.spawn("eviction", async move {
        manager.run(manager::INTERVAL, draining).await;
        Ok(())
    });
    Ok(())
}

/// Gives Pods their time before the host goes down, if they are to have any.
fn await_shutdown(parts: &Parts, shared: &Arc<pod::Shared>) {
    let grace = parts.settings.node.shutdown_grace.clone();
    if grace.groups().is_empty() {
        return;
    }
    let host = Arc::new(node_shutdown::logind::Logind::default());
    let manager = node_shutdown::Manager::new(Arc::clone(shared), host, grace, parts.shutting_down.clone());
    let draining = parts.tasks.draining();
    parts.tasks.spawn("node shutdown", async move {
        manager.run(draining).await;
        Ok(())
    });
}

/// The static Pods, and the keeper of their mirrors; it also removes those of an earlier configuration.
fn static_pods(parts: &Parts) -> (watch::Receiver<StaticPods>, watch::Sender<mirror::Work>) {
    let Parts { settings, api, tasks, node, .. } = parts;
    let name = &settings.node.name;
    let (work, worked) = watch::channel(mirror::Work::default());
    if !parts.is_standalone() {
        let mirrors = Mirrors::new(api.client.clone(), name, worked, node.registration.clone());
        let closing = tasks.closing();
        tasks.spawn_companion("mirror Pods", async move {
            mirrors.run(closing).await;
            Ok(())
        });
    }
    let Some(path) = &settings.pods.static_pod_path else { return (watch::channel(StaticPods::none()).1, work) };
    let (found, statics) = watch::channel(StaticPods::default());
    let source = source::run(Folder::new(path, name), settings.pods.file_check_frequency, found, tasks.draining());
    tasks.spawn("static Pods", async move {
        source.await;
        Ok(())
    });
    (statics, work)
}

/// With every Pod ended, nothing of the node stays on the host.
async fn take_down(shared: &pod::Shared, bridge: &watch::Sender<Option<Bridge>>) {
    if let Some(bridge) = bridge.send_replace(None)
        && let Err(error) = bridge.remove().await
    {
        tracing::warn!(error = crate::telemetry::chain(&error), "failed to remove the Pod network");
    }
    if let Err(error) = shared.volumes.images().prune(std::iter::empty()).await {
        tracing::warn!(error = crate::telemetry::chain(&error), "failed to remove what volumes have shown of images");
    }
    if let Err(error) = shared.volumes.close().await {
        tracing::warn!(error = crate::telemetry::chain(&error), "failed to unmount the Pods' secrets");
    }
    if let Err(error) = runtime::remove_cgroup_root(&shared.host.cgroup_root) {
        tracing::warn!(error = crate::telemetry::chain(&error), "failed to remove the Pods' cgroup");
    }
}

/// What every Pod's worker uses, and the tasks behind it.
async fn shared(parts: &Parts, addresses: Addresses, draining: watch::Receiver<bool>) -> anyhow::Result<pod::Shared> {
    let Parts { settings, api, tasks, .. } = parts;
    let client = api.client.clone();
    let counters = PublishCounters::registered(&parts.metrics);
    let publisher = Publisher::new(client.clone(), counters);
    let (closing, running) = (tasks.closing(), publisher.clone());
    tasks.spawn_companion("Pod status", async move {
        running.run(closing).await;
        Ok(())
    });
    let facts = parts.node.facts.clone();
    let objects = Arc::new(Objects::new(client.clone(), DEFAULT_TTL));
    let volumes = VolumeManager::new(client.clone(), Arc::clone(&objects), &settings.pods.root_dir);
    volumes.prepare().await.context("failed to set up the directory of the Pods' secrets")?;
    let inputs = Inputs::new(client, objects);
    let capacity = Capacity::new(&facts.borrow().allocatable);
    let memory = facts.borrow().capacity.get("memory").map_or(0, |memory| memory.value());
    Ok(pod::Shared {
        runtime: parts.runtime.clone(),
        runtime_name: settings.runtime.kind.name().to_owned(),
        drivers: parts.drivers.clone(),
        classes: match parts.is_standalone() {
            true => RuntimeClasses::of_manifests(),
            false => RuntimeClasses::new(api.client.clone()),
        },
        publisher,
        events: parts.events.clone(),
        volumes,
        inputs,
        dns: dns_settings(settings),
        addresses,
        admission: Admission::allowing(settings.pods.allowed_unsafe_sysctls.clone()),
        capacity,
        evictions: Orders::default(),
        environments: Environments::default(),
        fronts: Fronts::new(&parts.metrics),
        directory: parts.directory.clone(),
        images: Images::new(settings.images.max_parallel_pulls.map_or(UNLIMITED_PULLS, |n| n as usize)),
        probes: pod::probes::Bounds::default(),
        facts,
        registration: parts.node.registration.clone(),
        host: Host {
            cgroup_root: owner::cgroup_root(&parts.owner),
            seccomp_root: settings.pods.root_dir.join("seccomp"),
            memory,
            cpu_quota: settings.pods.cpu_cfs_quota,
            pids_limit: settings.pods.pids_limit,
        },
        settings: settings.pods.clone(),
        draining,
    })
}

/// What the node knows about names. The host's files are read once: a Pod keeps what it started with anyway.
fn dns_settings(settings: &Settings) -> DnsSettings {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    DnsSettings {
        cluster_dns: settings.pods.cluster_dns.clone(),
        cluster_domain: settings.pods.cluster_domain.clone(),
        host_resolv_conf: read(&settings.pods.resolv_conf),
        host_hosts: read(Path::new("/etc/hosts")),
        node_hostname: nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
    }
}
