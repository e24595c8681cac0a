//! A start in the directory of another one: nothing that this has left is in its way, or leads it out of there.

use std::os::unix::fs::{MetadataExt, symlink};

use super::*;

/// A template that Firecracker refuses, of the machines of this bench.
async fn spoilt_template(bench: &Bench) -> Template {
    let templates = Templates::new(bench.place.path().join("templates"));
    let spec = MachineSpec { template: Some(templates.begin().unwrap()), ..bench.spec() };
    let _server = bench.stand_in(&spec);
    let template = bench.manager.boot(&spec).await.unwrap().save().await.unwrap();
    fs::write(template.state(), "half of one").unwrap();
    template.describe(bench.manager.template_kind(&spec).await.unwrap()).unwrap();
    template
}

/// Does what a VMM may that was taken over: the jail's root is its own.
fn plant(root: &Path, outside: &Path) {
    fs::remove_dir_all(root.join("dev")).unwrap();
    for directory in ["own", "old_root"] {
        fs::create_dir(root.join(directory)).unwrap();
    }
    let directories = ["dev", "own/out"].map(|link| (link, outside.to_owned()));
    let files = ["firecracker", "firecracker.pid", SCRATCH].map(|link| (link, outside.join("file")));
    for (link, target) in directories.into_iter().chain(files) {
        crate::file::remove(&root.join(link)).unwrap();
        symlink(target, root.join(link)).unwrap();
    }
    fs::write(root.join(VSOCK_SOCKET), "").unwrap();
}

#[tokio::test]
async fn one_that_cannot_be_restored_is_booted_in_its_place() {
    let Some(mut bench) = Bench::new() else { return };
    let template = spoilt_template(&bench).await;
    let outside = bench.place.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "theirs").unwrap();
    let spec = bench.spec();
    let root = jailer::root(&spec.dir, &bench.manager.program);
    let server = bench.stand_in(&spec);
    // The second restore finds what the first boot has left.
    for memory in [Memory::File, Memory::Paged(bench.pager())] {
        bench.manager.memory = memory;
        let refused = bench.manager.restore(&spec, &template).await.map(drop).unwrap_err();
        assert!(refused.to_string().contains("Failed to restore from snapshot"), "{refused}");
        assert!(bench.manager.adopt(&spec.dir).await.unwrap().is_none());
        plant(&root, &outside);
        let machine = bench.manager.boot(&spec).await.unwrap();
        assert_eq!(server.asked().last().unwrap(), "PUT /actions -> 204");
        assert_eq!(said_back(machine.agent().await.unwrap()).await, "hello\n");
        let inode = |path: PathBuf| fs::symlink_metadata(path).unwrap().ino();
        assert_eq!(inode(root.join(SCRATCH)), inode(spec.scratch.clone()));
        assert!(![SNAPSHOT, MEMORY, "own"].iter().any(|name| root.join(name).exists()), "it was not restored");
        machine.kill().await.unwrap();
        assert_eq!(fs::read_to_string(outside.join("file")).unwrap(), "theirs");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    }
}

#[tokio::test]
async fn one_that_did_not_start_is_tried_again_in_its_directory() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    let _server = bench.stand_in(&spec);
    for _ in 0..2 {
        let refused = bench.manager.boot(&MachineSpec { vcpus: 33, ..spec.clone() }).await.map(drop).unwrap_err();
        assert!(refused.to_string().contains("33 vCPUs"), "{refused}");
    }
    let machine = bench.manager.boot(&spec).await.unwrap();
    assert_eq!(said_back(machine.agent().await.unwrap()).await, "hello\n");
    machine.kill().await.unwrap();
}
