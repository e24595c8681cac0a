//! One lambdalet process and everything on the host that is its.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::{Api, Client};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest as _, Sha256};

use super::cluster::Cluster;
use super::containerd::Containerd;
use super::wait::{SOON, poll, watch_until};

/// Time for a node to appear and be Ready.
const START: Duration = Duration::from_secs(40);

/// How a node is started.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// Flags besides those every test node gets.
    pub(crate) flags: Vec<String>,
    /// Lines of its configuration file besides those every test node gets.
    pub(crate) config: String,
    /// Environment of the process.
    pub(crate) environment: Vec<(String, String)>,
}

impl Options {
    pub(crate) fn flags(flags: &[&str]) -> Self {
        Self { flags: flags.iter().map(|f| (*f).to_owned()).collect(), ..Self::default() }
    }

    pub(crate) fn config(lines: &str) -> Self {
        Self { config: lines.to_owned(), ..Self::default() }
    }
}

/// A node. Dropping it ends it and removes what it made, however the test went.
pub(crate) struct Node {
    pub(crate) cluster: Cluster,
    pub(crate) name: String,
    pub(crate) root: PathBuf,
    pub(crate) port: u16,
    range: Option<Range>,
    flags: Vec<String>,
    config: String,
    /// Another way to the API server than the usual one.
    kubeconfig: OnceLock<PathBuf>,
    process: Mutex<Option<Child>>,
}

impl Node {
    /// Starts a node and waits until it is Ready.
    pub(crate) async fn start(cluster: &Cluster, client: &Client, name: &str, options: Options) -> Self {
        let mut node = Self::prepare(cluster, name, &options.flags);
        node.config = options.config;
        node.spawn(&options.environment);
        node.ready(client).await;
        node
    }

    /// Everything a node needs, without the process.
    pub(crate) fn prepare(cluster: &Cluster, name: &str, flags: &[String]) -> Self {
        let name = format!("{name}-{}", std::process::id());
        let more = std::env::var("LAMBDALET_TEST_NODE_FLAGS").unwrap_or_default();
        let more = more.split_whitespace().map(str::to_owned).filter(|flag| !flags.contains(flag));
        let root = std::env::temp_dir().join(format!("lambdalet-{name}"));
        std::fs::create_dir_all(&root).unwrap();
        Self {
            cluster: cluster.clone(),
            root,
            name,
            port: free_port(),
            range: Some(Range::claim()),
            flags: flags.iter().cloned().chain(more).collect(),
            config: String::new(),
            kubeconfig: OnceLock::new(),
            process: Mutex::new(None),
        }
    }

    /// The same, but the Pods' range is left to the cluster.
    pub(crate) fn without_range(cluster: &Cluster, name: &str) -> Self {
        let mut node = Self::prepare(cluster, name, &[]);
        node.range = None;
        node
    }

    /// Starts the process, with these flags beside the usual ones; they stay for later starts.
    pub(crate) fn spawn(&self, environment: &[(String, String)]) {
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        let child = self
            .command("run")
            .args(["--v", "4"])
            .args(self.configuration())
            .args(&self.flags)
            .envs(environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let before = self.process.lock().unwrap().replace(child);
        assert!(before.is_none(), "{} runs already", self.name);
    }

    /// A build machine's disk may be fuller than a node's should be: that is no test's concern, except of one that names a
    /// file of its own.
    fn configuration(&self) -> Option<String> {
        if self.flags.iter().any(|flag| flag.starts_with("--config")) {
            return None;
        }
        let path = self.root.with_extension("yaml");
        let text = format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
             evictionHard: {{memory.available: 100Mi, nodefs.available: 1Gi, nodefs.inodesFree: 1%}}\n\
             imageGCHighThresholdPercent: 100\n{}",
            self.config
        );
        std::fs::write(&path, text).unwrap();
        Some(format!("--config={}", path.display()))
    }

    /// `lambdalet` with this node's usual flags.
    pub(crate) fn command(&self, what: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lambdalet"));
        let kubeconfig = self.kubeconfig.get().cloned().unwrap_or_else(|| self.cluster.node_kubeconfig(&self.name));
        command.arg(what).arg("--kubeconfig").arg(kubeconfig).arg("--root-dir").arg(&self.root);
        command.args(["--node-name", &self.name, "--port", &self.port.to_string()]);
        command.args(["--node-labels", &format!("lambdalet.dev/test={}", self.name)]);
        if let Some(range) = &self.range {
            command.args(["--pod-cidr", &range.cidr()]);
        }
        command.args(["--cluster-dns", self.cluster.fact("DNS_IP")]);
        if !self.flags.iter().any(|flag| flag.starts_with("--client-ca-file")) {
            command.arg("--client-ca-file").arg(self.cluster.dir.join("ca.crt"));
        }
        command
    }

