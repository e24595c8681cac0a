//! Ports of the host that lead to a Pod (`hostPort`), as rules of the packet filter.
//!
//! ```text
//! PREROUTING, OUTPUT   to one of the host's addresses, this port -> the Pod's address and port
//! POSTROUTING          what the Pod sends itself that way, or the host by its loopback -> under the gateway's address
//! ```
//!
//! Only the first packet of a connection is shown to them. So after a change what the kernel remembers of UDP, which has no
//! end that would make it forget, is forgotten by `conntrack`, where that is installed: a client that goes on from the same
//! port would be led to the former Pod for ever.
//!
//! Each rule carries a comment with the bridge's name and the Pod's UID, so they are found again after a restart, and
//! nothing else remembers them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::PoisonError;

use ipnet::IpNet;
use tracing::debug;

use super::bridge::{Bridge, Settings};
use super::firewall::{self, Rule};
use super::{NetworkError, set_sysctl};

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// A port of the host that leads to one of a Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// Of both ports.
    pub protocol: Protocol,
    /// The host's address it is open at; `None` is every one.
    pub host_ip: Option<IpAddr>,
    /// The host's port.
    pub host_port: u16,
    /// The Pod's port.
    pub pod_port: u16,
}

impl Bridge {
    /// Makes exactly these ports of the host lead to the Pod `key` at these addresses, one of each family at most. Needs
    /// `iptables` (`ip6tables` for IPv6).
    ///
    /// # Errors
    /// As [`Bridge::ensure`]; some of the ports may be open then.
    pub async fn open_ports(&self, key: &str, addresses: &[IpAddr], ports: Vec<HostPort>) -> Result<(), NetworkError> {
        let (key, addresses) = (key.to_owned(), addresses.to_vec());
        let turn = self.turns.turn(&key).await;
        self.work_in_turn(turn, move |settings| {
            if addresses.iter().any(IpAddr::is_ipv4) {
                // Or packets with a loopback address are never sent out on the bridge.
                set_sysctl(&format!("net/ipv4/conf/{}/route_localnet", settings.name), "1")?;
            }
            let tag = tag(&settings.name, &key);
            keys(settings).insert(key);
            for net in &settings.nets {
                let of_family = addresses.iter().filter(|address| address.is_ipv4() == net.range.addr().is_ipv4());
                let wanted = of_family.flat_map(|address| ports.iter().map(move |port| (*address, port)));
                let wanted = wanted.flat_map(|(address, port)| rules(&tag, address, port)).collect::<Vec<_>>();
                settle(net.range, &tag, &wanted)?;
            }
            Ok(())
        })
        .await
    }

    /// No port of the host leads to the Pod any more; Ok if none did.
    ///
    /// # Errors
    /// As [`Bridge::ensure`]; some of the ports may still be open.
    pub async fn close_ports(&self, key: &str) -> Result<(), NetworkError> {
        let key = key.to_owned();
        let turn = self.turns.turn(&key).await;
        if !keys(self.settings()).contains(&key) {
            return Ok(());
        }
        self.work_in_turn(turn, move |settings| {
            let tag = tag(&settings.name, &key);
            settings.nets.iter().try_for_each(|net| settle(net.range, &tag, &[]))?;
            keys(settings).remove(&key);
            Ok(())
        })
        .await
    }

    /// The Pods that ports of the host lead to, those of an earlier process too.
    pub fn pods_with_ports(&self) -> Vec<String> {
        keys(self.settings()).iter().cloned().collect()
    }
}

fn settle(range: IpNet, tag: &str, wanted: &[Rule]) -> Result<(), NetworkError> {
    let changed = firewall::settle(range, tag, wanted)?;
    changed.iter().filter_map(udp).for_each(|to| forget(range, &to));
    Ok(())
}

