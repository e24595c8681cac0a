//! The bridge that Pods hang on, and the cable that joins a sandbox to it.
//!
//! A cable is a veth pair: the end here is a port of the bridge and named after the sandbox, the other is `eth0` in the
//! sandbox's network namespace. So the kernel is the memory: what is plugged is found again by name, and a namespace
//! that goes away takes both ends with it.

mod tap;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use ipnet::IpNet;
use nix::sched::{CloneFlags, setns};
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedMutexGuard, Semaphore};
use tracing::debug;

use super::guard::{self, Guard};
use super::netlink::{Mac, Netlink, Pair};
use super::routes::Routes;
use super::{Cable, NetworkError, firewall, set_sysctl};
use crate::turns::Turns;

/// Name of the interface inside a sandbox, as every Pod network has it.
const INTERFACE: &str = "eth0";
/// Begins the name of each port, before twelve hex digits.
const PORT_PREFIX: &str = "lv";
/// MTU where the host has no default route to take one from.
const DEFAULT_MTU: u32 = 1500;
/// Cables worked on at once. The kernel changes interfaces one at a time anyway; this bounds the threads.
const AT_ONCE: usize = 4;

/// How long [`settle`] waits between two looks, and how often it looks: two seconds in all, twice what the kernel may
/// put it off.
const SETTLE_WAIT: Duration = Duration::from_millis(1);
const SETTLE_TRIES: u32 = 2000;

/// A Linux bridge with the gateway's address, routed and masqueraded by the host. Clones are the same bridge.
#[derive(Clone, Debug)]
pub struct Bridge {
    settings: Arc<Settings>,
    permits: Arc<Semaphore>,
    /// One at a time works on a cable, or on the host's ports of a Pod.
    pub(super) turns: Arc<Turns<String>>,
}

#[derive(Debug)]
pub(super) struct Settings {
    pub(super) name: String,
    /// One of each family, at least one; the first is that of taps.
    pub(super) nets: Vec<Net>,
    mtu: u32,
    pub(super) guard: Guard,
    /// The Pods that ports of the host lead to.
    pub(super) with_ports: Mutex<BTreeSet<String>>,
}

/// The bridge's part of one address family.
#[derive(Debug)]
pub(super) struct Net {
    gateway: IpAddr,
    pub(super) range: IpNet,
    routes: Routes,
}

impl Settings {
    /// The part that is of the family of `address`.
    fn net(&self, address: IpAddr) -> Result<&Net, NetworkError> {
        let same = |net: &&Net| net.gateway.is_ipv4() == address.is_ipv4();
        let none = || kernel(&format!("find the range of {address} on {}", self.name), io::ErrorKind::NotFound.into());
        self.nets.iter().find(same).ok_or_else(none)
    }
}

// === impl Bridge ===

impl Bridge {
    /// Makes the bridge, its address, IP forwarding and the packet filter rules be there. What is there already stays
    /// as it is, so running Pods notice nothing.
    ///
    /// Needs root (CAP_NET_ADMIN) and the `iptables` command (`ip6tables` for an IPv6 range).
    ///
    /// # Errors
    /// [`NetworkError::NotABridge`] if the name is taken, [`NetworkError::Command`] without `iptables`, or the kernel's
    /// refusal.
    pub async fn ensure(name: &str, gateway: IpAddr, range: IpNet) -> Result<Self, NetworkError> {
        Self::ensure_all(name, vec![(gateway, range)], Vec::new()).await
    }

    /// The same with a gateway and range of each family; the first is that of taps. What Pods send to `cluster`, at most one
    /// range of each family, is not masqueraded.
    ///
    /// # Errors
    /// As [`Bridge::ensure`].
    pub async fn ensure_all(
        name: &str,
        ranges: Vec<(IpAddr, IpNet)>,
        cluster: Vec<IpNet>,
    ) -> Result<Self, NetworkError> {
        let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 15 || name.starts_with(['.', '-']) || !name.chars().all(named) {
            return Err(NetworkError::BadName { name: name.to_owned() });
        }
        let name = name.to_owned();
        let settings = on_thread(move || ensure(name, &ranges, &cluster)).await?;
        Ok(Self { settings: Arc::new(settings), permits: Arc::new(Semaphore::new(AT_ONCE)), turns: Arc::default() })
    }

