//! CRI over the driver that was asked for: instead of a node, or beside a node's Pods.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::Context;
use ipnet::IpNet;
use tracing::info;

use super::drivers::{self, Made};
use super::{PATIENCE, Parts, end_execs, raise_open_files, remove_empty_cgroups};
use crate::config::{RuntimeKind, Settings};
use crate::cri::{About, Cri, Params, Plug, sandbox_files};
use crate::metrics::Metrics;
use crate::network::uplink::Uplink;
use crate::node::owner;
use crate::runtime::keepers::Keepers;
use crate::shutdown::Tasks;

/// What is not this host's, another's, or a node's of ours by default.
pub(in crate::args) const DEFAULT_RANGE: &str = "10.188.0.0/16";
/// Where the kubelet that is served keeps what it makes for its Pods.
pub(in crate::args) const DEFAULT_KUBELET_ROOT: &str = "/var/lib/kubelet";
/// On loopback, at a port that the system chooses.
pub(in crate::args) const DEFAULT_STREAM_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// What a node has for it below its own root directory.
const BESIDE: &str = "cri";

/// What the flags come to.
#[derive(Debug)]
pub(in crate::args) struct Plan {
    pub(in crate::args) listen: PathBuf,
    pub(in crate::args) root_dir: PathBuf,
    pub(in crate::args) owner: Option<String>,
    pub(in crate::args) stream_address: SocketAddr,
    /// The range that was asked for, and the one if none was.
    pub(in crate::args) range: (Option<IpNet>, IpNet),
    /// What the driver is to know.
    pub(in crate::args) settings: Settings,
}

/// Runs until a signal or a failure.
pub(in crate::args) async fn serve(plan: Plan) -> anyhow::Result<()> {
    raise_open_files();
    let (tasks, supervisor) = Tasks::new();
    open(plan, &tasks).await?;
    supervisor.run(PATIENCE).await
}

/// The server of a node that is to have one. It knows nothing of the node's Pods, nor the node of its sandboxes: it has
/// drivers of its own, with another owner, and another directory, range and bridge.
pub(super) async fn beside(parts: &Parts) -> anyhow::Result<()> {
    let Some(listen) = parts.settings.serving.cri_listen.clone() else { return Ok(()) };
    let mut settings = Settings::clone(&parts.settings);
    // Plugins make the network of the node's Pods.
    settings.pods.cni = None;
    settings.runtime.microvm.pods = Some(PathBuf::from(DEFAULT_KUBELET_ROOT).join("pods"));
    let tried = format!("failed to serve CRI beside the Pods, as --cri-listen unix://{} asks for", listen.display());
    let plan = Plan {
        listen,
        root_dir: settings.pods.root_dir.join(BESIDE),
        owner: None,
        stream_address: DEFAULT_STREAM_ADDRESS,
        range: (None, DEFAULT_RANGE.parse()?),
        settings,
    };
    open(plan, &parts.tasks).await.context(tried)
}

/// Takes the socket, and answers there until the tasks are to end.
async fn open(plan: Plan, tasks: &Tasks) -> anyhow::Result<()> {
    let Plan { listen, root_dir, owner, stream_address, range, mut settings } = plan;
    let root = std::path::absolute(root_dir).context("failed to find the root directory")?;
    let hostname = nix::unistd::gethostname().context("failed to read the host's name")?;
    let hostname = hostname.to_string_lossy().into_owned();
    let owner = match owner {
        Some(owner) => owner,
        // With the directory in it: a node of ours on the same host is another owner.
        None => owner::standalone(&root, &format!("cri at {}", root.display()))?,
    };
    let kind = settings.runtime.kind;
    info!(runtime = kind.name(), root = %root.display(), owner, "starting to serve CRI");
    let cgroup_root = owner::cgroup_root(&owner);
    let (uplink, bridge) = Uplink::new();
    // Metrics of its own: those of a node are its Pods'.
    let (keepers, metrics) = (Keepers::default(), Metrics::new());
    settings.pods.root_dir.clone_from(&root);
    // The host names and resolvers of sandboxes, which containers in microVMs get copies of.
    settings.runtime.microvm.files = Some(sandbox_files(&root));
    let Made { runtime, drivers } = drivers::make(&settings, (&owner, &keepers), uplink, &metrics).await;
    let params = Params {
        listen,
        streams: stream_address,
        root,
        runtime: runtime.clone(),
        about: About {
            handlers: drivers.offered,
            cgroup_root: cgroup_root.clone(),
            hostname,
            // libselinux looks there too.
            selinux: Path::new("/sys/fs/selinux/enforce").exists(),
        },
        range,
        plug: (kind != RuntimeKind::Fake).then(|| Plug { name: owner::bridge_name(&owner), bridge }),
    };
    let cri = Cri::bind(params, tasks).await?;
    let draining = tasks.draining();
    tasks.spawn("CRI", async move {
        cri.serve(draining).await?;
        end_execs(&keepers).await;
        runtime.close().await;
        remove_empty_cgroups(&cgroup_root);
        Ok(())
    });
    Ok(())
}
