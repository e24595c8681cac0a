//! A cluster that `hack/cluster up` made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use kube::Client;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};

/// Where a cluster lives, and what its `env` file says.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    pub(crate) dir: PathBuf,
    facts: BTreeMap<String, String>,
}

impl Cluster {
    /// The cluster the environment names. `None`, with a word why, if it names none.
    pub(crate) fn from_environment() -> Option<Self> {
        match std::env::var_os("LAMBDALET_TEST_CLUSTER") {
            Some(dir) => Some(Self::at(Path::new(&dir))),
            None => {
                eprintln!("skipped: LAMBDALET_TEST_CLUSTER names no cluster; run hack/test");
                None
            }
        }
    }

    fn at(dir: &Path) -> Self {
        let path = dir.join("env");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("no cluster: {}: {e}", path.display()));
        let facts = text.lines().filter_map(|line| line.split_once('='));
        Self { dir: dir.to_owned(), facts: facts.map(|(k, v)| (k.to_owned(), v.to_owned())).collect() }
    }

    /// Starts another one, for a test that takes its API server away.
    pub(crate) fn start(dir: &Path) -> Self {
        hack(dir, &["up"]);
        Self::at(dir)
    }

    /// Ends one that [`Cluster::start`] made.
    pub(crate) fn down(&self) {
        self.hack(&["down"]);
    }

    /// A value of the cluster's `env` file.
    pub(crate) fn fact(&self, name: &str) -> &str {
        self.facts.get(name).unwrap_or_else(|| panic!("{} is not in {}/env", name, self.dir.display()))
    }

    /// Whether kube-proxy and cluster DNS run here.
    pub(crate) fn has_addons(&self) -> bool {
        self.dir.join("run/kube-proxy.pid").exists()
    }

    pub(crate) fn admin_kubeconfig(&self) -> PathBuf {
        self.dir.join("admin.kubeconfig")
    }

    /// The path of a kubeconfig for the identity of that node.
    pub(crate) fn node_kubeconfig(&self, node: &str) -> PathBuf {
        self.hack(&["node-kubeconfig", node]).trim().into()
    }

    /// The path of a kubeconfig for a user without groups.
    pub(crate) fn user_kubeconfig(&self, user: &str) -> PathBuf {
        self.hack(&["user-kubeconfig", user]).trim().into()
    }

    /// The path of a kubeconfig with a bootstrap token.
    pub(crate) fn bootstrap_kubeconfig(&self) -> PathBuf {
        self.hack(&["bootstrap-kubeconfig"]).trim().into()
    }

    /// The address of an API server that translates what clients send over WebSocket to SPDY for nodes, as those before
    /// 1.36 do. Whoever asks first starts it.
    pub(crate) fn older_apiserver(&self) -> String {
        self.hack(&["older-apiserver", "up"]).trim().to_owned()
    }

    pub(crate) fn hack(&self, args: &[&str]) -> String {
        hack(&self.dir, args)
    }

    /// A client with every right. It belongs to the async runtime it is made in.
    pub(crate) async fn client(&self) -> Client {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let kubeconfig = Kubeconfig::read_from(self.admin_kubeconfig()).unwrap();
        let options = KubeConfigOptions::default();
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
        config.read_timeout = None;
        Client::try_from(config).unwrap()
    }

    /// `kubectl` as the cluster's administrator.
    pub(crate) fn kubectl(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.facts.get("KUBECTL").map_or("kubectl", String::as_str));
        command.arg("--kubeconfig").arg(self.admin_kubeconfig()).args(args).env("NO_PROXY", "*");
        command
    }
}

fn hack(dir: &Path, args: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("hack/cluster");
    let output = Command::new(&script).arg("--dir").arg(dir).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "hack/cluster --dir {} {args:?}: {}\n{}",
        dir.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
