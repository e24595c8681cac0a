//! The values flags and the configuration file are made of, each checked while it is parsed.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::quantity::Quantity;

/// Why a value was refused: what it is and what was expected, in one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(String);

impl ValueError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// A node's name: a DNS subdomain in lower case, at most 253 bytes (RFC 1123, as the API server demands).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeName(String);

impl NodeName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if is_dns_subdomain(text) {
            return Ok(Self(text.to_owned()));
        }
        Err(ValueError::new(format!(
            "{text:?} cannot be a node name: use lower-case letters, digits, '-' and '.', at most 253, \
             beginning and ending with a letter or digit"
        )))
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_dns_part(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !text.is_empty() && text.chars().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

fn is_dns_subdomain(text: &str) -> bool {
    // Kubernetes holds only the whole to 253 bytes, not the parts of a subdomain to 63.
    text.len() <= 253 && text.split('.').all(is_dns_part)
}

/// Labels a kubelet may give its own Node although they are in a Kubernetes namespace.
///
/// From the NodeRestriction admission plugin and kubelet's `--node-labels` documentation.
const KUBELET_LABELS: [&str; 11] = [
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "kubernetes.io/arch",
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];

/// Label namespaces in which a kubelet may choose freely (they and what is below them).
const KUBELET_NAMESPACES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];

/// One label for the Node, `key=value`; refused if the NodeRestriction admission plugin would refuse it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeLabel {
    /// The key, with its namespace.
    pub key: String,
    /// The value, maybe empty.
    pub value: String,
}

impl FromStr for NodeLabel {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (key, value) =
            text.split_once('=').ok_or_else(|| ValueError::new(format!("{text:?} is not a label: write key=value")))?;
        check_key(key)?;
        check_label_value(value)?;
        if !kubelet_may_set(key) {
            return Err(ValueError::new(format!(
                "label {key:?} cannot be set by a node: in the kubernetes.io and k8s.io namespaces only {} and keys \
                 in {} are allowed; set it with kubectl label node, or choose another namespace",
                KUBELET_LABELS.join(", "),
                KUBELET_NAMESPACES.join(", "),
            )));
        }
        Ok(Self { key: key.to_owned(), value: value.to_owned() })
    }
}

/// Whether the NodeRestriction admission plugin lets a kubelet set this label on its own Node.
fn kubelet_may_set(key: &str) -> bool {
    let namespace = key.split_once('/').map_or("", |(namespace, _)| namespace);
    let within = |zone: &str| namespace == zone || namespace.ends_with(&format!(".{zone}"));
    if !within("kubernetes.io") && !within("k8s.io") {
        return true;
    }
    KUBELET_LABELS.contains(&key) || KUBELET_NAMESPACES.iter().any(|zone| within(zone))
}

/// Letters, digits, `-`, `_`, `.`, both ends alphanumeric, 1 to 63 bytes.
fn is_qualified_part(text: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && edge(text.chars().next())
        && edge(text.chars().next_back())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

fn check_key(key: &str) -> Result<(), ValueError> {
    let (namespace, name) = key.rsplit_once('/').map_or((None, key), |(namespace, name)| (Some(namespace), name));
    if is_qualified_part(name) && namespace.is_none_or(is_dns_subdomain) {
        return Ok(());
    }
    Err(ValueError::new(format!(
        "{key:?} is not a valid key: write name or domain/name, the name at most 63 letters, digits, '-', '_' or '.'"
    )))
}

fn check_label_value(value: &str) -> Result<(), ValueError> {
    if value.is_empty() || is_qualified_part(value) {
        return Ok(());
    }
    Err(ValueError::new(format!("{value:?} is not a valid value: at most 63 letters, digits, '-', '_' or '.'")))
}

/// What a taint does to Pods that do not tolerate it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaintEffect {
    /// Not scheduled here.
    NoSchedule,
    /// Rather scheduled elsewhere.
    PreferNoSchedule,
    /// Not scheduled here, and evicted.
    NoExecute,
}