    /// Takes away the bridge and exactly its own packet filter rules. IP forwarding stays on: others may rely on it by
    /// now.
    ///
    /// # Errors
    /// As [`Bridge::ensure`].
    pub async fn remove(self) -> Result<(), NetworkError> {
        let settings = Arc::clone(&self.settings);
        on_thread(move || {
            if guard::is_there() {
                settings.guard.remove()?;
            }
            let mut host = open_netlink()?;
            for net in &settings.nets {
                firewall::remove(&settings.name, net.range)?;
                let unroute = |source| kernel(&format!("remove the route to {}", net.range), source);
                net.routes.remove(&mut host).map_err(unroute)?;
            }
            delete_by_name(&mut host, &settings.name)
        })
        .await
    }

    /// Name of the bridge interface.
    pub fn name(&self) -> &str {
        &self.settings.name
    }

    /// MTU of the bridge and of every cable, in bytes: that of the host's uplink.
    pub fn mtu(&self) -> u32 {
        self.settings.mtu
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Settings) -> Result<T, NetworkError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| ended())?;
        let settings = Arc::clone(&self.settings);
        on_thread(move || {
            let _permit = permit;
            work(&settings)
        })
        .await
    }

    /// The same for whoever has the turn of what is worked on; it ends with the work, not with who waits for it. Else
    /// what goes on for a caller that has left would undo what the next one did.
    pub(super) async fn work_in_turn<T: Send + 'static>(
        &self,
        turn: OwnedMutexGuard<()>,
        work: impl FnOnce(&Settings) -> Result<T, NetworkError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        self.work(move |settings| {
            let _turn = turn;
            work(settings)
        })
        .await
    }
}

#[async_trait]
impl Cable for Bridge {
    async fn plug(&self, pid: i32, sandbox: &str, addresses: &[IpAddr]) -> Result<(), NetworkError> {
        let (port, addresses) = (port_name(sandbox), addresses.to_vec());
        let turn = self.turns.turn(&port).await;
        self.work_in_turn(turn, move |settings| plug(settings, &port, pid, &addresses)).await
    }

    async fn unplug(&self, sandbox: &str) -> Result<(), NetworkError> {
        let port = port_name(sandbox);
        let turn = self.turns.turn(&port).await;
        self.work_in_turn(turn, move |settings| {
            let mut host = open_netlink()?;
            // The route first: a packet on its way to a port that is gone would be answered by nobody.
            let refuse = |source| kernel(&format!("refuse the address behind {port}"), source);
            settings.nets.iter().try_for_each(|net| net.routes.prune(&mut host, Some(&port))).map_err(refuse)?;
            delete_by_name(&mut host, &port)
        })
        .await
    }
}

/// The host end's name: deterministic, so that it is found again, and within the 15 bytes of an interface name.
fn port_name(sandbox: &str) -> String {
    hashed(PORT_PREFIX, sandbox)
}

fn hashed(prefix: &str, sandbox: &str) -> String {
    let hash = Sha256::digest(sandbox.as_bytes());
    let digits: String = hash.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("{prefix}{digits}")
}

/// A locally administered hardware address that follows from the IP address: whoever remembers the one for the other
/// (the host's neighbour table does) is right about a remade sandbox too.
pub fn mac_of(address: IpAddr) -> Mac {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            [0x02, 0x6c, a, b, c, d]
        }
        IpAddr::V6(address) => {
            let hash = Sha256::digest(address.octets());
            [0x02, hash[0], hash[1], hash[2], hash[3], hash[4]]
        }
    }
}

// === On the host ===

