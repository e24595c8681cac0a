//! What the bridge and its cables look like from the kernel, in a network namespace of the test's own.

pub(crate) mod taps;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::*;
use crate::network::ports::{HostPort, Protocol};

type Work = Box<dyn FnOnce() + Send>;

/// A network namespace, kept by a thread that works in it.
pub(in crate::network) struct Namespace {
    pub(in crate::network) tid: i32,
    work: mpsc::SyncSender<Work>,
}

impl Namespace {
    pub(in crate::network) fn new() -> Self {
        let (work, queue) = mpsc::sync_channel::<Work>(8);
        let (ready, made) = mpsc::sync_channel(1);
        thread::spawn(move || {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ready.send(nix::unistd::gettid().as_raw()).unwrap();
            queue.into_iter().for_each(|work| work());
        });
        Self { tid: made.recv().unwrap(), work }
    }

    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::sync_channel(1);
        self.work.send(Box::new(move || answer.send(work()).unwrap())).unwrap();
        answered.recv().unwrap()
    }

    pub(in crate::network) fn listen(&self, address: IpAddr) {
        let listener = self.run(move || TcpListener::bind(SocketAddr::new(address, 80)).unwrap());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let peer = stream.peer_addr().unwrap().ip().to_string();
                stream.write_all(peer.as_bytes()).unwrap();
            }
        });
    }

    /// Who the listener at `to` says we are.
    pub(in crate::network) fn ask(&self, to: IpAddr) -> Result<String, io::Error> {
        self.run(move || ask(to))
    }

    pub(in crate::network) fn sees(&self, command: &'static str) -> String {
        self.run(move || shell(command))
    }
}

pub(in crate::network) fn ask(to: IpAddr) -> Result<String, io::Error> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, 80), Duration::from_secs(2))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

pub(crate) fn shell(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn rules_of(command: &str) -> Vec<String> {
    shell(command).lines().filter(|line| line.starts_with('-')).map(str::to_owned).collect()
}

/// Runs the test with a namespace of its own as its host, or says why not.
pub(crate) fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root to make network namespaces");
        return;
    }
    let host = Namespace::new();
    host.run(move || {
        shell("ip link set lo up");
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    });
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) async fn bridge() -> Bridge {
    Bridge::ensure("lb0", ip("10.77.0.1"), "10.77.0.0/24".parse().unwrap()).await.unwrap()
}

#[test]
fn port_names_fit_an_interface_and_follow_the_sandbox() {
    let name = port_name("lambdalet_default_web_1b2c_0");
    assert!(name.len() <= 15 && name.starts_with(PORT_PREFIX), "{name}");
    assert_eq!(name, port_name("lambdalet_default_web_1b2c_0"));
    assert_ne!(name, port_name("lambdalet_default_web_1b2c_1"));
}

#[test]
fn hardware_addresses_are_local_unicast_and_follow_the_address() {
    assert_eq!(mac_of(ip("10.1.2.3")), [0x02, 0x6c, 10, 1, 2, 3]);
    assert_eq!(mac_of(ip("fd00::1"))[0], 0x02);
    assert_ne!(mac_of(ip("fd00::1")), mac_of(ip("fd00::2")));
}

