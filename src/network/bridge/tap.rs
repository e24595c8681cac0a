//! Taps on the bridge.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;

use async_trait::async_trait;
use tappers::Interface;

use super::{
    Bridge, SETTLE_TRIES, SETTLE_WAIT, Settings, delete_by_name, finish_port, hashed, kernel, mac_of, open_netlink,
};
use crate::network::NetworkError;
use crate::network::netlink::Netlink;
use crate::network::tap::{Surroundings, Tap, Taps};

/// Begins the name of each tap, before twelve hex digits.
const TAP_PREFIX: &str = "lt";

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
    let mut make = || -> io::Result<Tap> {
        let tap = tappers::linux::Tap::new_named(Interface::new(&name)?)?;
        let device = match owner {
            Some(owner) => {
                tap.set_owner(owner)?;
                tap.set_persistent(true)?;
                None
            }
            None => Some(Arc::new(rustix::io::fcntl_dupfd_cloexec(&tap, 3)?)),
        };
        let link = host.link(&name)?.ok_or(io::ErrorKind::NotFound)?;
        host.set_mtu(link.index, settings.mtu)?;
        host.enslave(link.index, bridge.index)?;
        Ok(Tap { name: name.clone(), device })
    };
    make().map_err(failed)
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
        let port = host.link(name)?.ok_or(io::ErrorKind::NotFound)?;
        if port.operational && port.forwarding {
            return Ok(());
        }
        thread::sleep(SETTLE_WAIT);
    }
    Err(io::ErrorKind::TimedOut.into())
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
