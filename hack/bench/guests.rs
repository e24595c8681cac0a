//! What a Pod of one container costs in a microVM: until it runs, in memory, and for each call of the function in it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use lambdalet::function::front;
use lambdalet::metrics::Metrics;
use lambdalet::runtime::microvm::MicrovmRuntime;
use lambdalet::runtime::microvm::agent::Agent;
use lambdalet::runtime::microvm::machine::directory::DEFAULT_NAMESPACE;
use lambdalet::runtime::microvm::machine::{MachineManager as _, VmDirs};
use lambdalet::runtime::types::{ContainerConfig, ContainerState, ImageId, SandboxId};
use lambdalet::runtime::{ImageStore as _, SandboxRuntime as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::{Bench, PATIENCE, address, median, qemu, row, size_row};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: function\r\n\r\n";
const ANSWER: &[u8] = b"\r\n\r\nok";
/// What a guest may take of its memory besides its containers, and what the front may add to a call.
const GUEST_MB: u64 = 40;
const FRONT: Duration = Duration::from_micros(300);

impl Bench<'_> {
    /// Ends the driver: a guest talks to one at a time.
    pub(super) async fn pods(&self, driver: MicrovmRuntime) -> anyhow::Result<()> {
        let image = driver.pull_image(&format!("{}/team/app:1", self.registry.host), &[]).await?;
        let mut times = Vec::new();
        for round in 0..=self.args.restored {
            let begun = Instant::now();
            let id = self.pod(&driver, &image).await?;
            let took = begun.elapsed();
            driver.remove_pod_sandbox(&id).await?;
            if round > 0 {
                times.push(took);
            }
        }
        row("a Pod's container runs, from a template, by the driver", &times, Some(Duration::from_millis(600)));
        self.pod(&driver, &image).await?;
        self.calls().await?;
        drop(driver);
        self.guest().await
    }

    /// A Pod whose container runs when this returns.
    async fn pod(&self, driver: &MicrovmRuntime, image: &ImageId) -> anyhow::Result<SandboxId> {
        let sandbox = self.config(0);
        let id = driver.run_pod_sandbox(&sandbox).await?;
        let container = ContainerConfig {
            cgroup_parent: sandbox.cgroup_parent.clone(),
            ..ContainerConfig::new(sandbox.pod, "function", image.clone(), vec!["/function".to_owned()])
        };
        let container = driver.create_container(&id, &container).await?;
        driver.start_container(&container).await?;
        let state = driver.container_status(&container).await?.state;
        ensure!(state == ContainerState::Running, "the function has {state:?}");
        Ok(id)
    }

    /// Calls of the function, directly and through its front in turn, so that both meet the same host.
    async fn calls(&self) -> anyhow::Result<()> {
        let function = SocketAddr::from((address(0), 8080));
        let mut direct = connect(function).await?;
        let (_drain, drained) = watch::channel(None);
        let listeners = front::listen_in(None, vec![([127, 0, 0, 1], 0).into()]).await?;
        let front_address = listeners[0].local_addr()?;
        let labels = front::FunctionLabels { namespace: "bench".into(), pod: "p0".into(), uid: "uid-p0".into() };
        let leases = Arc::new(One(front::Environment::new(function)));
        let (node, meters) = (front::NodeConnections::new(1024), front::Meters::new(&Metrics::new()));
        let front = front::Front::new(leases, front::Limits::default(), node, &meters, labels);
        let serving = tokio::spawn(front.run(listeners, drained));
        let mut through = connect(front_address).await?;
        let (mut without, mut with) = (Vec::new(), Vec::new());
        // The first of each makes connections, and the translator's code.
        for round in 0..=self.args.calls {
            let (one, other) = (call(&mut direct).await?, call(&mut through).await?);
            if round > 0 {
                without.push(one);
                with.push(other);
            }
        }
        serving.abort();
        let floor = row("a call of a function in a guest, over its address", &without, None);
        row("a call of it through its front", &with, Some(floor + FRONT));
        let added = median(&with).saturating_sub(floor);
        println!("  the front adds {:.2} ms (budget {:.2})", milliseconds(added), milliseconds(FRONT));
        Ok(())
    }

    /// By the guest's own figures. Its directory and its tap go with the bench.
    async fn guest(&self) -> anyhow::Result<()> {
        let dirs = VmDirs::new(&self.place.join("restores/vms"), DEFAULT_NAMESPACE)?.list()?;
        let machine = qemu().adopt(dirs.first().context("a guest is left")?).await?.context("it runs")?;
        let (agent, _) = Agent::connect(machine.agent().await?, PATIENCE).await?;
        let stats = agent.stats(false).await?;
        agent.close();
        machine.kill().await?;
        let container = stats.pod.memory.saturating_sub(stats.pod.memory_inactive_file);
        let taken = stats.memory_total - stats.memory_available;
        let above = taken.saturating_sub(container) / 1024;
        size_row("memory of a guest taken beside its container", &mut [above], Some(GUEST_MB));
        let never = (self.args.memory << 20).saturating_sub(stats.memory_total) / 1024;
        size_row("  what its kernel never counts comes to that", &mut [never], None);
        Ok(())
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A connection to a server that may not listen yet.
async fn connect(to: SocketAddr) -> anyhow::Result<TcpStream> {
    let begun = Instant::now();
    loop {
        match TcpStream::connect(to).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => ensure!(begun.elapsed() < PATIENCE, "nobody listens at {to}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn call(stream: &mut TcpStream) -> anyhow::Result<Duration> {
    let mut answer = Vec::with_capacity(1024);
    let begun = Instant::now();
    stream.write_all(REQUEST).await?;
    while !answer.ends_with(ANSWER) {
        ensure!(stream.read_buf(&mut answer).await? > 0, "the connection ended");
    }
    let took = begun.elapsed();
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "the call failed: {}", String::from_utf8_lossy(&answer));
    Ok(took)
}

/// One environment, which nobody else leases.
struct One(Arc<front::Environment>);

impl front::Leases for One {
    async fn lease(&self) -> Result<front::Lease, front::TryAgain> {
        Ok(front::Lease::new(Arc::clone(&self.0), |_| {}))
    }
}