#[test]
fn pods_reach_the_host_and_each_other_and_survive_a_second_plug() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let (a, b) = (Namespace::new(), Namespace::new());
        let begun = Instant::now();
        bridge.plug(a.tid, "sandbox-a", &[ip("10.77.0.2")]).await.unwrap();
        println!("first plug took {:?}", begun.elapsed());
        let begun = Instant::now();
        bridge.plug(b.tid, "sandbox-b", &[ip("10.77.0.3")]).await.unwrap();
        println!("second plug took {:?}", begun.elapsed());
        a.listen(ip("10.77.0.2"));
        assert_eq!(ask(ip("10.77.0.2")).unwrap(), "10.77.0.1");
        assert_eq!(b.ask(ip("10.77.0.2")).unwrap(), "10.77.0.3");
        assert_eq!(a.ask(ip("10.77.0.2")).unwrap(), "10.77.0.2");
        let before = a.sees("ip -o link show eth0");
        bridge.plug(a.tid, "sandbox-a", &[ip("10.77.0.2")]).await.unwrap();
        assert_eq!(a.sees("ip -o link show eth0"), before);
        assert!(before.contains("02:6c:0a:4d:00:02") && before.contains("mtu 1500"), "{before}");
        assert!(a.sees("ip route").contains("default via 10.77.0.1 dev eth0"));
        assert!(a.sees("ip -o addr show eth0").contains("10.77.0.2/24"));
        assert!(!a.sees("ip route").contains("10.77.0.0/24"));
        assert!(shell("bridge -d link show").contains("hairpin on"));
    });
}

#[test]
fn a_service_between_two_pods_of_the_node_needs_no_bridge_filtering() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let (a, b) = (Namespace::new(), Namespace::new());
        bridge.plug(a.tid, "sandbox-a", &[ip("10.77.0.2")]).await.unwrap();
        bridge.plug(b.tid, "sandbox-b", &[ip("10.77.0.3")]).await.unwrap();
        a.listen(ip("10.77.0.2"));
        shell("sysctl -q -w net.bridge.bridge-nf-call-iptables=0 2>/dev/null || true");
        shell("iptables -t nat -A PREROUTING -d 10.96.0.1 -p tcp -j DNAT --to-destination 10.77.0.2:80");
        assert_eq!(b.ask(ip("10.96.0.1")).unwrap(), "10.77.0.3");
    });
}

#[test]
fn pods_leave_the_node_under_its_address_and_pass_a_closed_forward_chain() {
    on_a_host(|| async {
        shell("iptables -P FORWARD DROP");
        // Beyond is another machine that knows the node and not the Pods.
        let beyond = Namespace::new();
        shell(&format!("ip link add up0 type veth peer name eth0 netns {}", beyond.tid));
        shell("ip addr add 192.0.2.1/24 dev up0 && ip link set up0 up");
        beyond.sees("ip addr add 192.0.2.9/24 dev eth0 && ip link set eth0 up");
        beyond.listen(ip("192.0.2.9"));
        let bridge = bridge().await;
        let pod = Namespace::new();
        bridge.plug(pod.tid, "sandbox", &[ip("10.77.0.2")]).await.unwrap();
        assert_eq!(pod.ask(ip("192.0.2.9")).unwrap(), "192.0.2.1");
        bridge.remove().await.unwrap();
    });
}

#[test]
fn thirty_plugs_at_once_are_quick_and_all_there() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let pods: Vec<Namespace> = (0..30).map(|_| Namespace::new()).collect();
        let begun = Instant::now();
        let plugs = pods.iter().zip(2_u8..).map(|(pod, last)| {
            let bridge = bridge.clone();
            async move { bridge.plug(pod.tid, &format!("s{last}"), &[[10, 77, 0, last].into()]).await.unwrap() }
        });
        futures::future::join_all(plugs).await;
        println!("thirty plugs took {:?}", begun.elapsed());
        let ports = || shell("ip -o link show master lb0").lines().count();
        let routes = || shell("ip -o route show dev lb0").lines().count();
        assert_eq!((ports(), routes()), (30, 30));
        let sandboxes: Vec<String> = (2..32).map(|last| format!("s{last}")).collect();
        let begun = Instant::now();
        futures::future::join_all(sandboxes.iter().map(|sandbox| bridge.unplug(sandbox))).await;
        println!("thirty unplugs took {:?}", begun.elapsed());
        assert_eq!((ports(), routes()), (0, 0));
    });
}

