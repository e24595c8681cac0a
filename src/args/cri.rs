//! `lambdalet cri`: its flags.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use ipnet::IpNet;

use super::flags::{LoggingArgs, MicrovmArgs, RuntimeArgs};
use super::start::cri::{self, DEFAULT_KUBELET_ROOT, DEFAULT_RANGE, DEFAULT_STREAM_ADDRESS, Plan};
use crate::config::Settings;

/// Every flag of `cri`.
#[derive(Debug, Args)]
pub(super) struct CriArgs {
    /// The socket that clients connect to; only its owner may
    #[arg(long, value_name = "URL", default_value = "unix:///run/lambdalet/cri.sock", value_parser = socket)]
    listen: PathBuf,
    /// Where is kept what must survive a restart; one process has it
    #[arg(long, value_name = "DIR", default_value = "/var/lib/lambdalet-cri")]
    root_dir: PathBuf,
    /// Whose the containers on this host are: a word of small letters and digits that no other process uses here
    /// [default: one that follows from --root-dir]
    #[arg(long, value_name = "WORD", value_parser = owner)]
    owner: Option<String>,
    /// Where exec, attach and port-forward are served to whoever was given a URL; a loopback address
    #[arg(long, value_name = "IP:PORT", default_value_t = DEFAULT_STREAM_ADDRESS, value_parser = loopback)]
    stream_address: SocketAddr,
    /// Range of the sandboxes' addresses [default: what the client says, else 10.188.0.0/16]
    #[arg(long, value_name = "CIDR")]
    pod_cidr: Option<IpNet>,
    /// The kubelet's own root directory: containers in microVMs get copies of what it makes there for their Pods
    #[arg(long, value_name = "DIR", default_value = DEFAULT_KUBELET_ROOT)]
    kubelet_root_dir: PathBuf,
    #[command(flatten)]
    runtime: RuntimeArgs,
    #[command(flatten)]
    microvm: MicrovmArgs,
    #[command(flatten)]
    pub(super) logging: LoggingArgs,
}

impl CriArgs {
    /// Runs until a signal.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let Self { listen, root_dir, owner, stream_address, pod_cidr, kubelet_root_dir, runtime, microvm, logging: _ } =
            self;
        let mut settings = Settings::default();
        runtime.apply(&mut settings);
        microvm.apply(&mut settings)?;
        settings.runtime.microvm.pods = Some(kubelet_root_dir.join("pods"));
        let range = (pod_cidr, DEFAULT_RANGE.parse()?);
        cri::serve(Plan { listen, root_dir, owner, stream_address, range, settings }).await
    }
}

pub(super) fn socket(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix://").unwrap_or(text) {
        path if path.starts_with('/') => Ok(path.into()),
        _ => Err("a socket is unix:// and an absolute path".to_owned()),
    }
}

fn owner(text: &str) -> Result<String, String> {
    let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if (1..=32).contains(&text.len()) && text.chars().all(known) {
        return Ok(text.to_owned());
    }
    Err("an owner is 1 to 32 small letters and digits".to_owned())
}

fn loopback(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(address),
        Ok(_) => Err("not a loopback address: what is served there is not encrypted".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_make_no_sense_are_refused() {
        assert_eq!(socket("unix:///run/a.sock"), Ok("/run/a.sock".into()));
        assert_eq!(socket("/run/a.sock"), Ok("/run/a.sock".into()));
        assert!(socket("tcp://1.2.3.4").is_err() && socket("unix://a").is_err());
        assert!(owner("ci1").is_ok() && owner("").is_err() && owner("a/b").is_err() && owner("A").is_err());
        assert!(loopback("127.0.0.1:0").is_ok() && loopback("[::1]:1").is_ok() && loopback("0.0.0.0:1").is_err());
    }
}
