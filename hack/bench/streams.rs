//! Measures exec, port-forward and followed logs as a node serves them, beside `docker exec` and a bare TLS relay to the
//! same container.
//!
//! `hack/bench/streams` runs it against a node of its own. It speaks to the node as API servers do, over TLS with
//! WebSocket or SPDY, without one in between. Each way is measured in turn, round after round, and the median counts. Node,
//! daemon, container and client share the machine, for `docker exec` as for the node.
#![allow(clippy::disallowed_methods, reason = "a benchmark's tasks end with it")]

#[path = "client.rs"]
mod client;
#[path = "namespace.rs"]
mod namespace;
#[path = "resident.rs"]
mod resident;
#[path = "spdy.rs"]
mod spdy;

use std::io::{BufRead as _, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bollard::Docker;
use bollard::exec::{CreateExecOptions, StartExecResults};
use clap::Parser;
use futures::StreamExt as _;
use futures::future::try_join_all;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use client::{Client, Kept, PIECE, query_value, send_zeros};
use namespace::{PATIENCE, Place};
use resident::resident_kib;
use spdy::Forwarded;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const POD: &str = "streams";
const EXEC_PROTOCOL: &str = "v5.channel.k8s.io";
const PORT_PROTOCOL: &str = "v4.channel.k8s.io";
/// Serves port 8080: sends as many zeros as it is asked for, or takes as many and says so. And speaks all the time.
const SERVER: &str = r#"use IO::Socket::INET; $SIG{CHLD} = "IGNORE"; $| = 1;
if (!fork) { while (1) { print "x" x 100, "\n"; sleep 1 } }
my $listener = IO::Socket::INET->new(Listen => 64, LocalPort => 8080, ReuseAddr => 1) or die $!;
while (my $client = $listener->accept) {
  if (fork) { close $client; next }
  my ($way, $left) = unpack "aQ<", do { my $head = ""; sysread $client, $head, 9 - length $head, length $head while length $head < 9; $head };
  my $zeros = "\0" x 65536;
  if ($way eq "s") { while ($left > 0) { my $n = syswrite $client, $zeros, $left < 65536 ? $left : 65536; last unless $n; $left -= $n } }
  else { while ($left > 0) { my $n = sysread $client, my $bytes, 65536; last unless $n; $left -= $n } syswrite $client, "k" }
  exit;
}"#;

#[derive(Parser)]
struct Args {
    /// Kubeconfig of somebody who may create Pods
    #[arg(long, required_unless_present = "relay_to")]
    kubeconfig: Option<PathBuf>,
    /// The node to measure
    #[arg(long, default_value = "")]
    node: String,
    /// Where its API listens
    #[arg(long, default_value = "127.0.0.1:10250")]
    api: SocketAddr,
    /// PEM certificate of somebody who may use it
    #[arg(long, requires = "key")]
    certificate: Option<PathBuf>,
    /// The certificate's key
    #[arg(long)]
    key: Option<PathBuf>,
    /// The node's process, whose memory is looked at
    #[arg(long, default_value_t = 0)]
    pid: u32,
    /// An image with perl, cat, head and true
    #[arg(long, default_value = "lambdalet.test/debian:12")]
    image: String,
    /// Commands run one after the other, for the latency
    #[arg(long, default_value_t = 40)]
    commands: usize,
    /// MiB sent each way, for the throughput
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// Times each throughput is measured
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Clients that follow a log at once
    #[arg(long, default_value_t = 200)]
    followers: usize,
    /// Be the bare relay to this address; the benchmark starts itself
    #[arg(long, hide = true)]
    relay_to: Option<SocketAddr>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let args = Args::parse();
    if let Some(target) = args.relay_to {
        return relay(target).await;
    }
    let place = Place::open(args.kubeconfig.as_deref().context("--kubeconfig is missing")?).await?;
    let measured = measure(&place, args).await;
    place.close().await?;
    measured
}

async fn measure(place: &Place, args: Args) -> anyhow::Result<()> {
    let pods: Api<Pod> = Api::namespaced(place.client.clone(), &place.namespace);
    let pod = json!({
        "metadata": { "name": POD },
        "spec": {
            "nodeSelector": { "kubernetes.io/hostname": args.node },
            "tolerations": [{ "operator": "Exists" }],
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "c", "image": args.image, "imagePullPolicy": "IfNotPresent", "command": ["perl", "-e", SERVER],
            }],
        },
    });
    pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await?;
    let running = tokio::time::timeout(PATIENCE, await_condition(pods.clone(), POD, conditions::is_pod_running()));
    let pod = running.await.context("the Pod does not run")??.context("the Pod is gone")?;
    let status = pod.status.context("it has a status")?;
    let id = status.container_statuses.iter().flatten().find_map(|c| c.container_id.clone());
    let id = id.context("the container has an id")?.strip_prefix("docker://").map(str::to_owned);
    let target = SocketAddr::new(status.pod_ip.context("the Pod has an address")?.parse()?, 8080);
    let client = Client::new(args.api, args.certificate.as_deref().zip(args.key.as_deref()))?;
    let bench = Bench { client, place: format!("{}/{POD}", place.namespace), id, target, args };
    println!("| | lambdalet | beside it | ratio | wanted |\n|---|---|---|---|---|");
    bench.latency().await?;
    bench.exec_throughput().await?;
    bench.port_throughput().await?;
    bench.followers().await?;
    if bench.id.is_none() {
        return Ok(());
    }
    println!(
        "\nBeside it: `docker exec` (the program, as people run it) for exec, for port-forward a process that only ends \
         TLS and copies.\nAn upgraded connection cannot be used again, so each exec over WebSocket is a connection of its \
         own (TLS resumed); /run is the kubelet API's way to run a command over one that is kept.\nA WebSocket's client \
         must mask what it sends, which the bare relay's need not."
    );
    Ok(())
}