#[test]
fn a_remade_sandbox_is_reached_at_once_under_its_old_address() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let old = Namespace::new();
        bridge.plug(old.tid, "sandbox", &[ip("10.77.0.2")]).await.unwrap();
        old.listen(ip("10.77.0.2"));
        ask(ip("10.77.0.2")).unwrap();
        // The old namespace still lives: its cable must move.
        let new = Namespace::new();
        bridge.plug(new.tid, "sandbox", &[ip("10.77.0.2")]).await.unwrap();
        new.listen(ip("10.77.0.2"));
        let begun = Instant::now();
        ask(ip("10.77.0.2")).unwrap();
        assert!(begun.elapsed() < RETRANSMISSION, "{:?}", begun.elapsed());
        assert!(!old.sees("ip -o link").contains("eth0"));
        bridge.unplug("sandbox").await.unwrap();
        bridge.unplug("sandbox").await.unwrap();
        assert!(!new.sees("ip -o link").contains("eth0"));
    });
}

/// Less than a packet that is lost takes to be sent again: a second.
const RETRANSMISSION: Duration = Duration::from_millis(900);

/// How the address says no, and that it does so at once.
fn refusal(asked: impl FnOnce() -> Result<String, io::Error>) -> io::ErrorKind {
    let begun = Instant::now();
    let error = asked().unwrap_err();
    assert!(begun.elapsed() < RETRANSMISSION, "{error} took {:?}", begun.elapsed());
    error.kind()
}

#[test]
fn an_address_refuses_host_and_pods_at_once_unless_its_pod_is_plugged_in() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let (pod, neighbour) = (Namespace::new(), Namespace::new());
        bridge.plug(neighbour.tid, "neighbour", &[ip("10.77.0.3")]).await.unwrap();
        let refuses = |when: &str| {
            assert_eq!(refusal(|| ask(ip("10.77.0.2"))), io::ErrorKind::ConnectionRefused, "host, {when}");
            assert_eq!(refusal(|| neighbour.ask(ip("10.77.0.2"))), io::ErrorKind::ConnectionRefused, "Pod, {when}");
        };
        refuses("before anybody had it");
        bridge.plug(pod.tid, "sandbox", &[ip("10.77.0.2")]).await.unwrap();
        refuses("without a listener");
        pod.listen(ip("10.77.0.2"));
        ask(ip("10.77.0.2")).unwrap();
        neighbour.ask(ip("10.77.0.2")).unwrap();
        bridge.unplug("sandbox").await.unwrap();
        refuses("after its Pod was unplugged");
        // What the host sends to itself is not meant.
        let listener = TcpListener::bind("10.77.0.1:80").unwrap();
        thread::spawn(move || listener.accept().unwrap().0.write_all(b"host").unwrap());
        assert_eq!(neighbour.ask(ip("10.77.0.1")).unwrap(), "host");
        bridge.plug(pod.tid, "sandbox", &[ip("10.77.0.2")]).await.unwrap();
        ask(ip("10.77.0.2")).unwrap();
    });
}

#[test]
fn nothing_of_the_host_answers_for_a_pod_that_is_gone() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let neighbour = Namespace::new();
        bridge.plug(neighbour.tid, "neighbour", &[ip("10.77.0.3")]).await.unwrap();
        let everywhere = TcpListener::bind("0.0.0.0:80").unwrap();
        everywhere.set_nonblocking(true).unwrap();
        // As Docker and kube-proxy publish ports: on whatever address is local.
        for chain in ["PREROUTING", "OUTPUT"] {
            shell(&format!("iptables -t nat -A {chain} -p tcp -m addrtype --dst-type LOCAL -j REDIRECT --to-ports 80"));
        }
        assert_eq!(refusal(|| ask(ip("10.77.0.2"))), io::ErrorKind::ConnectionRefused);
        assert_eq!(refusal(|| neighbour.ask(ip("10.77.0.2"))), io::ErrorKind::ConnectionRefused);
        assert_eq!(everywhere.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    });
}

