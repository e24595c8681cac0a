//! Measures servers of CRI v1 beside each other, by nothing but CRI: how long a sandbox with a container takes, lists with
//! many containers, a command, and how soon the end of a container is told.
//!
//! `hack/bench/cri` starts the servers. Each `--server` is NAME=SOCKET=IMAGE; the image has a shell.
#![allow(clippy::disallowed_methods, reason = "a benchmark's tasks end with it")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use clap::Parser;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use hyper_util::rt::TokioIo;
use lambdalet_proto::cri::v1;
use lambdalet_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tokio::time::error::Elapsed;
use tokio::time::{sleep, timeout};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

/// Longer than anything here takes that goes well.
const PATIENCE: Duration = Duration::from_secs(120);
/// The label of what is made here.
const MINE: &str = "lambdalet.dev/bench";
/// Instead of a figure of a call that a server does not know, and of what was never measured.
const NOT_SERVED: &str = "not served";
const NONE: &str = "none";
/// What a container does that is there to be there. It ends when it is told to, so that a removal does not wait.
const SLEEPS: &str = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done";
/// A list of statistics that takes longer is given up.
const LONG: Duration = Duration::from_secs(30);
/// Sandboxes that are made and removed at once where that is not what is measured.
const AT_ONCE: usize = 4;
/// What hundreds of starts and removals leave an engine to do is part of no figure but theirs.
const REST: Duration = Duration::from_secs(10);

#[derive(Parser)]
struct Args {
    /// A server: its name, its socket and the image it has
    #[arg(long = "server", value_name = "NAME=SOCKET=IMAGE", required = true)]
    servers: Vec<Server>,
    /// How many are started at once, one round after the other
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10, 50])]
    bursts: Vec<usize>,
    /// How often one is started alone
    #[arg(long, default_value_t = 15)]
    single: usize,
    /// Containers that lists are of
    #[arg(long, default_value_t = 200)]
    containers: usize,
    /// Lists, commands and ends that are measured; 0 leaves them out, as where somebody else listens to a containerd's events:
    /// a second listener may wait for ever
    #[arg(long, default_value_t = 30)]
    rounds: usize,
}

#[derive(Clone)]
struct Server {
    name: String,
    socket: PathBuf,
    image: String,
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.splitn(3, '=').collect();
        let [name, socket, image] = parts[..] else { return Err("a server is NAME=SOCKET=IMAGE".to_owned()) };
        Ok(Self { name: name.to_owned(), socket: socket.into(), image: image.to_owned() })
    }
}

/// What was measured, by what it is.
type Figures = Vec<(String, Figure)>;

/// Milliseconds, or why there are none.
type Figure = Result<f64, &'static str>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let logs = tempfile::tempdir()?;
    let mut columns = Vec::new();
    for server in &args.servers {
        let bench = Bench::connect(server, logs.path()).await?;
        bench.clean().await?;
        let measured = bench.measure(&args).await;
        bench.clean().await?;
        columns.push(measured.with_context(|| format!("failed to measure {}", server.name))?);
    }
    print(&args.servers, &columns);
    Ok(())
}

fn print(servers: &[Server], columns: &[Figures]) {
    let names: Vec<_> = servers.iter().map(|server| server.name.as_str()).collect();
    println!("| | {} |", names.join(" | "));
    println!("|---|{}", "---|".repeat(names.len()));
    for (row, (what, _)) in columns[0].iter().enumerate() {
        let cell = |figure: Figure| figure.map_or_else(str::to_owned, |figure| format!("{figure:.1} ms"));
        let cells: Vec<_> = columns.iter().map(|column| cell(column[row].1)).collect();
        println!("| {what} | {} |", cells.join(" | "));
    }
}

/// A client of one server.
#[derive(Clone)]
struct Bench {
    client: RuntimeServiceClient<Channel>,
    image: String,
    logs: PathBuf,
}

impl Bench {
    async fn connect(server: &Server, logs: &Path) -> anyhow::Result<Self> {
        let socket = server.socket.clone();
        let dial = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost").connect_with_connector(dial).await;
        let channel = channel.with_context(|| format!("failed to connect to {}", server.socket.display()))?;
        let client = RuntimeServiceClient::new(channel).max_decoding_message_size(16 << 20);
        Ok(Self { client, image: server.image.clone(), logs: logs.to_owned() })
    }

