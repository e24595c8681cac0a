//! Firecracker: driven against a stand-in that refuses what its API refuses, and for real where it can run.

mod again;
mod guest;
mod network;
mod stand_in;

use std::fs;
use std::io::Write;
use std::pin::Pin;

use stand_in::StandIn;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::*;
use crate::runtime::microvm::machine::template::Templates;
use crate::runtime::microvm::machine::{VmDirs, VmId};
use crate::runtime::session::Duplex;

/// Does what is seen of the jailer: leaves a process, in the network namespace that it was told, and its number. By then its
/// machine is written down. It refuses a root where there is what it makes, or what Firecracker makes there first (facts:
/// `src/jailer/src/env.rs`, `chroot.rs`), and tells who stands in for that.
const JAILER: &str = r#"#!/bin/sh
while [ "$1" != -- ]; do
  case $1 in
    --id) id=$2 ;; --chroot-base-dir) base=$2 ;; --exec-file) exec=$2 ;; --netns) netns=$2 ;;
  esac
  shift
done
machine=${base%/jail} program=${exec##*/}
[ -s "$machine/machine.json" ] || exit 1
PATH=/usr/bin:/bin
cd "$base/$program/$id/root" && cp "$exec" "$program" && mkdir old_root && rmdir old_root || exit 1
mkdir -p dev/net && mkfifo dev/net/tun dev/kvm dev/userfaultfd || exit 1
for made in "$program.pid" firecracker.sock; do
  [ ! -e "$made" ] && [ ! -L "$made" ] || exit 1
done
leave='sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >"$0"'
${netns:+nsenter --net="$netns"} sh -c "$leave" "$program.pid" || exit 1
[ ! -p "$machine/begun" ] || echo >"$machine/begun"
"#;

/// A place for machines whose Firecracker is the stand-in.
struct Bench {
    place: tempfile::TempDir,
    dirs: VmDirs,
    manager: Firecracker,
    cgroup: String,
}

impl Bench {
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: a VMM is jailed by root");
            return None;
        }
        let place = tempfile::tempdir().unwrap();
        let program = script(place.path(), "firecracker", "#!/bin/sh\necho Firecracker v1.16.1\n");
        let jailer = script(place.path(), "jailer", JAILER);
        let dirs = VmDirs::new(&place.path().join("vms"), "default").unwrap();
        let manager = Firecracker::new(program, jailer, VmmUser::default(), Memory::File);
        Some(Self { place, dirs, manager, cgroup: format!("lambdalet-test-{}", VmId::random()) })
    }

    /// This program, as a pager.
    fn pager(&self) -> PathBuf {
        let own = std::env::current_exe().unwrap();
        let test = "runtime::microvm::machine::firecracker::tests::as_a_pager";
        let run = format!("exec {} --exact {test} --ignored --nocapture", own.display());
        script(self.place.path(), "pager", &format!("#!/bin/sh\nLAMBDALET_TEST_PAGER=\"$*\" {run}\n"))
    }

    fn spec(&self) -> MachineSpec {
        let dir = self.dirs.of(&VmId::random());
        dir.create(0, 0).unwrap();
        let scratch = dir.inside().join("scratch.img");
        fs::write(&scratch, vec![0; 4096]).unwrap();
        let file = |name: &str| {
            let path = self.place.path().join(name);
            if !path.exists() {
                fs::write(&path, name).unwrap();
            }
            Asset::open(&path).unwrap()
        };
        MachineSpec {
            dir,
            kernel: file("vmlinux"),
            initramfs: file("initramfs.cpio"),
            kernel_args: vec!["VMID=x".to_owned()],
            memory: 128 << 20,
            vcpus: 2,
            cpus: None,
            numa_node: None,
            tap: None,
            scratch,
            image_slots: 8,
            cgroup_parent: self.cgroup.clone(),
            template: None,
        }
    }

    fn stand_in(&self, spec: &MachineSpec) -> StandIn {
        let root = jailer::root(&spec.dir, &self.manager.program);
        StandIn::behind_jailer(&spec.dir.path().join("begun"), root, API_SOCKET)
    }
}

