//! What whoever takes over a VMM can do: here a shell is in the place of QEMU.

use std::collections::HashMap;
use std::net::TcpListener;

use super::*;
use crate::runtime::microvm::machine::cgroup::Limits;
use crate::runtime::microvm::machine::directory::Checkpoint;
use crate::runtime::microvm::machine::process::{Process, boot_id};
use crate::runtime::microvm::machine::{VmExit, VmId};

const BUSYBOX: &str = "/bin/busybox";

/// Tries what it can think of; each line of its output is a name and what came of it.
const ATTEMPTS: &str = r#"
until [ -e /vm/go ]; do busybox usleep 1000; done
try() { name=$1; shift; if "$@" >/dev/null 2>&1; then echo "$name yes"; else echo "$name no"; fi; }
say() { echo "$1 $(shift; "$@" 2>&1 | busybox tr '\n' ' ')"; }
say user busybox id -u
say root busybox ls /
try own_directory busybox touch /vm/x
try own_root busybox touch /x
try host_file busybox cat /etc/passwd
try climb busybox cat /vm/../../../../etc/passwd
try processes busybox ls /proc/1
try other_process kill -0 "$HOST_PID"
try network busybox nc -w 1 127.0.0.1 "$PORT" -e busybox true
try mount busybox mount -t tmpfs none /vm
try device busybox mknod /vm/disk b 254 0
try become_root busybox su -c true
busybox cp /bin/busybox /vm/program 2>/dev/null; busybox chmod +x /vm/program
try execute_own /vm/program true
say files ulimit -n
try large_file busybox dd if=/dev/urandom of=/vm/large bs=1M count=2 seek=7
try larger_file busybox dd if=/dev/urandom of=/vm/larger bs=1M count=2 seek=8
try memory busybox dd if=/dev/urandom of=/dev/null bs=320M count=1
forked=0
while [ $forked -lt 400 ]; do /bin/busybox sleep 60 & forked=$((forked + 1)); echo "forked $forked"; done
"#;

fn bind(path: &str, kind: BindKind) -> Bind {
    Bind { what: Source::Path(path.into()), at: path.into(), kind }
}

fn jail(place: &Path, variables: &[(&str, String)]) -> Jail {
    let user = VmmUser::default();
    let (root, own) = (place.join("root"), place.join("vmm"));
    fs::create_dir(&root).unwrap();
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(user.uid), Some(user.gid)).unwrap();
    let mut binds = vec![bind(BUSYBOX, BindKind::Program), bind("/nowhere/at/all", BindKind::Program)];
    binds.push(Bind { what: Source::Path(BUSYBOX.into()), at: SHELL.into(), kind: BindKind::Program });
    binds.extend(["/dev/null", "/dev/urandom", "/dev/nowhere"].map(|path| bind(path, BindKind::Device)));
    binds.push(Bind { what: Source::Path(own), at: "/vm".into(), kind: BindKind::Writable });
    let given: String = variables.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
    let applet = format!("busybox() {{ {BUSYBOX} \"$@\"; }}\n");
    Jail {
        root,
        binds,
        user,
        cpus: Some(vec![0]),
        largest_file: 9 << 20,
        program: BUSYBOX.into(),
        directory: "/vm".into(),
        arguments: ["sh", "-c", &(given + &applet + ATTEMPTS)].map(str::to_owned).to_vec(),
        input: None,
        console: File::create(place.join("console")).unwrap(),
        cgroup: None,
    }
}

