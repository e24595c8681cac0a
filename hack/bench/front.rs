//! Measures what the front of a function costs: the same trivial HTTP function is called directly, through a bare hyper
//! reverse proxy that only forwards, and through the front. Function, proxies and load are processes of their own.
//!
//! `cargo run --release --example bench-front` takes half a minute and prints a table; `--soak N` makes N calls through
//! the front instead, each to a path of its own, and says how its memory grew.
#![allow(clippy::disallowed_methods, reason = "a benchmark's tasks end with it")]

#[path = "resident.rs"]
mod resident;

use std::convert::Infallible;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use clap::{Parser, ValueEnum};
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{client, server};
use hyper_util::rt::TokioIo;
use lambdalet::function::front;
use lambdalet::metrics::Metrics;
use resident::resident_kib;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What the function answers.
const ANSWER: &[u8] = b"hello from a function";
const REQUEST: &[u8] = b"POST /call HTTP/1.1\r\nHost: function\r\nContent-Length: 14\r\n\r\n{\"key\":\"word\"}";

#[derive(Parser)]
struct Args {
    /// Clients at once for the throughput rows
    #[arg(long, default_value_t = 8)]
    clients: usize,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 1.5)]
    seconds: f64,
    /// Times each is measured, in turn; the median counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Make this many calls through the front and print its memory
    #[arg(long)]
    soak: Option<u64>,
    /// What this process is; the benchmark starts itself
    #[arg(long, hide = true)]
    role: Option<Role>,
    #[arg(long, hide = true)]
    target: Option<SocketAddr>,
    #[arg(long, hide = true)]
    calls: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Role {
    Function,
    Bare,
    Front,
    Load,
}

/// Of one measurement.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Figures {
    calls_per_second: f64,
    p50_us: f64,
    p99_us: f64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    match args.role {
        None => measure(&args),
        Some(Role::Load) => load(&args),
        Some(role) => {
            let mut runtime = tokio::runtime::Builder::new_multi_thread();
            if role == Role::Front {
                runtime.worker_threads(lambdalet::args::worker_threads());
            }
            runtime.enable_all().build()?.block_on(serve(role, &args))
        }
    }
}

// === The parent ===

/// A process of ours, killed on drop.
struct Server(Child, SocketAddr);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(role: Role, args: &Args, target: Option<SocketAddr>) -> anyhow::Result<Server> {
    let mut command = itself(role, args.clients)?;
    if let Some(target) = target {
        command.arg("--target").arg(target.to_string());
    }
    let mut child = command.stdout(Stdio::piped()).spawn().context("failed to start itself")?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("it has an output")?).read_line(&mut line)?;
    let address = line.trim().parse().with_context(|| format!("{role:?} said no address but {line:?}"))?;
    Ok(Server(child, address))
}

fn itself(role: Role, clients: usize) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    let role = role.to_possible_value().context("a role has a name")?;
    command.args(["--role", role.get_name(), "--clients", &clients.to_string()]);
    Ok(command)
}

fn measure(args: &Args) -> anyhow::Result<()> {
    let function = start(Role::Function, args, None)?;
    let bare = start(Role::Bare, args, Some(function.1))?;
    let front = start(Role::Front, args, Some(function.1))?;
    if let Some(calls) = args.soak {
        return soak(args, &front, calls);
    }
    let ways = [("direct", function.1), ("bare hyper proxy", bare.1), ("front", front.1)];
    for clients in [1, args.clients] {
        let mut rows: [Vec<Figures>; 3] = Default::default();
        for _ in 0..args.rounds {
            for (row, (_, address)) in rows.iter_mut().zip(&ways) {
                row.push(run(args, *address, clients, None)?);
            }
        }
        let medians = rows.map(median);
        println!("{clients} client{} at once", if clients == 1 { "" } else { "s" });
        println!("  {:<18}{:>10}{:>10}{:>10}{:>10}", "", "calls/s", "p50 us", "p99 us", "x bare");
        for ((name, _), figures) in ways.iter().zip(&medians) {
            let ratio = figures.calls_per_second / medians[1].calls_per_second;
            let Figures { calls_per_second, p50_us, p99_us } = figures;
            println!("  {name:<18}{calls_per_second:>10.0}{p50_us:>10.1}{p99_us:>10.1}{ratio:>10.2}");
        }
        let added = |of: fn(&Figures) -> f64| (of(&medians[2]) - of(&medians[0])) / 1000.0;
        let over_direct = medians[2].calls_per_second / medians[0].calls_per_second;
        println!(
            "  the front adds {:.3} ms p50, {:.3} ms p99; {over_direct:.2} x direct",
            added(|figures| figures.p50_us),
            added(|figures| figures.p99_us)
        );
    }
    Ok(())
}

fn soak(args: &Args, front: &Server, calls: u64) -> anyhow::Result<()> {
    let part = (calls / 10).max(1);
    run(args, front.1, args.clients, Some(part.min(100_000)))?;
    println!("{:>12}{:>12}", "calls", "RSS KiB");
    println!("{:>12}{:>12}", 0, resident_kib(front.0.id())?);
    for step in 1..=10 {
        run(args, front.1, args.clients, Some(part))?;
        println!("{:>12}{:>12}", step * part, resident_kib(front.0.id())?);
    }
    Ok(())
}