    /// Starts it with this kubeconfig from now on.
    pub(crate) fn lead_to(&self, kubeconfig: PathBuf) {
        self.kubeconfig.set(kubeconfig).unwrap();
    }

    fn log_path(&self) -> PathBuf {
        self.root.with_extension("log")
    }

    /// What the process wrote since the node's first start.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// Waits until the Node is Ready, or says what the process said before it ended.
    pub(crate) async fn ready(&self, client: &Client) -> NodeObject {
        self.until(client, "Ready", START, |node| condition(node, "Ready") == Some("True")).await
    }

    /// Waits for something of the Node object while the process runs.
    pub(crate) async fn until(
        &self,
        client: &Client,
        what: &str,
        within: Duration,
        done: impl Fn(&NodeObject) -> bool,
    ) -> NodeObject {
        let nodes: Api<NodeObject> = Api::all(client.clone());
        let waiting = watch_until(nodes, &self.name, what, within, |node| node.is_some_and(&done));
        tokio::select! {
            node = waiting => node.unwrap(),
            status = self.ended() => panic!("{} ended with {status} before it was {what}:\n{}", self.name, self.log()),
        }
    }

    /// Whether the process runs.
    pub(crate) fn runs(&self) -> bool {
        self.process.lock().unwrap().as_mut().is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    /// The process's id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.lock().unwrap().as_ref().unwrap().id()
    }

    /// Waits until the process has ended by itself.
    pub(crate) async fn ended(&self) -> ExitStatus {
        poll("ended", Duration::from_secs(24 * 3600), async || {
            let mut process = self.process.lock().unwrap();
            let Some(child) = process.as_mut() else { return Err("it was not started".to_owned()) };
            let status = child.try_wait().unwrap().ok_or("it runs")?;
            *process = None;
            Ok(status)
        })
        .await
    }

