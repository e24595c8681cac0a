//! What plugins of the Container Network Interface, and their configuration, can fail with.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Why plugins cannot plug a sandbox in or out.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The directory has no configuration, so there is no network yet.
    #[error("there is no CNI configuration in {dir} (*.conflist, *.conf or *.json)", dir = .dir.display())]
    Unconfigured {
        /// `--cni-conf-dir`.
        dir: PathBuf,
    },
    /// The directory or the configuration could not be read.
    #[error("failed to read the CNI configuration {path}", path = .path.display())]
    Unreadable {
        /// The directory or the file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The configuration is not one.
    #[error("the CNI configuration {path} cannot be used: {reason}", path = .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No directory has the plugin.
    #[error("CNI plugin {plugin} is not in {dirs}")]
    Missing {
        /// Its type.
        plugin: String,
        /// `--cni-bin-dir`.
        dirs: String,
    },
    /// The file is there and is no program.
    #[error("CNI plugin {path} is not an executable file", path = .path.display())]
    NotExecutable {
        /// The file.
        path: PathBuf,
    },
    /// The program could not be started, or spoken to.
    #[error("failed to run CNI plugin {path} for {command}", path = .path.display())]
    Unusable {
        /// The program.
        path: PathBuf,
        /// What it was asked to do.
        command: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It did not end and was killed.
    #[error("CNI plugin {plugin} did not finish {command} within {patience:?} and was killed")]
    Hangs {
        /// Its type.
        plugin: String,
        /// What it was asked to do.
        command: &'static str,
        /// How long it had.
        patience: Duration,
    },
    /// It said no, in the words of the specification.
    #[error("CNI plugin {plugin} failed {command}: {told}")]
    Refused {
        /// Its type.
        plugin: String,
        /// What it was asked to do.
        command: &'static str,
        /// What it said.
        told: Refusal,
    },
    /// It failed without saying why as the specification wants it.
    #[error("CNI plugin {plugin} failed {command} with {status}: {said:?}")]
    Died {
        /// Its type.
        plugin: String,
        /// What it was asked to do.
        command: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote.
        said: String,
    },
    /// It succeeded and its answer is none.
    #[error("CNI plugin {plugin} answered {command} with something else than a result: {reason}")]
    Garbled {
        /// Its type.
        plugin: String,
        /// What it was asked to do.
        command: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// It does not know the version of the configuration.
    #[error("CNI plugin {plugin} does not support version {wanted} of the configuration (but {supported})")]
    Unsupported {
        /// Its type.
        plugin: String,
        /// The configuration's version.
        wanted: String,
        /// What it does support.
        supported: String,
    },
    /// The sandbox has an interface and no address.
    #[error("network {network} gave the sandbox no address")]
    NoAddress {
        /// The network's name.
        network: String,
    },
    /// What was begun was not finished: the process ended in between.
    #[error("sandbox {sandbox} was not plugged in completely")]
    HalfPlugged {
        /// The sandbox.
        sandbox: String,
    },
    /// This node has a network of its own, or the other way round.
    #[error("sandbox {sandbox} belongs to another network than this node's: {reason}")]
    OtherNetwork {
        /// The sandbox.
        sandbox: String,
        /// Which.
        reason: &'static str,
    },
}

/// The error object of the specification.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
pub struct Refusal {
    /// 1 to 99 are the specification's, others the plugin's.
    #[serde(default)]
    pub code: u32,
    /// For people.
    #[serde(default)]
    pub msg: String,
    /// More of it.
    #[serde(default)]
    pub details: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { code, msg, details } = self;
        match details.is_empty() {
            true => write!(f, "{msg} (code {code})"),
            false => write!(f, "{msg}; {details} (code {code})"),
        }
    }
}
