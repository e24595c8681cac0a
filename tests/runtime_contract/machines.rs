//! What only machines of this host can answer: that they outlive their driver, and what becomes of them when something
//! breaks; that they are on the node's network; that nothing is left of them.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::StreamExt;
use lambdalet::runtime::Kind;
use lambdalet::runtime::microvm::agent::Agent;
use lambdalet::runtime::microvm::machine::directory::DEFAULT_NAMESPACE;
use lambdalet::runtime::microvm::machine::{MachineManager, VmDirs};
use lambdalet::runtime::session::ExecRequest;
use lambdalet::runtime::types::{
    ContainerConfig, ContainerId, ContainerState, LogOptions, Mount, SandboxConfig, SandboxId, SandboxState, Security,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::bench::{Bench, GATEWAY, PATIENCE, output, text};
use crate::streams::{exec, finish};

/// Runs a script in a container; what it wrote, and its code.
pub(crate) async fn sh(bench: &Bench, id: &ContainerId, script: &str) -> (String, i32) {
    let request = ExecRequest { command: bench.script(script), tty: false, stdin: false, stdout: true, stderr: true };
    let (out, err, code) = finish(exec(bench, id, request).await).await;
    (String::from_utf8_lossy(&[out, err].concat()).into_owned(), code)
}

async fn log(bench: &Bench, id: &ContainerId) -> String {
    String::from_utf8(text(&bench.log(id, LogOptions::default()).await)).unwrap()
}

/// Follows a log until it has this line.
pub(crate) async fn says(bench: &Bench, id: &ContainerId, line: &str) {
    let follow = LogOptions { follow: true, ..LogOptions::default() };
    let mut pieces = bench.runtime.logs(id, &follow).await.unwrap();
    let mut seen = Vec::new();
    let said = async {
        while !String::from_utf8_lossy(&seen).lines().any(|said| said == line) {
            seen.extend_from_slice(&pieces.next().await.expect("the log goes on").unwrap().bytes);
        }
    };
    tokio::time::timeout(PATIENCE, said).await.unwrap_or_else(|_| panic!("{line:?} does not come"));
}

pub(crate) async fn vmm(bench: &Bench, id: &SandboxId) -> i32 {
    bench.runtime.pod_sandbox_status(id).await.unwrap().pid.expect("its VMM runs")
}

async fn not_ready(bench: &Bench, id: &SandboxId) {
    let begun = Instant::now();
    while bench.runtime.pod_sandbox_status(id).await.unwrap().state == SandboxState::Ready {
        assert!(begun.elapsed() < PATIENCE, "it is still ready");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

const COUNTS: &str = "i=0; while :; do i=$((i+1)); echo line $i; busybox sleep 0.02; done";

/// The lines of [`COUNTS`] as they are to be: all, in order, each once.
fn assert_counted(said: &str) -> usize {
    let lines: Vec<&str> = said.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        assert_eq!(*line, format!("line {}", at + 1), "of {}", lines.len());
    }
    lines.len()
}

pub(crate) async fn a_driver_that_starts_anew_takes_its_machines_over_and_loses_no_line(bench: &mut Bench) {
    let id = bench.started("counts", bench.script(COUNTS)).await;
    let ended = bench.started("ended", bench.script("echo last; exit 5")).await;
    bench.exited(&ended).await;
    let sandbox = bench.sandbox("p").await;
    let before = bench.runtime.pod_sandbox_status(&sandbox).await.unwrap();
    says(bench, &id, "line 10").await;
    let mut counted = 0;
    for round in 0..3 {
        bench.restart().await;
        let after = bench.runtime.pod_sandbox_status(&sandbox).await.unwrap();
        assert_eq!((after.state, after.pid, after.created_at), (SandboxState::Ready, before.pid, before.created_at));
        assert_eq!(bench.sandbox("p").await, sandbox);
        assert_eq!(bench.runtime.container_status(&id).await.unwrap().state, ContainerState::Running);
        let known = bench.runtime.container_status(&ended).await.unwrap();
        assert_eq!((known.state, known.exit_code), (ContainerState::Exited, 5));
        counted = assert_counted(&log(bench, &id).await);
        says(bench, &id, &format!("line {}", counted + 10)).await;
        // Old and new containers are worked with as before.
        assert_eq!(sh(bench, &id, "echo in").await, ("in\n".to_owned(), 0));
        let new = bench.started(&format!("new-{round}"), bench.exits(3)).await;
        assert_eq!(bench.exited(&new).await.exit_code, 3);
    }
    bench.runtime.stop_container(&id, Duration::ZERO).await.unwrap();
    assert!(assert_counted(&log(bench, &id).await) >= counted + 10);
    assert_eq!(log(bench, &ended).await, "last\n");
}

pub(crate) async fn a_machine_that_ended_while_no_driver_ran_is_told_as_ended(bench: &mut Bench) {
    let id = bench.started("counts", bench.script(COUNTS)).await;
    let sandbox = bench.sandbox("p").await;
    says(bench, &id, "line 5").await;
    let pid = vmm(bench, &sandbox).await;
    // It may be told of it yet: then it is the same as one that was killed before.
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    bench.restart().await;
    assert_eq!(bench.runtime.pod_sandbox_status(&sandbox).await.unwrap().state, SandboxState::NotReady);
    let status = bench.runtime.container_status(&id).await.unwrap();
    assert_eq!((status.state, status.exit_code), (ContainerState::Exited, 137));
    assert!(assert_counted(&log(bench, &id).await) >= 5);
}

/// What is to be seen of a sandbox whose machine has ended, and that another takes its place.
async fn is_gone_and_replaced(bench: &Bench, sandbox: &SandboxId, id: &ContainerId) {
    not_ready(bench, sandbox).await;
    let status = bench.exited(id).await;
    assert_eq!((status.exit_code, status.message.as_str()), (137, "its microVM has ended"));
    assert_eq!(log(bench, id).await, "before\n");
    let request = ExecRequest { command: bench.exits(0), tty: false, stdin: false, stdout: true, stderr: true };
    assert_eq!(bench.runtime.exec(id, &request).await.unwrap_err().kind(), Kind::Invalid);
    let next = bench.sandbox("p").await;
    assert_ne!(next, *sandbox);
    assert_eq!(bench.runtime.list_pod_sandboxes(None).await.unwrap().len(), 1);
    let again = bench.started("again", bench.exits(7)).await;
    assert_eq!(bench.exited(&again).await.exit_code, 7);
    bench.runtime.remove_pod_sandbox(&next).await.unwrap();
}

pub(crate) async fn a_vmm_that_is_killed_takes_its_sandbox_along(bench: &mut Bench) {
    let id = bench.started("c", bench.script("echo before; while :; do sleep 1; done")).await;
    let sandbox = bench.sandbox("p").await;
    says(bench, &id, "before").await;
    kill(Pid::from_raw(vmm(bench, &sandbox).await), Signal::SIGKILL).unwrap();
    is_gone_and_replaced(bench, &sandbox, &id).await;
}

/// A script that ends with an error before it does anything if the kernel it runs on is this one, or does not say which it
/// is: what ends a guest would end the host.
fn spares_the_host(script: &str) -> String {
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let host = host.trim();
    assert!(!host.is_empty());
    format!("case $(busybox cat /proc/sys/kernel/random/boot_id) in ''|{host}) exit 1;; esac\n{script}")
}

/// Runs a script in a privileged container of `p`, that does what follows `read go` once it is seen to run; sees that the
/// guest ends by it, and that nothing of it is left.
async fn ends_its_guest(bench: &Bench, script: &str) {
    let script = spares_the_host(script);
    let sandbox = bench.sandbox("p").await;
    let config = ContainerConfig {
        stdin: true,
        security: Security { privileged: true, ..Security::default() },
        ..bench.container_config("p", "c", bench.script(&format!("echo before; read go; {script}; sleep 1000")))
    };
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    says(bench, &id, "before").await;
    let attach = lambdalet::runtime::session::AttachRequest { stdin: true, stdout: false, stderr: false };
    let mut session = bench.runtime.attach(&id, &attach).await.unwrap();
    crate::streams::write(&mut session, b"go\n").await;
    is_gone_and_replaced(bench, &sandbox, &id).await;
    let left = bench.of_machines();
    assert!(left.is_empty(), "{left:?}");
}

pub(crate) async fn a_guest_that_dies_takes_its_sandbox_along(bench: &mut Bench) {
    ends_its_guest(bench, "echo c >/proc/sysrq-trigger").await;
}

/// What a kernel runs for a process that crashes runs outside of all containers. No signal that is sent ends process 1, so
/// its code is overwritten.
const KILL_AGENT: &str = r#"busybox cat >/end <<'END'
b=/proc/$1/root/bin/busybox
text=$($b grep -m 1 r-xp /proc/1/maps)
range=${text%% *}
first=$((0x${range%-*} / 4096)) last=$((0x${range#*-} / 4096))
$b dd if=/proc/$1/root/dev/zero of=/proc/1/mem bs=4096 seek=$first count=$((last - first)) conv=notrunc
END
echo '|/proc/%P/root/bin/busybox sh /proc/%P/root/end %P' >/proc/sys/kernel/core_pattern
sh -c 'kill -SEGV $$'"#;

/// The agent is process 1 of the guest: its end is the end of the guest's kernel.
pub(crate) async fn an_agent_that_is_killed_takes_its_sandbox_along(bench: &mut Bench) {
    ends_its_guest(bench, KILL_AGENT).await;
}

// === Templates ===

/// The only template of this bench, once there is one; its memory and state.
async fn template(bench: &Bench) -> (PathBuf, PathBuf) {
    let begun = Instant::now();
    loop {
        let entries = fs::read_dir(bench.own_templates()).into_iter().flatten().flatten();
        let made: Vec<_> = entries
            .map(|entry| entry.path())
            .filter(|path| !path.file_name().unwrap().to_string_lossy().starts_with("new-"))
            .collect();
        if let [path] = &made[..] {
            return (path.join("memory"), path.join("state"));
        }
        assert!(made.is_empty() && begun.elapsed() < 2 * PATIENCE, "{made:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Runs a sandbox to see whether it is restored.
async fn is_restored(bench: &Bench) -> bool {
    let sandbox = bench.sandbox("p").await;
    let command = fs::read(format!("/proc/{}/cmdline", vmm(bench, &sandbox).await)).unwrap();
    let restored = command.split(|byte| *byte == 0).any(|word| word == b"-incoming");
    let id = bench.started("c", bench.exits(4)).await;
    assert_eq!(bench.exited(&id).await.exit_code, 4);
    bench.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    restored
}

/// Fills a file with something else, and hides that.
fn spoil(path: &Path) {
    let seen = fs::metadata(path).unwrap();
    let mut file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let garbage = vec![0x5a; 1 << 20];
    let mut left = usize::try_from(seen.size()).unwrap();
    while left > 0 {
        left -= file.write(&garbage[..left.min(garbage.len())]).unwrap();
    }
    file.set_modified(seen.modified().unwrap()).unwrap();
}

pub(crate) async fn the_first_guest_is_booted_and_a_spoilt_template_is_replaced(bench: &mut Bench) {
    assert!(!is_restored(bench).await, "there is no template yet");
    let (memory, state) = template(bench).await;
    assert!(is_restored(bench).await);

    // Seen before it is used.
    let first = fs::metadata(&memory).unwrap().ino();
    fs::OpenOptions::new().append(true).open(&memory).unwrap().write_all(b"more").unwrap();
    assert!(!is_restored(bench).await);
    assert_eq!(template(bench).await.0, memory);
    assert_ne!(fs::metadata(&memory).unwrap().ino(), first);
    assert!(is_restored(bench).await);

    // Seen by the VMM, which refuses the state.
    spoil(&state);
    assert!(!is_restored(bench).await);
    template(bench).await;
    assert!(is_restored(bench).await);

    // Seen by nobody until the guest is of no use: the next one is booted.
    spoil(&memory);
    let error = bench.runtime.run_pod_sandbox(&bench.sandbox_config("p")).await.unwrap_err();
    println!("{}", lambdalet::telemetry::chain(&error));
    assert!(!memory.exists());
    assert!(!is_restored(bench).await);
    template(bench).await;
    assert!(is_restored(bench).await);
}

// === Network ===

fn echoed(address: [u8; 4], port: u16, words: &str) -> String {
    let address = SocketAddr::from((address, port));
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(words.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A container of Docker beside the machines, that sends back what it gets on this port.
async fn docker_pod(bench: &Bench, pod: &str, port: u16) -> ContainerId {
    let config = SandboxConfig { handler: Some("docker".to_owned()), ..bench.sandbox_config(pod) };
    let sandbox = bench.runtime.run_pod_sandbox(&config).await.unwrap();
    let listen = bench.script(&format!("exec busybox nc -ll -p {port} -e cat"));
    let id = bench.runtime.create_container(&sandbox, &bench.container_config(pod, "echo", listen)).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    while bench.runtime.port_forward(&sandbox, port).await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    id
}

pub(crate) async fn a_guest_is_reached_by_host_and_neighbours_and_reaches_them(bench: &mut Bench) {
    let sandbox = bench.echoes("p", 7000).await;
    let own = bench.address("p");
    // A thread of its own for what blocks, in the same network.
    let ask = async |port| tokio::task::spawn_blocking(move || echoed(own, port, "from the host")).await.unwrap();
    assert_eq!(ask(7000).await, "from the host");

    let docker = docker_pod(bench, "d", 7001).await;
    let other = bench.sandbox("q").await;
    let machine = bench.container_config("q", "idle", bench.idles());
    let machine = bench.runtime.create_container(&other, &machine).await.unwrap();
    bench.runtime.start_container(&machine).await.unwrap();
    let call = |pod: &str, port: u16| {
        let [a, b, c, d] = bench.address(pod);
        format!("echo hello | busybox nc -w 20 {a}.{b}.{c}.{d} {port}")
    };
    for (from, to) in [(&docker, call("p", 7000)), (&machine, call("p", 7000)), (&machine, call("d", 7001))] {
        assert_eq!(sh(bench, from, &to).await, ("hello\n".to_owned(), 0), "{to}");
    }
    // It knows itself by its own address, and the gateway as the way to everybody.
    let (known, _) = sh(bench, &machine, "busybox ip -o addr show eth0; busybox ip route").await;
    let [.., last] = bench.address("q");
    assert!(known.contains(&format!("10.99.0.{last}/32")) && known.contains("default via 10.99.0.1"), "{known}");

    // An address that is given up refuses at once, and works again for whoever has it next.
    bench.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    let begun = Instant::now();
    let refused = TcpStream::connect_timeout(&SocketAddr::from((own, 7000)), PATIENCE).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    bench.echoes("p", 7000).await;
    assert_eq!(ask(7000).await, "from the host");
}

pub(crate) async fn a_guest_cannot_speak_as_another(bench: &mut Bench) {
    let sandbox = bench.sandbox("p").await;
    let config = ContainerConfig {
        security: Security { add_capabilities: vec!["NET_ADMIN".to_owned()], ..Security::default() },
        ..bench.container_config("p", "c", bench.idles())
    };
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    let [a, b, c, d] = GATEWAY;
    let ping = format!("busybox ping -c 1 -W 3 {a}.{b}.{c}.{d} >/dev/null");
    let reaches = async |first: &str| {
        let (said, code) = sh(bench, &id, &format!("{first} && {ping}")).await;
        assert!(said.is_empty(), "{first}: {said}");
        code == 0
    };
    assert!(reaches("true").await);
    let other =
        format!("busybox ip addr add 10.99.0.66/32 dev eth0 && {} -I 10.99.0.66", ping.replace(" >/dev/null", ""));
    assert_eq!(sh(bench, &id, &format!("{other} >/dev/null")).await, (String::new(), 1), "as another address");
    let mac = lambdalet::network::tap::mac_of(bench.address("p").into());
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    assert!(!reaches("busybox ip link set eth0 address 02:00:00:00:00:66").await, "as another card");
    assert!(reaches(&format!("busybox ip link set eth0 address {mac}")).await, "as itself");
    let rules = output("nft", &["list", "ruleset"]);
    assert!(!rules.contains(&format!("!= {mac} counter packets 0 ")), "{rules}");
}

// === Time ===

pub(crate) async fn a_guests_clock_is_set_right(bench: &mut Bench) {
    let sandbox = bench.sandbox("p").await;
    let config = ContainerConfig {
        security: Security { add_capabilities: vec!["SYS_TIME".to_owned()], ..Security::default() },
        ..bench.container_config("p", "c", bench.idles())
    };
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    let behind = async || {
        let (said, code) = sh(bench, &id, "busybox date +%s").await;
        assert_eq!(code, 0, "{said}");
        jiff::Timestamp::now().as_second() - said.trim().parse::<i64>().unwrap()
    };
    assert!((0..10).contains(&behind().await), "as it was configured: {}", behind().await);
    let (said, code) = sh(bench, &id, "busybox date -s 2001-01-01 >/dev/null").await;
    assert_eq!(code, 0, "{said}");
    let begun = Instant::now();
    while !(0..10).contains(&behind().await) {
        assert!(begun.elapsed() < PATIENCE, "{} s behind", behind().await);
    }
}

// === Identity ===

/// What a guest's kernel says of itself: random bytes first, then its boot, another random number, its name and its clock.
const WHO: &str = "busybox head -c 16 /dev/urandom | busybox md5sum; busybox cat /proc/sys/kernel/random/boot_id \
                   /proc/sys/kernel/random/uuid; busybox hostname; busybox date +%s; while :; do sleep 1; done";

/// By what the agent of each machine answers to a session of the test's own.
async fn machine_ids(bench: &mut Bench) -> Vec<String> {
    // A machine has room for one session.
    bench.hang_up();
    let mut ids = Vec::new();
    let dirs = VmDirs::new(&bench.root().join("vms"), DEFAULT_NAMESPACE).unwrap().list().unwrap();
    // Those that wait are no sandbox's.
    for dir in dirs.into_iter().filter(|dir| bench.root().join("sandboxes").join(dir.id().as_str()).exists()) {
        let machine = Bench::qemu().adopt(&dir).await.unwrap().expect("it runs");
        let (agent, hello) = Agent::connect(machine.agent().await.unwrap(), PATIENCE).await.unwrap();
        ids.push(hello.machine_id);
        agent.close();
    }
    bench.restart().await;
    ids
}

pub(crate) async fn clones_of_one_template_are_strangers(bench: &mut Bench) {
    are_strangers(bench, async |bench, pod| bench.sandbox(pod).await).await;
}

pub(crate) async fn guests_that_have_waited_are_strangers(bench: &mut Bench) {
    are_strangers(bench, woken).await;
}

async fn are_strangers(bench: &mut Bench, start: impl AsyncFn(&Bench, &str) -> SandboxId) {
    let mut said: Vec<Vec<String>> = Vec::new();
    for pod in ["p", "q", "r"] {
        let sandbox = start(bench, pod).await;
        let command = fs::read(format!("/proc/{}/cmdline", vmm(bench, &sandbox).await)).unwrap();
        assert!(command.split(|byte| *byte == 0).any(|word| word == b"-incoming"), "{pod} is no clone");
        let config = bench.container_config(pod, "who", bench.script(WHO));
        let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
        bench.runtime.start_container(&id).await.unwrap();
        let begun = Instant::now();
        let lines = loop {
            let lines: Vec<String> = log(bench, &id).await.lines().map(str::to_owned).collect();
            if lines.len() == 5 {
                break lines;
            }
            assert!(begun.elapsed() < PATIENCE, "{lines:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert_eq!(lines[3], format!("host-{pod}"));
        let behind = jiff::Timestamp::now().as_second() - lines[4].parse::<i64>().unwrap();
        assert!((0..20).contains(&behind), "{pod} is {behind} s behind");
        said.push(lines);
    }
    for (at, what) in ["random bytes", "boot", "random number", "name"].into_iter().enumerate() {
        let distinct: BTreeSet<&String> = said.iter().map(|lines| &lines[at]).collect();
        assert_eq!(distinct.len(), said.len(), "the same {what}: {said:?}");
    }
    let ids = machine_ids(bench).await;
    let distinct: BTreeSet<&String> = ids.iter().filter(|id| id.len() == 32).collect();
    assert_eq!(distinct.len(), 3, "{ids:?}");
}

// === Waiting ===

/// The ids of machines, those that wait among them.
fn machines(bench: &Bench) -> BTreeSet<String> {
    let entries = fs::read_dir(bench.root().join("vms/default")).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

/// What the driver itself calls a sandbox, and its machine: beside others its ids begin with its name.
fn own_id(sandbox: &SandboxId) -> &str {
    sandbox.as_str().split_once('.').map_or(sandbox.as_str(), |(_, id)| id)
}

/// A sandbox whose guest has waited: it was there before.
async fn woken(bench: &Bench, pod: &str) -> SandboxId {
    let begun = Instant::now();
    loop {
        let before = machines(bench);
        let sandbox = bench.sandbox(pod).await;
        if before.contains(own_id(&sandbox)) {
            return sandbox;
        }
        bench.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
        assert!(begun.elapsed() < PATIENCE, "none waits");
    }
}

pub(crate) async fn a_guest_that_has_waited_is_its_pods(bench: &mut Bench) {
    let sandbox = woken(bench, "p").await;
    let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", vmm(bench, &sandbox).await)).unwrap();
    let own = format!("/pod-p/vmm-{}", own_id(&sandbox));
    let elsewhere: Vec<&str> = cgroups.lines().filter(|line| line.contains("/vmm-") && !line.ends_with(&own)).collect();
    assert!(cgroups.contains(&own) && elsewhere.is_empty(), "{cgroups}");
    // It is reached at its address, reaches others, and survives its driver.
    let id = bench.started("echo", bench.script("exec busybox nc -ll -p 7000 -e cat")).await;
    while bench.runtime.port_forward(&sandbox, 7000).await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let own = bench.address("p");
    assert_eq!(tokio::task::spawn_blocking(move || echoed(own, 7000, "hello")).await.unwrap(), "hello");
    let [a, b, c, d] = GATEWAY;
    let ping = format!("busybox ping -c 1 -W 3 {a}.{b}.{c}.{d} >/dev/null");
    assert_eq!(sh(bench, &id, &ping).await, (String::new(), 0));
    bench.restart().await;
    assert_eq!(bench.sandbox("p").await, sandbox);
    assert_eq!(sh(bench, &id, &ping).await, (String::new(), 0));
}

pub(crate) async fn guests_that_wait_end_with_their_driver_or_by_the_next(bench: &mut Bench) {
    for crashed in [true, false] {
        let sandbox = woken(bench, "p").await;
        bench.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
        // One that crashes ends nothing any more, and begins nothing.
        bench.all_wait().await;
        let before = crashed.then(|| bench.runtime.clone());
        bench.hang_up();
        let begun = Instant::now();
        let run = |bench: &Bench| bench.of_machines().iter().any(|left| left.starts_with("/proc/"));
        while !crashed && run(bench) {
            assert!(begun.elapsed() < PATIENCE, "{:?}", bench.of_machines());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bench.restart().await;
        while !bench.of_machines().is_empty() {
            assert!(begun.elapsed() < PATIENCE, "{:?}", bench.of_machines());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(before);
    }
    // One that is told of its end leaves nothing for the next.
    let sandbox = woken(bench, "p").await;
    bench.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    bench.runtime.close().await;
    assert_eq!(bench.of_machines(), Vec::<String>::new());
}

// === Coming and going ===

/// `LAMBDALET_TEST_CYCLES` says how often.
pub(crate) async fn machines_that_come_and_go_leave_nothing(bench: &mut Bench) {
    let cycles = std::env::var("LAMBDALET_TEST_CYCLES").map_or(4, |cycles| cycles.parse().expect("a number"));
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let (begun, before) = (Instant::now(), descriptors());
    for cycle in 0..cycles {
        let id = bench.started("c", bench.exits(cycle % 100)).await;
        assert_eq!(bench.exited(&id).await.exit_code, cycle % 100);
        let sandbox = bench.sandbox("p").await;
        if cycle % 2 == 0 {
            kill(Pid::from_raw(vmm(bench, &sandbox).await), Signal::SIGKILL).unwrap();
            not_ready(bench, &sandbox).await;
        }
        bench.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
        let left = bench.of_machines();
        assert!(left.is_empty(), "after {cycle} cycles: {left:?}");
    }
    // Other tests of this process have theirs too.
    println!("{cycles} cycles in {:?}; descriptors: {before} before, {} after", begun.elapsed(), descriptors());
}

pub(crate) async fn a_part_of_a_volume_and_an_image_are_shown(bench: &mut Bench) {
    let shared = bench.root().with_file_name("shared");
    fs::create_dir_all(shared.join("sub")).unwrap();
    fs::write(shared.join("sub/file"), "part\n").unwrap();
    fs::write(shared.join("other"), "whole\n").unwrap();
    let shown = |mount: Mount, sub_path: &str, at: &str| Mount {
        sub_path: sub_path.to_owned(),
        container_path: at.to_owned(),
        read_only: true,
        ..mount
    };
    let part = |sub_path, at| shown(Mount { host_path: shared.clone(), ..Mount::default() }, sub_path, at);
    let image = |sub_path, at| shown(Mount { image: Some(bench.image.clone()), ..Mount::default() }, sub_path, at);
    let mounts = vec![
        part("sub", "/dir"),
        part("sub/file", "/etc/file"),
        part("", "/all"),
        image("", "/image"),
        image("bin", "/programs"),
    ];
    let look = "busybox cat /dir/file /etc/file /all/other; busybox ls /dir /programs/busybox /image/bin/busybox; \
                busybox touch /image/x || echo read only; /programs/busybox true || echo no program";
    let config = ContainerConfig { mounts, ..bench.container_config("p", "looks", bench.script(look)) };
    let id = bench.runtime.create_container(&bench.sandbox("p").await, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    bench.exited(&id).await;
    let said = log(bench, &id).await;
    assert!(said.starts_with("part\npart\nwhole\n/image/bin/busybox\n/programs/busybox\n\n/dir:\nfile\n"), "{said}");
    assert!(said.contains("read only\n") && said.contains("no program\n"), "{said}");
    // A file has no parts, and an image none but its own.
    let of_file = Mount { host_path: shared.join("other"), ..part("x", "/x") };
    let with = |name, mount| {
        let config = bench.container_config("p", name, bench.exits(0));
        ContainerConfig { mounts: vec![mount], ..config }
    };
    let sandbox = bench.sandbox("p").await;
    let error = bench.runtime.create_container(&sandbox, &with("of-file", of_file)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    let id = bench.runtime.create_container(&sandbox, &with("absent", image("absent", "/x"))).await.unwrap();
    let error = bench.runtime.start_container(&id).await.unwrap_err();
    assert!(error.to_string().contains("absent"), "{error}");
}
