//! The network's configuration: which file it is, what it says, and what each plugin is told of it. Pure, but for reading.
//!
//! The rules are those of the CNI specification (<https://github.com/containernetworking/cni/blob/main/SPEC.md>, sections
//! 1 and 3); which file counts is what kubelets and containerd agree on: the first by name.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::error::CniError;

/// Ends of the names of files that count.
const EXTENSIONS: [&str; 3] = ["conflist", "conf", "json"];
/// Most bytes of a file.
const LONGEST: u64 = 1 << 20;

/// A version of the specification that this node speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Version {
    #[serde(rename = "0.3.0")]
    V0_3_0,
    #[serde(rename = "0.3.1")]
    V0_3_1,
    #[serde(rename = "0.4.0")]
    V0_4_0,
    #[serde(rename = "1.0.0")]
    V1_0_0,
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    const ALL: [Self; 5] = [Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    fn read(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.name() == text)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// CHECK, and the former result on DEL.
    pub(super) fn has_check(self) -> bool {
        self >= Self::V0_4_0
    }

    /// STATUS.
    pub(super) fn has_status(self) -> bool {
        self >= Self::V1_1_0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A network: plugins that are called one after the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Network {
    pub(super) name: String,
    pub(super) version: Version,
    pub(super) disable_check: bool,
    /// At least one, each with a `type`.
    pub(super) plugins: Vec<Map<String, Value>>,
}

impl Network {
    /// The type of each plugin, in order.
    pub(super) fn types(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.plugins.iter().map(type_of)
    }

    /// Whether a plugin wants to be told of this capability.
    pub(super) fn wants(&self, capability: &str) -> bool {
        self.plugins.iter().any(|plugin| plugin_wants(plugin, capability))
    }

    /// What one plugin reads: its own configuration, the network's name and version, those of the `capabilities` that it
    /// asked for, and the result so far.
    pub(super) fn told(
        &self,
        plugin: &Map<String, Value>,
        capabilities: &Map<String, Value>,
        before: Option<&Value>,
    ) -> Value {
        let mut told = plugin.clone();
        told.remove("capabilities");
        told.insert("name".to_owned(), json!(self.name));
        told.insert("cniVersion".to_owned(), json!(self.version));
        let wanted = capabilities.iter().filter(|(name, _)| plugin_wants(plugin, name));
        let wanted: Map<String, Value> = wanted.map(|(name, value)| (name.clone(), value.clone())).collect();
        if !wanted.is_empty() {
            told.insert("runtimeConfig".to_owned(), Value::Object(wanted));
        }
        if let Some(before) = before {
            told.insert("prevResult".to_owned(), before.clone());
        }
        Value::Object(told)
    }
}

pub(super) fn type_of(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn plugin_wants(plugin: &Map<String, Value>, capability: &str) -> bool {
    plugin.get("capabilities").and_then(|wanted| wanted.get(capability)).and_then(Value::as_bool) == Some(true)
}

/// The network that the directory tells of: its first file by name.
///
/// # Errors
/// [`CniError::Unconfigured`], [`CniError::Unreadable`] or [`CniError::Malformed`].
pub(super) fn load(dir: &Path) -> Result<Network, CniError> {
    let path = first(dir)?.ok_or_else(|| CniError::Unconfigured { dir: dir.to_owned() })?;
    let unreadable = |source| CniError::Unreadable { path: path.clone(), source };
    if fs::metadata(&path).map_err(unreadable)?.len() > LONGEST {
        return Err(unreadable(io::Error::other(format!("it is longer than {LONGEST} bytes"))));
    }
    let text = fs::read(&path).map_err(unreadable)?;
    parse(&text).map_err(|reason| CniError::Malformed { path: path.clone(), reason })
}

fn first(dir: &Path) -> Result<Option<PathBuf>, CniError> {
    let unreadable = |source| CniError::Unreadable { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        // It may be made, and filled, by whatever installs the network.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(unreadable)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        let counts = path.extension().and_then(|end| end.to_str()).is_some_and(|end| EXTENSIONS.contains(&end));
        if counts && path.is_file() {
            found.push(path);
        }
    }
    Ok(found.into_iter().min())
}

/// Reads a list of plugins, or a single one, which is a list of one.
pub(super) fn parse(text: &[u8]) -> Result<Network, String> {
    let whole: Map<String, Value> = serde_json::from_slice(text).map_err(|error| format!("it is not JSON: {error}"))?;
    let name = whole.get("name").and_then(Value::as_str).unwrap_or_default();
    if !is_name(name) {
        return Err(format!("\"name\" is {name:?}: it begins with a letter or digit, and has also '-', '_' and '.'"));
    }
    let plugins = match whole.get("plugins") {
        None => vec![whole.clone()],
        Some(Value::Array(plugins)) => plugins.iter().map(object).collect::<Result<_, _>>()?,
        Some(_) => return Err("\"plugins\" is not a list".to_owned()),
    };
    if plugins.is_empty() {
        return Err("\"plugins\" is empty".to_owned());
    }
    for (at, plugin) in plugins.iter().enumerate() {
        let named = type_of(plugin);
        if named.is_empty() || named.contains('/') || named == "." || named == ".." {
            return Err(format!("plugin {} has the \"type\" {named:?}: it is the name of a program", at + 1));
        }
    }
    let disable_check = match whole.get("disableCheck") {
        Some(Value::String(text)) => text == "true",
        other => other.and_then(Value::as_bool).unwrap_or(false),
    };
    Ok(Network { name: name.to_owned(), version: version(&whole)?, disable_check, plugins })
}

fn object(plugin: &Value) -> Result<Map<String, Value>, String> {
    plugin.as_object().cloned().ok_or_else(|| format!("\"plugins\" has {plugin}, which is no plugin"))
}

/// The newest of those the file offers that this node speaks.
fn version(whole: &Map<String, Value>) -> Result<Version, String> {
    let one = whole.get("cniVersion").and_then(Value::as_str);
    let more = whole.get("cniVersions").and_then(Value::as_array);
    let offered: Vec<&str> = one.into_iter().chain(more.into_iter().flatten().filter_map(Value::as_str)).collect();
    let spoken = offered.iter().filter_map(|text| Version::read(text)).max();
    spoken.ok_or_else(|| {
        let known = Version::ALL.map(Version::name).join(", ");
        match offered[..] {
            [] => format!("it has no \"cniVersion\" (one of {known})"),
            _ => format!("\"cniVersion\" is {}, and this node speaks {known}", offered.join(", ")),
        }
    })
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn network(text: &Value) -> Result<Network, String> {
        parse(text.to_string().as_bytes())
    }

    fn list() -> Value {
        json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
            {"type": "bridge", "ipam": {"type": "host-local"}},
            {"type": "portmap", "capabilities": {"portMappings": true, "other": false}},
        ]})
    }

    #[test]
    fn a_single_plugin_is_a_list_of_one() {
        let single = network(&json!({"cniVersion": "0.3.1", "name": "pods", "type": "bridge", "mtu": 1400})).unwrap();
        assert_eq!(single.types().collect::<Vec<_>>(), ["bridge"]);
        assert_eq!((single.version, single.version.has_check(), single.disable_check), (Version::V0_3_1, false, false));
        assert_eq!(single.plugins[0]["mtu"], json!(1400));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let broken = |key: &str, value: Value| {
            let mut list = list();
            list[key] = value;
            network(&list).unwrap_err()
        };
        assert!(parse(b"{").unwrap_err().starts_with("it is not JSON: "));
        assert!(parse(b"[]").unwrap_err().starts_with("it is not JSON: "));
        assert!(broken("name", json!("a b")).contains("\"a b\""));
        assert!(broken("name", json!(null)).contains("\"name\""));
        assert_eq!(broken("plugins", json!([])), "\"plugins\" is empty");
        assert_eq!(broken("plugins", json!({})), "\"plugins\" is not a list");
        assert!(broken("plugins", json!([{"type": "../sh"}])).contains("plugin 1 has the \"type\" \"../sh\""));
        assert!(broken("plugins", json!([1])).contains("no plugin"));
        assert!(
            broken("cniVersion", json!("0.2.0")).starts_with("\"cniVersion\" is 0.2.0, and this node speaks 0.3.0")
        );
        assert!(broken("cniVersion", json!(null)).starts_with("it has no \"cniVersion\""));
    }

    #[test]
    fn the_newest_version_that_both_speak_is_taken() {
        let mut several = list();
        several["cniVersions"] = json!(["0.4.0", "1.1.0", "9.9.9"]);
        assert_eq!(network(&several).unwrap().version, Version::V1_1_0);
    }

    #[test]
    fn a_plugin_is_told_its_own_and_what_it_asked_for() {
        let network = network(&list()).unwrap();
        let capabilities = json!({"portMappings": [{"hostPort": 80}], "other": 1, "bandwidth": 2});
        let told = |at: usize, before| network.told(&network.plugins[at], capabilities.as_object().unwrap(), before);
        let first = json!({"type": "bridge", "ipam": {"type": "host-local"}, "name": "pods", "cniVersion": "1.0.0"});
        assert_eq!(told(0, None), first);
        let before = json!({"ips": []});
        let second = json!({"type": "portmap", "name": "pods", "cniVersion": "1.0.0", "prevResult": {"ips": []},
            "runtimeConfig": {"portMappings": [{"hostPort": 80}]}});
        assert_eq!(told(1, Some(&before)), second);
        assert!(network.wants("portMappings") && !network.wants("other") && !network.wants("bandwidth"));
    }

    #[test]
    fn the_first_file_by_name_counts_and_a_directory_may_come_later() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(&dir.path().join("none")), Err(CniError::Unconfigured { .. })));
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("00-notes.txt", "no configuration");
        write("05-hidden.conflist.bak", "neither");
        assert!(matches!(load(dir.path()), Err(CniError::Unconfigured { .. })));
        write("20-b.conf", &json!({"cniVersion": "1.0.0", "name": "b", "type": "x"}).to_string());
        assert_eq!(load(dir.path()).unwrap().name, "b");
        write("10-a.conflist", "{");
        let error = load(dir.path()).unwrap_err();
        assert!(error.to_string().contains("10-a.conflist cannot be used: it is not JSON"), "{error}");
    }

    proptest! {
        #[test]
        fn whatever_stands_in_a_file_is_a_network_or_a_reason(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }

        #[test]
        fn what_a_record_keeps_of_a_network_reads_back(name in "[a-z0-9][a-z0-9_.-]{0,20}", types in proptest::collection::vec("[a-z][a-z-]{0,10}", 1..4), version in 0..5_usize) {
            let plugins: Vec<Value> = types.iter().map(|named| json!({"type": named, "capabilities": {"bandwidth": true}})).collect();
            let made = network(&json!({"cniVersion": Version::ALL[version], "name": name, "plugins": plugins})).unwrap();
            let back: Network = serde_json::from_str(&serde_json::to_string(&made).unwrap()).unwrap();
            prop_assert_eq!(&back, &made);
            prop_assert_eq!(back.types().collect::<Vec<_>>(), types);
        }
    }
}
