//! The containerd that nodes with `--runtime cri` run their Pods on.

use super::node::{Options, output};

/// One that `hack/containerd` has set up, and its client.
#[derive(Clone, Debug)]
pub(crate) struct Containerd {
    socket: String,
    ctr: String,
}

impl Containerd {
    /// `None`, and a word about it, unless the environment names one.
    pub(crate) fn from_environment() -> Option<Self> {
        let named = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let found = named("LAMBDALET_TEST_CONTAINERD").zip(named("LAMBDALET_TEST_CTR"));
        if found.is_none() {
            eprintln!("skipped: LAMBDALET_TEST_CONTAINERD and LAMBDALET_TEST_CTR name no containerd (hack/containerd)");
        }
        found.map(|(socket, ctr)| Self { socket, ctr })
    }

    /// How a node on it is started.
    pub(crate) fn options(&self) -> Options {
        Options::flags(&["--runtime=cri", &format!("--container-runtime-endpoint=unix://{}", self.socket)])
    }

    /// Containers of that owner, sandboxes included.
    pub(crate) fn containers(&self, owner: &str) -> Vec<String> {
        let filter = format!(r#"labels."lambdalet.dev/owner"=={owner}"#);
        let mut ids: Vec<_> = self.ctr(&["containers", "ls", "-q", &filter]).lines().map(str::to_owned).collect();
        ids.sort();
        ids
    }

    /// Ends and removes them, past CRI.
    pub(crate) fn remove(&self, owner: &str) {
        for id in self.containers(owner) {
            self.ctr(&["tasks", "rm", "-f", &id]);
            self.ctr(&["containers", "rm", &id]);
        }
    }

    fn ctr(&self, args: &[&str]) -> String {
        output(&self.ctr, &[&["--address", &self.socket, "--namespace", "k8s.io"], args].concat())
    }
}
