//! The packet filter rules of a bridge: Pods may talk to everybody but the host's loopback, and leave the node under its own
//! address; what is sent to an address that no Pod has ([`super::routes`] leads it nowhere) is refused as a closed port is.
//!
//! The `iptables` command is the interface, since it speaks to whichever back end the host uses. Each rule carries a
//! comment that names the bridge, so what is stale or to be removed is found without remembering anything.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use ipnet::IpNet;

use super::routes::NOWHERE;
use super::{NetworkError, ports};

/// Where rules that accept forwarded packets go. Docker sets the policy of FORWARD to DROP and keeps this chain, which
/// it never flushes, for rules of others that come before its own.
const DOCKER_CHAIN: &str = "DOCKER-USER";
/// Seconds to wait for another `iptables` that holds the lock.
const LOCK_WAIT: &str = "10";

/// One rule: its table, its chain, whether it goes to the front of the chain, and its text as `iptables -S` prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) table: &'static str,
    pub(super) chain: String,
    pub(super) first: bool,
    pub(super) text: Vec<String>,
}

/// Makes the rules of this bridge be there, each once, and removes older ones of it that differ. Returns the Pods that
/// ports of the host lead to. What goes to `cluster` leaves the node with the Pod's address as its source.
pub(super) fn ensure(bridge: &str, range: IpNet, cluster: Option<IpNet>) -> Result<BTreeSet<String>, NetworkError> {
    let command = command_for(range.addr());
    let listed = list(command)?;
    let wanted = wanted(bridge, (range, cluster), has_docker_chain(&listed));
    reconcile(command, &tagged(&comment(bridge), &listed), &wanted)?;
    Ok(ports::open(bridge, &listed))
}

/// Removes every rule of this bridge, and those of its Pods.
pub(super) fn remove(bridge: &str, range: IpNet) -> Result<(), NetworkError> {
    let command = command_for(range.addr());
    let listed = list(command)?;
    for key in ports::open(bridge, &listed) {
        reconcile(command, &tagged(&ports::tag(bridge, &key), &listed), &[])?;
    }
    reconcile(command, &tagged(&comment(bridge), &listed), &[]).map(|_| ())
}

/// Makes these and no others be the rules with that comment. Returns those that were added or removed.
pub(super) fn settle(range: IpNet, comment: &str, wanted: &[Rule]) -> Result<Vec<Rule>, NetworkError> {
    let command = command_for(range.addr());
    reconcile(command, &tagged(comment, &list(command)?), wanted)
}

fn command_for(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "iptables" } else { "ip6tables" }
}

fn wanted(bridge: &str, (range, cluster): (IpNet, Option<IpNet>), docker: bool) -> Vec<Rule> {
    let comment = comment(bridge);
    let rule = |table, chain: &str, first, text: &str| Rule {
        table,
        chain: chain.to_owned(),
        first,
        text: text.split(' ').map(str::to_owned).collect(),
    };
    let forward = if docker { DOCKER_CHAIN } else { "FORWARD" };
    let range = range.trunc();
    let tag = format!("-m comment --comment {comment}");
    let elsewhere = cluster.map(|cluster| format!("! -d {} ", cluster.trunc())).unwrap_or_default();
    let mut rules = vec![
        rule("filter", forward, true, &format!("-i {bridge} ! -o {NOWHERE} {tag} -j ACCEPT")),
        rule("filter", forward, true, &format!("-o {bridge} {tag} -j ACCEPT")),
        rule("nat", "POSTROUTING", false, &format!("-s {range} {elsewhere}! -o {bridge} {tag} -j MASQUERADE")),
    ];
    for chain in [forward, "OUTPUT"].into_iter().filter(|_| range.addr().is_ipv4()) {
        // What the host sent to an address of its own, and a rule has led to a Pod by now, still counts as leaving there.
        let led = if chain == "OUTPUT" { "-m conntrack ! --ctstate DNAT " } else { "" };
        // Not the gateway's own address: what the host sends to itself leaves by the loopback interface as well.
        let nobody = format!("{led}-m addrtype --dst-type UNICAST {tag} -j REJECT --reject-with");
        rules.extend([
            rule("filter", chain, true, &format!("-d {range} -o {NOWHERE} ! -p tcp {nobody} icmp-port-unreachable")),
            rule("filter", chain, true, &format!("-d {range} -o {NOWHERE} -p tcp {nobody} tcp-reset")),
        ]);
    }
    if range.addr().is_ipv4() {
        // Ports of the host make the bridge take packets for these addresses (`route_localnet`): they are for answers alone,
        // or a Pod that writes its own packets reaches what the host keeps to itself (CVE-2020-8558).
        let new = "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT";
        rules.push(rule("filter", "INPUT", true, &format!("-d 127.0.0.0/8 -i {bridge} {new} {tag} -j DROP")));
    }
    rules
}

pub(super) fn comment(bridge: &str) -> String {
    format!("lambdalet:{bridge}")
}

/// Every rule of the two tables, as (table, line) of `iptables -S`.
fn list(command: &str) -> Result<Vec<(&'static str, String)>, NetworkError> {
    let mut listed = Vec::new();
    for table in ["filter", "nat"] {
        let output = run(command, &["-t", table, "-S"])?;
        listed.extend(output.lines().map(|line| (table, line.to_owned())));
    }
    Ok(listed)
}

