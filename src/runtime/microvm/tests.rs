//! The driver on VMs in memory: what a restart, a death and a lost file leave.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::Duration;

use futures::TryStreamExt;
use tempfile::TempDir;
use tokio::time::timeout;

use super::fake::{FakeVms, Manners};
use super::*;
use crate::runtime::stats::DiskUsage;
use crate::runtime::types::{EventKind, MachineFiles, Mount, NamespaceMode, PodRef, SandboxNetwork, SandboxState};
use crate::runtime::verb::Verb;

const PATIENCE: Duration = Duration::from_secs(30);

/// A host on which one driver after another runs.
struct Host {
    vms: FakeVms,
    root: TempDir,
    logs: LogLimits,
}

impl Host {
    fn new() -> Self {
        Self { vms: FakeVms::new(), root: tempfile::tempdir().unwrap(), logs: LogLimits::default() }
    }

    async fn driver(&self) -> MicrovmRuntime {
        self.open().await.unwrap()
    }

    fn open(&self) -> impl Future<Output = Result<MicrovmRuntime>> {
        let options = MicrovmOptions {
            owner: "me".into(),
            root: self.root.path().into(),
            places: Places { pods: self.root.path().join("pods"), ..Places::default() },
            logs: self.logs,
        };
        let images = Arc::new(self.vms.engine.clone());
        MicrovmRuntime::open(options, Arc::new(self.vms.clone()), images)
    }

    fn container(&self, name: &str, image: &str, command: &[&str]) -> ContainerConfig {
        let words = command.iter().map(|part| (*part).to_owned()).collect();
        ContainerConfig {
            image_ref: image.into(),
            cgroup_parent: "/pod".into(),
            annotations: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
            ..ContainerConfig::new(pod(), name, self.vms.engine.add_image(image), words)
        }
    }
}

fn pod() -> PodRef {
    PodRef { uid: "u".into(), namespace: "n".into(), name: "p".into() }
}

async fn sandbox(driver: &MicrovmRuntime) -> SandboxId {
    let config = SandboxConfig {
        pod: pod(),
        handler: None,
        attempt: 0,
        hostname: "h".into(),
        network: SandboxNetwork::Pod { address: [10, 0, 0, 1].into() },
        ipc: NamespaceMode::Pod,
        pid: NamespaceMode::Container,
        sysctls: BTreeMap::new(),
        cgroup_parent: "/pod".into(),
        resources: Resources::default(),
        machine: MachineFiles::default(),
    };
    driver.run_pod_sandbox(&config).await.unwrap()
}

async fn started(driver: &MicrovmRuntime, config: &ContainerConfig) -> ContainerId {
    let id = driver.create_container(&sandbox(driver).await, config).await.unwrap();
    driver.start_container(&id).await.unwrap();
    id
}

