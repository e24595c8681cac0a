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

/// Brings interfaces and routes to what the node says.
///
/// # Errors
/// What does not parse, or the kernel refuses.
pub(crate) fn configure(request: &ConfigureRequest) -> Result<()> {
    let mut netlink = Netlink::open().tried(|| "failed to open netlink".to_owned())?;
    let loopback = index(LOOPBACK).tried(|| "failed to find the loopback interface".to_owned())?;
    netlink.set_up(loopback, true, 0).tried(|| "failed to bring the loopback interface up".to_owned())?;
    for interface in &request.interfaces {
        bring_up(&mut netlink, interface)?;
    }
    for route in &request.routes {
        add_route(&mut netlink, route)?;
    }
    request.sysctls.iter().try_for_each(set)
}

fn bring_up(netlink: &mut Netlink, interface: &Interface) -> Result<()> {
    let name = if interface.name.is_empty() { "eth0" } else { &interface.name };
    if name.len() > 15 || name.contains('/') {
        return Err(Error::invalid(format!("{name:?} is no name of an interface")));
    }
    let mac = mac(&interface.mac)?;
    let found = find(mac.map(|_| interface.mac.as_str())).tried(|| "failed to list the interfaces".to_owned())?;
    let found = found.ok_or_else(|| Error::not_found(format!("there is no interface for {name}")))?;
    let tried = || format!("failed to configure interface {name}");
    let index = index(&found).tried(tried)?;
    let differs = mac.is_some() && address(&found).as_deref() != Some(&interface.mac.to_ascii_lowercase());
    if found != name || differs {
        netlink.set_up(index, false, 0).tried(tried)?;
        netlink.rename(index, name, mac).tried(tried)?;
    }
    netlink.set_up(index, true, interface.mtu).tried(tried)?;
    for said in &interface.addresses {
        let (address, prefix) = network(said)?;
        netlink.add_address(index, address, prefix).tried(|| format!("failed to add address {said} to {name}"))?;
    }
    Ok(())
}

/// The interface with this hardware address; else the first that is not loopback, which takes it.
fn find(mac: Option<&str>) -> io::Result<Option<String>> {
    let mut names: Vec<_> =
        fs::read_dir(INTERFACES)?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| name != LOOPBACK && Path::new(INTERFACES).join(name).join("device").exists());
    names.sort();
    let wanted = mac.map(str::to_ascii_lowercase);
    let exact = names.iter().find(|name| wanted.is_some() && address(name) == wanted);
    Ok(exact.or(names.first()).cloned())
}

fn address(interface: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new(INTERFACES).join(interface).join("address")).ok()?;
    Some(text.trim().to_ascii_lowercase())
}

fn index(interface: &str) -> io::Result<u32> {
    let text = fs::read_to_string(Path::new(INTERFACES).join(interface).join("ifindex"))?;
    text.trim().parse().map_err(io::Error::other)
}

fn add_route(netlink: &mut Netlink, route: &Route) -> Result<()> {
    let tried = || format!("failed to add the route to {} through {}", route.destination, route.interface);
    let to = network(&route.destination)?;
    let gateway = (!route.gateway.is_empty()).then(|| parse::<IpAddr>("address", &route.gateway)).transpose()?;
    let index = index(&route.interface).tried(tried)?;
    netlink.add_route(to, gateway, index).tried(tried)
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