#[test]
fn a_connection_to_a_pod_that_is_unplugged_is_reset_by_the_next_packet() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let pod = Namespace::new();
        bridge.plug(pod.tid, "sandbox", &[ip("10.77.0.2")]).await.unwrap();
        let listener = pod.run(|| TcpListener::bind("10.77.0.2:80").unwrap());
        let mut stream = TcpStream::connect("10.77.0.2:80").unwrap();
        let _kept = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        bridge.unplug("sandbox").await.unwrap();
        let asked = || stream.write_all(b"hello").and_then(|()| stream.read(&mut [0]).map(|_| String::new()));
        assert_eq!(refusal(asked), io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn an_address_stays_with_the_sandbox_that_was_plugged_last() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let (old, new) = (Namespace::new(), Namespace::new());
        bridge.plug(old.tid, "old", &[ip("10.77.0.2")]).await.unwrap();
        bridge.unplug("old").await.unwrap();
        bridge.plug(new.tid, "new", &[ip("10.77.0.2")]).await.unwrap();
        new.listen(ip("10.77.0.2"));
        bridge.unplug("old").await.unwrap();
        ask(ip("10.77.0.2")).unwrap();
    });
}

#[test]
fn after_a_restart_an_address_refuses_whose_port_went_with_its_namespace() {
    on_a_host(|| async {
        let first = bridge().await;
        let (dead, live) = (Namespace::new(), Namespace::new());
        first.plug(dead.tid, "dead", &[ip("10.77.0.2")]).await.unwrap();
        first.plug(live.tid, "live", &[ip("10.77.0.3")]).await.unwrap();
        live.listen(ip("10.77.0.3"));
        // The kernel takes the port away when it gets round to ending the namespace.
        shell(&format!("ip link delete {}", port_name("dead")));
        assert!(shell("ip route").contains("10.77.0.2 dev lb0"), "the kernel knows nothing of the Pod");
        bridge().await;
        assert_eq!(refusal(|| ask(ip("10.77.0.2"))), io::ErrorKind::ConnectionRefused);
        ask(ip("10.77.0.3")).unwrap();
    });
}

#[test]
fn a_process_that_is_gone_or_on_the_host_network_is_refused() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let error = bridge.plug(i32::MAX, "x", &[ip("10.77.0.2")]).await.unwrap_err();
        assert!(matches!(error, NetworkError::Namespace { pid: i32::MAX, .. }), "{error}");
        let own = nix::unistd::gettid().as_raw();
        let error = bridge.plug(own, "x", &[ip("10.77.0.2")]).await.unwrap_err();
        assert!(crate::telemetry::chain(&error).contains("no network namespace of its own"), "{error}");
        assert!(!shell("ip -o link").contains("eth0"));
        assert!(!shell("ip -o link").contains("lv"));
    });
}

#[test]
fn ensure_twice_changes_nothing_and_remove_takes_exactly_its_own() {
    on_a_host(|| async {
        shell("iptables -N DOCKER-USER && iptables -A FORWARD -j DOCKER-USER && iptables -P FORWARD DROP");
        shell("iptables -A DOCKER-USER -i lb0 -m comment --comment 'somebody else' -j ACCEPT");
        let untouched = rules_of("iptables-save");
        let first = bridge().await;
        let made = rules_of("iptables-save");
        assert_eq!(made.iter().filter(|rule| rule.contains("lambdalet:lb0")).count(), 8, "{made:?}");
        let second = bridge().await;
        assert_eq!(rules_of("iptables-save"), made);
        assert_eq!(shell("cat /proc/sys/net/ipv4/ip_forward").trim(), "1");
        // The range changes: the old rule and address go.
        drop(second);
        let moved = Bridge::ensure("lb0", ip("10.78.0.1"), "10.78.0.0/24".parse().unwrap()).await.unwrap();
        let rules = shell("iptables-save");
        assert!(rules.contains("10.78.0.0/24") && !rules.contains("10.77.0.0/24"), "{rules}");
        let addresses = shell("ip -o -4 addr show lb0");
        assert!(addresses.contains("10.78.0.1/24") && !addresses.contains("10.77.0.1"), "{addresses}");
        moved.remove().await.unwrap();
        assert_eq!(rules_of("iptables-save"), untouched);
        assert!(!shell("ip -o link").contains("lb0"));
        assert_eq!(shell("ip route"), "");
        first.remove().await.unwrap();
    });
}