impl TaintEffect {
    /// The name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoSchedule => "NoSchedule",
            Self::PreferNoSchedule => "PreferNoSchedule",
            Self::NoExecute => "NoExecute",
        }
    }
}

/// A taint the Node is registered with, `key=value:Effect` or `key:Effect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeTaint {
    /// The key.
    pub key: String,
    /// The value, maybe empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub value: String,
    /// What it does.
    pub effect: TaintEffect,
}

impl NodeTaint {
    /// The taint, if key and value are what the API server accepts.
    ///
    /// # Errors
    /// Which part is wrong.
    pub fn checked(self) -> Result<Self, ValueError> {
        check_key(&self.key)?;
        check_label_value(&self.value)?;
        Ok(self)
    }
}

impl FromStr for NodeTaint {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shape = || {
            ValueError::new(format!(
                "{text:?} is not a taint: write key=value:Effect or key:Effect, the effect being NoSchedule, \
                 PreferNoSchedule or NoExecute"
            ))
        };
        let (rest, effect) = text.rsplit_once(':').ok_or_else(shape)?;
        let effect = match effect {
            "NoSchedule" => TaintEffect::NoSchedule,
            "PreferNoSchedule" => TaintEffect::PreferNoSchedule,
            "NoExecute" => TaintEffect::NoExecute,
            _ => return Err(shape()),
        };
        let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
        Self { key: key.to_owned(), value: value.to_owned(), effect }.checked()
    }
}

/// Resources kept from Pods, `cpu=500m,memory=1Gi,ephemeral-storage=1Gi,pid=1000`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reserved(pub BTreeMap<String, Quantity>);

impl Reserved {
    /// Reserves so much more of `name`.
    pub fn add(&mut self, name: &str, more: Quantity) {
        let reserved = self.0.entry(name.to_owned()).or_insert(Quantity::ZERO);
        *reserved = *reserved + more;
    }

    /// The list from names and texts.
    ///
    /// # Errors
    /// The first name a node cannot reserve, or text that is no quantity.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, ValueError> {
        let mut reserved = BTreeMap::new();
        for (name, text) in pairs {
            if !matches!(name, "cpu" | "memory" | "ephemeral-storage" | "pid") {
                return Err(ValueError::new(format!(
                    "{name:?} cannot be reserved: choose among cpu, memory, ephemeral-storage and pid"
                )));
            }
            let quantity = parse_quantity(text)?;
            if reserved.insert(name.to_owned(), quantity).is_some() {
                return Err(ValueError::new(format!("{name:?} is reserved twice")));
            }
        }
        Ok(Self(reserved))
    }
}