    /// As a crash would end it.
    pub(crate) fn kill9(&self) {
        if let Some(mut child) = self.process.lock().unwrap().take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().try_into().unwrap()), signal).unwrap();
    }

    /// Ends it with SIGTERM and waits for the end.
    pub(crate) async fn stop(&self, within: Duration) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        match tokio::time::timeout(within, self.ended()).await {
            Ok(status) => status,
            Err(_) => panic!("{} still runs {within:?} after SIGTERM:\n{}", self.name, self.log()),
        }
    }

    /// Ends it as a crash would, and starts it again until Ready once more.
    pub(crate) async fn restart(&self, client: &Client) {
        self.kill9();
        self.spawn(&[]);
        self.adopted(client).await;
    }

    /// Waits until a node that was started again answers for its Pods: only then does its API know of any.
    pub(crate) async fn adopted(&self, client: &Client) {
        let since = jiff::Timestamp::now();
        let renewed = |node: &NodeObject| condition(node, "Ready") == Some("True");
        self.until(client, "Ready after a restart", START, renewed).await;
        poll("serving after its restart", SOON, async || {
            let address = (Ipv4Addr::LOCALHOST, self.port);
            std::net::TcpStream::connect(address).map(drop).map_err(|e| format!("{e}, started {since}"))
        })
        .await;
    }

    /// The word that marks what is this node's on the host; `None` before its first start.
    pub(crate) fn owner(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.root.join("owner.json")).ok()?;
        let record: serde_json::Value = serde_json::from_str(&text).unwrap();
        let identity = format!("{}/{}", record["cluster"].as_str().unwrap(), record["node"].as_str().unwrap());
        Some(Sha256::digest(identity).iter().take(6).map(|byte| format!("{byte:02x}")).collect())
    }

    /// What its Pods run on, if that is not Docker.
    pub(crate) fn containerd(&self) -> Option<Containerd> {
        self.flags.iter().any(|flag| flag == "--runtime=cri").then(Containerd::from_environment).flatten()
    }

    /// Name of the bridge its Pods hang on.
    pub(crate) fn bridge(&self) -> Option<String> {
        self.owner().map(|owner| format!("ll{}", &owner[..8]))
    }

    /// Whether the address is one of its Pods'.
    pub(crate) fn has_address(&self, address: &str) -> bool {
        self.range.as_ref().is_some_and(|range| address.starts_with(&range.prefix()))
    }

    /// The node's way out of everything it made on the host.
    fn clear(&self) {
        self.kill9();
        let Some(owner) = self.owner() else { return };
        for pid in super::leaks::all_vmms(self) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let ids = output("docker", &["ps", "-aq", "--filter", &format!("label=lambdalet.dev/owner={owner}")]);
        let ids: Vec<&str> = ids.split_whitespace().collect();
        if !ids.is_empty() {
            output("docker", &[&["rm", "-f"], &ids[..]].concat());
        }
        if let Some(containerd) = self.containerd() {
            containerd.remove(&owner);
        }
        let bridge = self.bridge().unwrap();
        for (command, table) in
            [("iptables", "filter"), ("iptables", "nat"), ("ip6tables", "filter"), ("ip6tables", "nat")]
        {
            let rules = output(command, &["-w", "-t", table, "-S"]);
            for rule in rules.lines().filter(|r| r.contains(&format!("lambdalet:{bridge}"))) {
                let words: Vec<String> = rule.replacen("-A", "-D", 1).split(' ').map(|w| w.replace('"', "")).collect();
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                output(command, &[&["-w", "-t", table], &words[..]].concat());
            }
        }
        // Only a node with microVMs has one.
        let _ = Command::new("nft").args(["delete", "table", "bridge", &format!("lambdalet_{bridge}")]).output();
        output("ip", &["link", "delete", &bridge]);
        // What is empty of Pods goes; a directory that is not refuses.
        let groups = format!("*/lambdalet-{owner}*");
        output("find", &["/sys/fs/cgroup", "-depth", "-type", "d", "-path", &groups, "-exec", "rmdir", "{}", ";"]);
        for mount in mounts_below(&self.root).iter().rev() {
            output("umount", &["--lazy", mount]);
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() || std::env::var_os("LAMBDALET_TEST_VERBOSE").is_some() {
            eprintln!("--- log of {}, in full in {}\n{}", self.name, self.log_path().display(), tail(&self.log(), 150));
        } else {
            let _ = std::fs::remove_file(self.log_path());
        }
        self.clear();
        let _ = self.cluster.kubectl(&["delete", "node", &self.name, "--ignore-not-found", "--wait=false"]).output();
        let lease = ["-n", "kube-node-lease", "delete", "lease", &self.name, "--ignore-not-found", "--wait=false"];
        let _ = self.cluster.kubectl(&lease).output();
        let _ = std::fs::remove_dir_all(&self.root);
        let _ = std::fs::remove_file(self.root.with_extension("yaml"));
    }
}

/// The status of a condition.
pub(crate) fn condition<'a>(node: &'a NodeObject, type_: &str) -> Option<&'a str> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|c| c.type_ == type_).map(|c| c.status.as_str())
}

/// The mount points below a directory, outermost first.
pub(crate) fn mounts_below(directory: &Path) -> Vec<String> {
    let prefix = format!("{}/", directory.display());
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    let mut points: Vec<String> = points.filter(|point| point.starts_with(&prefix)).map(str::to_owned).collect();
    points.sort();
    points
}

/// Standard output of a command, whether it succeeded or not.
pub(crate) fn output(command: &str, args: &[&str]) -> String {
    let output = Command::new(command).args(args).output().unwrap_or_else(|e| panic!("{command}: {e}"));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The last lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A port nobody listens on, below the range that outgoing connections use. Each is given out once: whoever has one may not
/// listen yet.
pub(crate) fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = rand::random_range(20_000..30_000);
        let is_free = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok();
        if is_free && GIVEN.lock().unwrap().insert(port) {
            return port;
        }
    }
}

/// A /24 of Pod addresses that no other test on this host uses while the file is locked.
struct Range {
    number: u8,
    _claim: File,
}

impl Range {
    fn claim() -> Self {
        let directory = std::env::temp_dir().join("lambdalet-test-ranges");
        std::fs::create_dir_all(&directory).unwrap();
        for number in 1..255 {
            let file = File::create(directory.join(number.to_string())).unwrap();
            if file.try_lock().is_ok() {
                return Self { number, _claim: file };
            }
        }
        panic!("254 test nodes run on this host already");
    }

    fn prefix(&self) -> String {
        format!("10.201.{}.", self.number)
    }

    fn cidr(&self) -> String {
        format!("10.201.{}.0/24", self.number)
    }
}