#[test]
fn names_that_are_taken_or_do_not_fit_are_refused() {
    on_a_host(|| async {
        shell("ip link add lb9 type veth peer name lb8");
        let range: IpNet = "10.77.0.0/24".parse().unwrap();
        let error = Bridge::ensure("lb9", ip("10.77.0.1"), range).await.unwrap_err();
        assert_eq!(error.to_string(), "interface lb9 exists and is not a bridge");
        for bad in ["", "a/b", "sixteen-letters-", "-t", "a b"] {
            let error = Bridge::ensure(bad, ip("10.77.0.1"), range).await.unwrap_err();
            assert!(matches!(error, NetworkError::BadName { .. }), "{error}");
        }
    });
}

#[test]
fn ipv6_works_as_well() {
    on_a_host(|| async {
        let bridge = Bridge::ensure("lb6", ip("fd77::1"), "fd77::/64".parse().unwrap()).await.unwrap();
        let pod = Namespace::new();
        bridge.plug(pod.tid, "six", &[ip("fd77::2")]).await.unwrap();
        bridge.plug(pod.tid, "six", &[ip("fd77::2")]).await.unwrap();
        pod.listen(ip("fd77::2"));
        assert_eq!(ask(ip("fd77::2")).unwrap(), "fd77::1");
        let neighbour = Namespace::new();
        bridge.plug(neighbour.tid, "seven", &[ip("fd77::3")]).await.unwrap();
        assert_eq!(neighbour.ask(ip("fd77::2")).unwrap(), "fd77::3");
        bridge.unplug("six").await.unwrap();
        assert_eq!(refusal(|| ask(ip("fd77::2"))), io::ErrorKind::HostUnreachable);
        let begun = Instant::now();
        assert_eq!(neighbour.ask(ip("fd77::2")).unwrap_err().kind(), io::ErrorKind::NetworkUnreachable);
        assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
        bridge.remove().await.unwrap();
    });
}

#[test]
fn ports_of_the_host_lead_to_a_pod_from_everywhere_until_they_are_closed() {
    on_a_host(|| async {
        let (gateway, loopback) = (ip("10.77.0.1"), ip("127.0.0.1"));
        let port = |host_ip| HostPort { protocol: Protocol::Tcp, host_ip, host_port: 80, pod_port: 80 };
        let bridge = bridge().await;
        let (a, b) = (Namespace::new(), Namespace::new());
        bridge.plug(a.tid, "sandbox-a", &[ip("10.77.0.2")]).await.unwrap();
        bridge.plug(b.tid, "sandbox-b", &[ip("10.77.0.3")]).await.unwrap();
        a.listen(ip("10.77.0.2"));
        bridge.open_ports("u-1", &[ip("10.77.0.2")], vec![port(None)]).await.unwrap();
        for at in [loopback, gateway] {
            ask(at).unwrap_or_else(|e| panic!("the host at {at}: {e}"));
        }
        assert_eq!(b.ask(gateway).unwrap(), "10.77.0.3");
        assert_eq!(a.ask(gateway).unwrap(), "10.77.0.1", "to itself, under the gateway's address");
        let rules = rules_of("iptables -t nat -S");
        bridge.open_ports("u-1", &[ip("10.77.0.2")], vec![port(None)]).await.unwrap();
        assert_eq!(rules_of("iptables -t nat -S"), rules, "a second time changes nothing");

        bridge.open_ports("u-1", &[ip("10.77.0.2")], vec![port(Some(loopback))]).await.unwrap();
        ask(loopback).unwrap();
        assert!(ask(gateway).is_err() && b.ask(gateway).is_err(), "open at one address only");
        // Another process finds them, and closes what it has found.
        let again = self::bridge().await;
        again.close_ports("u-1").await.unwrap();
        assert!(ask(loopback).is_err());
        assert!(!rules_of("iptables -t nat -S").iter().any(|rule| rule.contains("u-1")));
    });
}

