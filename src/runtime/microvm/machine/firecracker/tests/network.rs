//! The network of a VMM: a namespace of its own, joined to the node's bridge. The test is the guest behind the stand-in's card.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::network::bridge::Bridge;
use crate::network::bridge::tests::taps::{interfaces_in, is_answered, question, taps_there, until_there};
use crate::network::bridge::tests::{bridge, on_a_host, shell};
use crate::network::tap::{Taps, mac_of};
use crate::runtime::microvm::machine::TapLink;

const OWN: [u8; 4] = [10, 77, 0, 2];
const OTHER: [u8; 4] = [10, 77, 0, 3];

/// A machine with a tap on the bridge.
async fn with_tap(spec: MachineSpec, bridge: &Bridge, manager: &Firecracker) -> MachineSpec {
    let TapUse::Named { uid } = manager.tap_use() else { panic!("Firecracker opens it by name") };
    let tap = bridge.make_tap(spec.dir.id().as_str(), Some(uid)).await.unwrap();
    let link = TapLink { name: tap.name, mac: mac_of(OWN.into()), device: tap.device, namespace: tap.namespace };
    MachineSpec { tap: Some(link), ..spec }
}

fn namespace_of(pid: i32) -> fs::File {
    fs::File::open(format!("/proc/{pid}/ns/net")).unwrap()
}

pub(super) fn is_of_the_host(pid: i32) -> bool {
    let own = fs::metadata("/proc/thread-self/ns/net").unwrap();
    namespace_of(pid).metadata().unwrap().ino() == own.ino()
}

/// Whether the guest is heard as itself, and as nobody else.
fn speaks_as_itself(card: &OwnedFd) -> bool {
    let mac = |address: [u8; 4]| mac_of(IpAddr::from(address));
    let forged = [question(mac(OWN), OTHER), question(mac(OTHER), OWN), question(mac(OTHER), OTHER)];
    is_answered(card, &question(mac(OWN), OWN)) && forged.iter().all(|frame| !is_answered(card, frame))
}

/// Leaves something in a machine's namespace that is seen from here for as long as that is there: of the name that is returned.
fn watch(pid: i32) -> &'static str {
    shell(&format!("ip link add seen0 type veth peer name seen1 netns {pid}"));
    "seen0"
}

async fn until_gone(interface: &str) {
    let gone = async {
        while shell("ip -o link").contains(interface) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(START_PATIENCE, gone).await.unwrap_or_else(|_| panic!("{}", shell("ip -o link")));
}

#[test]
fn a_vmm_has_its_tap_and_nothing_of_the_hosts_network_until_it_ends() {
    let Some(bench) = Bench::new() else { return };
    on_a_host(|| async move {
        let bridge = bridge().await;
        let mut spec = with_tap(bench.spec(), &bridge, &bench.manager).await;
        let name = spec.tap.as_ref().unwrap().name.clone();
        let id = spec.dir.id().to_string();
        let server = bench.stand_in(&spec);
        let machine = bench.manager.boot(&spec).await.unwrap();
        assert!(server.asked().contains(&"PUT /network-interfaces/eth0 -> 204".to_owned()), "{:?}", server.asked());
        assert!(!is_of_the_host(machine.pid()));
        assert_eq!(interfaces_in(namespace_of(machine.pid())), ["hub", "lo", &name, "out"]);
        assert!(shell("ip -o link show master lb0").contains(&format!(" {name}@")));

        // From here on the VMM alone keeps it, and the next process of the node finds it as it was.
        spec.tap = None;
        let card = server.take_card();
        assert!(!is_answered(&card, &question(mac_of(OWN.into()), OWN)), "it has no address yet");
        bridge.lead(&id, OWN.into()).await.unwrap();
        assert!(speaks_as_itself(&card));
        drop(machine);
        let machine = bench.manager.adopt(&spec.dir).await.unwrap().expect("it runs");
        assert!(speaks_as_itself(&card));

        let seen = watch(machine.pid());
        drop(card);
        machine.kill().await.unwrap();
        until_gone(seen).await;
        until_there(&[]);
        bridge.remove_tap(&id).await.unwrap();
        bridge.remove_tap(&id).await.unwrap();
        assert_eq!(bridge.remove_other_taps(&[]).await.unwrap(), 0);
    });
}

#[test]
fn one_that_is_restored_ahead_of_its_pod_has_a_namespace_of_its_own_too() {
    let Some(bench) = Bench::new() else { return };
    on_a_host(|| async move {
        let bridge = bridge().await;
        let templates = Templates::new(bench.place.path().join("templates"));
        let template = MachineSpec { template: Some(templates.begin().unwrap()), ..bench.spec() };
        let spec = with_tap(template, &bridge, &bench.manager).await;
        let server = bench.stand_in(&spec);
        let machine = bench.manager.boot(&spec).await.unwrap();
        let kind = bench.manager.template_kind(&spec).await.unwrap();
        drop(server.take_card());
        let template = templates.commit(machine.save().await.unwrap(), &kind).unwrap();
        bridge.remove_tap(spec.dir.id().as_str()).await.unwrap();

        let mut clone = with_tap(bench.spec(), &bridge, &bench.manager).await;
        let server = bench.stand_in(&clone);
        let mut machine = bench.manager.restore(&clone, &template).await.unwrap();
        assert_eq!(server.asked().last().unwrap(), "PUT /snapshot/load -> 204");
        let name = clone.tap.take().unwrap().name;
        assert!(!is_of_the_host(machine.pid()));
        assert_eq!(interfaces_in(namespace_of(machine.pid())), ["hub", "lo", &name, "out"]);
        machine.pause().await.unwrap();
        // It waits, and a Pod comes.
        let claimed = MachineSpec { cgroup_parent: format!("{}/pod", bench.cgroup), ..clone.clone() };
        machine.move_to(&claimed).await.unwrap();
        machine.resume().await.unwrap();
        bridge.lead(clone.dir.id().as_str(), OWN.into()).await.unwrap();
        let card = server.take_card();
        assert!(speaks_as_itself(&card));
        drop(card);
        machine.kill().await.unwrap();
        until_there(&[]);
    });
}

#[test]
fn nothing_is_left_of_the_network_of_one_that_did_not_start() {
    let Some(bench) = Bench::new() else { return };
    on_a_host(|| async move {
        let bridge = bridge().await;
        let spec = MachineSpec { vcpus: 33, ..with_tap(bench.spec(), &bridge, &bench.manager).await };
        let _server = bench.stand_in(&spec);
        bench.manager.boot(&spec).await.unwrap_err();
        assert_eq!(taps_there().len(), 1, "it may be tried again");
        drop(spec);
        until_there(&[]);

        // As a node that is killed leaves it: what held it open is closed.
        let spec = with_tap(bench.spec(), &bridge, &bench.manager).await;
        fs::write(&bench.manager.jailer, "#!/bin/sh\nexit 1\n").unwrap();
        bench.manager.boot(&spec).await.unwrap_err();
        drop(spec);
        until_there(&[]);
        assert_eq!(bridge.remove_other_taps(&[]).await.unwrap(), 2, "rules of theirs");
        assert_eq!(bridge.remove_other_taps(&[]).await.unwrap(), 0);
    });
}

#[tokio::test]
async fn one_without_a_card_has_no_network_at_all() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    let _server = bench.stand_in(&spec);
    let machine = bench.manager.boot(&spec).await.unwrap();
    assert!(!is_of_the_host(machine.pid()));
    assert_eq!(interfaces_in(namespace_of(machine.pid())), ["lo"]);
    machine.kill().await.unwrap();
}