fn run(args: &Args, target: SocketAddr, clients: usize, calls: Option<u64>) -> anyhow::Result<Figures> {
    let mut command = itself(Role::Load, clients)?;
    command.args(["--target", &target.to_string(), "--seconds", &args.seconds.to_string()]);
    if let Some(calls) = calls {
        command.args(["--calls", &calls.to_string()]);
    }
    let output = command.stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the load failed: {}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn median(mut figures: Vec<Figures>) -> Figures {
    let mut of = |value: fn(&Figures) -> f64| {
        figures.sort_by(|a, b| value(a).total_cmp(&value(b)));
        value(&figures[figures.len() / 2])
    };
    Figures {
        calls_per_second: of(|figures| figures.calls_per_second),
        p50_us: of(|figures| figures.p50_us),
        p99_us: of(|figures| figures.p99_us),
    }
}

// === The load ===

fn load(args: &Args) -> anyhow::Result<()> {
    let target = args.target.context("a load has a target")?;
    let each = args.calls.map(|calls| calls / args.clients as u64);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let figures = runtime.block_on(async {
        if each.is_none() {
            // Connections, caches and branch predictors get warm.
            calls(target, args.clients, (Duration::from_secs_f64(args.seconds / 5.0), None)).await?;
        }
        calls(target, args.clients, (Duration::from_secs_f64(args.seconds), each)).await
    })?;
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

async fn calls(target: SocketAddr, clients: usize, (time, each): (Duration, Option<u64>)) -> anyhow::Result<Figures> {
    let began = Instant::now();
    let until = move |made: u64| each.map_or_else(|| began.elapsed() < time, |each| made < each);
    let clients: Vec<_> = (0..clients).map(|_| tokio::spawn(client(target, each.is_some(), until))).collect();
    let mut times = Vec::new();
    for client in clients {
        times.extend(client.await??);
    }
    let took = began.elapsed().as_secs_f64();
    times.sort_unstable();
    ensure!(!times.is_empty(), "no call was made");
    let at = |share: f64| f64::from(times[((times.len() - 1) as f64 * share) as usize]) / 1000.0;
    Ok(Figures { calls_per_second: times.len() as f64 / took, p50_us: at(0.5), p99_us: at(0.99) })
}

/// Nanoseconds of each call, of the first million.
async fn client(target: SocketAddr, soak: bool, go_on: impl Fn(u64) -> bool) -> anyhow::Result<Vec<u32>> {
    let mut stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    let (mut times, mut made, mut buffer) = (Vec::with_capacity(1 << 20), 0, Vec::with_capacity(4096));
    while go_on(made) {
        let other = soak.then(|| format!("GET /{:x}/{made} HTTP/1.1\r\nHost: function\r\n\r\n", rand::random::<u64>()));
        let began = Instant::now();
        stream.write_all(other.as_ref().map_or(REQUEST, String::as_bytes)).await?;
        buffer.clear();
        while !buffer.ends_with(ANSWER) {
            ensure!(stream.read_buf(&mut buffer).await? > 0, "the connection ended");
        }
        ensure!(buffer.starts_with(b"HTTP/1.1 200"), "the call failed");
        made += 1;
        if times.len() < times.capacity() {
            times.push(u32::try_from(began.elapsed().as_nanos()).unwrap_or(u32::MAX));
        }
    }
    Ok(times)
}

// === The servers ===

async fn serve(role: Role, args: &Args) -> anyhow::Result<()> {
    if role == Role::Front {
        return serve_front(args).await;
    }
    let target = args.target;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            match target {
                None => function(stream).await,
                Some(target) => bare(stream, target).await,
            }
        });
    }
}

async fn function(stream: TcpStream) -> anyhow::Result<()> {
    let service = service_fn(|_: Request<Incoming>| async {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(ANSWER))))
    });
    Ok(server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await?)
}

/// One connection there for each that comes; nothing is looked at.
async fn bare(stream: TcpStream, target: SocketAddr) -> anyhow::Result<()> {
    let there = TcpStream::connect(target).await?;
    there.set_nodelay(true)?;
    let (sender, connection) = client::conn::http1::handshake(TokioIo::new(there)).await?;
    tokio::spawn(connection);
    let sender = Arc::new(tokio::sync::Mutex::new(sender));
    let service = service_fn(move |request: Request<Incoming>| {
        let sender = sender.clone();
        async move {
            let mut sender = sender.lock().await;
            sender.ready().await?;
            sender.send_request(request).await
        }
    });
    Ok(server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await?)
}

/// Environments in a list.
#[derive(Default)]
struct Pool {
    idle: Mutex<Vec<Arc<front::Environment>>>,
    free: Notify,
}

struct Handle(Arc<Pool>);

impl front::Leases for Handle {
    async fn lease(&self) -> Result<front::Lease, front::TryAgain> {
        loop {
            let environment = self.0.idle.lock().ok().and_then(|mut idle| idle.pop());
            if let Some(environment) = environment {
                let (pool, back) = (self.0.clone(), environment.clone());
                return Ok(front::Lease::new(environment, move |_| pool.add(back)));
            }
            self.0.free.notified().await;
        }
    }
}

impl Pool {
    fn add(&self, environment: Arc<front::Environment>) {
        if let Ok(mut idle) = self.idle.lock() {
            idle.push(environment);
        }
        self.free.notify_one();
    }
}

async fn serve_front(args: &Args) -> anyhow::Result<()> {
    let target = args.target.context("a front has a target")?;
    let pool = Arc::new(Pool::default());
    for _ in 0..args.clients {
        pool.add(front::Environment::new(target));
    }
    let listeners = front::listen_in(None, vec![([127, 0, 0, 1], 0).into()]).await?;
    println!("{}", listeners[0].local_addr()?);
    let meters = front::Meters::new(&Metrics::new());
    let labels = front::FunctionLabels { namespace: "default".into(), pod: "bench".into(), uid: "1".into() };
    let node = front::NodeConnections::new(1024);
    let front = front::Front::new(Arc::new(Handle(pool)), front::Limits::default(), node, &meters, labels);
    let (_drain, drained) = watch::channel(None);
    front.run(listeners, drained).await?;
    Ok(())
}