#[test]
fn a_pod_with_an_address_of_each_family_is_reached_by_both_until_it_is_unplugged() {
    on_a_host(|| async {
        let ranges =
            || vec![(ip("10.77.0.1"), "10.77.0.0/24".parse().unwrap()), (ip("fd77::1"), "fd77::/64".parse().unwrap())];
        let bridge = Bridge::ensure_all("lb0", ranges(), Vec::new()).await.unwrap();
        let (a, b) = (Namespace::new(), Namespace::new());
        let (of_a, of_b) = ([ip("10.77.0.2"), ip("fd77::2")], [ip("10.77.0.3"), ip("fd77::3")]);
        bridge.plug(a.tid, "sandbox-a", &of_a).await.unwrap();
        bridge.plug(b.tid, "sandbox-b", &of_b).await.unwrap();
        bridge.plug(a.tid, "sandbox-a", &of_a).await.unwrap();
        of_a.iter().for_each(|address| a.listen(*address));
        for (at, from) in of_a.into_iter().zip(of_b) {
            ask(at).unwrap();
            assert_eq!(b.ask(at).unwrap(), from.to_string());
        }
        let port = HostPort { protocol: Protocol::Tcp, host_ip: None, host_port: 80, pod_port: 80 };
        bridge.open_ports("u-1", &of_a, vec![port]).await.unwrap();
        assert_eq!(b.ask(ip("10.77.0.1")).unwrap(), "10.77.0.3");
        assert_eq!(b.ask(ip("fd77::1")).unwrap(), "fd77::3");
        // Another process finds both families of the ports, and of the Pod that is left.
        let again = Bridge::ensure_all("lb0", ranges(), Vec::new()).await.unwrap();
        again.close_ports("u-1").await.unwrap();
        assert!(b.ask(ip("10.77.0.1")).is_err() && b.ask(ip("fd77::1")).is_err());
        ask(of_a[1]).unwrap();
        again.unplug("sandbox-a").await.unwrap();
        assert_eq!(refusal(|| ask(of_a[0])), io::ErrorKind::ConnectionRefused);
        assert_eq!(refusal(|| ask(of_a[1])), io::ErrorKind::HostUnreachable);
        again.remove().await.unwrap();
        assert_eq!(shell("ip route; ip -6 route | grep fd77 || true"), "");
        assert!(!shell("iptables-save; ip6tables-save").contains("lambdalet"));
    });
}

#[test]
fn ports_of_the_host_open_its_loopback_to_no_pod() {
    on_a_host(|| async {
        let port = HostPort { protocol: Protocol::Tcp, host_ip: None, host_port: 8080, pod_port: 80 };
        let bridge = bridge().await;
        let pod = Namespace::new();
        bridge.plug(pod.tid, "sandbox-a", &[ip("10.77.0.2")]).await.unwrap();
        bridge.open_ports("u-1", &[ip("10.77.0.2")], vec![port]).await.unwrap();
        let _own = TcpListener::bind("127.0.0.1:80").unwrap();
        // A Pod that is its network's root leads the addresses there, and takes the answers.
        pod.sees("echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet");
        pod.sees("ip addr flush dev lo; ip route replace 127.0.0.0/8 via 10.77.0.1");
        let own: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let reaches = || pod.run(move || TcpStream::connect_timeout(&own, Duration::from_secs(2)).is_ok());
        assert!(!reaches());
        shell("iptables -F INPUT");
        assert!(reaches(), "it is the rule that keeps it out");
    });
}
