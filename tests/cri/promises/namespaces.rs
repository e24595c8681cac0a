//! What is promised of namespaces, and of what a sandbox says of them: ports, kernel parameters, a cgroup.

use std::path::{Path, PathBuf};
use std::time::Duration;

use lambdalet_proto::cri::v1;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::Status;

use super::real::{finds, prints, real, shell, starts, within};
use crate::support::{PATIENCE, World, map};

/// The sandbox and its containers in these namespaces.
fn sandbox(world: &World, namespaces: v1::NamespaceOption) -> v1::PodSandboxConfig {
    let context = v1::LinuxSandboxSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
    let linux = v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    v1::PodSandboxConfig { linux: Some(linux), ..world.config("a") }
}

/// Which namespace of which kernel a process of this script is in, and its id there.
const WHICH: &str = "read -r k </proc/sys/kernel/random/boot_id; echo $k $(readlink /proc/self/ns/ipc); \
                     echo $k $(readlink /proc/self/ns/pid); echo $$";

/// What two containers of a sandbox in these namespaces find, while both run: a namespace's number may be that of one that
/// was before.
async fn both(world: &mut World, namespaces: v1::NamespaceOption) -> Result<[Vec<String>; 2], Status> {
    let config = sandbox(world, namespaces.clone());
    let id = world.run(config.clone()).await?;
    for name in ["one", "two"] {
        let stays = within(shell(world, name, &format!("{WHICH}; exec sleep 600")), namespaces.clone());
        starts(world, (&id, &config), stays).await;
    }
    let (one, two) = (world.lines("one.log", 3).await, world.lines("two.log", 3).await);
    let said = |lines: Vec<String>| lines.iter().map(|line| line.trim_start_matches("stdout F ").to_owned()).collect();
    Ok([said(one), said(two)])
}

/// The host's namespace.
fn own(name: &str) -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    format!("{} {}", kernel.trim(), std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap().display())
}

#[tokio::test]
async fn containers_of_a_pod_share_its_ipc_and_each_has_its_own_processes() {
    let Some(mut world) = real().await else { return };
    let namespaces = v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() };
    let [one, two] = both(&mut world, namespaces).await.unwrap();
    assert!(one[0] == two[0] && one[0] != own("ipc"), "{one:?} {two:?}");
    assert!(one[1] != two[1] && one[1] != own("pid"), "{one:?} {two:?}");
    assert_eq!((one[2].as_str(), two[2].as_str()), ("1", "1"));
}

#[tokio::test]
async fn containers_of_a_pod_may_share_its_processes_of_which_the_first_is_none_of_theirs() {
    let Some(mut world) = real().await else { return };
    let [one, two] = both(&mut world, v1::NamespaceOption::default()).await.unwrap();
    assert!(one[1] == two[1] && one[1] != own("pid"), "{one:?} {two:?}");
    assert!(one[2] != "1" && two[2] != "1", "{one:?} {two:?}");
}

#[tokio::test]
async fn a_pod_may_have_the_hosts_ipc_and_processes() {
    let Some(mut world) = real().await else { return };
    let node = v1::NamespaceMode::Node.into();
    let namespaces = v1::NamespaceOption { ipc: node, pid: node, ..Default::default() };
    let [one, two] = both(&mut world, namespaces).await.unwrap();
    assert_eq!((&one[0], &one[1]), (&own("ipc"), &own("pid")));
    assert_eq!((&two[0], &two[1]), (&own("ipc"), &own("pid")));
}

#[tokio::test]
async fn a_container_may_join_the_processes_of_another() {
    let Some(mut world) = real().await else { return };
    let container = v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() };
    let config = sandbox(&world, container.clone());
    let id = world.run(config.clone()).await.unwrap();
    let main = shell(&world, "main", &format!("{WHICH}; exec sleep 600"));
    let target_id = starts(&mut world, (&id, &config), within(main, container)).await;
    let target = world.lines("main.log", 3).await;
    let joining = v1::NamespaceOption { pid: v1::NamespaceMode::Target.into(), target_id, ..Default::default() };
    let other = within(shell(&world, "other", WHICH), joining);
    let other = finds(&mut world, (&id, &config), other).await;
    assert!(target[1].ends_with(&other[1]) && other[2] != "1", "{target:?} {other:?}");
}

