//! The driver that speaks CRI (`--runtime cri`), against the server of this process: what only a runtime shows that others
//! use too. All else is the contract of the runtimes, asked of a containerd.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lambdalet::runtime::SandboxRuntime as _;
use lambdalet::runtime::cri::{CriOptions, CriRuntime};
use lambdalet::runtime::docker::NoCable;
use lambdalet::runtime::types::{MachineFiles, NamespaceMode, PodRef, Resources, SandboxConfig, SandboxNetwork};

use crate::support::World;

const UID: &str = "0b2a-vanished";

/// The directories of this cgroup, in whatever trees there are.
fn cgroups(path: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let trees = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let found = trees.chain([root.to_owned()]).map(|tree| tree.join(path.trim_start_matches('/')));
    found.filter(|path| path.is_dir()).collect()
}

#[tokio::test]
async fn a_sandbox_that_somebody_else_removed_leaves_neither_a_cgroup_nor_logs() {
    let mut world = World::inside().await;
    let logs = world.root().join("driver-logs");
    let mut options = CriOptions::new("driver", logs.clone());
    options.endpoint = format!("unix://{}", world.root().join("cri.sock").display());
    let driver = CriRuntime::connect(options, Arc::new(NoCable)).await.unwrap();
    let above = format!("/lambdalet-test-{}", std::process::id());
    let config = SandboxConfig {
        pod: PodRef { uid: UID.into(), namespace: "default".into(), name: "web".into() },
        handler: None,
        attempt: 0,
        hostname: "web".into(),
        network: SandboxNetwork::Host,
        ipc: NamespaceMode::Pod,
        pid: NamespaceMode::Container,
        sysctls: Default::default(),
        cgroup_parent: format!("{above}/pod{UID}"),
        resources: Resources::default(),
        machine: MachineFiles::default(),
    };
    let id = match driver.run_pod_sandbox(&config).await {
        Err(error) if !nix::unistd::geteuid().is_root() => {
            return println!("skipped: {error}; only root makes cgroups");
        }
        made => made.unwrap(),
    };
    assert!(!cgroups(&config.cgroup_parent).is_empty());
    std::fs::create_dir_all(logs.join(UID).join("main")).unwrap();
    assert_eq!(driver.list_pod_sandboxes(None).await.unwrap().len(), 1);
    assert!(logs.join(UID).exists(), "what is there keeps its own");
    world.remove_sandbox(id.as_str()).await.unwrap();
    let left = driver.list_pod_sandboxes(Some(UID)).await.unwrap();
    let (left_cgroups, left_logs) = (cgroups(&config.cgroup_parent), logs.join(UID).exists());
    for tree in cgroups(&above) {
        std::fs::remove_dir(tree).unwrap();
    }
    assert!(left.is_empty() && left_cgroups.is_empty() && !left_logs, "{left_cgroups:?}, logs: {left_logs}");
}