fn script(place: &Path, name: &str, text: &str) -> PathBuf {
    let path = place.join(name);
    // By another process: one that a test beside this starts just now would keep it open for writing a moment longer.
    let mut writer = std::process::Command::new("sh");
    writer.args(["-c", "printf %s \"$1\" >\"$0\" && chmod 755 \"$0\""]).arg(&path).arg(text);
    assert!(writer.status().unwrap().success());
    path
}

impl Drop for Bench {
    fn drop(&mut self) {
        for tree in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let _ = fs::remove_dir(tree.path().join(&self.cgroup));
        }
    }
}

async fn said_back(stream: Pin<Box<dyn Duplex>>) -> String {
    let mut stream = BufReader::new(stream);
    stream.write_all(b"hello\n").await.unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).await.unwrap();
    line
}

/// Waits until the console says that.
async fn said(dir: &VmDir, text: &str) {
    let waited = async {
        while dir.console_tail(SHOWN) != text {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(START_PATIENCE, waited).await.unwrap_or_else(|_| panic!("{}", dir.console_tail(SHOWN)));
}

#[tokio::test]
async fn a_machine_is_configured_in_an_order_that_firecracker_takes() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    let server = bench.stand_in(&spec);
    let machine = bench.manager.boot(&spec).await.unwrap();
    let asked = server.asked();
    println!("{asked:#?}");
    assert!(asked.iter().all(|line| line.ends_with("-> 204") || line.starts_with("GET / -> 200")), "{asked:?}");
    assert_eq!(asked.last().unwrap(), "PUT /actions -> 204");
    let puts: Vec<_> = asked.iter().filter(|line| line.starts_with("PUT")).collect();
    assert_eq!(puts[..2], ["PUT /logger -> 204", "PUT /metrics -> 204"]);
    said(&spec.dir, "logs begin\n").await;
    assert_eq!(asked.iter().filter(|line| line.starts_with("PUT /drives/")).count(), 9);
    assert_eq!(said_back(machine.agent().await.unwrap()).await, "hello\n");

    let root = jailer::root(&spec.dir, &bench.manager.program);
    let is_image = |entry: &fs::DirEntry| entry.file_name().to_str().unwrap().starts_with("image");
    let images = || fs::read_dir(&root).unwrap().flatten().filter(is_image).count();
    let image = bench.place.path().join("image");
    fs::write(&image, vec![1; 4096]).unwrap();
    machine.put_image(0, &image).await.unwrap();
    machine.put_image(0, &image).await.unwrap();
    assert_eq!(images(), 1, "the one before is removed");
    machine.take_image(0).await.unwrap();
    assert_eq!(images(), 0);
    assert!(matches!(machine.put_image(8, &image).await, Err(MachineError::NoSlot { .. })));
    for _ in 0..2 {
        machine.pause().await.unwrap();
    }
    for _ in 0..2 {
        machine.resume().await.unwrap();
    }
    let patched = server.asked().iter().filter(|line| *line == "PATCH /vm -> 204").count();
    assert_eq!(patched, 2, "pausing and resuming what is so already asks nothing");
    assert!(machine.save().await.is_err(), "it was not booted for that");

    let pid = machine.pid();
    drop(machine);
    let machine = bench.manager.adopt(&spec.dir).await.unwrap().expect("it runs");
    assert_eq!(machine.pid(), pid);
    let mut log = fs::File::options().write(true).open(root.join(LOG_FIFO)).expect("it is in the jail");
    log.write_all(b"logs go on\n").unwrap();
    said(&spec.dir, "logs begin\nlogs go on\n").await;
    machine.kill().await.unwrap();
    machine.exited().await;
    assert!(bench.manager.adopt(&spec.dir).await.unwrap().is_none());
}

#[tokio::test]
async fn one_whose_node_ended_before_it_was_written_down_is_not_left_running() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    let _server = bench.stand_in(&spec);
    let machine = bench.manager.boot(&spec).await.unwrap();
    spec.dir.write_checkpoint(&Checkpoint::of_start(NAME, &spec).unwrap()).unwrap();
    assert!(bench.manager.adopt(&spec.dir).await.unwrap().is_none());
    machine.exited().await;
    assert_eq!(start_time(machine.pid()), None);
    let directories = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|tree| tree.path().join(&bench.cgroup));
    let left: Vec<_> = directories.flat_map(|one| fs::read_dir(one).into_iter().flatten().flatten()).collect();
    assert!(left.iter().all(|entry| !entry.path().is_dir()), "{left:?}");
}

