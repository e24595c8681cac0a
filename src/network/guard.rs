//! What a guest may send: frames from its own hardware address, packets and ARP from its own IP address, nothing else.
//!
//! It is asked where a frame enters the bridge, by rules that are the same for all taps and are made once, by `nft`. What
//! differs are elements of their sets: each begins with the name of its tap. So what is stale or to be removed is found
//! without remembering anything, and each change is one transaction that can be repeated.
//!
//! ```text
//! table bridge lambdalet_BRIDGE
//!   set taps        tap                     whom the rules are for; other ports are not looked at
//!   set sources4    tap . card . address    what it may say it is
//!   set sources6
//!   set targets6    tap . card . address    whom it may speak for as a neighbour
//!   chain guests    (prerouting)            what is in no set -> drop
//! ```

mod elements;

use std::io::{self, Write};
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use elements::Element;
use nix::errno::Errno;

use super::NetworkError;
use super::netlink::Mac;

const NFT: &str = "nft";
const TAPS: &str = "taps";
const SOURCES: &str = "sources4";
const SOURCES_6: &str = "sources6";
const TARGETS_6: &str = "targets6";
const SETS: [&str; 4] = [TAPS, SOURCES, SOURCES_6, TARGETS_6];
/// Bytes of the name of an interface, in a key.
const NAME: usize = 16;

/// Keeps the guests of one bridge to what they are.
#[derive(Debug)]
pub(super) struct Guard {
    table: String,
    /// Whether this process has made the rules; held by whoever changes something.
    made: Mutex<bool>,
}

/// Whether this host can guard guests at all; without machines nothing of it is needed.
pub(super) fn is_there() -> bool {
    run(&["--version"], "").is_ok()
}

// === impl Guard ===

impl Guard {
    /// That of this bridge. Nothing is there before the first tap is.
    pub(super) fn new(bridge: &str) -> Self {
        Self { table: format!("lambdalet_{bridge}"), made: Mutex::default() }
    }

    /// Lets the guest behind `tap` send as this one only; as nobody if it has no address yet.
    pub(super) fn set(&self, tap: &str, guest: Option<(Mac, IpAddr)>) -> Result<(), NetworkError> {
        let wanted = wanted(tap, guest);
        // True or false as a whole, so a panic elsewhere does not spoil it.
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if *made {
            match self.exchange(tap, &wanted) {
                // Somebody has emptied the host's tables.
                Err(error) if is_missing(&error) => {}
                outcome => return outcome.map_err(self.failed("guard", tap)),
            }
        }
        run(&["-f", "-"], &rules(&self.table))?;
        *made = true;
        self.exchange(tap, &wanted).map_err(self.failed("guard", tap))
    }

    /// Forgets a tap.
    pub(super) fn unset(&self, tap: &str) -> Result<(), NetworkError> {
        let _made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        match self.exchange(tap, &[]) {
            Err(error) if is_missing(&error) => Ok(()),
            outcome => outcome.map_err(self.failed("forget", tap)),
        }
    }

    /// Forgets all taps, and the rules.
    pub(super) fn remove(&self) -> Result<(), NetworkError> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        *made = false;
        run(&["-f", "-"], &format!("add table bridge {0}\ndelete table bridge {0}\n", self.table)).map(drop)
    }

    /// The taps there are elements for.
    pub(super) fn known(&self) -> Result<Vec<String>, NetworkError> {
        let taps = match elements::list(&self.table, TAPS) {
            Err(error) if is_missing(&error) => Vec::new(),
            taps => taps.map_err(self.failed("list", "all taps"))?,
        };
        Ok(taps.iter().map(|tap| String::from_utf8_lossy(&tap.key).trim_end_matches('\0').to_owned()).collect())
    }

    /// Puts these in the place of what there is of the tap.
    fn exchange(&self, tap: &str, wanted: &[Element]) -> io::Result<()> {
        let mut there = Vec::new();
        for set in SETS {
            there.extend(elements::list(&self.table, set)?);
        }
        there.retain(|element| element.key.starts_with(&name(tap)));
        let (added, removed) = difference(&there, wanted);
        elements::change(&self.table, &added, &removed)
    }

    fn failed(&self, action: &str, tap: &str) -> impl FnOnce(io::Error) -> NetworkError {
        let action = format!("{action} {tap} in the packet filter's table bridge {}", self.table);
        move |source| NetworkError::Kernel { action, source }
    }
}

fn is_missing(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ENOENT as i32)
}

/// What is wanted and not there, and what is there and not wanted.
fn difference(there: &[Element], wanted: &[Element]) -> (Vec<Element>, Vec<Element>) {
    let without = |some: &[Element], others: &[Element]| {
        some.iter().filter(|element| !others.contains(element)).cloned().collect::<Vec<_>>()
    };
    (without(wanted, there), without(there, wanted))
}

