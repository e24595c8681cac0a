//! What is promised of what containers see of the host's files.

use std::path::{Path, PathBuf};

use lambdalet_proto::cri::v1;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use super::real::{prints, real, shell, starts, with};
use crate::support::World;

/// The directory, as `/data`.
fn data(folder: &Path) -> v1::Mount {
    v1::Mount { container_path: "/data".into(), host_path: folder.display().to_string(), ..Default::default() }
}

#[tokio::test]
async fn a_read_only_mount_is_read_and_not_written_to() {
    let Some(mut world) = real().await else { return };
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "there\n").unwrap();
    let script = "cat /data/file; touch /data/file /data/new 2>/dev/null && echo written || echo refused";
    let mounts = vec![v1::Mount { readonly: true, ..data(folder.path()) }];
    let (config, main) = (world.config("a"), shell(&world, "main", script));
    let lines = prints(&mut world, config, v1::ContainerConfig { mounts, ..main }).await;
    assert_eq!(lines, ["there", "refused"]);
    assert!(!folder.path().join("new").exists());
}

#[tokio::test]
async fn a_file_of_the_host_is_mounted_as_a_file() {
    let Some(mut world) = real().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "there\n").unwrap();
    let mounts = vec![v1::Mount { container_path: "/etc/own".into(), ..data(&file) }];
    let (config, main) = (world.config("a"), shell(&world, "main", "cat /etc/own"));
    assert_eq!(prints(&mut world, config, v1::ContainerConfig { mounts, ..main }).await, ["there"]);
}

/// A directory whose mounts others see, with one below it; both go with it.
struct Shared {
    folder: TempDir,
}

impl Shared {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("below")).unwrap();
        let none = None::<&str>;
        mount(Some(folder.path()), folder.path(), none, MsFlags::MS_BIND, none).unwrap();
        let shared = Self { folder };
        mount(none, shared.path(), none, MsFlags::MS_SHARED, none).unwrap();
        shared
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn below(&self) -> PathBuf {
        self.path().join("below")
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // What was mounted below may be gone.
        let _ = umount2(&self.below(), MntFlags::MNT_DETACH);
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}

fn propagated(folder: &Shared, propagation: v1::MountPropagation) -> Vec<v1::Mount> {
    vec![v1::Mount { propagation: propagation.into(), ..data(folder.path()) }]
}

#[tokio::test]
async fn what_the_host_mounts_later_is_seen_where_that_is_wanted() {
    let Some(mut world) = real().await else { return };
    let folder = Shared::new();
    let sandbox = world.sandbox("a").await;
    let mut ids = Vec::new();
    for (name, propagation) in [
        ("sees", v1::MountPropagation::PropagationHostToContainer),
        ("sees-not", v1::MountPropagation::PropagationPrivate),
    ] {
        let mounts = propagated(&folder, propagation);
        let config = v1::ContainerConfig { mounts, ..shell(&world, name, "exec sleep 600") };
        let of_sandbox = world.config("a");
        ids.push(starts(&mut world, (&sandbox, &of_sandbox), config).await);
    }
    mount(Some("none"), &folder.below(), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    std::fs::write(folder.below().join("file"), "new").unwrap();
    let look = async |world: &mut World, id: &str| {
        let cmd = ["cat", "/data/below/file"].map(str::to_owned).to_vec();
        let request = v1::ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: 20 };
        world.runtime.exec_sync(request).await.unwrap().into_inner()
    };
    assert_eq!(look(&mut world, &ids[0]).await.stdout, b"new");
    assert_ne!(look(&mut world, &ids[1]).await.exit_code, 0);
}

#[tokio::test]
async fn what_a_container_mounts_is_seen_by_the_host_where_that_is_wanted() {
    let Some(mut world) = real().await else { return };
    let folder = Shared::new();
    let context = v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() };
    let linux = v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    let config = v1::PodSandboxConfig { linux: Some(linux), ..world.config("a") };
    let script = "mount -t tmpfs none /data/below && echo new >/data/below/file && echo mounted";
    let mounts = propagated(&folder, v1::MountPropagation::PropagationBidirectional);
    let main = v1::ContainerConfig { mounts, ..shell(&world, "main", script) };
    let rights = v1::LinuxContainerSecurityContext { privileged: true, ..Default::default() };
    assert_eq!(prints(&mut world, config, with(main, rights)).await, ["mounted"]);
    assert_eq!(std::fs::read_to_string(folder.below().join("file")).unwrap(), "new\n");
}