#[tokio::test]
async fn a_snapshot_is_saved_and_loaded_from_either_backend() {
    let Some(bench) = Bench::new() else { return };
    let templates = Templates::new(bench.place.path().join("templates"));
    let spec = MachineSpec { template: Some(templates.begin().unwrap()), ..bench.spec() };
    let server = bench.stand_in(&spec);
    let machine = bench.manager.boot(&spec).await.unwrap();
    let kind = bench.manager.template_kind(&spec).await.unwrap();
    let template = templates.commit(machine.save().await.unwrap(), &kind).unwrap();
    assert!(server.asked().contains(&"PUT /snapshot/create -> 204".to_owned()), "{:?}", server.asked());
    assert_eq!(fs::read(template.memory()).unwrap(), guest::memory());
    assert_eq!(fs::read_to_string(template.state()).unwrap(), "snapshot_path");

    let clone = MachineSpec { kernel: spec.kernel.clone(), initramfs: spec.initramfs.clone(), ..bench.spec() };
    let server = bench.stand_in(&clone);
    let machine = bench.manager.restore(&clone, &template).await.unwrap();
    assert_eq!(server.asked().last().unwrap(), "PUT /snapshot/load -> 204");
    assert!(server.asked().contains(&"PUT /metrics -> 204".to_owned()), "a snapshot has neither: {:?}", server.asked());
    assert_eq!(said_back(machine.agent().await.unwrap()).await, "hello\n");
    machine.kill().await.unwrap();

    let Some(mut other) = Bench::new() else { return };
    other.manager.program = bench.manager.program.clone();
    other.manager.memory = Memory::Paged(other.pager());
    let clone = MachineSpec { kernel: spec.kernel.clone(), initramfs: spec.initramfs.clone(), ..other.spec() };
    let server = other.stand_in(&clone);
    let mut machine = other.manager.restore(&clone, &template).await.unwrap();
    assert_eq!(server.asked().last().unwrap(), "PUT /snapshot/load -> 204");
    let guest = server.guest();
    assert_eq!([guest.page(0), guest.page(40), guest.page(63), guest.page(1)], [1, 41, 64, 2]);
    guest.give_back(40);
    assert_eq!([guest.page(40), guest.page(41), guest.page(20)], [0, 42, 21], "what was given back is empty");
    // Beside the VMM, wherever that is, with the shell that stands behind it.
    let beside = |parent: &str| {
        let procs = format!("/sys/fs/cgroup/pids/{parent}/vmm-{}/cgroup.procs", clone.dir.id());
        fs::read_to_string(procs).map(|list| list.lines().count())
    };
    let v1 = Path::new("/sys/fs/cgroup/pids").is_dir();
    assert!(!v1 || beside(&other.cgroup).unwrap() == 3);
    let members = VmCgroup::of_host(&other.cgroup, clone.dir.id()).members();
    assert!(!v1 || members.len() == 3);
    assert!(!members.iter().any(|pid| network::is_of_the_host(*pid)), "none of them has the host's network");
    let elsewhere = MachineSpec { cgroup_parent: format!("{}/pod", other.cgroup), ..clone.clone() };
    machine.move_to(&elsewhere).await.unwrap();
    assert!(!v1 || beside(&elsewhere.cgroup_parent).unwrap() == 3 && beside(&other.cgroup).is_err());
    assert_eq!(guest.page(50), 51);
    machine.kill().await.unwrap();
    assert!(beside(&elsewhere.cgroup_parent).is_err(), "it ends with the VMM");
}