fn ensure(name: String, ranges: &[(IpAddr, IpNet)], cluster: &[IpNet]) -> Result<Settings, NetworkError> {
    let mut host = open_netlink()?;
    let tried = |action: &str| {
        let action = format!("{action} bridge {name}");
        move |source| NetworkError::Kernel { action, source }
    };
    let mtu = host.uplink_mtu().map_err(tried("find the uplink of"))?.unwrap_or(DEFAULT_MTU);
    let bridge = match host.link(&name).map_err(tried("look up"))? {
        Some(bridge) => bridge,
        None => {
            host.add_bridge(&name).map_err(tried("make"))?;
            host.link(&name).map_err(tried("look up"))?.ok_or_else(|| tried("find")(io::ErrorKind::NotFound.into()))?
        }
    };
    if !bridge.is_bridge {
        return Err(NetworkError::NotABridge { name });
    }
    // A bridge without an address of its own takes one from its ports and changes it as they come and go, which every
    // Pod would have to notice.
    if let Some((gateway, _)) = ranges.first() {
        host.configure(bridge.index, mac_of(*gateway), mtu).map_err(tried("configure"))?;
    }
    let (mut nets, mut with_ports) = (Vec::new(), BTreeSet::new());
    for &(gateway, range) in ranges {
        host.set_only_address(bridge.index, gateway, range.prefix_len()).map_err(tried("set the address of"))?;
        forward(&name, gateway)?;
        let same_family = |other: &&IpNet| other.addr().is_ipv4() == gateway.is_ipv4();
        with_ports.append(&mut firewall::ensure(&name, range, cluster.iter().find(same_family).copied())?);
        let routes = Routes::new(&name, gateway, range);
        routes.ensure(&mut host).map_err(tried("route the range of"))?;
        nets.push(Net { gateway, range, routes });
    }
    let guard = Guard::new(&name);
    Ok(Settings { name, nets, mtu, guard, with_ports: Mutex::new(with_ports) })
}

/// Lets the host route packets of the gateway's family.
fn forward(bridge: &str, gateway: IpAddr) -> Result<(), NetworkError> {
    match gateway {
        IpAddr::V6(_) => set_sysctl("net/ipv6/conf/all/forwarding", "1"),
        IpAddr::V4(_) => {
            set_sysctl("net/ipv4/ip_forward", "1")?;
            // Two Pods talk by way of the gateway on purpose; it must not advise them to do otherwise.
            set_sysctl(&format!("net/ipv4/conf/{bridge}/send_redirects"), "0")
        }
    }
}

fn delete_by_name(host: &mut Netlink, name: &str) -> Result<(), NetworkError> {
    let failed = |source| kernel(&format!("delete interface {name}"), source);
    match host.link(name).map_err(failed)? {
        Some(link) => host.delete_link(link.index).map_err(failed),
        None => Ok(()),
    }
}

// === Into the sandbox ===

/// Runs on a thread of its own, which ends in the sandbox's namespace.
fn plug(settings: &Settings, port: &str, pid: i32, addresses: &[IpAddr]) -> Result<(), NetworkError> {
    let none = || kernel(&format!("plug {port} without an address"), io::ErrorKind::InvalidInput.into());
    let first = *addresses.first().ok_or_else(none)?;
    let path = format!("/proc/{pid}/ns/net");
    let outside = |source| NetworkError::Namespace { pid, source };
    // Held open from here on: the process may end and its number be reused, the namespace stays the one we looked at.
    let namespace = File::open(path).map_err(outside)?;
    let own = fs::metadata("/proc/thread-self/ns/net").map_err(outside)?;
    if namespace.metadata().map_err(outside)?.ino() == own.ino() {
        return Err(outside(io::Error::other("it has no network namespace of its own")));
    }
    let mut host = open_netlink()?;
    let look_up = |source| kernel(&format!("look up bridge {}", settings.name), source);
    let bridge = host.link(&settings.name).map_err(look_up)?;
    let bridge = bridge.ok_or_else(|| look_up(io::ErrorKind::NotFound.into()))?;
    setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| outside(errno.into()))?;
    let mut inside = open_netlink()?;
    let pair = Pair {
        name: port,
        bridge: bridge.index,
        peer_name: INTERFACE,
        peer_mac: mac_of(first),
        namespace: namespace.as_fd(),
        mtu: settings.mtu,
    };
    connect(&mut host, &mut inside, &pair, addresses).map_err(|source| kernel(&format!("plug {port}"), source))?;
    for &address in addresses {
        configure(&mut inside, settings.net(address)?, address)
            .map_err(|source| kernel(&format!("give {address} to {INTERFACE} behind {port}"), source))?;
    }
    settle(&mut host, &mut inside, port).map_err(|source| kernel(&format!("see {port} working"), source))?;
    // The last step: until packets pass the addresses refuse.
    for &address in addresses {
        let lead = |source| kernel(&format!("lead {address} to {port}"), source);
        settings.net(address)?.routes.open(&mut host, address).map_err(lead)?;
    }
    Ok(())
}

