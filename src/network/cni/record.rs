//! What was plugged in, as files: written before the first plugin is called, so that whatever a crash leaves half done is
//! taken away by the same plugins with the same configuration.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tracing::warn;

use super::config::Network;
use crate::file::{self, Synced};
use crate::network::NetworkError;

/// Ends the name of a record.
const RECORD: &str = "json";
/// Ends the name of one that is being written.
const TEMPORARY: &str = "new";
/// Ends the name of one that could not be read.
const BROKEN: &str = "broken";

/// One sandbox on a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The sandbox.
    pub(super) sandbox: String,
    /// `CNI_ARGS`.
    pub(super) args: String,
    /// What plugins may ask for, by capability.
    pub(super) capabilities: Map<String, Value>,
    /// The network as it was then.
    pub(super) network: Network,
    /// What its last plugin so far has answered: what undoes it finds rules by the addresses in there.
    pub(super) result: Option<Value>,
    /// Every plugin has.
    pub(super) complete: bool,
}

/// The records of one node.
#[derive(Clone, Debug)]
pub(super) struct Records {
    dir: PathBuf,
}

impl Records {
    /// Those below `dir`, which need not exist.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn path(&self, sandbox: &str, end: &str) -> PathBuf {
        self.dir.join(format!("{sandbox}.{end}"))
    }

    /// What plugins have in files of their own outlives a power cut, and so does what is written here.
    pub(super) fn write(&self, record: &Record) -> Result<(), NetworkError> {
        self.put(record, Synced::Name)
    }

    /// Writes a step between; after a power cut the one before it may be found. What it says more is of the kernel's
    /// rules, which are gone then too.
    pub(super) fn note(&self, record: &Record) -> Result<(), NetworkError> {
        self.put(record, Synced::No)
    }

    fn put(&self, record: &Record, synced: Synced) -> Result<(), NetworkError> {
        let (path, temporary) = (self.path(&record.sandbox, RECORD), self.path(&record.sandbox, TEMPORARY));
        let write = || -> io::Result<()> {
            fs::create_dir_all(&self.dir)?;
            file::replace(&path, &temporary, &serde_json::to_vec(record)?, synced)
        };
        write().map_err(|source| failed("write", &path, source))
    }

    /// The record of a sandbox, if there is one. One that cannot be read is moved aside: nobody knows any more what to
    /// tell the plugins.
    pub(super) fn read(&self, sandbox: &str) -> Result<Option<Record>, NetworkError> {
        let path = self.path(sandbox, RECORD);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|source| failed("read", &path, source))?,
        };
        match serde_json::from_slice::<Record>(&text) {
            Ok(record) => Ok(Some(record)),
            Err(error) => {
                warn!(path = %path.display(), %error, "a record of CNI cannot be read; what its plugins made may be left");
                let aside = self.path(sandbox, BROKEN);
                fs::rename(&path, aside).map_err(|source| failed("move aside", &path, source))?;
                Ok(None)
            }
        }
    }

    pub(super) fn remove(&self, sandbox: &str) -> Result<(), NetworkError> {
        let path = self.path(sandbox, RECORD);
        file::remove(&path).map_err(|error| failed("remove", &path, error))
    }

    /// The sandboxes that have one.
    pub(super) fn sandboxes(&self) -> Result<Vec<String>, NetworkError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|source| failed("read directory", &self.dir, source))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter_map(|name| Some(name.strip_suffix(RECORD)?.strip_suffix('.')?.to_owned())).collect())
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> NetworkError {
    NetworkError::File { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::cni::config::parse;

    fn record(sandbox: &str) -> Record {
        Record {
            sandbox: sandbox.to_owned(),
            args: "IgnoreUnknown=1".to_owned(),
            capabilities: Map::new(),
            network: parse(br#"{"cniVersion": "0.4.0", "name": "n", "type": "bridge"}"#).unwrap(),
            result: None,
            complete: false,
        }
    }

    #[test]
    fn a_record_is_there_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().join("later"));
        assert!(records.sandboxes().unwrap().is_empty());
        assert_eq!(records.read("a").unwrap(), None);
        records.write(&record("a")).unwrap();
        let whole = Record { result: Some(serde_json::json!({"ips": []})), complete: true, ..record("a") };
        records.write(&whole).unwrap();
        assert_eq!(records.read("a").unwrap(), Some(whole));
        assert_eq!(records.sandboxes().unwrap(), ["a"]);
        records.remove("a").unwrap();
        records.remove("a").unwrap();
        assert!(records.sandboxes().unwrap().is_empty());
    }

    #[test]
    fn a_broken_record_is_moved_aside_and_one_that_was_never_finished_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_owned());
        fs::write(dir.path().join("a.json"), "{").unwrap();
        fs::write(dir.path().join("b.new"), "{").unwrap();
        assert_eq!(records.read("a").unwrap(), None);
        assert!(records.sandboxes().unwrap().is_empty());
        assert!(dir.path().join("a.broken").exists());
    }
}
