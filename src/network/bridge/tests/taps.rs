//! Taps, with the test in the place of a guest: it writes frames to the device and reads what comes.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;

use super::*;
use crate::network::tap::{Mac, Taps};

/// The user that opens a tap by its name.
const VMM: u32 = 65520;

/// A question by ARP from this card as this address: who is the gateway?
pub(crate) fn question(mac: Mac, from: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(from);
    frame.extend([0; 6]);
    frame.extend([10, 77, 0, 1]);
    frame
}

/// Whether the host answers.
pub(crate) fn is_answered(device: &OwnedFd, frame: &[u8]) -> bool {
    rustix::io::write(device, frame).unwrap();
    let end = Instant::now() + Duration::from_millis(500);
    while Instant::now() < end {
        let mut polled = [nix::poll::PollFd::new(device.as_fd(), nix::poll::PollFlags::POLLIN)];
        if nix::poll::poll(&mut polled, 50_u16).unwrap() == 0 {
            continue;
        }
        let mut read = [0; 2048];
        let length = rustix::io::read(device, &mut read).unwrap();
        // An answer by ARP, to us.
        if length >= 42 && read[12..14] == [0x08, 0x06] && read[20..22] == [0, 2] && read[..6] == frame[6..12] {
            return true;
        }
    }
    false
}

/// Does the work in a network namespace, on a thread that ends with it.
fn within<T: Send>(namespace: impl AsFd, work: impl FnOnce() -> T + Send) -> T {
    let namespace = namespace.as_fd();
    let run = || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        work()
    };
    thread::scope(|scope| scope.spawn(run).join().unwrap())
}

/// Opens the tap of that name in a network namespace, as a process of that user does which is in it.
pub(crate) fn open_by_name(namespace: impl AsFd, name: &str, user: u32) -> io::Result<OwnedFd> {
    // `linux/if_tun.h`: TUNSETIFF for IFF_TAP and IFF_NO_PI. Whoever asks has to be the user, and that is a process.
    let ask = "my $device = pack('a16sx22', $ARGV[0], 0x1002); ioctl(STDIN, 0x400454ca, $device) or die";
    within(namespace, || {
        let device = File::options().read(true).write(true).open("/dev/net/tun")?;
        let mut perl = Command::new("perl");
        perl.args(["-e", ask, name]).uid(user).gid(user).stdin(device.try_clone()?);
        let output = perl.output()?;
        let refused = || io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned());
        output.status.success().then(|| device.into()).ok_or_else(refused)
    })
}

/// What a command says in a network namespace.
pub(crate) fn said_in(namespace: impl AsFd, command: &str) -> String {
    within(namespace, || shell(command))
}

/// The names of the interfaces in a network namespace.
pub(crate) fn interfaces_in(namespace: impl AsFd) -> Vec<String> {
    let listed = said_in(namespace, "ip -o link");
    let name = |line: &str| line.split([':', '@']).nth(1).unwrap().trim().to_owned();
    let mut names: Vec<String> = listed.lines().map(name).collect();
    names.sort();
    names
}

pub(crate) fn taps_there() -> Vec<String> {
    let mut host = open_netlink().unwrap();
    host.links().unwrap().into_iter().map(|link| link.name).filter(|name| name.starts_with("lt")).collect()
}