/// The name of a tap as keys begin with it.
fn name(tap: &str) -> [u8; NAME] {
    let mut name = [0; NAME];
    // Names of interfaces are shorter; the last byte stays 0.
    name.iter_mut().take(NAME - 1).zip(tap.bytes()).for_each(|(place, byte)| *place = byte);
    name
}

fn wanted(tap: &str, guest: Option<(Mac, IpAddr)>) -> Vec<Element> {
    let own = name(tap);
    let mut all = vec![Element { set: TAPS, key: own.to_vec() }];
    if let Some((mac, address)) = guest {
        // Each part of a key fills whole words.
        let key = |address: &[u8]| [&own[..], &mac, &[0; 2], address].concat();
        match address {
            IpAddr::V4(address) => all.push(Element { set: SOURCES, key: key(&address.octets()) }),
            IpAddr::V6(address) => {
                all.extend([SOURCES_6, TARGETS_6].map(|set| Element { set, key: key(&address.octets()) }));
            }
        }
    }
    all
}

/// Makes table, sets and rules; what is in the sets stays, and frames meet the old rules or the new.
fn rules(table: &str) -> String {
    let mut script = format!("add table bridge {table}\n");
    for (set, parts) in [
        (TAPS, "type ifname"),
        (SOURCES, "typeof iifname . ether saddr . ip saddr"),
        (SOURCES_6, "typeof iifname . ether saddr . ip6 saddr"),
        // A neighbour says whom it speaks for behind the first eight bytes of its message.
        (TARGETS_6, "typeof iifname . ether saddr . @th,64,128"),
    ] {
        script += &format!("add set bridge {table} {set} {{ {parts}; }}\n");
    }
    // Before the rules of anybody else, so that none lets through what is forged.
    let chain = "type filter hook prerouting priority -300; policy accept;";
    script += &format!("add chain bridge {table} guests {{ {chain} }}\nflush chain bridge {table} guests\n");
    for rule in [
        format!("iifname != @{TAPS} accept"),
        format!("iifname . ether saddr . ip saddr @{SOURCES} accept"),
        // Twice: the card that has sent it, and the one it tells of.
        format!(
            "iifname . ether saddr . arp saddr ip @{SOURCES} iifname . arp saddr ether . arp saddr ip @{SOURCES} accept"
        ),
        format!("icmpv6 type nd-neighbor-advert iifname . ether saddr . @th,64,128 != @{TARGETS_6} drop"),
        format!("iifname . ether saddr . ip6 saddr @{SOURCES_6} accept"),
        "counter drop".to_owned(),
    ] {
        script += &format!("add rule bridge {table} guests {rule}\n");
    }
    script
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

    const TAP: &str = "lt0123456789ab";

    #[test]
    fn a_key_is_the_tap_then_the_card_then_the_address_in_whole_words() {
        let own = b"lt0123456789ab\0\0";
        assert_eq!(wanted(TAP, None), [Element { set: TAPS, key: own.to_vec() }]);
        let mac = [2, 108, 10, 1, 2, 3];
        let four = wanted(TAP, Some((mac, "10.1.2.3".parse().unwrap())));
        let key = [&own[..], &[2, 108, 10, 1, 2, 3, 0, 0, 10, 1, 2, 3]].concat();
        assert_eq!(four[1..], [Element { set: SOURCES, key }]);
        let six = wanted(TAP, Some((mac, "fd00::1".parse().unwrap())));
        assert_eq!(six.iter().map(|element| element.set).collect::<Vec<_>>(), [TAPS, SOURCES_6, TARGETS_6]);
        assert_eq!(six[1].key.len(), 40);
        assert_eq!(name("a-name-that-is-too-long")[NAME - 1], 0);
    }

    #[test]
    fn an_address_that_is_given_up_is_removed_with_the_new_one_added() {
        let of = |address: &str| wanted(TAP, Some(([2; 6], address.parse().unwrap())));
        let (added, removed) = difference(&of("10.0.0.1"), &of("10.0.0.2"));
        assert_eq!((added, removed), (of("10.0.0.2")[1..].to_vec(), of("10.0.0.1")[1..].to_vec()));
        assert_eq!(difference(&of("fd00::1"), &[]), (Vec::new(), of("fd00::1")));
        assert_eq!(difference(&of("fd00::1"), &of("fd00::1")), (Vec::new(), Vec::new()));
    }

    #[test]
    fn whatever_no_rule_lets_through_is_dropped() {
        let rules = rules("lambdalet_lb0");
        let of_chain: Vec<&str> =
            rules.lines().filter_map(|line| line.strip_prefix("add rule bridge lambdalet_lb0 guests ")).collect();
        assert_eq!(of_chain.first(), Some(&"iifname != @taps accept"));
        assert_eq!(of_chain.last(), Some(&"counter drop"));
    }
}
