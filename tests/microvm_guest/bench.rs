//! A guest to test on: a virtual machine, or namespaces of this host.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::StreamExt;
use lambdalet::runtime::microvm::agent::{Agent, said};
use lambdalet_proto::agent::v1::{ConfigureRequest, ContainerSpec, Interface, Resources};
use tokio::net::UnixStream;

/// A guest under emulation on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
const BUSYBOX: &str = "/bin/busybox";
/// What containers may do unless a case says otherwise.
const CAPABILITIES: [&str; 6] = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID"];
pub(crate) const MACHINE_ID: &str = "0123456789abcdef0123456789abcdef";
/// The image of all cases, and where it is.
pub(crate) const IMAGE: &str = "busybox";

/// A guest and the session with it.
pub(crate) struct Bench {
    pub(crate) agent: Agent,
    pub(crate) hello: said::Hello,
    child: Child,
    socket: PathBuf,
    directory: tempfile::TempDir,
    machine: bool,
}

impl Bench {
    /// Boots a machine; says why if there is none.
    pub(crate) async fn guest() -> Option<Self> {
        let skip = |why: &str| println!("skipped: the guest is not booted, {why}");
        let Some(bundle) = env::var_os("LAMBDALET_TEST_GUEST").map(PathBuf::from) else {
            skip("LAMBDALET_TEST_GUEST is not set (hack/guest makes one)");
            return None;
        };
        for tool in ["qemu-system-x86_64", "mkfs.erofs", "mkfs.ext4", "busybox"] {
            if !Command::new("which").arg(tool).stdout(Stdio::null()).status().is_ok_and(|status| status.success()) {
                skip(&format!("there is no {tool}"));
                return None;
            }
        }
        let directory = tempfile::tempdir().unwrap();
        disks(directory.path());
        let socket = directory.path().join("agent.sock");
        let started = Instant::now();
        let child = qemu(&bundle, directory.path(), &socket);
        let (agent, hello) = connect(&socket, &directory.path().join("console.log")).await;
        println!(
            "QEMU's start to the agent's answer {} ms; the guest's kernel to the agent {} ms, {} MiB of memory",
            started.elapsed().as_millis(),
            hello.ready_after.as_millis(),
            hello.memory >> 20,
        );
        Some(Self { agent, hello, child, socket, directory, machine: true })
    }

