//! What the API needs to know of Pods, without knowing who keeps them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use http::StatusCode;
use k8s_openapi::api::core::v1::Pod;

use crate::runtime::types::{ContainerId, LogChunk, PodRef, SandboxId};

/// Finds what a request names. Implemented by [`crate::pod`].
#[async_trait]
pub trait PodTargets: Send + Sync + 'static {
    /// What answers `kubectl logs POD -c CONTAINER [--previous]`: the running or latest attempt of the container, or with
    /// `previous` the one before it.
    ///
    /// # Errors
    /// What to tell the user; see [`TargetError`].
    async fn log_target(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        previous: bool,
    ) -> Result<LogTarget, TargetError>;

    /// The running container that `kubectl exec` and `attach` mean; with `uid` only if the Pod of that name has it. Where
    /// none runs now but one can be started for the visitor, this waits for it.
    ///
    /// # Errors
    /// What to tell the user; see [`TargetError`].
    async fn exec_target(
        &self,
        namespace: &str,
        pod: &str,
        uid: Option<&str>,
        container: &str,
    ) -> Result<Entrance, TargetError>;

    /// The sandbox whose ports `kubectl port-forward` means; with `uid` only if the Pod of that name has it.
    ///
    /// # Errors
    /// What to tell the user; see [`TargetError`].
    async fn port_target(&self, namespace: &str, pod: &str, uid: Option<&str>) -> Result<SandboxId, TargetError>;

    /// Every Pod of this node with the status last computed here, for `/pods`.
    fn pods(&self) -> Vec<Arc<Pod>>;

    /// The volumes of this node's Pods by Pod UID, for `/stats/summary`.
    fn volumes(&self) -> BTreeMap<String, Vec<PodVolume>>;

    /// How often the probes of this node's Pods said what, for `/metrics/probes`.
    fn probes(&self) -> Vec<ProbeCount>;

    /// Whether the Pod loop is alive, for `/healthz`.
    ///
    /// # Errors
    /// Which part is stuck and since when.
    fn healthy(&self) -> Result<(), String>;
}

/// How often one probe of one container had one result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeCount {
    /// Whose it is.
    pub pod: PodRef,
    /// The container's name.
    pub container: String,
    /// `Startup`, `Liveness` or `Readiness`.
    pub probe: &'static str,
    /// `successful`, `failed` or `unknown`.
    pub result: &'static str,
    /// How often.
    pub count: u64,
}

/// A volume whose use can be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodVolume {
    /// Its name in the Pod.
    pub name: String,
    /// Its directory on the host, which may not be there yet.
    pub path: PathBuf,
    /// Whether what it holds counts as the Pod's ephemeral storage.
    pub on_disk: bool,
}

/// Where a log comes from.
pub enum LogTarget {
    /// One attempt of one container.
    One(ContainerId),
    /// Containers that are read as one.
    Many(LogSpan),
}

/// Containers that come and go, and whose logs are read as one in the order of time.
pub struct LogSpan {
    /// What is left of those that are gone, each in the order in which it was written.
    pub kept: Vec<Vec<LogChunk>>,
    /// Those that are there.
    pub present: Vec<ContainerId>,
    /// Those that come later; it ends when none can come any more.
    pub later: BoxStream<'static, ContainerId>,
}

/// A container to look into.
pub struct Entrance {
    /// Which.
    pub container: ContainerId,
    /// To be dropped when the visitor has left: until then the container is not taken away for want of use.
    pub stay: Option<Box<dyn Send + Sync>>,
}

/// Why there is no such target. `Display` is the text kubectl prints.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TargetError {
    /// No such Pod on this node (HTTP 404).
    #[error("pod {0:?} not found")]
    NoPod(String),
    /// The node has just started and has not looked at all of its Pods (HTTP 503).
    #[error("pod {0:?} is not known yet: the node has just started and is still looking at its pods; try again")]
    NotYet(String),
    /// The Pod has no container of that name (HTTP 404).
    #[error("container {container:?} not found in pod {pod:?}")]
    NoContainer {
        /// The Pod's name.
        pod: String,
        /// The container asked for.
        container: String,
    },
    /// It has not started yet (HTTP 400).
    #[error("container {container:?} in pod {pod:?} is waiting to start: {reason}")]
    Waiting {
        /// The Pod's name.
        pod: String,
        /// The container asked for.
        container: String,
        /// The waiting reason of its status (`ContainerCreating`, `PodInitializing`, `ImagePullBackOff`, …).
        reason: String,
    },
    /// It has no earlier attempt (HTTP 400).
    #[error("previous terminated container {container:?} in pod {pod:?} not found")]
    NoPrevious {
        /// The Pod's name.
        pod: String,
        /// The container asked for.
        container: String,
    },
    /// No container of that name runs (HTTP 500, in a kubelet's words).
    #[error("container not found ({0:?})")]
    NotRunning(String),
    /// None runs now, and none could be started for the visitor (HTTP 503).
    #[error("no container of pod {pod:?} can be entered now: {reason}")]
    Refused {
        /// The Pod's name.
        pod: String,
        /// Why.
        reason: String,
    },
    /// The Pod has no sandbox that is ready (HTTP 500, as above).
    #[error("pod not found ({0:?})")]
    NoSandbox(String),
}

impl TargetError {
    /// The status it is answered with.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NoPod(_) | Self::NoContainer { .. } => StatusCode::NOT_FOUND,
            Self::Waiting { .. } | Self::NoPrevious { .. } => StatusCode::BAD_REQUEST,
            Self::NotYet(_) | Self::Refused { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::NotRunning(_) | Self::NoSandbox(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}