struct Bench {
    client: Client,
    /// Namespace and Pod, as paths have them.
    place: String,
    /// The container, to Docker; `None` on a node with another runtime, where there is nothing to run beside it.
    id: Option<String>,
    target: SocketAddr,
    args: Args,
}

/// Milliseconds of what is done.
async fn timed(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<f64> {
    let begun = Instant::now();
    work.await?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// One line of the table: medians of `ours` and `theirs`, in the same unit.
fn row(what: &str, ours: f64, theirs: Option<f64>, (unit, wanted): (&str, &str)) {
    let (theirs, ratio) = match theirs {
        Some(theirs) => (format!("{theirs:.1} {unit}"), format!("{:.2}", ours / theirs)),
        None => ("-".to_owned(), "-".to_owned()),
    };
    println!("| {what} | {ours:.1} {unit} | {theirs} | {ratio} | {wanted} |");
}

// === exec ===

impl Bench {
    async fn latency(&self) -> anyhow::Result<()> {
        let docker = Docker::connect_with_unix_defaults()?.negotiate_version().await?;
        let mut kept = self.client.plain().await?;
        let mut times: [Vec<f64>; 4] = Default::default();
        // The first of each pays for caches.
        for number in 0..=self.args.commands {
            let mut round = vec![
                timed(async { self.exec(&["true"], None).await.map(drop) }).await?,
                timed(self.run(&mut kept)).await?,
            ];
            if let Some(id) = &self.id {
                round.push(timed(async { docker_exec(id, &["true"], None).await.map(drop) }).await?);
                round.push(timed(docker_true(&docker, id)).await?);
            }
            if number > 0 {
                times.iter_mut().zip(round).for_each(|(times, time)| times.push(time));
            }
        }
        let beside = |times: Vec<f64>| (!times.is_empty()).then(|| median(times));
        let [socket, run, program, api] = times;
        let (socket, run, program, api) = (median(socket), median(run), beside(program), beside(api));
        row("exec `true`, p50, a WebSocket each", socket, program, ("ms", "<= 1.3"));
        row("run `true`, p50, one kept connection", run, program, ("ms", "<= 1.3"));
        row("the same beside Docker's API instead of its program", run, api, ("ms", ""));
        Ok(())
    }

    /// Runs a command; what it is given and what comes back, in bytes.
    async fn exec(&self, command: &[&str], input: Option<u64>) -> anyhow::Result<u64> {
        let words: String = command.iter().map(|word| format!("&command={}", query_value(word))).collect();
        let stdin = if input.is_some() { "&input=1" } else { "" };
        let path = format!("/exec/{}/c?output=1{stdin}{words}", self.place);
        self.client.websocket(&path, EXEC_PROTOCOL).await?.exchange(input).await
    }

    async fn run(&self, kept: &mut Kept) -> anyhow::Result<()> {
        kept.send("POST", &format!("/run/{}/c?cmd=true", self.place)).await?.collect().await?;
        Ok(())
    }

    async fn exec_throughput(&self) -> anyhow::Result<()> {
        let bytes = self.args.mib << 20;
        let count = bytes.to_string();
        let ways: [(&str, &[&str], Option<u64>, u64); 3] = [
            ("exec, out of the container", &["head", "-c", &count, "/dev/zero"], None, bytes),
            ("exec, into it", &["sh", "-c", "exec cat >/dev/null"], Some(bytes), 0),
            ("exec, both ways at once", &["cat"], Some(bytes), bytes),
        ];
        for (what, command, input, expected) in ways {
            let measured = async {
                let (mut ours, mut theirs) = (Vec::new(), Vec::new());
                for _ in 0..self.args.rounds {
                    ours.push(timed(async { same(self.exec(command, input).await?, expected) }).await?);
                    if let Some(id) = &self.id {
                        theirs.push(timed(async { same(docker_exec(id, command, input).await?, expected) }).await?);
                    }
                }
                anyhow::Ok((ours, theirs))
            };
            let rate = |times| bytes as f64 / 1e3 / median(times);
            match measured.await {
                Ok((ours, theirs)) => {
                    row(what, rate(ours), self.id.is_some().then(|| rate(theirs)), ("MB/s", ">= 0.8"))
                }
                // That another node agent cannot do it belongs into its column.
                Err(error) if self.id.is_none() => println!("| {what} | fails: {error:#} | - | - | >= 0.8 |"),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn same(seen: u64, expected: u64) -> anyhow::Result<()> {
    ensure!(seen == expected, "{seen} of {expected} bytes came");
    Ok(())
}

/// The same as [`Bench::exec`] by the program `docker`.
async fn docker_exec(id: &str, command: &[&str], input: Option<u64>) -> anyhow::Result<u64> {
    let mut docker = Command::new("docker");
    docker.arg("exec").args(input.map(|_| "-i")).arg(id).args(command);
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    docker.stdin(stdin).stdout(Stdio::piped());
    tokio::task::spawn_blocking(move || exchange(docker, input.unwrap_or_default())).await?
}

/// Gives a program so many zeros and reads what it writes to the end.
fn exchange(mut command: Command, bytes: u64) -> anyhow::Result<u64> {
    let mut child = command.spawn().context("failed to start docker")?;
    let writer = child.stdin.take().map(|mut stdin| {
        std::thread::spawn(move || {
            let (zeros, mut left) = (vec![0; PIECE], bytes);
            while left > 0 {
                let length = left.min(PIECE as u64);
                stdin.write_all(&zeros[..length as usize])?;
                left -= length;
            }
            std::io::Result::Ok(())
        })
    });
    let (mut seen, mut buffer) = (0, vec![0; 2 * PIECE]);
    let mut stdout = child.stdout.take().context("it has an output")?;
    loop {
        match stdout.read(&mut buffer)? {
            0 => break,
            read => seen += read as u64,
        }
    }
    if let Some(writer) = writer {
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    }
    let status = child.wait()?;
    ensure!(status.success(), "docker exec: {status}");
    Ok(seen)
}

/// `true` by Docker's API, as its program does it: create, start, read to the end, look at the code.
async fn docker_true(docker: &Docker, id: &str) -> anyhow::Result<()> {
    let options =
        CreateExecOptions { cmd: Some(vec!["true"]), attach_stdout: Some(true), ..CreateExecOptions::default() };
    let exec = docker.create_exec(id, options).await?.id;
    if let StartExecResults::Attached { mut output, .. } = docker.start_exec(&exec, None).await? {
        while output.next().await.is_some() {}
    }
    ensure!(docker.inspect_exec(&exec).await?.exit_code == Some(0), "true failed");
    Ok(())
}

// === port-forward ===

/// What the server in the container is asked for.
fn head(way: u8, bytes: u64) -> Vec<u8> {
    [&[way][..], &bytes.to_le_bytes()].concat()
}

impl Bench {
    async fn port_throughput(&self) -> anyhow::Result<()> {
        let (_relay, address) = start_relay(self.target)?;
        let relay = Client::new(address, None)?;
        let bytes = self.args.mib << 20;
        for (what, way) in [("out of the container", b's'), ("into it", b'r')] {
            let mut times: [Vec<f64>; 3] = Default::default();
            for _ in 0..self.args.rounds {
                times[0].push(timed(self.over_spdy(way, bytes)).await?);
                times[1].push(timed(self.over_websocket(way, bytes)).await?);
                times[2].push(timed(relayed(&relay, way, bytes)).await?);
            }
            let [spdy, websocket, bare] = times.map(|times| bytes as f64 / 1e3 / median(times));
            row(&format!("port-forward over SPDY, {what}"), spdy, Some(bare), ("MB/s", ">= 0.8"));
            row(&format!("port-forward over WebSocket, {what}"), websocket, Some(bare), ("MB/s", ""));
        }
        Ok(())
    }

    async fn over_spdy(&self, way: u8, bytes: u64) -> anyhow::Result<()> {
        let mut port = Forwarded::open(&self.client, &self.place, 8080).await?;
        port.send(&head(way, bytes)).await?;
        if way == b's' {
            return port.receive(bytes).await;
        }
        port.send_zeros(bytes).await?;
        port.receive(1).await
    }

    async fn over_websocket(&self, way: u8, bytes: u64) -> anyhow::Result<()> {
        let path = format!("/portForward/{}?port=8080", self.place);
        let mut socket = self.client.websocket(&path, PORT_PROTOCOL).await?;
        // Each channel begins with the port.
        ensure!(socket.next_of(0).await?[..] == 8080_u16.to_le_bytes(), "another port");
        socket.send(0, &head(way, bytes)).await?;
        if way == b'r' {
            send_zeros(&mut socket.sink, 0, bytes).await?;
        }
        let (mut seen, expected) = (0, if way == b's' { bytes } else { 1 });
        while seen < expected {
            seen += socket.next_of(0).await?.len() as u64;
        }
        same(seen, expected)
    }
}

async fn relayed(relay: &Client, way: u8, bytes: u64) -> anyhow::Result<()> {
    let mut stream = relay.connect().await?;
    stream.write_all(&head(way, bytes)).await?;
    if way == b'r' {
        let (zeros, mut left) = (vec![0; PIECE], bytes);
        while left > 0 {
            let length = left.min(PIECE as u64);
            stream.write_all(&zeros[..length as usize]).await?;
            left -= length;
        }
    }
    stream.flush().await?;
    let (mut seen, expected, mut buffer) = (0, if way == b's' { bytes } else { 1 }, vec![0; PIECE]);
    while seen < expected {
        let read = stream.read(&mut buffer).await?;
        ensure!(read > 0, "the relay ended after {seen} bytes");
        seen += read as u64;
    }
    same(seen, expected)
}

/// A process of ours, killed on drop.
struct Relay(Child);

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_relay(target: SocketAddr) -> anyhow::Result<(Relay, SocketAddr)> {
    let mut command = Command::new(std::env::current_exe()?);
    let mut child = command.args(["--relay-to", &target.to_string()]).stdout(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().context("it has an output")?;
    let relay = Relay(child);
    let mut line = String::new();
    std::io::BufReader::new(stdout).read_line(&mut line)?;
    Ok((relay, line.trim().parse().with_context(|| format!("the relay said {line:?}"))?))
}

async fn relay(target: SocketAddr) -> anyhow::Result<()> {
    let key = rcgen::generate_simple_self_signed(["relay".to_owned()])?;
    let private = rustls_pki_types::PrivateKeyDer::Pkcs8(key.signing_key.serialize_der().into());
    let config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![key.cert.der().clone()], private)?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    loop {
        let (tcp, _) = listener.accept().await?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            tcp.set_nodelay(true)?;
            let mut near = acceptor.accept(BufReader::with_capacity(16 << 10, tcp)).await?;
            let mut far = TcpStream::connect(target).await?;
            far.set_nodelay(true)?;
            copy_bidirectional_with_sizes(&mut near, &mut far, PIECE, PIECE).await
        });
    }
}

// === logs ===

impl Bench {
    async fn followers(&self) -> anyhow::Result<()> {
        if self.args.pid == 0 {
            return Ok(());
        }
        // The first one pays for what is made once.
        drop(self.follow().await?);
        let before = at_rest(self.args.pid).await?;
        let many = (0..self.args.followers).map(|_| self.follow());
        let mut following = try_join_all(many).await?;
        let lines = following.iter_mut().map(|(_, log)| async move {
            for _ in 0..5 {
                log.frame().await.context("the log ended")??;
            }
            anyhow::Ok(())
        });
        try_join_all(lines).await?;
        let after = at_rest(self.args.pid).await?;
        let (growth, each) = (after - before, (after - before) * 1024.0 / self.args.followers as f64);
        println!(
            "| {} x logs -f, growth of the node's RSS | {growth:.1} MiB | {before:.1} MiB before | {each:.0} KiB each | \
             <= 20 MB |",
            self.args.followers
        );
        Ok(())
    }

    async fn follow(&self) -> anyhow::Result<(Kept, Incoming)> {
        let mut connection = self.client.plain().await?;
        let log = connection.send("GET", &format!("/containerLogs/{}/c?follow=true", self.place)).await?;
        Ok((connection, log))
    }
}

/// MiB of memory that the process has at rest: the least of a while that is longer than the node's time between two looks
/// at what code it need not keep, which by chance comes just before a measurement or just after.
async fn at_rest(pid: u32) -> anyhow::Result<f64> {
    let (mut least, mut seconds) = (u64::MAX, tokio::time::interval(Duration::from_secs(1)));
    for _ in 0..40 {
        seconds.tick().await;
        least = least.min(resident_kib(pid)?);
    }
    Ok(least as f64 / 1024.0)
}
