//! Volumes and the files in them.

use lambdalet::runtime::Kind;
use lambdalet::runtime::microvm::agent::{PushedContent, PushedFile};
use lambdalet_proto::agent::v1::volume::Kind as VolumeKind;
use lambdalet_proto::agent::v1::{ContainerSpec, Empty, FileLayout, Mount, Volume};

use crate::bench::{Bench, IMAGE, script};

fn volume(name: &str, kind: VolumeKind) -> Volume {
    Volume { name: name.into(), kind: Some(kind), mode: 0o1777, gid: 0 }
}

fn mount(volume: &str, sub_path: &str, path: &str, read_only: bool) -> Mount {
    let (volume, sub_path, container_path) = (volume.into(), sub_path.into(), path.into());
    Mount { volume, sub_path, container_path, read_only, image: String::new() }
}

fn file(path: &str, bytes: Vec<u8>) -> PushedFile {
    PushedFile { path: path.into(), mode: 0o444, owner: (0, 0), content: PushedContent::File(bytes.into()) }
}

pub(crate) async fn files_are_pushed_and_exchanged_at_once(bench: &mut Bench) {
    let agent = &bench.agent;
    agent.make_volume(volume("config", VolumeKind::Pushed(Empty {}))).await.unwrap();
    agent.make_volume(volume("config", VolumeKind::Pushed(Empty {}))).await.unwrap();
    agent.make_volume(volume("files", VolumeKind::Pushed(Empty {}))).await.unwrap();
    let large = vec![b'z'; 2_000_000];
    agent
        .push_files("config", FileLayout::Atomic, &[file("key", b"one".to_vec()), file("large", large)])
        .await
        .unwrap();
    agent.push_files("files", FileLayout::Plain, &[file("hosts", b"127.0.0.1 localhost\n".to_vec())]).await.unwrap();
    let look = "cat /config/key /etc/hosts; wc -c < /config/large; cat /one; echo x > /config/y; echo ready; \
                until grep -q two /config/key; do sleep 0.05; done; cat /config/key /etc/hosts; ls /config";
    let mounts = vec![
        mount("config", "", "/config", true),
        mount("files", "hosts", "/etc/hosts", true),
        mount("config", "key", "/one", true),
    ];
    bench.start(ContainerSpec { mounts, ..script("reads", look) }).await;
    bench.log_says("reads", "ready\n").await;
    let before = bench.log("reads").await;
    assert!(
        before.starts_with("one127.0.0.1 localhost\n2000000\none") && before.contains("Read-only file system"),
        "{before}"
    );
    agent.push_files("files", FileLayout::Plain, &[file("hosts", b"10.0.0.1 other\n".to_vec())]).await.unwrap();
    agent.push_files("config", FileLayout::Atomic, &[file("key", b"two".to_vec())]).await.unwrap();
    assert_eq!(agent.wait("reads").await.unwrap().exit_code, 0);
    let after = bench.log("reads").await;
    assert!(after.ends_with("ready\ntwo10.0.0.1 other\nkey\n"), "{after}");
    let many = vec![file("a", vec![0; 17 << 20])];
    assert_eq!(agent.push_files("config", FileLayout::Atomic, &many).await.unwrap_err().kind(), Kind::Invalid);
    let out = [file("../out", Vec::new())];
    assert_eq!(agent.push_files("config", FileLayout::Atomic, &out).await.unwrap_err().kind(), Kind::Invalid);
    assert!(agent.push_files("none", FileLayout::Atomic, &[]).await.unwrap_err().is_not_found());
    agent.remove("reads").await.unwrap();
    for name in ["config", "files", "files"] {
        agent.remove_volume(name).await.unwrap();
    }
}