#[tokio::test]
async fn kernel_parameters_are_as_the_sandbox_says() {
    let Some(mut world) = real().await else { return };
    let sysctls = map(&[("net.ipv4.ip_local_port_range", "20000 21000"), ("kernel.shm_rmid_forced", "1")]);
    let linux = v1::LinuxPodSandboxConfig { sysctls, ..Default::default() };
    let config = v1::PodSandboxConfig { linux: Some(linux), ..world.config("a") };
    let script = "cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/shm_rmid_forced";
    let main = shell(&world, "main", script);
    assert_eq!(prints(&mut world, config, main).await, ["20000\t21000", "1"]);
}

/// The directories of a cgroup of this name, in whatever trees there are.
fn cgroups(name: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let trees = std::fs::read_dir(root).unwrap().flatten().map(|entry| entry.path());
    trees.chain([root.to_owned()]).map(|tree| tree.join(name)).filter(|path| path.is_dir()).collect()
}

#[tokio::test]
async fn a_sandbox_is_below_the_cgroup_that_it_is_given() {
    let Some(mut world) = real().await else { return };
    let driver = world.runtime.runtime_config(v1::RuntimeConfigRequest {}).await.unwrap().into_inner();
    let (name, cgroup_parent) = match driver.linux.unwrap().cgroup_driver() {
        // A slice has no dash but for the one above it.
        v1::CgroupDriver::Systemd => {
            let slice = format!("lltest{}.slice", world.uid("a").replace('-', ""));
            (slice.clone(), slice)
        }
        v1::CgroupDriver::Cgroupfs => {
            let name = format!("lltest-{}", world.uid("a"));
            (name.clone(), format!("/{name}"))
        }
    };
    let linux = v1::LinuxPodSandboxConfig { cgroup_parent, ..Default::default() };
    let config = v1::PodSandboxConfig { linux: Some(linux), ..world.config("a") };
    let id = world.run(config.clone()).await.unwrap();
    let main = shell(&world, "main", "exec sleep 600");
    starts(&mut world, (&id, &config), main).await;
    let below = |path: &PathBuf| std::fs::read_dir(path).unwrap().flatten().any(|entry| entry.path().is_dir());
    let found = cgroups(&name);
    assert!(found.iter().any(below), "{found:?}");
    world.stop_sandbox(&id).await.unwrap();
    world.remove_sandbox(&id).await.unwrap();
    for left in cgroups(&name) {
        // Who made it may take it away, and need not.
        let _ = std::fs::remove_dir(left);
    }
}

#[tokio::test]
async fn a_port_of_the_host_leads_to_the_sandbox_while_it_is_ready() {
    let Some(mut world) = real().await else { return };
    let host = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mapping = v1::PortMapping {
        protocol: v1::Protocol::Tcp.into(),
        container_port: 80,
        host_port: host.port().into(),
        ..Default::default()
    };
    let config = v1::PodSandboxConfig { port_mappings: vec![mapping], ..world.config("a") };
    let id = world.run(config.clone()).await.unwrap();
    let main = world.container("main", "listen 80 sleep 60000");
    starts(&mut world, (&id, &config), main).await;
    let echoed = async {
        loop {
            let asked = async {
                let mut socket = TcpStream::connect(host).await?;
                socket.write_all(b"hello").await?;
                let mut answer = [0; 5];
                socket.read_exact(&mut answer).await.map(|_| answer)
            };
            if let Ok(answer) = asked.await {
                return answer;
            }
            // It does not listen yet.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert_eq!(&tokio::time::timeout(PATIENCE, echoed).await.expect("somebody answers"), b"hello");
    world.stop_sandbox(&id).await.unwrap();
    assert!(TcpStream::connect(host).await.is_err(), "nobody answers for a sandbox that is not ready");
}