/// Waits until packets pass. The kernel takes note of a new carrier a little later and drops what is sent before; the
/// sender of a lost SYN would try again only after a second.
fn settle(host: &mut Netlink, inside: &mut Netlink, port: &str) -> io::Result<()> {
    for _ in 0..SETTLE_TRIES {
        let (outer, inner) = (host.link(port)?, inside.link(INTERFACE)?);
        let (outer, inner) = (outer.ok_or(io::ErrorKind::NotFound)?, inner.ok_or(io::ErrorKind::NotFound)?);
        if outer.operational && outer.forwarding && inner.operational {
            return Ok(());
        }
        thread::sleep(SETTLE_WAIT);
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Makes the pair be there, with both its ends where they belong.
fn connect(host: &mut Netlink, inside: &mut Netlink, pair: &Pair<'_>, addresses: &[IpAddr]) -> io::Result<()> {
    let (outer, inner) = (host.link(pair.name)?, inside.link(INTERFACE)?);
    if let (Some(outer), Some(inner)) = (&outer, &inner) {
        // Each end tells the other's index; with the hardware address that is enough to know them as one pair.
        let joined = outer.peer == Some(inner.index) && inner.peer == Some(outer.index);
        if joined && inner.mac == pair.peer_mac {
            host.enslave(outer.index, pair.bridge)?;
            return finish_port(host, outer.index, addresses);
        }
    }
    if let Some(outer) = outer {
        host.delete_link(outer.index)?;
    }
    if let Some(inner) = inner.filter(|inner| inner.mac == pair.peer_mac) {
        inside.delete_link(inner.index)?;
    }
    host.add_pair(pair)?;
    let outer = host.link(pair.name)?.ok_or(io::ErrorKind::NotFound)?;
    finish_port(host, outer.index, addresses)
}

/// What a port has besides its place on the bridge; the alias is how its routes are known for its own.
fn finish_port(host: &mut Netlink, port: u32, addresses: &[IpAddr]) -> io::Result<()> {
    let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
    host.set_alias(port, &addresses.join(","))?;
    host.set_hairpin(port)
}

/// Interfaces, address and routes as seen from inside; each step replaces what is there.
fn configure(inside: &mut Netlink, net: &Net, address: IpAddr) -> io::Result<()> {
    if let Some(loopback) = inside.link("lo")? {
        inside.set_up(loopback.index)?;
    }
    let interface = inside.link(INTERFACE)?.ok_or(io::ErrorKind::NotFound)?.index;
    inside.add_address(interface, address, net.range.prefix_len())?;
    inside.set_up(interface)?;
    inside.add_link_route(interface, net.gateway.into(), None)?;
    inside.add_default_route(interface, net.gateway)?;
    let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
    for key in ["all", INTERFACE] {
        // See the module: neighbours are reached through the gateway, whatever another router may advise.
        if let Err(error) = set_sysctl(&format!("net/{family}/conf/{key}/accept_redirects"), "0") {
            debug!(error = crate::telemetry::chain(&error), "redirects stay accepted in a sandbox");
        }
    }
    Ok(())
}

// === Threads ===

/// Runs blocking work on a thread that ends with it, so that whatever namespace it has entered is left for good. The
/// work goes on to its end if the caller stops waiting.
pub(super) async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    // What was done for a caller that has gone is found by the next one.
    let answered = crate::thread::begin("cable", work, drop).map_err(|source| kernel("start a thread", source))?;
    answered.await.map_err(|_| ended())?
}

fn open_netlink() -> Result<Netlink, NetworkError> {
    Netlink::open().map_err(|source| kernel("open a netlink socket", source))
}

fn kernel(action: &str, source: io::Error) -> NetworkError {
    NetworkError::Kernel { action: action.to_owned(), source }
}

pub(super) fn ended() -> NetworkError {
    kernel("finish network work", io::Error::other("its thread ended early"))
}

#[cfg(test)]
pub(crate) mod tests;
