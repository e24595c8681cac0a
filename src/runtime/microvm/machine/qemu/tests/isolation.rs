//! What the process of a VMM can see and do.

use std::collections::BTreeSet;

use super::*;

fn status(pid: i32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn names(path: &str) -> BTreeSet<String> {
    fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[tokio::test]
async fn a_vmm_sees_its_own_directory_and_has_no_rights() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    let machine = bench.qemu.boot(&spec).await.unwrap();
    Guest::of(machine.as_ref()).await.ready().await;
    let pid = machine.pid();
    it_sees_its_directory(pid);
    it_has_no_rights(pid);
    it_is_bounded(pid, &bench, &spec);
    it_holds_its_own_files(pid, spec.dir.path());
    machine.kill().await.unwrap();
}

/// Nothing of the host but devices; what it was started from is gone.
fn it_sees_its_directory(pid: i32) {
    let root = format!("/proc/{pid}/root");
    println!("root: {:?}", names(&root));
    let devices = names(&format!("{root}/dev"));
    assert!(devices.is_superset(&set(&["null", "urandom"])) && devices.is_subset(&set(&["kvm", "null", "urandom"])));
    let mut own = set(&["agent.sock", "qmp.sock", "scratch.img"]);
    own.extend((0..8).map(|slot| format!("blank{slot}")));
    assert_eq!(names(&format!("{root}/vm")), own);
    for place in ["lib", "lib64", "usr/lib", "usr/lib64", "usr/share/qemu", "usr/share/seabios"] {
        let left = fs::read_dir(format!("{root}/{place}")).map(Iterator::count);
        assert_eq!(left.unwrap_or(0), 0, "{place} was taken away");
    }
    assert_eq!(fs::metadata(format!("{root}/usr/bin/qemu-system-x86_64")).unwrap().len(), 0);
    for place in ["proc", "sys", "etc/passwd", "root", "home", "var", "run", "tmp"] {
        assert!(!Path::new(&format!("{root}/{place}")).exists(), "{place}");
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    println!("{mounts}");
    assert_eq!(mounts.lines().count(), 3, "its root, its directory, its console");
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let options: Vec<&str> = fields[3].split(',').collect();
        let writable = matches!(fields[1], "/vm" | "/console");
        assert_eq!(options.contains(&"rw"), writable, "{line}");
        assert!(options.contains(&"nosuid") && options.contains(&"noexec"), "{line}");
    }
}

/// A user of its own without a capability or a way to one, a filter on system calls, namespaces of its own.
fn it_has_no_rights(pid: i32) {
    let user = VmmUser::default();
    assert_eq!(status(pid, "Uid"), [user.uid; 4].map(|uid| uid.to_string()).join(" "));
    assert_eq!(status(pid, "Gid"), [user.gid; 4].map(|gid| gid.to_string()).join(" "));
    assert_eq!(status(pid, "Groups"), "");
    for kind in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&status(pid, kind), 16), Ok(0), "{kind}");
    }
    assert_eq!((status(pid, "NoNewPrivs"), status(pid, "Seccomp")), ("1".to_owned(), "2".to_owned()));

    // Namespaces: it is the first process of its own, and its network has not even a loopback that is up.
    for namespace in ["mnt", "pid", "ipc", "uts", "net"] {
        let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(link(&pid.to_string()), link("self"), "{namespace}");
    }
    assert!(status(pid, "NSpid").ends_with(" 1"), "{}", status(pid, "NSpid"));
    let routes = fs::read_to_string(format!("/proc/{pid}/net/route")).unwrap();
    assert_eq!(routes.lines().skip(1).count(), 0, "{routes}");
}

fn it_is_bounded(pid: i32, bench: &Bench, spec: &MachineSpec) {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| limits.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert!(limit("Max open files").starts_with("1024 "), "{limits}");
    assert!(limit("Max core file size").starts_with("0 "), "{limits}");
    assert!(limit("Max file size").starts_with(&(64 << 20).to_string()), "{limits}");
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let own = format!("{}/vmm-{}", bench.cgroup, spec.dir.id());
    assert!(cgroup.lines().filter(|line| line.ends_with(&own)).count() >= 1, "{cgroup}");
    let tasks = bench.cgroups().iter().filter_map(|path| fs::read_to_string(path.join("pids.max")).ok()).next();
    assert_eq!(tasks.as_deref().map(str::trim), Some("256"));
}

/// Its own files and sockets, nothing of this process.
fn it_holds_its_own_files(pid: i32, dir: &Path) {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let open: BTreeSet<String> =
        descriptors.filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string())).collect();
    println!("open: {open:?}");
    let known = ["/vm/", "/console", "/dev/null", "/dev/urandom", "/dev/kvm", "socket:", "anon_inode:", "pipe:"];
    let dir = dir.display().to_string();
    let strange: Vec<&String> = open
        .iter()
        .filter(|path| !known.iter().any(|known| path.starts_with(known)) && !path.starts_with(&dir))
        .collect();
    assert!(strange.is_empty(), "{strange:?}");
}
