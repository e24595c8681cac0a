//! Who answers for an address of the range: its Pod, or at once the host with a refusal.
//!
//! ```text
//! 10.1.0.7  dev BRIDGE   one for each Pod that is plugged in
//! 10.1.0/24 dev lo       every other address; super::firewall refuses what goes there
//! ```
//! Without the second, whoever calls an address whose Pod is gone waits seconds for an answer to ARP: clients that keep
//! warm endpoints by address do that. It is there from before a Pod is plugged until after it is unplugged, whether the
//! address is held, cooling down or free, and also while this process is not there. Nothing is remembered: a port's
//! alias is its Pod's address, so a route without a port is one that a Pod left behind.
//!
//! An IPv6 range has a route of type "unreachable" in the place of that to `lo`, since netfilter's resets do not come back
//! by `lo` there. The host is told so at once; a Pod of this host after a second, with its second packet (the answer to
//! the first is there before the kernel listens).
//!
//! The range is routed to `lo` and not made local: the host's own services, and ports that others translate wherever
//! they find a local address, must not answer for a Pod that is gone.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use ipnet::IpNet;

use super::netlink::Netlink;

/// The interface that what nobody has is routed to.
pub(super) const NOWHERE: &str = "lo";

/// The addresses in a port's alias.
fn addresses(alias: &str) -> Vec<IpAddr> {
    alias.split(',').filter_map(|address| address.parse().ok()).collect()
}

/// The host's routes to one bridge's range.
#[derive(Debug)]
pub(super) struct Routes {
    bridge: String,
    gateway: IpAddr,
    range: IpNet,
    /// Held from the look at the ports to the change that follows from it.
    changing: Mutex<()>,
}

// === impl Routes ===

impl Routes {
    pub(super) fn new(bridge: &str, gateway: IpAddr, range: IpNet) -> Self {
        Self { bridge: bridge.to_owned(), gateway, range: range.trunc(), changing: Mutex::default() }
    }

    /// Refuses every address that no port has.
    pub(super) fn ensure(&self, host: &mut Netlink) -> io::Result<()> {
        if self.range.addr().is_ipv4() {
            let nowhere = host.link(NOWHERE)?.ok_or(io::ErrorKind::NotFound)?;
            host.add_link_route(nowhere.index, self.range, Some(self.gateway))?;
        } else {
            host.add_unreachable_route(self.range)?;
        }
        self.prune(host, None)
    }

    /// Leads to the port that has `address` in its alias.
    pub(super) fn open(&self, host: &mut Netlink, address: IpAddr) -> io::Result<()> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let bridge = host.link(&self.bridge)?.ok_or(io::ErrorKind::NotFound)?;
        host.add_link_route(bridge.index, address.into(), Some(self.gateway))
    }

    /// Refuses the address of the port that is `leaving`, and those whose port is gone.
    pub(super) fn prune(&self, host: &mut Netlink, leaving: Option<&str>) -> io::Result<()> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(bridge) = host.link(&self.bridge)? else { return Ok(()) };
        let ports = host.links()?.into_iter().filter(|link| link.bridge == Some(bridge.index));
        let stay = ports.filter(|port| Some(port.name.as_str()) != leaving);
        let plugged: HashSet<IpAddr> = stay.flat_map(|port| addresses(&port.alias)).collect();
        for route in host.link_routes(bridge.index, self.gateway)? {
            if route.prefix_len() == route.max_prefix_len() && !plugged.contains(&route.addr()) {
                host.delete_link_route(bridge.index, route)?;
            }
        }
        Ok(())
    }

    /// Takes the route of the range away; those of Pods go with the bridge.
    pub(super) fn remove(&self, host: &mut Netlink) -> io::Result<()> {
        if self.range.addr().is_ipv6() {
            return host.delete_unreachable_route(self.range);
        }
        let nowhere = host.link(NOWHERE)?.ok_or(io::ErrorKind::NotFound)?;
        host.delete_link_route(nowhere.index, self.range)
    }
}
