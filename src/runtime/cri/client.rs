//! The way to the runtime: one HTTP/2 connection over its socket, which is made anew when it breaks, and what its
//! failures mean.

use std::future::Future;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use lambdalet_proto::cri::v1::image_service_client::ImageServiceClient;
use lambdalet_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use lambdalet_proto::cri::v1::{RuntimeCondition, StatusRequest, VersionRequest, VersionResponse};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::runtime::{Kind, Result, RuntimeError};

/// The runtime may take so long for a call that waits for no process; a start under heavy load may take tens of seconds.
pub(super) const PATIENCE: Duration = Duration::from_secs(240);
/// A connection to a socket of this host is there at once.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// The largest answer: as much as a kubelet takes.
const MAX_MESSAGE: usize = 16 << 20;
/// The version of CRI that is spoken.
const VERSION: &str = "v1";

/// Calls one RPC that waits for no process. `tried` begins the message of a failure.
macro_rules! ask {
    ($client:expr, $verb:ident($request:expr), $tried:expr) => {{
        let mut client = $client.clone();
        let request = $request;
        crate::runtime::cri::client::within($tried, async move { client.$verb(request).await })
    }};
}
pub(super) use ask;

/// Both services of one runtime. Clones share the connection.
#[derive(Clone, Debug)]
pub struct CriClient {
    pub(super) runtime: RuntimeServiceClient<Channel>,
    pub(super) images: ImageServiceClient<Channel>,
}