    async fn measure(&self, args: &Args) -> anyhow::Result<Figures> {
        let mut figures = Vec::new();
        for &burst in &args.bursts {
            let rounds = if burst == 1 { args.single } else { 1 };
            let (mut each, mut walls) = (Vec::new(), Vec::new());
            for round in 0..rounds {
                let begun = Instant::now();
                let pods = (0..burst).map(|number| self.clone().pod(format!("b{burst}-{round}-{number}"), SLEEPS));
                each.extend(futures::future::try_join_all(pods).await?.into_iter().map(|(_, took)| took));
                walls.push(begun.elapsed());
                self.clean().await?;
            }
            figures.push((format!("sandbox, container and start, {burst} at once, p50"), median(each)));
            if burst > 1 {
                figures.push((format!("{burst} at once, all started"), median(walls)));
            }
        }
        if args.rounds == 0 {
            return Ok(figures);
        }
        let pods = stream::iter(0..args.containers).map(|number| self.clone().pod(format!("l{number}"), SLEEPS));
        let (first, _) = pods.buffer_unordered(AT_ONCE).try_collect::<Vec<_>>().await?.swap_remove(0);
        sleep(REST).await;
        self.lists(args, &mut figures).await?;
        figures.push(("ExecSync of `true`, p50".to_owned(), self.execs(&first, args.rounds).await?));
        self.clean().await?;
        sleep(REST).await;
        let (median, longest) = self.ends(args.rounds).await?;
        figures.push(("event of an end, p50".to_owned(), median));
        figures.push(("event of an end, max".to_owned(), longest));
        Ok(figures)
    }

