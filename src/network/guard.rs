//! What a guest may send: frames from its own hardware address, packets and ARP from its own IP address, nothing else.
//!
//! It is asked where a frame enters the bridge, by `nft`: each tap has a chain of its own, named like it, and a map
//! leads to it. So what is stale or to be removed is found without remembering anything, and each change is one
//! transaction that can be repeated.
//!
//! ```text
//! table bridge lambdalet_BRIDGE
//!   chain guests   (prerouting)   iifname -> chain of that tap; other ports are not looked at
//!   chain TAP      wrong source -> drop; right source -> accept; whatever it is -> drop
//! ```

use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use super::NetworkError;
use super::netlink::Mac;

const NFT: &str = "nft";

/// Whether this host can guard guests at all; without machines nothing of it is needed.
pub(super) fn is_there() -> bool {
    run(&["--version"], "").is_ok()
}

/// Lets the guest behind `tap` send as this one only; as nobody if it has no address yet.
pub(super) fn set(bridge: &str, tap: &str, guest: Option<(Mac, IpAddr)>) -> Result<(), NetworkError> {
    apply(&set_script(bridge, tap, guest))
}

/// Forgets a tap.
pub(super) fn unset(bridge: &str, tap: &str) -> Result<(), NetworkError> {
    apply(&unset_script(bridge, tap))
}

/// Forgets all taps of a bridge.
pub(super) fn remove(bridge: &str) -> Result<(), NetworkError> {
    let table = table(bridge);
    apply(&format!("add table {table}\ndelete table {table}\n"))
}

/// The taps there are rules for.
pub(super) fn known(bridge: &str) -> Result<Vec<String>, NetworkError> {
    let arguments = ["list", "tables", "bridge"];
    let table = table(bridge);
    if !run(&arguments, "")?.lines().any(|line| line.strip_prefix("table ") == Some(&table)) {
        return Ok(Vec::new());
    }
    let arguments: Vec<&str> = ["list", "table"].into_iter().chain(table.split(' ')).collect();
    Ok(chains(&run(&arguments, "")?))
}

fn table(bridge: &str) -> String {
    format!("bridge lambdalet_{bridge}")
}

fn chains(listed: &str) -> Vec<String> {
    let name = |line: &str| line.trim().strip_prefix("chain ")?.strip_suffix(" {").map(str::to_owned);
    listed.lines().filter_map(name).filter(|name| name != "guests").collect()
}

fn base(table: &str) -> String {
    format!("add table {table}\nadd map {table} taps {{ type ifname : verdict; }}\n")
}

fn set_script(bridge: &str, tap: &str, guest: Option<(Mac, IpAddr)>) -> String {
    let table = table(bridge);
    let mut script = base(&table);
    // Before the rules of anybody else, so that none lets through what is forged.
    script += &format!("add chain {table} guests {{ type filter hook prerouting priority -300; policy accept; }}\n");
    script += &format!("flush chain {table} guests\nadd rule {table} guests iifname vmap @taps\n");
    script += &format!("add chain {table} {tap}\nflush chain {table} {tap}\n");
    let mut rule = |text: &str| script += &format!("add rule {table} {tap} {text}\n");
    match guest {
        Some((mac, IpAddr::V4(address))) => {
            let mac = text(mac);
            rule(&format!("ether saddr != {mac} counter drop"));
            rule(&format!("ether type arp arp saddr ether {mac} arp saddr ip {address} accept"));
            rule(&format!("ip saddr {address} accept"));
        }
        Some((mac, IpAddr::V6(address))) => {
            rule(&format!("ether saddr != {} counter drop", text(mac)));
            // A neighbour that says it is another: the target follows the first eight bytes of the message.
            let target = format!("{:#034x}", u128::from(address));
            rule(&format!("icmpv6 type nd-neighbor-advert @th,64,128 != {target} counter drop"));
            rule(&format!("ip6 saddr {address} accept"));
        }
        None => {}
    }
    rule("counter drop");
    script + &format!("add element {table} taps {{ \"{tap}\" : jump {tap} }}\n")
}

/// What is to go is made first, since to delete what is not there would fail.
fn unset_script(bridge: &str, tap: &str) -> String {
    let table = table(bridge);
    let element = format!("{table} taps {{ \"{tap}\"");
    base(&table)
        + &format!("add chain {table} {tap}\nadd element {element} : jump {tap} }}\ndelete element {element} }}\n")
        + &format!("flush chain {table} {tap}\ndelete chain {table} {tap}\n")
}

fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn apply(script: &str) -> Result<(), NetworkError> {
    run(&["-f", "-"], script).map(|_| ())
}

fn run(arguments: &[&str], input: &str) -> Result<String, NetworkError> {
    let line = format!("{NFT} {}", arguments.join(" "));
    let failed = |source| NetworkError::Command { command: line.clone(), source };
    let mut command = Command::new(NFT);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A few lines, which fit the pipe; a command that does not read them says why in its own words.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(NetworkError::CommandFailed { command: line, output });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_with_an_address_may_use_that_alone() {
        let script = set_script("lb0", "lt1", Some(([2, 108, 10, 1, 2, 3], "10.1.2.3".parse().unwrap())));
        let rules: Vec<&str> =
            script.lines().filter_map(|l| l.strip_prefix("add rule bridge lambdalet_lb0 lt1 ")).collect();
        assert_eq!(
            rules,
            [
                "ether saddr != 02:6c:0a:01:02:03 counter drop",
                "ether type arp arp saddr ether 02:6c:0a:01:02:03 arp saddr ip 10.1.2.3 accept",
                "ip saddr 10.1.2.3 accept",
                "counter drop",
            ]
        );
        let script = set_script("lb0", "lt1", Some(([2; 6], "fd00::1".parse().unwrap())));
        assert!(script.contains("@th,64,128 != 0xfd000000000000000000000000000001 "), "{script}");
        let nobody = set_script("lb0", "lt1", None);
        let rules: Vec<&str> =
            nobody.lines().filter(|line| line.starts_with("add rule bridge lambdalet_lb0 lt1 ")).collect();
        assert_eq!(rules, ["add rule bridge lambdalet_lb0 lt1 counter drop"]);
    }

    #[test]
    fn chains_are_read_from_a_listing() {
        let listed =
            "table bridge lambdalet_lb0 {\n\tmap taps {\n\t}\n\n\tchain guests {\n\t}\n\n\tchain lt1 {\n\t}\n}\n";
        assert_eq!(chains(listed), ["lt1"]);
    }
}