impl FromStr for Reserved {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let pairs = text
            .split(',')
            .filter(|part| !part.trim().is_empty())
            .map(|part| {
                part.trim()
                    .split_once('=')
                    .ok_or_else(|| ValueError::new(format!("{part:?} is not a reservation: write name=quantity")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        Self::from_pairs(pairs)
    }
}

/// A quantity that is not negative.
///
/// # Errors
/// If it is no quantity.
pub fn parse_quantity(text: &str) -> Result<Quantity, ValueError> {
    let quantity: Quantity = text.trim().parse().map_err(|error| ValueError::new(format!("{error}")))?;
    if quantity.nanos() < 0 {
        return Err(ValueError::new(format!("{text:?} is negative")));
    }
    Ok(quantity)
}

/// A registry that is spoken to in plain HTTP, `host` or `host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryHost(String);

impl RegistryHost {
    /// As written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RegistryHost {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Authority knows host names, IPv4, [IPv6] and ports, and refuses schemes and paths.
        match text.parse::<http::uri::Authority>() {
            Ok(authority) if !authority.host().is_empty() && !text.contains('@') => Ok(Self(text.to_owned())),
            _ => Err(ValueError::new(format!("{text:?} is not a registry: write host or host:port, without http://"))),
        }
    }
}

/// A duration as Go writes it: `300ms`, `10s`, `1m30s`, `1.5h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GoDuration(pub Duration);

/// Nanoseconds of each unit of a Go duration, the longer name before its own beginning.
const DURATION_UNITS: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("\u{b5}s", 1_000),
    ("\u{3bc}s", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

impl FromStr for GoDuration {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_duration(text)
            .map(|nanos| Self(Duration::from_nanos(nanos)))
            .ok_or_else(|| ValueError::new(format!("{text:?} is not a duration such as 10s, 1m30s or 300ms")))
    }
}

fn parse_duration(text: &str) -> Option<u64> {
    if text == "0" {
        return Some(0);
    }
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(end);
        let (unit, nanos) = DURATION_UNITS.iter().find(|(unit, _)| {
            // `m` must not swallow the beginning of `ms`.
            tail.strip_prefix(unit).is_some_and(|after| !after.starts_with(|c: char| c.is_alphabetic()))
        })?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.len() > 18 || fraction.contains('.') {
            return None;
        }
        let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
        let part = part * u128::from(*nanos) / 10_u128.pow(u32::try_from(fraction.len()).ok()?);
        total = total.checked_add(whole.checked_mul(*nanos)?)?.checked_add(u64::try_from(part).ok()?)?;
        rest = &tail[unit.len()..];
    }
    (!text.is_empty()).then_some(total)
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanos) = (self.0.as_secs(), self.0.subsec_nanos());
        if nanos != 0 || seconds == 0 {
            return write!(f, "{}ns", self.0.as_nanos());
        }
        let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        if hours > 0 {
            write!(f, "{hours}h")?;
        }
        if hours > 0 || minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        write!(f, "{seconds}s")
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How low a resource may fall before the node says it is under pressure: a quantity, or a share of the whole.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Threshold {
    /// Bytes, inodes or process ids.
    Absolute(Quantity),
    /// Percent of the capacity, 0 to 100.
    Percent(f64),
}

impl Threshold {
    /// The threshold in units, given the capacity in the same units.
    pub fn of(self, capacity: u64) -> u64 {
        match self {
            Self::Absolute(quantity) => u64::try_from(quantity.nanos() / 1_000_000_000).unwrap_or(u64::MAX),
            // Precision beyond 2^53 bytes does not matter for a percentage.
            Self::Percent(percent) => (capacity as f64 * percent / 100.0) as u64,
        }
    }
}

impl FromStr for Threshold {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some(percent) = text.strip_suffix('%') else { return parse_quantity(text).map(Self::Absolute) };
        match percent.parse::<f64>() {
            Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(Self::Percent(percent)),
            _ => Err(ValueError::new(format!("{text:?} is not a percentage between 0% and 100%"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn node_names_are_dns_subdomains() {
        for good in ["a", "node-1", "ip-10-0-0-1.eu.internal", "0"] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in ["", "Node", "a_b", "-a", "a-", "a..b", ".a", "a.", "a b", &"x".repeat(254)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_a_kubelet_may_not_set_are_refused_by_name() {
        for good in [
            "a=b",
            "a=",
            "example.com/x=y",
            "kubernetes.io/arch=arm64",
            "node.kubernetes.io/anything=1",
            "pool.node.kubernetes.io/x=1",
            "topology.kubernetes.io/zone=z1",
            "notkubernetes.io/x=1",
        ] {
            assert!(good.parse::<NodeLabel>().is_ok(), "{good}");
        }
        for bad in [
            "node-restriction.kubernetes.io/team=a",
            "node-role.kubernetes.io/worker=",
            "kubernetes.io/x=1",
            "k8s.io/x=1",
        ] {
            let error = bad.parse::<NodeLabel>().unwrap_err().to_string();
            assert!(error.contains("cannot be set by a node"), "{error}");
        }
        for bad in ["a", "=b", "a b=c", "a=b c", "a=-b", "/a=b", "A.b/c=d"] {
            assert!(bad.parse::<NodeLabel>().is_err(), "{bad}");
        }
    }

    #[test]
    fn taints_parse_with_and_without_value() {
        let taint: NodeTaint = "dedicated=lambda:NoSchedule".parse().unwrap();
        assert_eq!(
            (taint.key.as_str(), taint.value.as_str(), taint.effect),
            ("dedicated", "lambda", TaintEffect::NoSchedule)
        );
        let taint: NodeTaint = "lambdalet.dev/provider:NoExecute".parse().unwrap();
        assert_eq!((taint.value.as_str(), taint.effect), ("", TaintEffect::NoExecute));
        for bad in ["", "a", "a=b", "a=b:Nope", ":NoSchedule", "a=b c:NoSchedule"] {
            assert!(bad.parse::<NodeTaint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn reservations_name_what_is_wrong() {
        let reserved: Reserved = "cpu=500m,memory=1Gi".parse().unwrap();
        assert_eq!(reserved.0["cpu"], Quantity::from_millis(500));
        assert_eq!(reserved.0["memory"], Quantity::from_units(1 << 30));
        assert!("gpu=1".parse::<Reserved>().unwrap_err().to_string().contains("\"gpu\""));
        assert!("cpu".parse::<Reserved>().unwrap_err().to_string().contains("name=quantity"));
        assert!("cpu=lots".parse::<Reserved>().unwrap_err().to_string().contains("\"lots\""));
        assert!("cpu=1,cpu=2".parse::<Reserved>().unwrap_err().to_string().contains("twice"));
    }

    #[test]
    fn registries_are_hosts_not_urls() {
        for good in ["localhost:5000", "registry.local", "10.0.0.1:80", "[::1]:5000"] {
            assert!(good.parse::<RegistryHost>().is_ok(), "{good}");
        }
        for bad in ["", "http://a", "a/b", "user@a", "a b"] {
            assert!(bad.parse::<RegistryHost>().is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_those_of_go() {
        for (text, millis) in [
            ("10s", 10_000),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("300ms", 300),
            ("0", 0),
            ("0s", 0),
            (".5s", 500),
            ("2m3ms", 120_003),
        ] {
            assert_eq!(text.parse::<GoDuration>().unwrap().0, Duration::from_millis(millis), "{text}");
        }
        for bad in ["", "10", "s", "10x", "1.2.3s", "-1s", "1 s", "10sec", "99999999999999h"] {
            assert!(bad.parse::<GoDuration>().is_err(), "{bad}");
        }
    }

    #[test]
    fn thresholds_are_quantities_or_percentages() {
        assert_eq!("100Mi".parse::<Threshold>().unwrap().of(1), 100 << 20);
        assert_eq!("10%".parse::<Threshold>().unwrap().of(1000), 100);
        for bad in ["101%", "-1%", "%", "x"] {
            assert!(bad.parse::<Threshold>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_duration_survives_being_printed(nanos in 0_u64..u64::MAX / 2) {
            let duration = GoDuration(Duration::from_nanos(nanos));
            prop_assert_eq!(duration.to_string().parse::<GoDuration>().unwrap(), duration);
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in ".{0,40}") {
            let _ = text.parse::<NodeName>();
            let _ = text.parse::<NodeLabel>();
            let _ = text.parse::<NodeTaint>();
            let _ = text.parse::<Reserved>();
            let _ = text.parse::<RegistryHost>();
            let _ = text.parse::<GoDuration>();
            let _ = text.parse::<Threshold>();
        }

        #[test]
        fn a_label_keeps_what_was_written(key in "[a-z][a-z0-9]{0,20}", value in "[a-zA-Z0-9]{0,20}") {
            let label: NodeLabel = format!("{key}={value}").parse().unwrap();
            prop_assert_eq!((label.key, label.value), (key, value));
        }

        #[test]
        fn a_taint_keeps_what_was_written(key in "[a-z][a-z0-9]{0,20}", value in "[a-zA-Z0-9]{1,20}") {
            let taint: NodeTaint = format!("{key}={value}:NoExecute").parse().unwrap();
            prop_assert_eq!((taint.key, taint.value), (key, value));
        }
    }
}