impl CriClient {
    /// Connects to `endpoint` (`unix:///path`) and sees that CRI v1 is spoken there; with the runtime's name and version.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the endpoint is none of a socket, [`Kind::Unavailable`] if nobody answers there,
    /// [`Kind::Unsupported`] if it is not CRI v1.
    pub async fn connect(endpoint: &str) -> Result<(Self, VersionResponse)> {
        let path = socket(endpoint)?;
        let tried = format!("failed to connect to the container runtime at {endpoint}");
        look(&path, &tried)?;
        let unavailable = |error| RuntimeError::new(Kind::Unavailable, tried.clone()).with_source(error);
        let shared: Arc<Path> = path.into();
        let connector = tower::service_fn(move |_| {
            let path = Arc::clone(&shared);
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The authority that a kubelet's client sends too: a server that checks it knows no other.
        let target = Endpoint::from_static("http://localhost").connect_timeout(CONNECT_PATIENCE);
        let channel = target.connect_with_connector(connector).await.map_err(unavailable)?;
        let client = Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
        };
        let version = VersionRequest { version: VERSION.to_owned() };
        let answer = ask!(client.runtime, version(version), || tried.clone()).await;
        let version = answer.map_err(|error| match error.kind() {
            Kind::Unsupported => RuntimeError::new(
                Kind::Unsupported,
                format!(
                    "{error}: it does not speak CRI v1 (containerd does from 1.6, CRI-O from 1.23; containerd must not \
                    have \"cri\" among its disabled_plugins)"
                ),
            ),
            _ => error,
        })?;
        Ok((client, version))
    }

    /// The conditions that keep the runtime from running Pods; none if it can.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if it does not answer.
    pub async fn unmet(&self) -> Result<Vec<RuntimeCondition>> {
        let request = StatusRequest { verbose: false };
        let tried = || "failed to ask for the container runtime's status".to_owned();
        let answer = ask!(self.runtime, status(request), tried).await?;
        let conditions = answer.status.unwrap_or_default().conditions;
        Ok(conditions.into_iter().filter(|condition| !condition.status && is_required(&condition.r#type)).collect())
    }
}

/// The conditions that CRI requires; a runtime may have more of its own.
fn is_required(condition: &str) -> bool {
    matches!(condition, "RuntimeReady" | "NetworkReady")
}

/// A condition that is not met, in words that say what to do.
pub fn explained(condition: &RuntimeCondition) -> String {
    let RuntimeCondition { r#type, reason, message, .. } = condition;
    let remedy = match r#type.as_str() {
        "NetworkReady" => "; it wants a CNI configuration, and manifests/cni has one (docs/cri-driver.md)",
        _ => "",
    };
    format!("the container runtime's {type} is false: {reason} {message}{remedy}")
}

/// The path of a socket's URL.
fn socket(endpoint: &str) -> Result<PathBuf> {
    match endpoint.strip_prefix("unix://").filter(|path| path.starts_with('/')) {
        Some(path) => Ok(path.into()),
        None => Err(RuntimeError::new(
            Kind::Invalid,
            format!(
                "container runtime endpoint {endpoint:?} is not the URL of a socket, as unix:///run/containerd/containerd.sock"
            ),
        )),
    }
}

/// What a failed connection would not say.
fn look(path: &Path, tried: &str) -> Result<()> {
    let wrong = |what: &str| Err(RuntimeError::new(Kind::Unavailable, format!("{tried}: {what}")));
    match std::fs::metadata(path) {
        Ok(found) if found.file_type().is_socket() => Ok(()),
        Ok(_) => wrong("it is not a socket"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            wrong("there is no such socket; is the runtime running?")
        }
        Err(error) => Err(RuntimeError::new(Kind::Unavailable, tried.to_owned()).with_source(error)),
    }
}

/// One call, and what its failure means.
pub(super) async fn within<T>(
    tried: impl Fn() -> String,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T> {
    match timeout(PATIENCE, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(failed(&tried(), &status)),
        Err(late) => Err(RuntimeError::new(Kind::Unavailable, tried()).with_source(late)),
    }
}

/// A refusal as ours. Runtimes are free with [`Code::Unknown`], so callers look at what is there where it matters.
pub(super) fn failed(tried: &str, status: &Status) -> RuntimeError {
    let kind = match status.code() {
        Code::NotFound => Kind::NotFound,
        Code::AlreadyExists => Kind::AlreadyExists,
        Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => Kind::Invalid,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted | Code::ResourceExhausted => {
            Kind::Unavailable
        }
        Code::Unimplemented => Kind::Unsupported,
        Code::Unauthenticated | Code::PermissionDenied => Kind::Unauthorized,
        Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => Kind::Internal,
    };
    RuntimeError::new(kind, format!("{tried}: {}", status.message().trim()))
}

/// Whether a create failed because another of the same name is under way or there.
pub(super) fn is_taken(error: &RuntimeError) -> bool {
    error.kind() == Kind::AlreadyExists || error.to_string().contains("is reserved for")
}

/// Where there is nothing of that id, that is fine.
pub(super) fn unless_absent(done: Result<()>) -> Result<()> {
    match done {
        Err(error) if error.is_not_found() => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_endpoint_that_cannot_be_is_refused_by_what_is_wrong_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| format!("unix://{}", folder.path().join(name).display());
        std::fs::write(folder.path().join("file"), "").unwrap();
        drop(std::os::unix::net::UnixListener::bind(folder.path().join("silent")).unwrap());
        for (endpoint, kind, words) in [
            ("tcp://127.0.0.1:1".to_owned(), Kind::Invalid, "not the URL of a socket"),
            ("unix://relative".to_owned(), Kind::Invalid, "not the URL of a socket"),
            (at("none"), Kind::Unavailable, "there is no such socket"),
            (at("file"), Kind::Unavailable, "it is not a socket"),
            (at("silent"), Kind::Unavailable, "failed to connect"),
        ] {
            let error = CriClient::connect(&endpoint).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{endpoint}: {error}");
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_condition_says_what_to_do() {
        let condition = RuntimeCondition {
            r#type: "NetworkReady".to_owned(),
            status: false,
            reason: "NetworkPluginNotReady".to_owned(),
            message: "cni plugin not initialized".to_owned(),
        };
        let text = explained(&condition);
        assert!(
            text.contains("NetworkReady is false: NetworkPluginNotReady cni plugin") && text.contains("manifests/cni")
        );
    }

    #[test]
    fn a_taken_name_is_told_from_other_failures() {
        let status = Status::unknown("failed to reserve sandbox name \"a_b\": name \"a_b\" is reserved for \"0f\"");
        assert!(is_taken(&failed("failed", &status)));
        assert!(!is_taken(&failed("failed", &Status::unknown("no space left on device"))));
    }
}