/// Has a guest of this name, behind this device, try to be somebody else.
async fn try_to_be_another(bridge: Bridge, guest: &str, device: &OwnedFd) {
    let (own, other) = ([10, 77, 0, 2], [10, 77, 0, 3]);
    let mac = mac_of(IpAddr::from(own));
    assert!(!is_answered(device, &question(mac, own)), "it has no address yet");
    bridge.lead(guest, IpAddr::from(own)).await.unwrap();
    assert!(is_answered(device, &question(mac, own)));
    assert!(!is_answered(device, &question(mac, other)), "another's address");
    assert!(!is_answered(device, &question(mac_of(IpAddr::from(other)), own)), "another's card");
    let mut lies = question(mac, own);
    lies[22..28].copy_from_slice(&mac_of(IpAddr::from(other)));
    assert!(!is_answered(device, &lies), "another's card inside");
    let mut tagged = question(mac, own);
    tagged.splice(12..12, [0x81, 0, 0, 1]);
    assert!(!is_answered(device, &tagged), "in another network");
    assert!(is_answered(device, &question(mac, own)));
    bridge.lead(guest, IpAddr::from(other)).await.unwrap();
    assert!(!is_answered(device, &question(mac, own)), "an address it had before");
    assert!(is_answered(device, &question(mac_of(IpAddr::from(other)), other)));
    let routes = shell("ip route show dev lb0");
    assert!(routes.contains("10.77.0.3") && !routes.contains("10.77.0.2"), "{routes}");
    bridge.remove().await.unwrap();
    assert!(!shell("nft list tables").contains("lambdalet_lb0"));
}

#[test]
fn a_guest_speaks_as_itself_or_not_at_all() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let tap = bridge.make_tap("vm-a", None).await.unwrap();
        try_to_be_another(bridge, "vm-a", &tap.device.unwrap()).await;
    });
}

#[test]
fn so_does_one_behind_a_tap_in_a_namespace_of_its_own() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let tap = bridge.make_tap("vm-a", Some(VMM)).await.unwrap();
        let device = open_by_name(tap.namespace.as_ref().unwrap(), &tap.name, VMM).unwrap();
        try_to_be_another(bridge, "vm-a", &device).await;
    });
}

#[test]
fn beside_a_named_tap_there_is_what_joins_it_and_no_address() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let tap = bridge.make_tap("vm-a", Some(VMM)).await.unwrap();
        let (namespace, name) = (tap.namespace.unwrap(), tap.name);
        assert_eq!(interfaces_in(&namespace), ["hub", "lo", &name, "out"]);
        let device = said_in(&namespace, &format!("ip -d link show {name}"));
        assert!(device.contains("tun type tap") && device.contains("mtu 1500"), "{device}");
        let port = shell(&format!("ip -d link show {name}"));
        assert!(port.contains("veth") && port.contains("master lb0"), "{port}");
        let late = bridge.lead("vm-a", ip("10.77.0.2")).await.unwrap_err();
        assert!(matches!(&late, NetworkError::Kernel { source, .. } if source.kind() == io::ErrorKind::TimedOut));
        for (name, user) in [(&*name, VMM + 1), ("lt0", VMM)] {
            let refused = open_by_name(&namespace, name, user).unwrap_err().to_string();
            assert!(refused.contains("Died"), "{refused}");
        }
        let device = open_by_name(&namespace, &name, VMM).unwrap();
        bridge.lead("vm-a", ip("10.77.0.2")).await.unwrap();
        // With everything up, when the kernel gives addresses of itself.
        assert_eq!(said_in(&namespace, "ip -o addr; ip -6 -o addr"), "");
        drop(device);
    });
}

/// Waits until these are there: a process that another test is just starting may hold a device for a moment longer, and the
/// kernel takes a namespace down behind whoever leaves it.
pub(crate) fn until_there(taps: &[&str]) {
    let begun = Instant::now();
    while taps_there() != taps {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", taps_there());
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_handed_tap_ends_with_its_device_and_a_named_one_with_its_namespace() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let handed = bridge.make_tap("vm-a", None).await.unwrap();
        let named = bridge.make_tap("vm-b", Some(VMM)).await.unwrap();
        assert!(named.device.is_none() && handed.namespace.is_none());
        assert_eq!(taps_there().len(), 2);
        drop(handed);
        until_there(&[&named.name]);
        let opened = open_by_name(named.namespace.as_ref().unwrap(), &named.name, VMM).unwrap();
        drop(named.namespace);
        assert_eq!(taps_there(), [&*named.name], "it is in use");
        drop(opened);
        until_there(&[]);
        let before = bridge.make_tap("vm-b", Some(VMM)).await.unwrap();
        let again = bridge.make_tap("vm-b", Some(VMM)).await.unwrap();
        assert_eq!(taps_there().len(), 1, "one of that name is replaced");
        assert_eq!(interfaces_in(before.namespace.as_ref().unwrap()), ["hub", "lo", &before.name], "its cable is gone");
        drop((before, again));
        until_there(&[]);
        bridge.remove_tap("vm-a").await.unwrap();
        bridge.remove_tap("vm-a").await.unwrap();
        bridge.remove_tap("vm-b").await.unwrap();
        until_there(&[]);
        assert!(matches!(bridge.lead("vm-b", ip("10.77.0.9")).await, Err(NetworkError::Kernel { .. })));
    });
}