#[tokio::test]
async fn a_vmm_ends_whose_pager_cannot_go_on() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    let _server = bench.stand_in(&spec);
    let machine = bench.manager.start(&spec, bench.manager.make_jail(&spec).unwrap()).await.unwrap();
    let memory = bench.place.path().join("memory");
    fs::write(&memory, guest::memory()).unwrap();
    let listener = jailer::listen(&machine.root, PAGER_SOCKET, bench.manager.user).unwrap();
    bench.manager.start_pager(&machine, Paged { program: bench.pager(), listener, memory }).await.unwrap();
    let mut stream = machine.dir.connect(&machine.root, PAGER_SOCKET).await.unwrap();
    stream.write_all(b"no memory of mine").await.unwrap();
    tokio::time::timeout(START_PATIENCE, machine.exited()).await.expect("the pager has ended it");
    machine.kill().await.unwrap();
}

/// The pager's process, for a test: started by its [script](Bench::pager).
#[test]
#[ignore = "it is what other tests start"]
fn as_a_pager() {
    let told = std::env::var("LAMBDALET_TEST_PAGER").unwrap();
    let words: Vec<&str> = told.split_ascii_whitespace().collect();
    let ["pager", "--memory", memory, "--vmm", vmm, "--vmm-started", started, "--uid", uid, "--gid", gid] = words[..]
    else {
        panic!("{told}")
    };
    let user = VmmUser { uid: uid.parse().unwrap(), gid: gid.parse().unwrap() };
    let (vmm, vmm_started) = (vmm.parse().unwrap(), started.parse().unwrap());
    pager::Arguments { memory: memory.into(), vmm, vmm_started, user }.serve().unwrap();
}

#[tokio::test]
async fn a_start_that_fails_leaves_nothing_running() {
    let Some(bench) = Bench::new() else { return };
    let spec = MachineSpec { vcpus: 33, ..bench.spec() };
    let server = bench.stand_in(&spec);
    let error = bench.manager.boot(&spec).await.unwrap_err();
    assert!(error.to_string().contains("33 vCPUs"), "{error}");
    assert!(server.asked().iter().all(|line| !line.contains("/actions")), "{:?}", server.asked());
    let checkpoint = spec.dir.read_checkpoint().unwrap();
    assert_eq!(start_time(checkpoint.pid), None);
    fs::write(&bench.manager.jailer, "#!/bin/sh\necho no such user >&2\nexit 1\n").unwrap();
    let error = bench.manager.boot(&bench.spec()).await.unwrap_err();
    let MachineError::Ended { exit: VmExit::Code(1), said, .. } = &error else { panic!("{error}") };
    assert_eq!(said, "no such user");
}

