//! What Docker needs at least, asked directly.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use bollard::Docker;
use bollard::models::{ContainerCreateBody, HostConfig};
use bollard::query_parameters::{
    CreateContainerOptions, ListContainersOptionsBuilder, RemoveContainerOptionsBuilder, StartContainerOptions,
};

use super::{Kind, PATIENCE, call};

/// Where a container of one's own can run: a sandbox in which nothing listens.
pub(crate) struct Place {
    holder: String,
    address: String,
}

impl Place {
    /// The sandbox of that Pod.
    pub(crate) async fn of_pod(docker: &Docker, uid: &str, address: String) -> anyhow::Result<Self> {
        let wanted = HashMap::from([(
            "label".to_owned(),
            vec!["lambdalet.dev/kind=sandbox".to_owned(), format!("lambdalet.dev/pod-uid={uid}")],
        )]);
        let found = docker.list_containers(Some(ListContainersOptionsBuilder::new().filters(&wanted).build())).await?;
        let holder = found.into_iter().find_map(|container| container.id).context("the Pod has no sandbox")?;
        Ok(Self { holder, address })
    }

    /// Seconds of `docker start` of a created container, and from then until it has answered.
    pub(crate) async fn measure(&self, docker: &Docker, kind: &Kind) -> anyhow::Result<(f64, f64)> {
        let body = ContainerCreateBody {
            image: Some(kind.image.clone()),
            entrypoint: (!kind.command.is_empty()).then(|| kind.command.clone()),
            labels: Some(HashMap::from([("lambdalet.dev/bench".to_owned(), "floor".to_owned())])),
            host_config: Some(HostConfig {
                network_mode: Some(format!("container:{}", self.holder)),
                ..HostConfig::default()
            }),
            ..ContainerCreateBody::default()
        };
        let id = docker.create_container(None::<CreateContainerOptions>, body).await?.id;
        let result = self.start(docker, kind, &id).await;
        remove(docker, &id).await?;
        result
    }

    async fn start(&self, docker: &Docker, kind: &Kind, id: &str) -> anyhow::Result<(f64, f64)> {
        let began = Instant::now();
        docker.start_container(id, None::<StartContainerOptions>).await?;
        let started = began.elapsed().as_secs_f64();
        let mut answered = call(&self.address, kind.request, true).await;
        while answered.is_err() && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(1)).await;
            answered = call(&self.address, kind.request, true).await;
        }
        let took = began.elapsed().as_secs_f64() - started;
        answered.map(|_| (started, took))
    }
}

async fn remove(docker: &Docker, id: &str) -> anyhow::Result<()> {
    let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
    Ok(docker.remove_container(id, Some(options)).await?)
}

/// How many containers of the environments of that Pod are in that state.
pub(crate) async fn environments(docker: &Docker, uid: &str, state: &str) -> anyhow::Result<usize> {
    let wanted = HashMap::from([
        ("label".to_owned(), vec!["lambdalet.dev/kind=container".to_owned()]),
        ("status".to_owned(), vec![state.to_owned()]),
    ]);
    let options = ListContainersOptionsBuilder::new().all(true).filters(&wanted).build();
    let found = docker.list_containers(Some(options)).await?;
    let key = |labels: &HashMap<String, String>| labels.get("lambdalet.dev/pod-uid").cloned().unwrap_or_default();
    let ours = found.iter().filter_map(|container| container.labels.as_ref());
    Ok(ours.filter(|labels| key(labels).starts_with(&format!("{uid}."))).count())
}
