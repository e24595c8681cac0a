//! The Pods' network: the node's own bridge and range, or what CNI plugins make.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use ipnet::IpNet;
use tokio::sync::watch;
use tracing::{info, warn};

use super::Parts;
use crate::config::{RuntimeKind, Settings};
use crate::network::bridge::Bridge;
use crate::network::cni::{Cni, CniOptions, PATIENCE};
use crate::network::ipam::{DEFAULT_COOL_DOWN, Ipam};
use crate::node::owner;
use crate::pod::addresses::Addresses;
use crate::runtime::Runtime;
use crate::shutdown::Ticks;
use crate::telemetry::chain;

/// How often what sandboxes have left with plugins is looked for.
const SWEEP: Duration = Duration::from_secs(60);

/// The node's own network, its addresses by family, the first one first; without a bridge where no driver needs one.
pub(super) type Own = (Vec<Arc<Ipam>>, Option<Bridge>);

/// The plugins, if they are to make the network.
pub(super) fn plugins(settings: &Settings) -> Option<Cni> {
    let told = settings.pods.cni.clone()?;
    let root = settings.pods.root_dir.join("cni");
    Some(Cni::new(CniOptions { conf_dir: told.conf_dir, bin_dirs: told.bin_dirs, root, patience: PATIENCE }))
}

/// Opens the network once the node's range is known; `None` if the node ends before.
pub(super) async fn open(
    parts: &Parts,
    bridge: &watch::Sender<Option<Bridge>>,
) -> anyhow::Result<Option<(Addresses, Option<Own>)>> {
    let draining = parts.tasks.draining();
    let opened = async {
        match &parts.plugins {
            Some(plugins) => {
                of_plugins(parts, plugins);
                anyhow::Ok((Addresses::by_plugins(), None))
            }
            None => {
                let (ipams, bridge) = own(parts, bridge).await?;
                Ok((Addresses::of_each(ipams.clone()).on(bridge.clone()), Some((ipams, bridge))))
            }
        }
    };
    tokio::select! {
        // Cancel-safe: a bridge that is being made is found by the next process.
        opened = opened => opened.map(Some),
        () = draining.cancelled() => Ok(None),
    }
}

async fn own(parts: &Parts, bridge: &watch::Sender<Option<Bridge>>) -> anyhow::Result<Own> {
    let settings = &parts.settings;
    let mut ipams = Vec::new();
    for range in usable(parts.node.pod_ranges(&settings.pods.pod_cidrs).await) {
        let dir = settings.pods.root_dir.join(directory(range));
        let ipam = Ipam::open(&dir, range, DEFAULT_COOL_DOWN).context("failed to open the Pod addresses")?;
        ipams.push(Arc::new(ipam));
    }
    if settings.runtime.kind != RuntimeKind::Fake {
        let name = owner::bridge_name(&parts.owner);
        let ranges: Vec<(IpAddr, IpNet)> = ipams.iter().map(|ipam| (ipam.gateway(), ipam.range())).collect();
        info!(bridge = name, ?ranges, "setting up the Pod network");
        let made = Bridge::ensure_all(&name, ranges, settings.pods.non_masquerade_cidrs.clone()).await;
        let made = made.context("failed to set up the Pod network")?;
        bridge.send_replace(Some(made));
    }
    Ok((ipams, bridge.borrow().clone()))
}

/// The ranges that this host can use: a cluster of two families may have nodes without IPv6.
fn usable(mut ranges: Vec<IpNet>) -> Vec<IpNet> {
    if ranges.len() > 1 && !Path::new("/proc/sys/net/ipv6").exists() {
        ranges.retain(|range| range.addr().is_ipv4());
        warn!(?ranges, "this host has no IPv6: its Pods have IPv4 addresses only");
    }
    ranges
}

/// Where the records of a family's addresses are.
fn directory(range: IpNet) -> &'static str {
    if range.addr().is_ipv4() { "addresses" } else { "addresses6" }
}

/// Tells the plugins the node's ranges, and takes away what sandboxes have left with them, now and then.
fn of_plugins(parts: &Parts, plugins: &Cni) {
    let (told, node, of_ranges) = (parts.settings.pods.pod_cidrs.clone(), parts.node.clone(), plugins.clone());
    let draining = parts.tasks.draining();
    parts.tasks.spawn_finite("CNI ranges", async move {
        let ranges = async {
            match told.is_empty() {
                true => node.handed_out_ranges().await,
                false => told,
            }
        };
        tokio::select! {
            // Cancel-safe: nothing was told yet.
            ranges = ranges => of_ranges.set_ranges(ranges),
            () = draining.cancelled() => {}
        }
        Ok(())
    });
    let (plugins, runtime, draining) = (plugins.clone(), Arc::clone(&parts.runtime), parts.tasks.draining());
    parts.tasks.spawn("CNI sweep", async move {
        let mut ticks = Ticks::new(SWEEP, draining);
        while ticks.next().await {
            if let Err(error) = sweep(&plugins, &*runtime).await {
                warn!(error = &*error, "what sandboxes have left with CNI plugins is looked for again later");
            }
        }
        Ok(())
    });
}

async fn sweep(plugins: &Cni, runtime: &dyn Runtime) -> Result<(), String> {
    // In this order: a sandbox is there before it has a record.
    let known = plugins.known().map_err(|error| chain(&error))?;
    if known.is_empty() {
        return Ok(());
    }
    let there = runtime.list_pod_sandboxes(None).await.map_err(|error| chain(&error))?;
    let there: BTreeSet<String> = there.iter().map(|sandbox| sandbox.id.as_str().to_owned()).collect();
    let swept = plugins.sweep(known, &there).await;
    if swept > 0 {
        info!(sandboxes = swept, "took away what sandboxes had left with CNI plugins");
    }
    Ok(())
}