fn has_docker_chain(listed: &[(&str, String)]) -> bool {
    listed.iter().any(|(table, line)| *table == "filter" && line.strip_prefix("-N ") == Some(DOCKER_CHAIN))
}

/// The rules with exactly this comment.
fn tagged(comment: &str, listed: &[(&'static str, String)]) -> Vec<Rule> {
    let rule = |(table, line): &(&'static str, String)| {
        // Only rules of others contain quoted blanks, and those do not carry our comment.
        let mut words = line.split_whitespace().map(|word| word.trim_matches('"').to_owned());
        let (verb, chain) = (words.next()?, words.next()?);
        let text: Vec<String> = words.collect();
        let ours = text.windows(2).any(|pair| pair[0] == "--comment" && pair[1] == comment);
        (verb == "-A" && ours).then_some(Rule { table, chain, first: false, text })
    };
    listed.iter().filter_map(rule).collect()
}

fn reconcile(command: &str, present: &[Rule], wanted: &[Rule]) -> Result<Vec<Rule>, NetworkError> {
    let mut changed = Vec::new();
    let same =
        |left: &Rule, right: &Rule| left.table == right.table && left.chain == right.chain && left.text == right.text;
    // Added before the stale ones go, so that packets of running Pods are accepted all the time.
    for rule in wanted.iter().filter(|rule| !present.iter().any(|there| same(there, rule))) {
        change(command, if rule.first { "-I" } else { "-A" }, rule)?;
        changed.push(rule.clone());
    }
    for (position, rule) in present.iter().enumerate() {
        let repeated = present[..position].iter().any(|earlier| same(earlier, rule));
        if repeated || !wanted.iter().any(|other| same(other, rule)) {
            change(command, "-D", rule)?;
            changed.push(rule.clone());
        }
    }
    Ok(changed)
}

fn change(command: &str, verb: &str, rule: &Rule) -> Result<(), NetworkError> {
    let mut arguments = vec!["-t", rule.table, verb, &rule.chain];
    arguments.extend(rule.text.iter().map(String::as_str));
    run(command, &arguments).map(|_| ())
}

fn run(command: &str, arguments: &[&str]) -> Result<String, NetworkError> {
    let line = || format!("{command} {}", arguments.join(" "));
    let output = Command::new(command)
        .args(["-w", LOCK_WAIT])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| NetworkError::Command { command: line(), source })?;
    if !output.status.success() {
        let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(NetworkError::CommandFailed { command: line(), output });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: &str = "\
-P FORWARD DROP
-N DOCKER-USER
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -i lb0 ! -o lo -m comment --comment \"lambdalet:lb0\" -j ACCEPT
-A DOCKER-USER -o lb0 -m comment --comment lambdalet:lb0 -j ACCEPT
-A DOCKER-USER -o lb01 -m comment --comment lambdalet:lb01 -j ACCEPT
-A DOCKER-USER -o lb0 -m comment --comment \"not lambdalet:lb0 but close\" -j ACCEPT
";

    fn listed() -> Vec<(&'static str, String)> {
        LISTED.lines().map(|line| ("filter", line.to_owned())).collect()
    }

    #[test]
    fn only_rules_of_this_bridge_are_ours() {
        let ours = tagged("lambdalet:lb0", &listed());
        assert_eq!(ours.len(), 2);
        let wanted = wanted("lb0", ("10.1.0.5/16".parse().unwrap(), None), has_docker_chain(&listed()));
        assert_eq!(ours[0].text, wanted[0].text);
        assert_eq!(ours[1].text, wanted[1].text);
        assert_eq!(ours[1].chain, wanted[1].chain);
        assert_eq!(wanted[2].text[..2], ["-s", "10.1.0.0/16"]);
    }

    #[test]
    fn what_goes_to_other_nodes_pods_keeps_its_address() {
        let masquerades = |cluster: Option<&str>| {
            let cluster = cluster.map(|range| range.parse().unwrap());
            let rules = wanted("lb0", ("10.1.2.0/24".parse().unwrap(), cluster), false);
            rules.into_iter().find(|rule| rule.table == "nat").unwrap().text.join(" ")
        };
        let end = "! -o lb0 -m comment --comment lambdalet:lb0 -j MASQUERADE";
        assert_eq!(masquerades(None), format!("-s 10.1.2.0/24 {end}"));
        assert_eq!(masquerades(Some("10.1.2.3/16")), format!("-s 10.1.2.0/24 ! -d 10.1.0.0/16 {end}"));
    }

    #[test]
    fn without_docker_the_rules_go_to_forward() {
        assert!(!has_docker_chain(&[("nat", "-N DOCKER-USER".to_owned())]));
        assert_eq!(wanted("lb0", ("10.1.0.0/16".parse().unwrap(), None), false)[0].chain, "FORWARD");
    }

    #[test]
    fn a_missing_command_is_named() {
        let error = run("lambdalet-no-such-iptables", &["-S"]).unwrap_err();
        assert_eq!(error.to_string(), "failed to run lambdalet-no-such-iptables -S; is it installed?");
    }
}