#[tokio::test]
async fn whoever_takes_over_a_vmm_has_its_directory_and_nothing_else() {
    if !nix::unistd::geteuid().is_root() || !Path::new(BUSYBOX).exists() {
        println!("skipped: needs root and {BUSYBOX} (busybox-static)");
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let variables = [("PORT", port), ("HOST_PID", std::process::id().to_string())];
    let parent = format!("lambdalet-test-{}", VmId::random());
    let cgroup = VmCgroup::of_host(&parent, &VmId::new("one").unwrap());
    cgroup.make(&Limits::default()).unwrap();
    let begun = std::time::Instant::now();
    let jail = Jail { cgroup: Some(cgroup.clone()), ..jail(place.path(), &variables) };
    let pid = jail.start().await.unwrap();
    println!("jailed in {:?}", begun.elapsed());
    let process = Process::open(pid).unwrap();
    cgroup.join_entered(pid).unwrap();
    let allowed = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    fs::write(place.path().join("vmm/go"), "").unwrap();
    let exit = process.ended().await;
    let console = fs::read_to_string(place.path().join("console")).unwrap();
    println!("{exit:?}\n{}", console.lines().filter(|line| !line.starts_with("forked")).collect::<Vec<_>>().join("\n"));
    let found: HashMap<&str, &str> = console.lines().filter_map(|line| line.split_once(' ')).collect();

    assert_eq!(found["user"].trim(), VmmUser::default().uid.to_string());
    assert_eq!(found["root"].split_whitespace().collect::<Vec<_>>(), ["bin", "dev", "vm"]);
    for can in ["own_directory", "large_file"] {
        assert_eq!(found[can], "yes", "{can}");
    }
    for cannot in [
        "own_root",
        "host_file",
        "climb",
        "processes",
        "other_process",
        "network",
        "mount",
        "device",
        "become_root",
        "execute_own",
        "larger_file",
        "memory",
    ] {
        assert_eq!(found[cannot], "no", "{cannot}");
    }
    assert_eq!(found["files"].trim(), "1024");
    let forked: u32 = found["forked"].parse().unwrap();
    assert!((200..256).contains(&forked), "{forked} of 256 tasks");
    assert_ne!(exit, VmExit::Code(0), "the shell ends when it cannot fork");
    assert!(allowed.contains("Cpus_allowed_list:\t0\n"), "{allowed}");

    // With the first process of its namespace all others ended, and nothing is left.
    cgroup.remove().await.unwrap();
    for tree in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let _ = fs::remove_dir(tree.path().join(&parent));
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(place.path().to_str().unwrap()), "{mounts}");
}

/// In a namespace of mounts of its own, that of version 2 of cgroups among them: also on a host whose controllers are all of
/// version 1.
#[test]
fn one_that_nobody_wrote_down_is_in_its_cgroup_of_version_2_and_ends_with_it() {
    if !nix::unistd::geteuid().is_root() || !Path::new(BUSYBOX).exists() {
        println!("skipped: needs root and {BUSYBOX} (busybox-static)");
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let (tree, parent) = (place.path().join("cgroup2"), format!("lambdalet-test-{}", VmId::random()));
    fs::create_dir(&tree).unwrap();
    let work = || {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        if let Err(errno) = mount(none, &tree, Some("cgroup2"), MsFlags::empty(), none) {
            println!("skipped: this kernel has no version 2 of cgroups: {errno}");
            return;
        }
        let cgroup = VmCgroup::at(&tree, &parent, &VmId::new("one").unwrap());
        let own = tree.join(&parent).join("vmm-one");
        fs::create_dir_all(&own).unwrap();
        let started = async {
            let arguments = ["sh", "-c", "echo there; exec /bin/busybox sleep 1000"].map(str::to_owned).to_vec();
            let jail = Jail { cgroup: Some(cgroup.clone()), arguments, ..jail(place.path(), &[]) };
            let pid = jail.start().await.unwrap();
            let process = Process::open(pid).unwrap();
            while fs::read_to_string(place.path().join("console")).unwrap() != "there\n" {
                assert_eq!(process.try_ended(), None);
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            // Nobody has moved it.
            assert_eq!(fs::read_to_string(own.join("cgroup.procs")).unwrap(), format!("{pid}\n"));
            assert!(fs::read_link(format!("/proc/{pid}/fd/1")).unwrap().ends_with("console"), "its list is not kept");
            let checkpoint = Checkpoint {
                manager: "qemu".to_owned(),
                pid: 0,
                start_time: 0,
                boot_id: boot_id().unwrap(),
                image_slots: 0,
                cgroup_parent: parent.clone(),
            };
            let (taken, exit) = tokio::join!(Process::take_over(&checkpoint, &cgroup), process.ended());
            assert!(taken.unwrap().is_none());
            assert_eq!(exit, VmExit::Signal(9));
        };
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(started);
        assert!(!own.exists());
        fs::remove_dir(tree.join(&parent)).unwrap();
    };
    std::thread::scope(|scope| scope.spawn(work).join().unwrap());
}

#[tokio::test]
async fn a_step_that_fails_is_named() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let mut broken = jail(place.path(), &[]);
    broken.program = "/bin/nothing".into();
    assert_eq!(broken.start().await.unwrap_err().step, "run /bin/nothing");
    let place = tempfile::tempdir().unwrap();
    let mut broken = jail(place.path(), &[]);
    broken.binds.push(bind("/nowhere", BindKind::ReadOnly));
    let failed = broken.start().await.unwrap_err();
    assert_eq!((failed.step.as_str(), failed.source.kind()), ("show /nowhere to the VMM", io::ErrorKind::NotFound));
}
