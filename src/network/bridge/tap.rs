//! Taps on the bridge.
//!
//! ```text
//! handed:    VMM --device--> lt<hash>, a port of the bridge
//! by name:   VMM --device--> lt<hash> -- hub -- out  |  lt<hash>, a port of the bridge
//!            '------ a network namespace of its own -'
//! ```
//! The hub learns nothing. What a guest sends to all comes back to it, as the bridge's ports send back (hairpin); who learned
//! from that would take the guest to be on the other side.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use async_trait::async_trait;
use nix::sched::{CloneFlags, unshare};
use tappers::Interface;

use super::{
    Bridge, SETTLE_TRIES, SETTLE_WAIT, Settings, delete_by_name, finish_port, hashed, kernel, mac_of, open_netlink,
};
use crate::network::netlink::{Netlink, Pair};
use crate::network::tap::{Surroundings, Tap, Taps};
use crate::network::{NetworkError, set_sysctl};

/// Begins the name of each tap, before twelve hex digits.
const TAP_PREFIX: &str = "lt";
/// Beside a tap in a namespace of its own: the cable's end, and what joins the two.
const OUT: &str = "out";
const HUB: &str = "hub";
/// Without it no interface has an address of itself.
const WITHOUT_IPV6: &str = "net/ipv6/conf/all/disable_ipv6";

#[async_trait]
impl Taps for Bridge {
    async fn surroundings(&self) -> Result<Surroundings, NetworkError> {
        // There is always one.
        let gateway = self.settings().nets.first().map_or(IpAddr::from([0, 0, 0, 0]), |net| net.gateway);
        Ok(Surroundings { gateway, mtu: self.mtu() })
    }

    async fn make_tap(&self, sandbox: &str, owner: Option<u32>) -> Result<Tap, NetworkError> {
        let name = tap_name(sandbox);
        self.work(move |settings| make(settings, name, owner)).await
    }

    async fn lead(&self, sandbox: &str, address: IpAddr) -> Result<(), NetworkError> {
        let name = tap_name(sandbox);
        self.work(move |settings| lead(settings, &name, address)).await
    }

    async fn remove_tap(&self, sandbox: &str) -> Result<(), NetworkError> {
        let name = tap_name(sandbox);
        self.work(move |settings| remove(settings, &name)).await
    }

    async fn remove_other_taps(&self, sandboxes: &[String]) -> Result<usize, NetworkError> {
        let kept: Vec<String> = sandboxes.iter().map(|sandbox| tap_name(sandbox)).collect();
        self.work(move |settings| {
            let mut others = left(settings)?;
            others.retain(|name| !kept.contains(name));
            others.iter().try_for_each(|name| remove(settings, name))?;
            Ok(others.len())
        })
        .await
    }
}

fn tap_name(sandbox: &str) -> String {
    hashed(TAP_PREFIX, sandbox)
}

fn make(settings: &Settings, name: String, owner: Option<u32>) -> Result<Tap, NetworkError> {
    let mut host = open_netlink()?;
    let failed = |source| kernel(&format!("make tap {name}"), source);
    let bridge = host.link(&settings.name).map_err(failed)?;
    let bridge = bridge.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    delete_by_name(&mut host, &name)?;
    // Before there is a device that something could be sent by.
    settings.guard.set(&name, None)?;
    match owner {
        None => {
            let device = make_handed(&mut host, &name, (bridge.index, settings.mtu)).map_err(failed)?;
            Ok(Tap { name, device: Some(Arc::new(device)), namespace: None })
        }
        Some(owner) => {
            let namespace = enter_new_namespace()?;
            let made = make_apart(&mut host, &name, (bridge.index, settings.mtu), (owner, &namespace));
            made.map_err(failed)?;
            Ok(Tap { name, device: None, namespace: Some(Arc::new(namespace.into())) })
        }
    }
}

/// A device here.
fn make_handed(host: &mut Netlink, name: &str, (bridge, mtu): (u32, u32)) -> io::Result<OwnedFd> {
    let tap = tappers::linux::Tap::new_named(Interface::new(name)?)?;
    let device = rustix::io::fcntl_dupfd_cloexec(&tap, 3)?;
    join(host, name, (bridge, mtu))?;
    Ok(device)
}

/// A network namespace that nobody else is in. To be called on a thread that ends with it.
fn enter_new_namespace() -> Result<File, NetworkError> {
    let failed = |source| kernel("make a network namespace", source);
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| failed(errno.into()))?;
    // A kernel without IPv6 has nothing to be set.
    if Path::new("/proc/sys").join(WITHOUT_IPV6).exists() {
        set_sysctl(WITHOUT_IPV6, "1")?;
    }
    File::open("/proc/thread-self/ns/net").map_err(failed)
}

