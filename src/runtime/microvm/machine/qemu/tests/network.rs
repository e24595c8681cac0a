//! A guest on the node's bridge.

use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::network::bridge::Bridge;
use crate::network::ports::{HostPort, Protocol};
use crate::network::tap::{Taps, mac_of};

fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn text(mac: [u8; 6]) -> String {
    command::mac(mac)
}

/// Runs the test on a thread with a network of its own, as if that were a host.
fn on_a_host(test: impl Future<Output = ()> + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        sh("ip link set lo up");
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    };
    std::thread::spawn(run).join().unwrap();
}

async fn greeted(address: IpAddr) -> String {
    // Its server starts a moment after it said so.
    let begun = Instant::now();
    loop {
        match TcpStream::connect_timeout(&SocketAddr::new(address, 80), Duration::from_secs(5)) {
            Ok(mut stream) => {
                let mut said = String::new();
                stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                stream.read_to_string(&mut said).unwrap();
                return said.trim().to_owned();
            }
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{address}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn a_guest_is_reached_at_its_address_and_cannot_be_another() {
    let Some(bench) = Bench::new() else { return };
    on_a_host(async move {
        let bridge =
            Bridge::ensure("lbvm", "10.78.0.1".parse().unwrap(), "10.78.0.0/24".parse().unwrap()).await.unwrap();
        let address: IpAddr = "10.78.0.2".parse().unwrap();
        let mac = mac_of(address);
        let mut spec = bench.spec();
        let id = spec.dir.id().to_string();
        let tap = bridge.make_tap(&id, None).await.unwrap();
        let name = tap.name.clone();
        spec.tap = Some(link(tap, mac));
        let machine = bench.qemu.boot(&spec).await.unwrap();
        spec.tap = None;
        bridge.lead(&id, address).await.unwrap();
        let mut guest = Guest::of(machine.as_ref()).await;
        guest.ready().await;
        assert_eq!(guest.ask(&format!("net {} 10.78.0.2/24", text(mac))).await, "ok");
        guest.ask("sh nc -ll -p 80 -e echo hello >/dev/null 2>&1 &").await;
        assert_eq!(greeted(address).await, "hello");

        // As another address, and as another card, it reaches nobody; as itself it does.
        let ping = "sh ping -c 1 -W 2 10.78.0.1 >/dev/null 2>&1 && echo reached || echo lost";
        assert_eq!(guest.ask(ping).await, "reached;");
        guest.ask(&format!("net {} 10.78.0.3/24", text(mac))).await;
        assert_eq!(guest.ask(ping).await, "lost;");
        guest.ask(&format!("net {} 10.78.0.2/24", text(mac_of("10.78.0.3".parse().unwrap())))).await;
        assert_eq!(guest.ask(ping).await, "lost;");
        guest.ask(&format!("net {} 10.78.0.2/24", text(mac))).await;
        assert_eq!(guest.ask(ping).await, "reached;");
        let dropped = sh("nft list table bridge lambdalet_lbvm");
        println!("{dropped}");
        assert!(dropped.contains("counter packets ") && !dropped.contains("counter packets 0 "), "{dropped}");

        // Its tap ends with it; what is left of it is removed, however often.
        machine.kill().await.unwrap();
        let begun = Instant::now();
        while sh("ip -o link").contains(&name) {
            assert!(begun.elapsed() < PATIENCE, "the tap outlives the machine");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(bridge.remove_other_taps(&[]).await.unwrap(), 1);
        bridge.remove_tap(&id).await.unwrap();
        assert_eq!(bridge.remove_other_taps(&[]).await.unwrap(), 0);
        bridge.remove().await.unwrap();
    });
}

/// Somebody who listens there, and hangs up on whoever comes; the port.
fn listens(address: &str) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    port
}

/// Whether the guest can connect there.
async fn scan(guest: &mut Guest, address: &str, port: u16) -> String {
    let found = guest.ask(&format!("sh nc -w 5 {address} {port} </dev/null && echo open || echo closed")).await;
    found.trim_end_matches(';').rsplit(';').next().unwrap_or_default().to_owned()
}

/// What somebody finds who scans the host from a guest: the ports of the Pod network, as from any Pod, and none of those that
/// the host keeps to itself.
#[test]
fn a_scan_of_the_host_finds_no_port_of_its_own() {
    let Some(bench) = Bench::new() else { return };
    on_a_host(async move {
        let bridge =
            Bridge::ensure("lbvm", "10.78.0.1".parse().unwrap(), "10.78.0.0/24".parse().unwrap()).await.unwrap();
        let address: IpAddr = "10.78.0.2".parse().unwrap();
        let mut spec = bench.spec();
        let id = spec.dir.id().to_string();
        spec.tap = Some(link(bridge.make_tap(&id, None).await.unwrap(), mac_of(address)));
        let machine = bench.qemu.boot(&spec).await.unwrap();
        spec.tap = None;
        bridge.lead(&id, address).await.unwrap();
        // In the place of the API of a node or a VMM: on the loopback, and the host has an address in another network.
        sh("ip addr add 192.0.2.1/32 dev lo");
        let (open, own) = (listens("10.78.0.1"), [listens("127.0.0.1"), listens("::1")]);
        let mut guest = Guest::of(machine.as_ref()).await;
        guest.ready().await;
        let mac = text(mac_of(address));
        guest.ask(&format!("net {mac} 10.78.0.2/24")).await;
        guest.ask("sh ip route add default via 10.78.0.1").await;

        assert_eq!(scan(&mut guest, "10.78.0.1", open).await, "open", "a scan finds what is there");
        for port in own {
            for address in ["10.78.0.1", "192.0.2.1"] {
                assert_eq!(scan(&mut guest, address, port).await, "closed", "{address} {port}");
            }
        }
        // The VMM's own sockets are files, and its network is empty.
        let listening = sh("ss -Hltn");
        assert_eq!(listening.lines().count(), 3, "{listening}");
        let inside = fs::read_to_string(format!("/proc/{}/net/tcp", machine.pid())).unwrap();
        assert_eq!(inside.lines().count(), 1, "{inside}");
        loopback_is_out_of_reach(&bridge, &mut guest, own[0]).await;
        machine.kill().await.unwrap();
        bridge.remove_tap(&id).await.unwrap();
        bridge.remove().await.unwrap();
    });
}

/// The host's loopback is not reached by a guest that leads its addresses to the host, not even where a port of the host
/// leads to a Pod: then the bridge takes packets for them.
async fn loopback_is_out_of_reach(bridge: &Bridge, guest: &mut Guest, own: u16) {
    let leading = HostPort { protocol: Protocol::Tcp, host_ip: None, host_port: 8080, pod_port: 80 };
    bridge.open_ports("pod", &["10.78.0.2".parse().unwrap()], vec![leading]).await.unwrap();
    let routed = "echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet; ip link set lo down; \
                  ip route add 127.0.0.0/8 via 10.78.0.1";
    guest.ask(&format!("sh {routed}")).await;
    assert_eq!(scan(guest, "127.0.0.1", own).await, "closed");
    sh("iptables -F INPUT");
    assert_eq!(scan(guest, "127.0.0.1", own).await, "open", "it is a rule that keeps it out");
}
