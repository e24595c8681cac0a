//! `cri`: the driver that was asked for, behind a socket instead of under a node.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use ipnet::IpNet;
use tracing::info;

use super::drivers::{self, Made};
use super::{PATIENCE, end_execs, raise_open_files, remove_empty_cgroups};
use crate::config::{RuntimeKind, Settings};
use crate::cri::{About, Cri, Params, Plug, sandbox_files};
use crate::metrics::Metrics;
use crate::network::uplink::Uplink;
use crate::node::owner;
use crate::runtime::keepers::Keepers;
use crate::shutdown::Tasks;

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
    info!(runtime = kind.name(), root = %root.display(), owner, "starting");
    raise_open_files();
    let cgroup_root = owner::cgroup_root(&owner);
    let (tasks, supervisor) = Tasks::new();
    let (uplink, bridge) = Uplink::new();
    let (keepers, metrics) = (Keepers::default(), Metrics::new());
    settings.pods.root_dir.clone_from(&root);
    // The host names and resolvers of sandboxes, which containers in microVMs get copies of.
    settings.runtime.microvm.files = Some(sandbox_files(&root));
    let Made { runtime, drivers } = drivers::make(&settings, (&owner, &keepers), uplink, &metrics).await;
    let params = Params {
        listen,
        streams: stream_address,
        root,
        runtime,
        about: About { handlers: drivers.offered, cgroup_root: cgroup_root.clone(), hostname },
        range,
        plug: (kind != RuntimeKind::Fake).then(|| Plug { name: owner::bridge_name(&owner), bridge }),
    };
    let cri = Cri::bind(params, &tasks).await?;
    let draining = tasks.draining();
    tasks.spawn("CRI", async move {
        cri.serve(draining).await?;
        end_execs(&keepers).await;
        remove_empty_cgroups(&cgroup_root);
        Ok(())
    });
    supervisor.run(PATIENCE).await
}