pub(crate) async fn a_volume_is_shared_and_read_back(bench: &mut Bench) {
    let agent = &bench.agent;
    agent.make_volume(volume("memory", VolumeKind::Memory(1 << 20))).await.unwrap();
    agent.make_volume(volume("disk", VolumeKind::Scratch(Empty {}))).await.unwrap();
    let grouped = Volume { mode: 0o2770, gid: 4321, ..volume("grouped", VolumeKind::Scratch(Empty {})) };
    agent.make_volume(grouped).await.unwrap();
    let mounts = vec![mount("memory", "", "/memory", false), mount("disk", "sub/dir", "/disk", false)];
    let (_, said) =
        bench.run(ContainerSpec { mounts: mounts.clone(), ..script("looks", "stat -c %a /disk /memory") }).await;
    assert_eq!(said, "1777\n1777\n", "a part is made with the mode of its volume");
    let write = "echo last words > /disk/message; ln -s /etc/passwd /disk/link; dd if=/dev/zero of=/memory/x bs=65536";
    let (ended, said) = bench.run(ContainerSpec { mounts: mounts.clone(), ..script("writes", write) }).await;
    assert!(ended.exit_code != 0 && said.contains("No space left"), "{said}");
    let of_group = vec![mount("grouped", "", "/grouped", false)];
    let (_, said) = bench.run(ContainerSpec { mounts: of_group, ..script("group", "stat -c '%a %g' /grouped") }).await;
    assert_eq!(said, "2770 4321\n");
    let (_, said) =
        bench.run(ContainerSpec { mounts, ..script("reads", "cat /disk/message; wc -c < /memory/x") }).await;
    assert_eq!(said, "last words\n1048576\n");
    let read = |path: &'static str, limit| async move { agent.read_file("disk", path, limit).await };
    assert_eq!(read("sub/dir/message", 100).await.unwrap().unwrap(), "last words\n");
    assert_eq!(read("sub/dir/message", 6).await.unwrap().unwrap(), "words\n");
    assert_eq!(read("sub/dir/none", 6).await.unwrap(), None);
    assert!(read("sub/dir/link", 6).await.is_err() && read("../x", 6).await.is_err());
    for name in ["memory", "disk", "grouped"] {
        agent.remove_volume(name).await.unwrap();
    }
}

pub(crate) async fn what_a_volume_on_the_disk_holds_is_counted(bench: &mut Bench) {
    let agent = &bench.agent;
    agent.make_volume(volume("disk", VolumeKind::Scratch(Empty {}))).await.unwrap();
    agent.make_volume(volume("memory", VolumeKind::Memory(8 << 20))).await.unwrap();
    let mounts = vec![mount("disk", "", "/disk", false), mount("memory", "", "/memory", false)];
    let write = "for at in disk memory; do dd if=/dev/zero of=/$at/file bs=65536 count=32 2>/dev/null; done; sync";
    bench.run(ContainerSpec { mounts, ..script("writes", write) }).await;
    let counted = agent.stats(true).await.unwrap().volumes;
    assert_eq!(counted.iter().map(|one| (one.name.as_str(), one.inodes)).collect::<Vec<_>>(), [("disk", 1)]);
    assert!((2 << 20..3 << 20).contains(&counted[0].bytes), "{counted:?}");
    assert!(agent.stats(false).await.unwrap().volumes.is_empty());
    agent.remove_volume("disk").await.unwrap();
    agent.remove_volume("memory").await.unwrap();
    assert!(agent.stats(true).await.unwrap().volumes.is_empty());
}

/// As of a node that was killed before it could note that the image is there.
pub(crate) async fn an_image_that_was_left_in_a_slot_gives_way(bench: &mut Bench) {
    let (agent, slot) = (&bench.agent, bench.slot());
    bench.start(script("uses", "sleep 1000")).await;
    assert_eq!(agent.unmount_image(&slot, "other").await.unwrap_err().kind(), Kind::AlreadyExists);
    agent.remove("uses").await.unwrap();
    agent.unmount_image(&slot, "other").await.unwrap();
    agent.mount_image(&slot, "left", "erofs").await.unwrap();
    assert_eq!(agent.mount_image(&slot, IMAGE, "erofs").await.unwrap_err().kind(), Kind::AlreadyExists);
    agent.unmount_image(&slot, IMAGE).await.unwrap();
    agent.mount_image(&slot, IMAGE, "erofs").await.unwrap();
    assert_eq!(bench.run(script("after", "echo well")).await.1, "well\n");
}
