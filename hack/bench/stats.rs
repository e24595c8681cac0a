//! Measures a scrape of `/metrics/resource` with many Pods: over real HTTPS, as metrics-server does it, beside one call
//! of Docker's own statistics for a single container.
//!
//! `cargo run --release --example bench-stats` starts a hundred Pods in Docker (image `busybox:1.36`, of `hack/images`),
//! which takes a minute, and removes them again.
#![allow(clippy::disallowed_methods, reason = "a benchmark's tasks end with it")]

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bollard::Docker;
use bollard::query_parameters::StatsOptionsBuilder;
use bytes::Bytes;
use clap::Parser;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use lambdalet::kubelet_api::{About, Access, Authorization, KubeletApi, Limits, Params, Serving, TlsParams};
use lambdalet::metrics::Metrics;
use lambdalet::pod::directory::Directory;
use lambdalet::runtime::docker::{DockerOptions, DockerRuntime, NoCable};
use lambdalet::runtime::types::{
    ContainerConfig, MachineFiles, NamespaceMode, PodRef, Resources, SandboxConfig, SandboxNetwork,
};
use lambdalet::runtime::{ImageStore as _, Runtime, SandboxRuntime as _, remove_cgroup_root};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Longer than the node tells the same figures again: each scrape reads the host's files.
const PAUSE: Duration = Duration::from_millis(600);
const IMAGE: &str = "busybox:1.36";

#[derive(Parser)]
struct Args {
    /// Pods of one container each
    #[arg(long, default_value_t = 100)]
    pods: usize,
    /// Scrapes, and calls of Docker's statistics
    #[arg(long, default_value_t = 50)]
    rounds: usize,
    /// Fail if half of the scrapes take longer than this many milliseconds
    #[arg(long)]
    budget: Option<f64>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let owner = format!("bench-stats-{}", std::process::id());
    let runtime: Arc<dyn Runtime> =
        Arc::new(DockerRuntime::connect(DockerOptions::new(&owner), Arc::new(NoCable)).await?);
    let measured = measure(&args, &owner, &runtime).await;
    for sandbox in runtime.list_pod_sandboxes(None).await? {
        runtime.remove_pod_sandbox(&sandbox.id).await?;
    }
    remove_cgroup_root(&owner)?;
    measured
}

async fn measure(args: &Args, owner: &str, runtime: &Arc<dyn Runtime>) -> anyhow::Result<()> {
    let ids: Vec<String> =
        stream::iter(0..args.pods).map(|number| pod(owner, number, runtime)).buffer_unordered(4).try_collect().await?;
    let directory = tempfile::tempdir()?;
    let mut client = serve(runtime, directory.path()).await?;
    let docker = Docker::connect_with_unix("/var/run/docker.sock", 120, bollard::API_DEFAULT_VERSION)?;
    let one_shot = StatsOptionsBuilder::default().stream(false).one_shot(true).build();
    let (mut scrapes, mut calls) = (Vec::new(), Vec::new());
    // The first makes connections and asks Docker what there is.
    for round in 0..=args.rounds {
        tokio::time::sleep(PAUSE).await;
        let began = Instant::now();
        let text = get(&mut client, "/metrics/resource").await?;
        let scrape = began.elapsed();
        let told = text.matches("\npod_cpu_usage_seconds_total{").count();
        ensure!(told == args.pods, "{told} of {} Pods are told", args.pods);
        let began = Instant::now();
        let stats = pin!(docker.stats(&ids[0], Some(one_shot.clone()))).try_next().await?;
        let call = began.elapsed();
        ensure!(stats.is_some(), "Docker told nothing");
        if round > 0 {
            scrapes.push(scrape);
            calls.push(call);
        }
    }
    println!("{:<52}{:>10}{:>10}", "", "p50 ms", "p99 ms");
    let scrape = row(&format!("/metrics/resource over HTTPS, {} Pods", args.pods), scrapes);
    row("Docker's statistics of one container, one call", calls);
    ensure!(args.budget.is_none_or(|budget| scrape <= budget), "a scrape takes {scrape:.2} ms");
    Ok(())
}