/// What `conntrack` is to look for, if this rule leads UDP away: the host's port, and its address if it is for one only.
fn udp(rule: &Rule) -> Option<Vec<&str>> {
    let after = |name: &str| rule.text.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1].as_str());
    if rule.chain != "PREROUTING" || after("-p") != Some("udp") {
        return None;
    }
    let mut wanted = vec!["--orig-port-dst", after("--dport")?];
    if let Some((address, _)) = after("-d").and_then(|net| net.split_once('/')) {
        wanted.extend(["--orig-dst", address]);
    }
    Some(wanted)
}

/// Makes the kernel ask the rules again. That it does not is no reason to go without the port.
fn forget(range: IpNet, to: &[&str]) {
    let family = if range.addr().is_ipv4() { "ipv4" } else { "ipv6" };
    let mut command = Command::new("conntrack");
    command.args(["-D", "-f", family, "-p", "udp"]).args(to).stdin(Stdio::null());
    match command.output() {
        Ok(output) if output.status.success() => {}
        // It also says so if there were none.
        Ok(output) => {
            debug!(?to, output = %String::from_utf8_lossy(&output.stderr).trim(), "no connection was forgotten")
        }
        Err(error) => debug!(?to, %error, "failed to run conntrack; is it installed?"),
    }
}

