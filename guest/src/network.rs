//! The guest's place in the network, and its names.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use lambdalet_proto::agent::v1::{ConfigureRequest, Interface, Route, Sysctl};

use crate::error::{Error, Result, Tried};
use crate::netlink::Netlink;

/// Where the kernel lists interfaces.
const INTERFACES: &str = "/sys/class/net";
const LOOPBACK: &str = "lo";
/// The kernel's number of it, in every network namespace.
const LOOPBACK_INDEX: u32 = 1;

/// The guest's network cards. They are looked for once, since none comes later.
#[derive(Debug, Default)]
pub(crate) struct Network {
    cards: Vec<Card>,
}

/// A network card.
#[derive(Debug)]
struct Card {
    name: String,
    index: u32,
    mac: Option<[u8; 6]>,
    /// Whether it has a part in IPv6.
    ipv6: bool,
}

impl Network {
    /// Finds the cards and brings them up, with no address: what is done before the guest is somebody, the guests that are made
    /// of its template need not do. Of IPv6 they have no part until an address says so: the kernel would give them one of its
    /// own, and speak to the network with it. A stand-in leaves its host's cards alone.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn prepare(stand_in: bool) -> io::Result<Self> {
        let mut netlink = Netlink::open()?;
        netlink.set_up(LOOPBACK_INDEX, None, 0)?;
        let mut network = Self::default();
        if stand_in {
            return Ok(network);
        }
        for entry in fs::read_dir(INTERFACES)?.flatten().filter(|entry| entry.path().join("device").exists()) {
            let read = |file: &str| fs::read_to_string(entry.path().join(file));
            let name = entry.file_name().to_string_lossy().into_owned();
            let index = read("ifindex")?.trim().parse().map_err(io::Error::other)?;
            let mut card = Card { name, index, mac: mac(read("address")?.trim()).ok().flatten(), ipv6: true };
            card.set_ipv6(false)?;
            netlink.set_up(index, None, 0)?;
            network.cards.push(card);
        }
        network.cards.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(network)
    }

    /// Brings interfaces and routes to what the node says.
    ///
    /// # Errors
    /// What does not parse, or the kernel refuses.
    pub(crate) fn configure(&mut self, request: &ConfigureRequest) -> Result<()> {
        let mut netlink = Netlink::open().tried(|| "failed to open netlink".to_owned())?;
        for interface in &request.interfaces {
            self.bring_up(&mut netlink, interface)?;
        }
        for route in &request.routes {
            self.add_route(&mut netlink, route)?;
        }
        request.sysctls.iter().try_for_each(set)
    }

    fn bring_up(&mut self, netlink: &mut Netlink, interface: &Interface) -> Result<()> {
        let name = if interface.name.is_empty() { "eth0" } else { &interface.name };
        if name.len() > 15 || name.contains('/') {
            return Err(Error::invalid(format!("{name:?} is no name of an interface")));
        }
        let mac = mac(&interface.mac)?;
        let exact = self.cards.iter().position(|card| mac.is_some() && card.mac == mac).unwrap_or(0);
        let card = self.cards.get_mut(exact);
        let card = card.ok_or_else(|| Error::not_found(format!("there is no interface for {name}")))?;
        let tried = || format!("failed to configure interface {name}");
        if card.name != name {
            netlink.rename(card.index, name).tried(tried)?;
            name.clone_into(&mut card.name);
        }
        let differs = mac.filter(|_| card.mac != mac);
        netlink.set_up(card.index, differs, interface.mtu).tried(tried)?;
        card.mac = mac.or(card.mac);
        for said in &interface.addresses {
            let (address, prefix) = network(said)?;
            if address.is_ipv6() {
                card.set_ipv6(true).tried(tried)?;
            }
            let tried = || format!("failed to add address {said} to {name}");
            netlink.add_address(card.index, address, prefix).tried(tried)?;
        }
        Ok(())
    }

    fn add_route(&self, netlink: &mut Netlink, route: &Route) -> Result<()> {
        let Route { destination, gateway, interface } = route;
        let to = network(destination)?;
        let gateway = (!gateway.is_empty()).then(|| parse::<IpAddr>("address", gateway)).transpose()?;
        let card = self.cards.iter().find(|card| card.name == *interface).map(|card| card.index);
        let index = card.or_else(|| (interface == LOOPBACK).then_some(LOOPBACK_INDEX));
        let index = index.ok_or_else(|| Error::not_found(format!("there is no interface {interface}")))?;
        let tried = || format!("failed to add the route to {destination} through {interface}");
        netlink.add_route(to, gateway, index).tried(tried)
    }
}

impl Card {
    fn set_ipv6(&mut self, on: bool) -> io::Result<()> {
        if self.ipv6 != on {
            match fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", self.name), if on { "0" } else { "1" }) {
                // A kernel without IPv6.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                written => written?,
            }
            self.ipv6 = on;
        }
        Ok(())
    }
}

/// `10.0.0.1/24`.
fn network(text: &str) -> Result<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/').unwrap_or((text, ""));
    let address: IpAddr = parse("address", address)?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let prefix = if prefix.is_empty() { longest } else { parse("prefix", prefix)? };
    if prefix > longest {
        return Err(Error::invalid(format!("{text:?} has too long a prefix")));
    }
    Ok((address, prefix))
}

/// `02:00:0a:00:00:01`, or nothing.
fn mac(text: &str) -> Result<Option<[u8; 6]>> {
    if text.is_empty() {
        return Ok(None);
    }
    let bytes: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    let bytes = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
    bytes.map(Some).ok_or_else(|| Error::invalid(format!("{text:?} is no hardware address")))
}

fn parse<T: std::str::FromStr>(what: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::invalid(format!("{text:?} is no {what}")))
}

/// Sets a kernel parameter; a dot in its name is a slash, and a slash a dot, as in sysctl(8).
fn set(sysctl: &Sysctl) -> Result<()> {
    let swapped: String = sysctl
        .name
        .chars()
        .map(|c| {
            if c == '.' {
                '/'
            } else if c == '/' {
                '.'
            } else {
                c
            }
        })
        .collect();
    let good = |part: &str| !part.is_empty() && part != "." && part != "..";
    if !swapped.split('/').all(good) {
        return Err(Error::invalid(format!("{:?} is no kernel parameter", sysctl.name)));
    }
    let path = Path::new("/proc/sys").join(swapped);
    fs::write(path, &sysctl.value).tried(|| format!("failed to set {} to {:?}", sysctl.name, sysctl.value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_with_their_prefix() {
        assert_eq!(network("10.0.0.7/24").unwrap(), ("10.0.0.7".parse().unwrap(), 24));
        assert_eq!(network("fd00::1").unwrap(), ("fd00::1".parse().unwrap(), 128));
        assert!(["", "10.0.0.7/33", "10.0.0/8", "x/8", "10.0.0.7/-1"].iter().all(|text| network(text).is_err()));
    }

    #[test]
    fn hardware_addresses_have_six_bytes() {
        assert_eq!(mac("02:00:0a:f4:01:07").unwrap(), Some([2, 0, 10, 244, 1, 7]));
        assert_eq!(mac("").unwrap(), None);
        assert!(["02:00", "02:00:0a:f4:01:07:09", "02:00:0a:f4:01:zz"].iter().all(|text| mac(text).is_err()));
    }

    #[test]
    fn a_parameter_stays_below_its_directory() {
        let sysctl = |name: &str| Sysctl { name: name.into(), value: "1".into() };
        assert!(["", "../etc.x", "/./etc", "net..x"].iter().all(|name| set(&sysctl(name)).is_err()));
    }
}