    /// Runs the agent in new namespaces of this host; says why if it cannot.
    pub(crate) async fn namespaces() -> Option<Self> {
        let Some(agent) = env::var_os("LAMBDALET_TEST_AGENT") else {
            println!("skipped: the agent is not run on this host, LAMBDALET_TEST_AGENT is not set");
            return None;
        };
        let directory = tempfile::tempdir().unwrap();
        root(&directory.path().join("root"));
        let socket = directory.path().join("agent.sock");
        let run = "mount -t tmpfs run /run && exec \"$0\" --stand-in \"$1\"";
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--pid",
            "--net",
            "--ipc",
            "--uts",
            "--fork",
            "--mount-proc",
            "--kill-child",
            "sh",
            "-c",
            run,
        ]);
        let child = command.arg(agent).arg(&socket).spawn().unwrap();
        let (agent, hello) = connect(&socket, &socket).await;
        Some(Self { agent, hello, child, socket, directory, machine: false })
    }

    /// Whether it is a virtual machine.
    pub(crate) fn is_machine(&self) -> bool {
        self.machine
    }

    /// Its identity; the image is mounted beside.
    pub(crate) async fn configure(&self) {
        self.agent.configure(self.identity(&["10.244.1.7/24"])).await.unwrap();
        let slot = self.slot();
        self.agent.mount_image(&slot, IMAGE, "erofs").await.unwrap();
        self.agent.mount_image(&slot, IMAGE, "erofs").await.unwrap();
    }

    /// The same with these addresses.
    pub(crate) fn identity(&self, addresses: &[&str]) -> ConfigureRequest {
        let interface = Interface {
            mac: "02:00:0a:f4:01:07".into(),
            name: "eth0".into(),
            addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
            mtu: 1400,
        };
        ConfigureRequest {
            hostname: "guest-test".into(),
            machine_id: MACHINE_ID.into(),
            time_ns: 1_800_000_000_000_000_000,
            seed: vec![7; 32].into(),
            interfaces: vec![interface],
            routes: vec![lambdalet_proto::agent::v1::Route {
                destination: "0.0.0.0/0".into(),
                gateway: "10.244.1.1".into(),
                interface: "eth0".into(),
            }],
            sysctls: vec![lambdalet_proto::agent::v1::Sysctl {
                name: "net.ipv4.ip_unprivileged_port_start".into(),
                value: "80".into(),
            }],
            resources: Some(Resources { pids: 500, ..Resources::default() }),
            scratch: true,
            ..ConfigureRequest::default()
        }
    }

    /// Where the image lies.
    pub(crate) fn slot(&self) -> String {
        if self.machine { "image0".to_owned() } else { self.directory.path().join("root").display().to_string() }
    }

    /// Gives the session up, as a node that was killed, and connects anew.
    pub(crate) async fn reconnect(&mut self) {
        self.agent.close();
        (self.agent, self.hello) = connect(&self.socket, &self.socket).await;
    }

    /// Removes what a case that failed left.
    pub(crate) async fn clean(&self) {
        for container in self.agent.list().await.unwrap_or_default() {
            let _ = self.agent.remove(&container.id).await;
        }
    }

    /// Waits until the machine has ended by itself.
    pub(crate) async fn ended(mut self) {
        let end = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < end, "the machine does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Runs a container to its end, and says its code and what it wrote.
    pub(crate) async fn run(&self, spec: ContainerSpec) -> (said::Container, String) {
        let id = spec.id.clone();
        self.agent.create_container(spec).await.unwrap();
        self.agent.start(&id).await.unwrap();
        let ended = tokio::time::timeout(PATIENCE, self.agent.wait(&id)).await.expect("it ends").unwrap();
        let log = self.log(&id).await;
        self.agent.remove(&id).await.unwrap();
        (ended, log)
    }

    /// Creates and starts a container that goes on.
    pub(crate) async fn start(&self, spec: ContainerSpec) {
        let id = spec.id.clone();
        self.agent.create_container(spec).await.unwrap();
        self.agent.start(&id).await.unwrap();
    }

    /// All of a log up to now.
    pub(crate) async fn log(&self, id: &str) -> String {
        let mut batches = self.agent.logs(id, 0, false).await.unwrap();
        let mut text = Vec::new();
        while let Some(batch) = batches.next().await {
            batch.unwrap().records.iter().for_each(|record| text.extend_from_slice(&record.bytes));
        }
        String::from_utf8(text).unwrap()
    }

    /// Follows a log until it contains some text.
    pub(crate) async fn log_says(&self, id: &str, wanted: &str) {
        let mut batches = self.agent.logs(id, 0, true).await.unwrap();
        let mut text = String::new();
        let says = async {
            while !text.contains(wanted) {
                let batch = batches.next().await.expect("the log goes on").unwrap();
                batch.records.iter().for_each(|record| text.push_str(&String::from_utf8_lossy(&record.bytes)));
            }
        };
        tokio::time::timeout(PATIENCE, says).await.unwrap_or_else(|_| panic!("the log of {id} says {wanted}"));
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A container that runs a script.
pub(crate) fn script(id: &str, script: &str) -> ContainerSpec {
    ContainerSpec {
        id: id.into(),
        image: IMAGE.into(),
        args: ["sh", "-c", script].map(str::to_owned).to_vec(),
        capabilities: CAPABILITIES.map(str::to_owned).to_vec(),
        ..ContainerSpec::default()
    }
}

/// Opens a session as soon as there is somebody to open it with.
async fn connect(socket: &Path, console: &Path) -> (Agent, said::Hello) {
    let end = Instant::now() + PATIENCE;
    let stream = loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < end, "{}: {error}", socket.display()),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    match Agent::connect(stream, PATIENCE).await {
        Ok(connected) => connected,
        Err(error) => {
            panic!("{}\n{}", lambdalet::telemetry::chain(&error), fs::read_to_string(console).unwrap_or_default())
        }
    }
}

/// A root file system of one program.
fn root(root: &Path) {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "var/www"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    let applets = Command::new(BUSYBOX).arg("--list").output().unwrap().stdout;
    for applet in String::from_utf8(applets).unwrap().lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www:/var/www:/bin/sh\n")
        .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nwww-data:x:33:\nextra:x:44:www-data\n").unwrap();
    fs::write(root.join("bin/plain"), "no program\n").unwrap();
    // What a link of an image must not lead out by.
    symlink("/../../../proc", root.join("up")).unwrap();
}

fn disks(directory: &Path) {
    root(&directory.join("root"));
    let made = Command::new("mkfs.erofs").arg(directory.join("image0")).arg(directory.join("root")).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let scratch = directory.join("scratch");
    fs::File::create(&scratch).unwrap().set_len(256 << 20).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&scratch).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// As in the recipe: TCG's time stamp counter runs at the host's rate, which the guest cannot find out by itself.
fn tsc_khz() -> u64 {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap();
    let line = cpus.lines().find(|line| line.starts_with("cpu MHz")).expect("the host says its rate");
    let mhz: f64 = line.rsplit(':').next().unwrap().trim().parse().unwrap();
    (mhz * 1000.0) as u64
}

fn qemu(bundle: &Path, directory: &Path, socket: &Path) -> Child {
    let path = |name: &str| directory.join(name).display().to_string();
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "microvm,x-option-roms=off,acpi=on,rtc=on,isa-serial=on", "-accel", "tcg,thread=multi"]);
    command.args([
        "-cpu",
        "Nehalem",
        "-m",
        "128m",
        "-smp",
        "1",
        "-nodefaults",
        "-no-user-config",
        "-nographic",
        "-no-reboot",
    ]);
    command.arg("-kernel").arg(bundle.join("vmlinux")).arg("-initrd").arg(bundle.join("initramfs.cpio"));
    let kernel = "console=ttyS0 reboot=t panic=-1 quiet mitigations=off random.trust_cpu=on";
    command.arg("-append").arg(format!("{kernel} tsc_early_khz={}", tsc_khz()));
    command.arg("-serial").arg(format!("file:{}", path("console.log")));
    command.args(["-device", "virtio-serial-device", "-device", "virtserialport,chardev=p0,name=agent"]);
    command.arg("-chardev").arg(format!("socket,path={},id=p0,server=on,wait=off", socket.display()));
    for (disk, read_only) in [("scratch", false), ("image0", true)] {
        let readonly = if read_only { ",readonly=on" } else { "" };
        command.arg("-drive").arg(format!("id={disk},file={},format=raw,if=none{readonly}", path(disk)));
        command.arg("-device").arg(format!("virtio-blk-device,drive={disk},serial={disk}"));
    }
    command.args(["-netdev", "hubport,id=n0,hubid=0", "-device", "virtio-net-device,netdev=n0,mac=02:00:0a:f4:01:07"]);
    command.stdin(Stdio::null()).spawn().unwrap()
}
