//! Starts the function server, if there is to be one, and opens where its replicas come from.

use std::sync::Arc;

use anyhow::Context;
use tokio::sync::watch;

use super::Parts;
use crate::config::function_server::{FunctionServerSettings, TlsFileNames};
use crate::function_server::pooled::{PooledParams, PooledReplicas};
use crate::function_server::{FunctionServer, Limits, ManagerParams, Params, Supply, TlsFiles};
use crate::network::bridge::Bridge;
use crate::network::ipam::Ipam;
use crate::network::tap::Taps;
use crate::node::owner;
use crate::runtime::microvm::machine::arguments::Services;
use crate::runtime::microvm::machine::pin::Pins;
use crate::runtime::microvm::machine::pool::{HostSetups, SetupPool};
use crate::runtime::microvm::machine::{AssetDirs, VmDirs, VmmUser};
use crate::runtime::microvm::vmms::Survey;
use crate::telemetry::chain;

/// Most replicas of one node.
const MOST: usize = 256;
/// Setups that are kept ready.
const READY: usize = 4;
/// Of the directories of replicas; other machines have another.
const NAMESPACE: &str = "functions";

/// Listens and serves. Where replicas come from is told later.
pub(super) async fn serve(parts: &Parts) -> anyhow::Result<()> {
    let Some(settings) = &parts.settings.function_server else { return Ok(()) };
    let FunctionServerSettings { listen, tls, manager, memory: _ } = settings.clone();
    let tls = tls.map(|TlsFileNames { certificate, key, client_ca }| TlsFiles { certificate, key, client_ca });
    let node = parts.node.facts.borrow().name.clone();
    let manager = match manager {
        None => None,
        Some(manager) => Some(ManagerParams {
            tls: tls.clone().filter(|_| !manager.is_local()),
            host: manager.host,
            port: manager.port,
            advertised: advertised(parts, settings)?,
            node,
        }),
    };
    let (supply, limits) = (parts.supply.subscribe(), Limits::default());
    let server = FunctionServer::bind(Params { listen: listen.0, tls, manager, supply, limits }).await?;
    let draining = parts.tasks.draining();
    parts.tasks.spawn("function server", async move {
        server.serve(draining).await;
        Ok(())
    });
    Ok(())
}

/// Nothing yet, and why.
pub(super) fn supply() -> watch::Sender<Supply> {
    watch::Sender::new(Supply::Missing("the node is starting".to_owned()))
}

/// The host's address of the server, for others.
fn advertised(parts: &Parts, settings: &FunctionServerSettings) -> anyhow::Result<String> {
    let listen = settings.listen.0.ip();
    if !listen.is_unspecified() {
        return Ok(listen.to_string());
    }
    let first = parts.node.facts.borrow().addresses.first().copied();
    Ok(first.context("this node has no address to be called at")?.to_string())
}

/// Opens the replicas on the Pod network, and tells the server; `None` if there are none to be had.
pub(super) async fn open(
    parts: &Parts,
    ipams: Vec<Arc<Ipam>>,
    bridge: Option<Bridge>,
) -> Option<Arc<PooledReplicas<HostSetups>>> {
    let settings = parts.settings.function_server.as_ref()?;
    // Replicas have IPv4 addresses.
    let ipam = ipams.iter().find(|ipam| ipam.gateway().is_ipv4()).or(ipams.first())?;
    match pooled(parts, settings, (ipam, bridge)).await {
        Ok(replicas) => {
            let replicas = Arc::new(replicas);
            parts.supply.send_replace(Supply::Ready(replicas.clone()));
            Some(replicas)
        }
        Err(why) => {
            tracing::warn!(why, "the function server starts no replicas");
            parts.supply.send_replace(Supply::Missing(format!("this node starts no replicas: {why}")));
            None
        }
    }
}

async fn pooled(
    parts: &Parts,
    settings: &FunctionServerSettings,
    (ipam, bridge): (&Arc<Ipam>, Option<Bridge>),
) -> Result<PooledReplicas<HostSetups>, String> {
    let microvm = &parts.settings.runtime.microvm;
    let bridge = bridge.ok_or("it has no Pod network")?;
    let memory = settings.memory.ok_or("--function-server-memory does not say how much memory they may have")?;
    let survey = Survey::of(microvm).await;
    let usable = survey.usable(microvm.vmm).first().copied();
    let vmm = usable.ok_or_else(|| format!("it has no microVMs: {}", survey.missing(None)))?;
    let (user, taps): (_, Arc<dyn Taps>) = (VmmUser::default(), Arc::new(bridge));
    let manager = vmm.manager(microvm, user);
    let dirs =
        VmDirs::new(&vmm.root(&parts.settings.pods.root_dir).join("vms"), NAMESPACE).map_err(|error| chain(&error))?;
    let setups = HostSetups::new(dirs.clone(), taps.clone(), user, manager.tap_use());
    let params = PooledParams {
        pool: SetupPool::new(setups, READY),
        dirs,
        manager,
        taps,
        ipam: Arc::clone(ipam),
        assets: AssetDirs::new(microvm.asset_dirs.clone()),
        services: services(parts, settings),
        cgroup_parent: owner::cgroup_root(&parts.owner),
        pins: microvm.pin_cpus.then(Pins::of_host).unwrap_or_default(),
        most: MOST,
        memory,
    };
    let mut replicas = PooledReplicas::open(params).await.map_err(|error| chain(&error))?;
    // Pods need not wait for them.
    replicas.keep_ready();
    Ok(replicas)
}

/// What guests are told of: addresses that they can reach, and so none of loopback.
fn services(parts: &Parts, settings: &FunctionServerSettings) -> Services {
    let local = settings.listen.0.ip().is_loopback();
    let own = advertised(parts, settings).ok().filter(|_| !local);
    let port = settings.listen.0.port();
    let manager = settings.manager.as_ref().filter(|manager| !manager.is_local());
    Services {
        resource_manager: manager.map(|manager| format!("{}:{}", manager.host, manager.port)).unwrap_or_default(),
        function_server: own.map(|address| format!("{address}:{port}")).unwrap_or_default(),
        ..Services::default()
    }
}