/// What the server says to a request of nobody's client.
async fn raw(root: &Path, method: &str, path: &str, body: &str) -> u16 {
    let mut stream = UnixStream::connect(root.join(API_SOCKET)).await.unwrap();
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn the_stand_in_refuses_what_firecracker_refuses() {
    let place = tempfile::tempdir().unwrap();
    let root = place.path().to_owned();
    let _server = StandIn::listen(root.clone(), API_SOCKET);
    fs::write(root.join("k"), "").unwrap();
    let put = |path: &'static str, body: &'static str| raw(&root, "PUT", path, body);
    let patch = |path: &'static str, body: &'static str| raw(&root, "PATCH", path, body);
    // Missing, unknown, of another type, out of range, not there.
    assert_eq!(put("/boot-source", r#"{}"#).await, 400);
    assert_eq!(put("/boot-source", r#"{"kernel_image_path":"k","kernel":"k"}"#).await, 400);
    assert_eq!(put("/boot-source", r#"{"kernel_image_path":1}"#).await, 400);
    assert_eq!(put("/boot-source", r#"{"kernel_image_path":"nowhere"}"#).await, 400);
    assert_eq!(put("/machine-config", r#"{"vcpu_count":33,"mem_size_mib":128}"#).await, 400);
    assert_eq!(put("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":"128"}"#).await, 400);
    assert_eq!(put("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128,"ht_enabled":false}"#).await, 400);
    assert_eq!(put("/vsock", r#"{"guest_cid":2,"uds_path":"v"}"#).await, 400);
    assert_eq!(put("/drives/a", r#"{"drive_id":"b","path_on_host":"k","is_root_device":false}"#).await, 400);
    assert_eq!(put("/drives/a-b", r#"{"drive_id":"a-b","path_on_host":"k","is_root_device":false}"#).await, 400);
    assert_eq!(put("/drives/a", r#"{"drive_id":"a","path_on_host":"k"}"#).await, 400);
    assert_eq!(put("/actions", r#"{"action_type":"instance_start"}"#).await, 400);
    assert_eq!(put("/nowhere", r#"{}"#).await, 400);
    assert_eq!(put("/snapshot/load", r#"{"snapshot_path":"k"}"#).await, 400);
    assert_eq!(put("/logger", r#"{"log_path":"nowhere"}"#).await, 400);
    assert_eq!(put("/logger", r#"{"log_path":"k","level":"Loud"}"#).await, 400);
    assert_eq!(put("/metrics", r#"{}"#).await, 400);
    // Too early.
    assert_eq!(put("/actions", r#"{"action_type":"InstanceStart"}"#).await, 400);
    assert_eq!(patch("/vm", r#"{"state":"Paused"}"#).await, 400);
    assert_eq!(patch("/drives/a", r#"{"drive_id":"a","path_on_host":"k"}"#).await, 400);
    // Right.
    assert_eq!(put("/logger", r#"{"log_path":"k","level":"Info","show_level":true}"#).await, 204);
    assert_eq!(put("/metrics", r#"{"metrics_path":"k"}"#).await, 204);
    assert_eq!(put("/metrics", r#"{"metrics_path":"k"}"#).await, 400, "once");
    assert_eq!(put("/boot-source", r#"{"kernel_image_path":"k"}"#).await, 204);
    assert_eq!(put("/snapshot/load", r#"{"snapshot_path":"k","mem_file_path":"k"}"#).await, 400, "configured");
    assert_eq!(put("/actions", r#"{"action_type":"InstanceStart"}"#).await, 204);
    // Too late, or not in this state.
    assert_eq!(put("/logger", r#"{"log_path":"k"}"#).await, 400);
    assert_eq!(put("/actions", r#"{"action_type":"InstanceStart"}"#).await, 400);
    assert_eq!(put("/boot-source", r#"{"kernel_image_path":"k"}"#).await, 400);
    assert_eq!(put("/snapshot/create", r#"{"snapshot_path":"s","mem_file_path":"m"}"#).await, 400);
    assert_eq!(patch("/drives/a", r#"{"drive_id":"a","path_on_host":"k"}"#).await, 400, "no such drive");
    assert_eq!(patch("/vm", r#"{"state":"Paused"}"#).await, 204);
    assert_eq!(put("/snapshot/create", r#"{"snapshot_path":"s","mem_file_path":"m"}"#).await, 204);
}

#[tokio::test]
async fn a_real_firecracker_boots_a_guest() {
    let Some(guest) = std::env::var_os("LAMBDALET_TEST_TINY_GUEST").map(PathBuf::from) else {
        println!("skipped: LAMBDALET_TEST_TINY_GUEST names no guest (hack/tiny-guest makes one)");
        return;
    };
    let Some(bench) = Bench::new() else { return };
    let programs = ("/usr/bin/firecracker".into(), "/usr/bin/jailer".into());
    let manager = Firecracker::new(programs.0, programs.1, VmmUser::default(), Memory::File);
    if let Err(why) = manager.check().await {
        println!("skipped: {why}");
        return;
    }
    let kernel = Asset::open(&guest.join("vmlinux")).unwrap();
    let initramfs = Asset::open(&guest.join("initramfs.cpio")).unwrap();
    let machine = manager.boot(&MachineSpec { kernel, initramfs, tap: None, ..bench.spec() }).await.unwrap();
    machine.pause().await.unwrap();
    machine.resume().await.unwrap();
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn what_is_missing_is_said() {
    let nowhere = || PathBuf::from("/nowhere/firecracker");
    let manager = Firecracker::new(nowhere(), nowhere(), VmmUser::default(), Memory::File);
    let why = manager.check().await.unwrap_err().to_string();
    assert!(why.contains("/nowhere/firecracker cannot be run"), "{why}");
    let Some(bench) = Bench::new() else { return };
    println!("{:?}", bench.manager.check().await);
    if host::usable_kvm().is_err() {
        assert!(bench.manager.check().await.unwrap_err().to_string().contains("Firecracker needs KVM"));
    }
}