/// The Pods that have rules.
pub(super) fn open(bridge: &str, listed: &[(&'static str, String)]) -> BTreeSet<String> {
    let prefix = tag(bridge, "");
    let words = listed.iter().flat_map(|(_, line)| line.split_whitespace());
    words.filter_map(|word| word.trim_matches('"').strip_prefix(&prefix)).map(str::to_owned).collect()
}

fn keys(settings: &Settings) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
    settings.with_ports.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn tag(bridge: &str, key: &str) -> String {
    format!("{}:{key}", firewall::comment(bridge))
}

fn rules(tag: &str, address: IpAddr, port: &HostPort) -> Vec<Rule> {
    let rule = |chain: &str, text: String| Rule {
        table: "nat",
        chain: chain.to_owned(),
        first: false,
        text: text.split(' ').map(str::to_owned).collect(),
    };
    let (protocol, bits) = (port.protocol.name(), if address.is_ipv4() { 32 } else { 128 });
    let comment = format!("-m comment --comment {tag}");
    let at = match port.host_ip.filter(|ip| !ip.is_unspecified()) {
        Some(ip) if ip.is_ipv4() == address.is_ipv4() => format!("-d {ip}/{bits} "),
        Some(_) => return Vec::new(),
        None => String::new(),
    };
    let to = SocketAddr::new(address, port.pod_port);
    let lead = format!(
        "{at}-p {protocol} -m {protocol} --dport {} -m addrtype --dst-type LOCAL {comment} -j DNAT --to-destination {to}",
        port.host_port
    );
    let behind =
        format!("-d {address}/{bits} -p {protocol} -m {protocol} --dport {} {comment} -j MASQUERADE", port.pod_port);
    let mut rules = vec![
        rule("PREROUTING", lead.clone()),
        rule("OUTPUT", lead),
        rule("POSTROUTING", format!("-s {address}/{bits} {behind}")),
    ];
    if address.is_ipv4() {
        rules.push(rule("POSTROUTING", format!("-s 127.0.0.0/8 {behind}")));
    }
    rules
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::network::Cable;
    use crate::network::bridge::tests::{Namespace, on_a_host};

    #[test]
    fn a_port_is_open_at_the_address_that_is_named_and_else_at_every_one() {
        let port = |host_ip: Option<&str>| HostPort {
            protocol: Protocol::Udp,
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            host_port: 53,
            pod_port: 5353,
        };
        let of = |host_ip| rules("lambdalet:lb0:u", "10.1.0.2".parse().unwrap(), &port(host_ip));
        assert_eq!(of(Some("192.0.2.1"))[0].text[..2], ["-d", "192.0.2.1/32"]);
        for everywhere in [None, Some("0.0.0.0")] {
            let rules = of(everywhere);
            assert_eq!(rules.len(), 4);
            assert_eq!(rules[0].text[..2], ["-p", "udp"]);
            assert_eq!(rules[1].text.last().unwrap(), "10.1.0.2:5353");
        }
        assert!(of(Some("2001:db8::1")).is_empty(), "an address of another family leads nowhere");
    }

    #[test]
    fn connections_are_forgotten_by_the_port_that_led_them_away() {
        let of = |protocol, host_ip: Option<&str>| {
            let host_ip = host_ip.map(|ip| ip.parse().unwrap());
            let port = HostPort { protocol, host_ip, host_port: 53, pod_port: 5353 };
            let rules = rules("lambdalet:lb0:u", "10.1.0.2".parse().unwrap(), &port);
            rules.iter().filter_map(udp).map(|words| words.join(" ")).collect::<Vec<_>>()
        };
        assert_eq!(of(Protocol::Udp, None), ["--orig-port-dst 53"]);
        assert_eq!(of(Protocol::Udp, Some("192.0.2.1")), ["--orig-port-dst 53 --orig-dst 192.0.2.1"]);
        assert!(of(Protocol::Tcp, None).is_empty());
    }

    /// A socket in the network namespace of this thread.
    fn socket_in(tid: i32, at: &'static str) -> UdpSocket {
        let bind = move || {
            let namespace = std::fs::File::open(format!("/proc/{tid}/ns/net")).unwrap();
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            UdpSocket::bind(at).unwrap()
        };
        let socket = std::thread::spawn(bind).join().unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        socket
    }

    #[test]
    fn who_goes_on_sending_reaches_the_pod_that_has_the_port_now() {
        if Command::new("conntrack").arg("--version").output().is_err() {
            println!("skipped: needs conntrack");
            return;
        }
        on_a_host(|| async {
            let ip = |text: &str| text.parse::<IpAddr>().unwrap();
            let bridge = Bridge::ensure("lb0", ip("10.77.0.1"), "10.77.0.0/24".parse().unwrap()).await.unwrap();
            let (old, new) = (Namespace::new(), Namespace::new());
            bridge.plug(old.tid, "old", &[ip("10.77.0.2")]).await.unwrap();
            bridge.plug(new.tid, "new", &[ip("10.77.0.3")]).await.unwrap();
            let (old, new) = (socket_in(old.tid, "10.77.0.2:5353"), socket_in(new.tid, "10.77.0.3:5353"));
            let port = HostPort { protocol: Protocol::Udp, host_ip: None, host_port: 53, pod_port: 5353 };
            let client = UdpSocket::bind("10.77.0.1:5000").unwrap();
            let asks = || client.send_to(b"?", "10.77.0.1:53").unwrap();
            // Nobody listens, which the kernel remembers as well.
            asks();
            bridge.open_ports("u-1", &[ip("10.77.0.2")], vec![port.clone()]).await.unwrap();
            assert_eq!(bridge.pods_with_ports(), ["u-1"]);
            asks();
            old.recv(&mut [0]).unwrap();
            bridge.close_ports("u-1").await.unwrap();
            bridge.open_ports("u-2", &[ip("10.77.0.3")], vec![port]).await.unwrap();
            asks();
            new.recv(&mut [0]).unwrap();
            assert_eq!(bridge.pods_with_ports(), ["u-2"]);
        });
    }

    #[test]
    fn pods_with_ports_are_found_by_their_rules() {
        let listed = [
            ("nat", "-A OUTPUT -p tcp -m comment --comment lambdalet:lb0:u-1 -j DNAT".to_owned()),
            ("nat", "-A OUTPUT -p tcp -m comment --comment \"lambdalet:lb0:u-1\" -j DNAT".to_owned()),
            ("nat", "-A OUTPUT -p tcp -m comment --comment lambdalet:lb1:u-2 -j DNAT".to_owned()),
            ("nat", "-A POSTROUTING -m comment --comment lambdalet:lb0 -j MASQUERADE".to_owned()),
        ];
        assert_eq!(open("lb0", &listed), BTreeSet::from(["u-1".to_owned()]));
    }
}