    /// A sandbox and a container that runs a script in it: its id, and how long the three calls took.
    async fn pod(mut self, name: String, script: &str) -> anyhow::Result<(String, Duration)> {
        let labels = HashMap::from([(MINE.to_owned(), "1".to_owned())]);
        let metadata = v1::PodSandboxMetadata {
            name: name.clone(),
            uid: format!("bench-{name}"),
            namespace: "bench".into(),
            attempt: 0,
        };
        let config = v1::PodSandboxConfig {
            metadata: Some(metadata),
            labels: labels.clone(),
            // Of a documentation range: what a containerd that is set up for a node's driver wants to see. Nothing is
            // plugged in then.
            annotations: HashMap::from([("lambdalet.dev/address".to_owned(), "192.0.2.1".to_owned())]),
            log_directory: self.logs.display().to_string(),
            // A kubelet always says this much; cri-dockerd goes by it.
            linux: Some(v1::LinuxPodSandboxConfig {
                security_context: Some(v1::LinuxSandboxSecurityContext::default()),
                ..Default::default()
            }),
            ..Default::default()
        };
        let container = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "main".into(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: self.image.clone(), ..Default::default() }),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            log_path: format!("{name}.log"),
            labels,
            ..Default::default()
        };
        let begun = Instant::now();
        let request = v1::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let pod_sandbox_id = self.client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        let request =
            v1::CreateContainerRequest { pod_sandbox_id, config: Some(container), sandbox_config: Some(config) };
        let id = self.client.create_container(request).await?.into_inner().container_id;
        self.client.start_container(v1::StartContainerRequest { container_id: id.clone() }).await?;
        Ok((id, begun.elapsed()))
    }

    async fn lists(&self, args: &Args, figures: &mut Figures) -> anyhow::Result<()> {
        let mut client = self.client.clone();
        let (mut containers, mut sandboxes) = (Vec::new(), Vec::new());
        let (mut stats, mut sandbox_stats) = (Lists::default(), Lists::default());
        let until = Instant::now() + LONG;
        for _ in 0..args.rounds {
            let begun = Instant::now();
            let found = client.list_containers(v1::ListContainersRequest::default()).await?.into_inner().containers;
            containers.push(begun.elapsed());
            ensure!(found.len() >= args.containers, "{} containers are listed", found.len());
            let begun = Instant::now();
            let found = client.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await?.into_inner().items;
            sandboxes.push(begun.elapsed());
            ensure!(found.len() >= args.containers, "{} sandboxes are listed", found.len());
            let begun = Instant::now();
            let asked = timeout(LONG, client.list_container_stats(v1::ListContainerStatsRequest::default())).await;
            stats.note(begun, args.containers, asked.map(|asked| asked.map(|found| found.into_inner().stats.len())));
            let begun = Instant::now();
            let asked = timeout(LONG, client.list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest::default())).await;
            sandbox_stats.note(
                begun,
                args.containers,
                asked.map(|asked| asked.map(|found| found.into_inner().stats.len())),
            );
            if Instant::now() > until {
                break;
            }
        }
        let of = format!("of {}, p50", args.containers);
        figures.push((format!("ListContainers {of}"), median(containers)));
        figures.push((format!("ListPodSandbox {of}"), median(sandboxes)));
        figures.push((format!("ListContainerStats {of}"), stats.figure()));
        figures.push((format!("ListPodSandboxStats {of}"), sandbox_stats.figure()));
        Ok(())
    }

    async fn execs(&self, id: &str, rounds: usize) -> anyhow::Result<Figure> {
        let (mut client, mut times) = (self.client.clone(), Vec::new());
        for _ in 0..rounds {
            let begun = Instant::now();
            let request =
                v1::ExecSyncRequest { container_id: id.to_owned(), cmd: vec!["true".to_owned()], timeout: 20 };
            let done = client.exec_sync(request).await?.into_inner();
            times.push(begun.elapsed());
            ensure!(done.exit_code == 0, "the command failed: {done:?}");
        }
        Ok(median(times))
    }

    /// From the end of a container, as its status has it, until its event is there: the median and the longest.
    async fn ends(&self, rounds: usize) -> anyhow::Result<(Figure, Figure)> {
        let mut client = self.client.clone();
        let asked = client.get_container_events(v1::GetEventsRequest {}).await;
        let mut events = match asked {
            Err(status) if status.code() == Code::Unimplemented => return Ok((Err(NOT_SERVED), Err(NOT_SERVED))),
            events => events?.into_inner(),
        };
        let mut times = Vec::new();
        for round in 0..rounds {
            let (id, _) = self.clone().pod(format!("e{round}"), "sleep 0.2").await?;
            let told = async {
                while let Some(event) = events.message().await? {
                    let kind = event.container_event_type();
                    if event.container_id == id && kind == v1::ContainerEventType::ContainerStoppedEvent {
                        return Ok(SystemTime::now().duration_since(UNIX_EPOCH)?);
                    }
                }
                anyhow::bail!("the events have ended")
            };
            let at = timeout(PATIENCE, told).await.context("no event came")??;
            let request = v1::ContainerStatusRequest { container_id: id, verbose: false };
            let status = client.container_status(request).await?.into_inner().status.context("no status")?;
            let ended = Duration::from_nanos(u64::try_from(status.finished_at)?);
            times.push(at.saturating_sub(ended));
        }
        self.clean().await?;
        let longest = times.iter().max().map_or(Err(NONE), |time| Ok(time.as_secs_f64() * 1e3));
        Ok((median(times), longest))
    }

    /// Removes all that was made here.
    async fn clean(&self) -> anyhow::Result<()> {
        let label_selector = HashMap::from([(MINE.to_owned(), "1".to_owned())]);
        let filter = Some(v1::PodSandboxFilter { label_selector, ..Default::default() });
        let mut client = self.client.clone();
        let found = client.list_pod_sandbox(v1::ListPodSandboxRequest { filter }).await?.into_inner().items;
        let removals = stream::iter(found).map(|v1::PodSandbox { id, .. }| {
            let mut client = self.client.clone();
            async move {
                client.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: id.clone() }).await?;
                client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id }).await.map(|_| ())
            }
        });
        Ok(removals.buffer_unordered(AT_ONCE).try_collect().await?)
    }
}

/// Lists of one kind, of which a server may give none.
#[derive(Default)]
struct Lists {
    times: Vec<Duration>,
    failed: Option<&'static str>,
}

impl Lists {
    fn note(&mut self, begun: Instant, wanted: usize, listed: Result<Result<usize, tonic::Status>, Elapsed>) {
        self.times.push(begun.elapsed());
        let failed = match listed {
            Ok(Ok(listed)) if listed >= wanted => return,
            Ok(Ok(_)) => "lists fewer",
            Err(_) => "more than 30 s",
            Ok(Err(status)) if status.code() == Code::Unimplemented => NOT_SERVED,
            Ok(Err(status)) => {
                if self.failed.is_none() {
                    eprintln!("a list failed: {}", status.message());
                }
                "fails"
            }
        };
        self.failed.get_or_insert(failed);
    }

    fn figure(self) -> Figure {
        self.failed.map_or_else(|| median(self.times), Err)
    }
}

/// The median in milliseconds.
fn median(mut times: Vec<Duration>) -> Figure {
    times.sort();
    times.get(times.len() / 2).map_or(Err(NONE), |time| Ok(time.as_secs_f64() * 1e3))
}
