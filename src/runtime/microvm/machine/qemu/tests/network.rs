//! A guest on the node's bridge.

use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::network::bridge::Bridge;
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