async fn exited(driver: &MicrovmRuntime, id: &ContainerId) -> ContainerStatus {
    let look = async {
        loop {
            let status = driver.container_status(id).await.unwrap();
            if status.state == ContainerState::Exited {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, look).await.expect("it exits")
}

async fn log(driver: &MicrovmRuntime, id: &ContainerId, follow: bool) -> String {
    let options = LogOptions { follow, ..LogOptions::default() };
    let chunks = driver.logs(id, &options).await.unwrap().try_collect::<Vec<_>>();
    let chunks = timeout(PATIENCE, chunks).await.expect("the log ends").unwrap();
    chunks.iter().map(|chunk| String::from_utf8_lossy(&chunk.bytes).into_owned()).collect()
}

#[tokio::test]
async fn a_vmm_that_does_not_end_is_an_error_until_it_does() {
    let host = Host::new();
    let driver = host.driver().await;
    started(&driver, &host.container("c", "i", &["idle"])).await;
    let id = sandbox(&driver).await;
    host.vms.hold(true);
    assert_eq!(driver.stop_pod_sandbox(&id).await.unwrap_err().kind(), Kind::Internal);
    assert_eq!(driver.remove_pod_sandbox(&id).await.unwrap_err().kind(), Kind::Internal);
    assert_eq!(driver.pod_sandbox_status(&id).await.unwrap().state, SandboxState::Ready, "it can be tried again");
    drop(driver);
    let driver = host.driver().await;
    assert_eq!((driver.pod_sandbox_status(&id).await.unwrap().state, host.vms.count()), (SandboxState::Ready, 1));
    host.vms.hold(false);
    driver.remove_pod_sandbox(&id).await.unwrap();
    assert_eq!(host.vms.count(), 0);
    assert_eq!(driver.pod_sandbox_status(&id).await.unwrap_err().kind(), Kind::NotFound);
}

#[tokio::test]
async fn a_new_process_takes_over_what_runs() {
    let host = Host::new();
    let first = host.driver().await;
    let speaks = host.container("c", "i", &["print", "one", "sleep", "300", "print", "two", "exit", "7"]);
    let (id, idle) = (started(&first, &speaks).await, started(&first, &host.container("d", "i", &["idle"])).await);
    let before = first.container_status(&idle).await.unwrap();
    let sandboxes = first.list_pod_sandboxes(None).await.unwrap();
    drop(first);
    // What it says and does meanwhile is not lost.
    let second = host.driver().await;
    let found = second.list_pod_sandboxes(Some("u")).await.unwrap();
    assert_eq!((found.len(), &found[0].id, found[0].state), (1, &sandboxes[0].id, SandboxState::Ready));
    assert_eq!((found[0].created_at, found[0].address()), (sandboxes[0].created_at, sandboxes[0].address()));
    let after = second.container_status(&idle).await.unwrap();
    assert_eq!(
        (after.state, after.started_at, &after.annotations),
        (ContainerState::Running, before.started_at, &before.annotations)
    );
    assert_eq!(log(&second, &id, true).await, "one\ntwo\n");
    assert_eq!(exited(&second, &id).await.exit_code, 7);
    assert_eq!(sandbox(&second).await, found[0].id, "it is still the one");
    drop(second);
    let third = host.driver().await;
    assert_eq!(third.container_status(&id).await.unwrap().exit_code, 7);
    assert_eq!(log(&third, &id, true).await, "one\ntwo\n");
}

#[tokio::test]
async fn statuses_and_logs_survive_the_vms_death() {
    let host = Host::new();
    let driver = host.driver().await;
    let runs = started(&driver, &host.container("c", "i", &["print", "one", "idle"])).await;
    let done = started(&driver, &host.container("d", "i", &["exit", "3"])).await;
    exited(&driver, &done).await;
    let waits = driver.create_container(&sandbox(&driver).await, &host.container("e", "i", &["idle"])).await.unwrap();
    while log(&driver, &runs, false).await.is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut events = driver.events().await.unwrap();
    host.vms.kill_all().await;
    let event = timeout(PATIENCE, events.next()).await.unwrap().unwrap();
    assert_eq!((event.pod_uid.as_str(), event.kind), ("u", EventKind::Exited));
    for driver in [&driver, &host.driver().await] {
        let sandboxes = driver.list_pod_sandboxes(None).await.unwrap();
        assert_eq!((sandboxes[0].state, sandboxes[0].pid), (SandboxState::NotReady, None));
        let status = driver.container_status(&runs).await.unwrap();
        assert_eq!((status.state, status.exit_code, status.pid), (ContainerState::Exited, 137, None));
        assert!(status.finished_at.is_some() && status.message.contains("microVM has ended"));
        assert_eq!(driver.container_status(&done).await.unwrap().exit_code, 3);
        assert_eq!(driver.container_status(&waits).await.unwrap().state, ContainerState::Created);
        assert_eq!(log(driver, &runs, true).await, "one\n");
        assert_eq!(driver.start_container(&waits).await.unwrap_err().kind(), Kind::Invalid);
    }
}

#[tokio::test]
async fn a_vm_that_ended_between_two_processes_is_written_down() {
    let host = Host::new();
    let driver = host.driver().await;
    let id = started(&driver, &host.container("c", "i", &["idle"])).await;
    drop(driver);
    host.vms.kill_all().await;
    let driver = host.driver().await;
    assert_eq!(driver.container_status(&id).await.unwrap().exit_code, 137);
    let before = driver.list_pod_sandboxes(None).await.unwrap();
    let next = sandbox(&driver).await;
    assert_ne!(next, before[0].id);
    assert_eq!(driver.list_pod_sandboxes(None).await.unwrap().len(), 1);
}

#[tokio::test]
async fn images_that_no_container_uses_give_way_and_those_in_use_do_not() {
    let host = Host::new();
    let driver = host.driver().await;
    let slots = host.vms.slots();
    let mut ids = Vec::new();
    for number in 0..slots {
        let name = format!("i{number}");
        ids.push(started(&driver, &host.container(&name, &name, &["idle"])).await);
    }
    // Another container of an image that is there already takes no slot.
    started(&driver, &host.container("again", "i0", &["idle"])).await;
    let more = host.container("more", "more", &["idle"]);
    let error = driver.create_container(&sandbox(&driver).await, &more).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("all 8 are in use"), "{error}");
    driver.remove_container(&ids[3]).await.unwrap();
    started(&driver, &more).await;
    let back = host.container("back", "i3", &["idle"]);
    assert!(driver.create_container(&sandbox(&driver).await, &back).await.is_err());
}

#[tokio::test]
async fn removal_leaves_nothing_and_may_be_repeated() {
    let host = Host::new();
    let driver = host.driver().await;
    for _ in 0..20 {
        let id = started(&driver, &host.container("c", "i", &["print", "one", "idle"])).await;
        let sandbox = sandbox(&driver).await;
        driver.remove_container(&id).await.unwrap();
        started(&driver, &host.container("d", "i", &["idle"])).await;
        for _ in 0..2 {
            driver.remove_pod_sandbox(&sandbox).await.unwrap();
        }
    }
    assert_eq!(host.vms.count(), 0);
    assert_eq!(std::fs::read_dir(host.root.path().join("sandboxes")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_checkpoint_that_makes_no_sense_hides_no_other() {
    let host = Host::new();
    let driver = host.driver().await;
    let id = sandbox(&driver).await;
    drop(driver);
    let lost = host.root.path().join("sandboxes/lost");
    std::fs::create_dir(&lost).unwrap();
    std::fs::write(lost.join("sandbox.json"), "{").unwrap();
    let driver = host.driver().await;
    let found = driver.list_pod_sandboxes(None).await.unwrap();
    assert_eq!((found.len(), &found[0].id), (1, &id));
    assert!(lost.exists());
}

#[tokio::test]
async fn what_a_guest_cannot_have_is_refused_with_the_reason() {
    let host = Host::new();
    let driver = host.driver().await;
    let mount = crate::runtime::types::Mount {
        host_path: "/etc".into(),
        container_path: "/host".into(),
        read_only: true,
        ..Default::default()
    };
    let config = ContainerConfig { mounts: vec![mount], ..host.container("c", "i", &["idle"]) };
    let error = driver.create_container(&sandbox(&driver).await, &config).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("/etc is not shared"), "{error}");
    assert!(driver.list_containers(None).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_guest_that_ends_nothing_ends_with_its_vm() {
    let ignored = [Manners::Silent, Manners::Endless, Manners::Lying].map(|manners| async move {
        let host = Host::new();
        let driver = host.driver().await;
        let id = started(&driver, &host.container("c", "i", &["idle"])).await;
        let sandbox = sandbox(&driver).await;
        host.vms.behave(manners);
        let stopped = driver.stop_within(&id, Duration::from_millis(20), Duration::from_millis(200));
        timeout(PATIENCE, stopped).await.expect("it is not waited for").unwrap();
        assert_eq!(exited(&driver, &id).await.exit_code, 137, "{manners:?}");
        assert_eq!(driver.pod_sandbox_status(&sandbox).await.unwrap().state, SandboxState::NotReady, "{manners:?}");
        driver.stop_within(&id, Duration::ZERO, Duration::ZERO).await.unwrap();
        driver.remove_pod_sandbox(&sandbox).await.unwrap();
        assert_eq!(host.vms.count(), 0);
    });
    join_all(ignored).await;
}

#[tokio::test]
async fn a_container_that_heeds_leaves_its_vm_and_the_others_alone() {
    let host = Host::new();
    let driver = host.driver().await;
    let id = started(&driver, &host.container("c", "i", &["idle"])).await;
    let other = started(&driver, &host.container("d", "i", &["idle"])).await;
    driver.pause_container(&id).await.unwrap();
    driver.stop_container(&id, PATIENCE).await.unwrap();
    assert_eq!(driver.container_status(&id).await.unwrap().state, ContainerState::Exited);
    assert_eq!(driver.container_status(&other).await.unwrap().state, ContainerState::Running);
}

#[tokio::test]
async fn a_silent_guest_holds_up_neither_lists_nor_statistics() {
    let host = Host::new();
    let driver = host.driver().await;
    let id = started(&driver, &host.container("c", "i", &["idle"])).await;
    host.vms.behave(Manners::Silent);
    let asked = async {
        let listed = driver.list_containers(None).await.unwrap();
        assert_eq!((listed.len(), &listed[0].id, listed[0].state), (1, &id, ContainerState::Running));
        assert!(driver.list_pod_sandbox_stats(StatsScope::All).await.unwrap().is_empty());
    };
    timeout(PATIENCE, asked).await.expect("it is done without");
}

#[tokio::test]
async fn a_silent_guest_does_not_hold_up_a_new_process() {
    let host = Host::new();
    let first = host.driver().await;
    let id = started(&first, &host.container("c", "i", &["idle"])).await;
    drop(first);
    host.vms.behave(Manners::Silent);
    let second = timeout(PATIENCE, host.driver()).await.expect("it is done without");
    assert_eq!(second.list_pod_sandboxes(None).await.unwrap()[0].state, SandboxState::Ready);
    assert_eq!(second.container_status(&id).await.unwrap().state, ContainerState::Running);
}

#[tokio::test]
async fn one_that_is_given_up_while_it_opens_lets_go_of_its_sandboxes() {
    let host = Host::new();
    let first = host.driver().await;
    sandbox(&first).await;
    drop(first);
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let settled = async |before: usize| {
        while alive() > before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, settled(0)).await.expect("the first lets go");
    host.vms.behave(Manners::Silent);
    // Once it attends the sandbox, it waits for the guest.
    let attended = async {
        while alive() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    // Both are cancel-safe: that the first is, is what is shown.
    tokio::select! {
        _ = host.open() => panic!("it waits for the guest"),
        () = attended => {}
    }
    timeout(PATIENCE, settled(0)).await.expect("nobody holds on to the guest");
    host.vms.behave(Manners::Good);
    assert_eq!(host.driver().await.list_pod_sandboxes(None).await.unwrap()[0].state, SandboxState::Ready);
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_taken_over_hides_no_other() {
    let host = Host::new();
    let driver = host.driver().await;
    let id = started(&driver, &host.container("c", "i", &["idle"])).await;
    let before = sandbox(&driver).await;
    drop(driver);
    let logs = host.root.path().join("sandboxes").join(before.as_str()).join("logs");
    std::fs::remove_dir_all(&logs).unwrap();
    std::fs::write(&logs, "no directory").unwrap();
    let driver = host.driver().await;
    assert_eq!(driver.list_pod_sandboxes(None).await.unwrap()[0].id, before);
    assert_eq!(driver.container_status(&id).await.unwrap().state, ContainerState::Running);
    driver.remove_pod_sandbox(&before).await.unwrap();
    assert_eq!(host.vms.count(), 0);
}

#[tokio::test]
async fn the_log_of_a_start_that_nobody_waits_for_is_fetched() {
    let host = Host::new();
    let driver = host.driver().await;
    let config = host.container("c", "i", &["print", "one", "exit", "0"]);
    let id = driver.create_container(&sandbox(&driver).await, &config).await.unwrap();
    host.vms.behave(Manners::Absent);
    assert!(timeout(Duration::from_millis(100), driver.start_container(&id)).await.is_err());
    assert_eq!(log(&driver, &id, true).await, "one\n");
    assert_eq!(exited(&driver, &id).await.exit_code, 0);
}

#[tokio::test]
async fn a_start_that_is_repeated_writes_no_line_twice() {
    let host = Host::new();
    let driver = host.driver().await;
    let words = ["sleep", "50", "print", "one", "sleep", "50", "print", "two", "exit", "0"];
    let id = driver.create_container(&sandbox(&driver).await, &host.container("c", "i", &words)).await.unwrap();
    host.vms.engine.fail_next(Verb::StartContainer, RuntimeError::new(Kind::Unavailable, "the session is lost"));
    assert_eq!(driver.start_container(&id).await.unwrap_err().kind(), Kind::Unavailable);
    driver.start_container(&id).await.unwrap();
    assert_eq!(exited(&driver, &id).await.exit_code, 0);
    assert_eq!(log(&driver, &id, true).await, "one\ntwo\n");
}

#[tokio::test]
async fn a_log_that_the_host_refuses_for_a_while_is_there_in_the_end() {
    let host = Host { logs: LogLimits { segment: 1, segments: 5 }, ..Host::new() };
    let driver = host.driver().await;
    let config = host.container("c", "i", &["print", "one", "exit", "0"]);
    let sandbox = sandbox(&driver).await;
    let id = driver.create_container(&sandbox, &config).await.unwrap();
    let logs = host.root.path().join("sandboxes").join(sandbox.as_str()).join("logs");
    let (place, aside) = (logs.join(id.as_str()), logs.join("aside"));
    std::fs::rename(&place, &aside).unwrap();
    driver.start_container(&id).await.unwrap();
    let asked_again = async {
        while host.vms.engine.calls(Verb::Logs) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, asked_again).await.expect("what was refused is not held on to, but asked for again");
    std::fs::rename(&aside, &place).unwrap();
    assert_eq!(log(&driver, &id, true).await, "one\n");
    assert_eq!(exited(&driver, &id).await.exit_code, 0);
}

#[tokio::test]
async fn an_empty_dir_is_its_groups_in_the_guest_too_and_what_it_holds_is_told() {
    let host = Host::new();
    let driver = host.driver().await;
    let host_path = host.root.path().join("pods/u/volumes/kubernetes.io~empty-dir/e");
    std::fs::create_dir_all(&host_path).unwrap();
    // Another group than one's own is for root to give.
    let _ = std::os::unix::fs::chown(&host_path, None, Some(4321));
    std::fs::set_permissions(&host_path, std::fs::Permissions::from_mode(0o2770)).unwrap();
    let gid = std::fs::metadata(&host_path).unwrap().gid();
    let mount = Mount { host_path: host_path.clone(), container_path: "/e".into(), ..Mount::default() };
    let config = ContainerConfig { mounts: vec![mount], ..host.container("c", "i", &["idle"]) };
    started(&driver, &config).await;
    let made: Vec<_> = host.vms.volumes().into_values().map(|volume| (volume.mode, volume.gid)).collect();
    assert_eq!(made, [(0o2770, gid)]);
    let told = driver.list_pod_sandbox_stats(StatsScope::All).await.unwrap();
    assert_eq!(told[0].volumes.iter().map(|(path, _)| path).collect::<Vec<_>>(), [&host_path]);
    let around = DiskUsage { time: told[0].usage.time, bytes: 1000, inodes: 1 };
    let with = around.with_sandboxes(&told, &host_path);
    assert_eq!((with.bytes, with.inodes), (1000 + 4096, 2));
    assert_eq!(around.with_sandboxes(&told, host.root.path()), around, "of others nothing is counted");
    assert!(driver.list_pod_sandbox_stats(StatsScope::CpuAndMemory).await.unwrap()[0].volumes.is_empty());
}