/// Prints a row and returns its median, in milliseconds.
fn row(name: &str, mut times: Vec<Duration>) -> f64 {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize].as_secs_f64() * 1e3;
    println!("{name:<52}{:>10.2}{:>10.2}", at(0.5), at(0.99));
    at(0.5)
}

/// Starts a Pod of one container that does nothing; the container's id.
async fn pod(owner: &str, number: usize, runtime: &Arc<dyn Runtime>) -> anyhow::Result<String> {
    let image = runtime.image_status(IMAGE).await?.with_context(|| format!("no image {IMAGE}: run hack/images"))?;
    let name = format!("p{number}");
    let sandbox = SandboxConfig {
        pod: PodRef { uid: format!("uid-{name}"), namespace: "bench".into(), name: name.clone() },
        handler: None,
        attempt: 0,
        hostname: name.clone(),
        network: SandboxNetwork::Pod { address: [10, 99, 0, 7].into() },
        ipc: NamespaceMode::Pod,
        pid: NamespaceMode::Container,
        sysctls: BTreeMap::new(),
        cgroup_parent: format!("/{owner}/pod-{name}"),
        resources: Resources { memory_limit: Some(256 << 20), ..Resources::default() },
        machine: MachineFiles::default(),
    };
    let id = runtime.run_pod_sandbox(&sandbox).await?;
    let container = ContainerConfig {
        image_ref: IMAGE.into(),
        cgroup_parent: sandbox.cgroup_parent.clone(),
        ..ContainerConfig::new(sandbox.pod.clone(), "c", image.id, vec!["sleep".into(), "100000".into()])
    };
    let container = runtime.create_container(&id, &container).await?;
    runtime.start_container(&container).await?;
    Ok(container.as_str().to_owned())
}

/// The node's API with everybody let in, and a kept connection to it.
async fn serve(runtime: &Arc<dyn Runtime>, directory: &Path) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    let mut authority = CertificateParams::default();
    authority.distinguished_name.push(DnType::CommonName, "bench");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate()?;
    let root = authority.self_signed(&key)?;
    let issuer = Issuer::new(authority, key);
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec!["localhost".to_owned()])?.signed_by(&key, &issuer)?;
    let (certificate_file, key_file) = (directory.join("tls.crt"), directory.join("tls.key"));
    std::fs::write(&certificate_file, certificate.pem())?;
    std::fs::write(&key_file, key.serialize_pem())?;
    let api = KubeletApi::bind(Params {
        listen: ([127, 0, 0, 1], 0).into(),
        node_name: "bench".into(),
        tls: TlsParams::new(Serving::Files { certificate: certificate_file, key: key_file }),
        access: Access { anonymous: true, authorization: Authorization::AlwaysAllow, ..Access::default() },
        client: kube::Client::try_from(kube::Config::new("http://127.0.0.1:9".parse()?))?,
        targets: Arc::new(Directory::default()),
        runtime: runtime.clone(),
        images: runtime.clone(),
        metrics: Metrics::new(),
        limits: Limits::default(),
        about: About::default(),
    })
    .await?;
    let address = api.local_addr();
    tokio::spawn(api.serve(CancellationToken::new()));

    let mut roots = rustls::RootCertStore::empty();
    roots.add(root.der().clone())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let tls = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("localhost")?, tcp).await?;
    let (client, connection) = handshake(TokioIo::new(tls)).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn get(client: &mut SendRequest<Empty<Bytes>>, path: &str) -> anyhow::Result<String> {
    client.ready().await?;
    let response = client.send_request(Request::get(path).header("host", "localhost").body(Empty::new())?).await?;
    ensure!(response.status() == StatusCode::OK, "{path}: {}", response.status());
    Ok(String::from_utf8(response.into_body().collect().await?.to_bytes().into())?)
}