#[test]
fn what_an_earlier_process_left_is_found_by_name() {
    on_a_host(|| async {
        let bridge = bridge().await;
        assert_eq!(bridge.remove_other_taps(&[]).await.unwrap(), 0);
        let left = bridge.make_tap("vm-a", Some(1)).await.unwrap();
        let kept = bridge.make_tap("vm-b", Some(1)).await.unwrap();
        // Of this one only the rules are left.
        drop(bridge.make_tap("vm-c", None).await.unwrap());
        let pod = Namespace::new();
        bridge.plug(pod.tid, "sandbox-a", &[ip("10.77.0.2")]).await.unwrap();
        assert_eq!(bridge.remove_other_taps(&["vm-b".to_owned()]).await.unwrap(), 2);
        assert_eq!(taps_there(), [kept.name]);
        assert!(!interfaces_in(left.namespace.unwrap()).contains(&"out".to_owned()));
        assert!(shell("ip -o link").contains(" lv"), "a cable is no tap");
        assert_eq!(bridge.remove_other_taps(&["vm-b".to_owned()]).await.unwrap(), 0);
    });
}

#[test]
fn rules_that_somebody_has_removed_are_there_again_with_the_next_change() {
    on_a_host(|| async {
        let bridge = bridge().await;
        let device = bridge.make_tap("vm-a", None).await.unwrap().device.unwrap();
        let (own, other) = ([10, 77, 0, 2], [10, 77, 0, 3]);
        let mac = mac_of(IpAddr::from(own));
        shell("nft delete table bridge lambdalet_lb0");
        bridge.lead("vm-a", IpAddr::from(own)).await.unwrap();
        assert!(is_answered(&device, &question(mac, own)));
        assert!(!is_answered(&device, &question(mac, other)), "another's address");
        shell("nft delete table bridge lambdalet_lb0");
        bridge.remove_tap("vm-a").await.unwrap();
        assert_eq!(bridge.remove_other_taps(&[]).await.unwrap(), 0);
    });
}

#[test]
fn rules_are_told_apart_among_hundreds() {
    on_a_host(|| async {
        // More than one answer of the kernel holds.
        let guard = Guard::new("lb0");
        let names: Vec<String> = (0..300).map(|number| format!("lt{number:012x}")).collect();
        for (name, last) in names.iter().zip(0_u16..) {
            let [high, low] = last.to_be_bytes();
            let address = IpAddr::from([10, 78, high, low]);
            guard.set(name, Some((mac_of(address), address))).unwrap();
        }
        let mut known = guard.known().unwrap();
        known.sort();
        assert_eq!(known, names);
        let sources = || shell("nft list set bridge lambdalet_lb0 sources4");
        assert!(sources().contains("10.78.1.43"), "{}", sources());
        guard.set(&names[299], None).unwrap();
        assert!(!sources().contains("10.78.1.43") && sources().contains("10.78.1.42"), "{}", sources());
        for name in &names[1..] {
            guard.unset(name).unwrap();
        }
        assert_eq!(guard.known().unwrap(), names[..1]);
        assert_eq!(sources().matches("10.78.").count(), 1, "{}", sources());
    });
}