/// A device in this thread's namespace, and the cable from there to the bridge, which `host` sees.
fn make_apart(
    host: &mut Netlink,
    name: &str,
    (bridge, mtu): (u32, u32),
    (owner, namespace): (u32, &File),
) -> io::Result<()> {
    let mut inside = Netlink::open()?;
    let tap = tappers::linux::Tap::new_named(Interface::new(name)?)?;
    tap.set_owner(owner)?;
    tap.set_persistent(true)?;
    inside.add_hub(HUB)?;
    // No guest's: what is sent to a port's own address goes no further.
    let peer_mac = mac_of(Ipv4Addr::BROADCAST.into());
    host.add_pair(&Pair { name, bridge, peer_name: OUT, peer_mac, namespace: namespace.as_fd(), mtu })?;
    let hub = inside.link(HUB)?.ok_or(io::ErrorKind::NotFound)?.index;
    join(&mut inside, OUT, (hub, mtu))?;
    join(&mut inside, name, (hub, mtu))
}

/// Makes an interface a port.
fn join(namespace: &mut Netlink, name: &str, (bridge, mtu): (u32, u32)) -> io::Result<()> {
    let link = namespace.link(name)?.ok_or(io::ErrorKind::NotFound)?;
    namespace.set_mtu(link.index, mtu)?;
    namespace.enslave(link.index, bridge)
}

fn lead(settings: &Settings, name: &str, address: IpAddr) -> Result<(), NetworkError> {
    let mut host = open_netlink()?;
    let failed = |source| kernel(&format!("lead {address} to {name}"), source);
    let port = host.link(name).map_err(failed)?.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    // An address that it had before is given up.
    settings.nets.iter().try_for_each(|net| net.routes.prune(&mut host, Some(name))).map_err(failed)?;
    settings.guard.set(name, Some((mac_of(address), address)))?;
    finish_port(&mut host, port.index, &[address]).map_err(failed)?;
    settle(&mut host, name).map_err(|source| kernel(&format!("see {name} working"), source))?;
    // The last step: until packets pass the address refuses.
    settings.net(address)?.routes.open(&mut host, address).map_err(failed)
}

/// Waits until packets pass: see the one of the cable.
fn settle(host: &mut Netlink, name: &str) -> io::Result<()> {
    for _ in 0..SETTLE_TRIES {
        if passes(host, name)? {
            return Ok(());
        }
        thread::sleep(SETTLE_WAIT);
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Whether every port on the way from the bridge to the device lets packets through.
fn passes(host: &mut Netlink, name: &str) -> io::Result<bool> {
    let mut ports = vec![host.link(name)?];
    // A cable's end has the device behind it; else it is the device.
    if let Some(beyond) = ports[0].as_ref().and_then(|port| port.beyond) {
        ports.extend([host.link_beyond(beyond, OUT)?, host.link_beyond(beyond, name)?]);
    }
    let ports: Option<Vec<_>> = ports.into_iter().collect();
    let ports = ports.ok_or(io::ErrorKind::NotFound)?;
    Ok(ports.iter().all(|port| port.operational && port.forwarding))
}

fn remove(settings: &Settings, name: &str) -> Result<(), NetworkError> {
    let mut host = open_netlink()?;
    // The route first: a packet on its way to a port that is gone would be answered by nobody.
    let refuse = |source| kernel(&format!("refuse the address behind {name}"), source);
    settings.nets.iter().try_for_each(|net| net.routes.prune(&mut host, Some(name))).map_err(refuse)?;
    delete_by_name(&mut host, name)?;
    settings.guard.unset(name)
}

/// The taps of this bridge: those there are devices of, and those there are only rules for.
fn left(settings: &Settings) -> Result<Vec<String>, NetworkError> {
    let mut host = open_netlink()?;
    let failed = |source| kernel(&format!("list the taps of {}", settings.name), source);
    let bridge = host.link(&settings.name).map_err(failed)?.map(|bridge| bridge.index);
    let ports = host.links().map_err(failed)?.into_iter().filter(|link| bridge.is_some() && link.bridge == bridge);
    let mut names: Vec<String> = ports.map(|port| port.name).filter(|name| name.starts_with(TAP_PREFIX)).collect();
    names.extend(settings.guard.known()?);
    names.sort();
    names.dedup();
    Ok(names)
}
