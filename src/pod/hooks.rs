//! Lifecycle hooks: what a container is asked to do right after its start and right before its end.
//!
//! Rules and words are a kubelet's ("Container Lifecycle Hooks", Kubernetes documentation): an HTTP hook that is answered
//! at all has succeeded, whatever the status, and `tcpSocket` fails always, as the API's own text says.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, LifecycleHandler};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::probes::action::{self, ActionError, Get};
use super::probes::{attempt, http};
use crate::runtime::types::ContainerId;
use crate::runtime::{Runtime, RuntimeError};

/// Reason of the event that tells of a hook that was asked without TLS.
pub(super) const FALLBACK: &str = "LifecycleHTTPFallback";

/// Who asks.
const AGENT: &str = "kube-lifecycle/1.36";

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// Its command ended with another code than 0.
    #[error("command {command:?} exited with {code}: {output}")]
    Exit {
        /// Program and arguments.
        command: String,
        /// Its exit code.
        code: i32,
        /// The beginning of what it wrote.
        output: String,
    },
    /// Its command could not be run.
    #[error("failed to run command {command:?}")]
    Exec {
        /// Program and arguments.
        command: String,
        /// What the runtime says.
        source: RuntimeError,
    },
    /// It was not answered.
    #[error("HTTP hook was not answered: {0}")]
    Http(String),
    /// It cannot be carried out as written.
    #[error("failed to read the hook")]
    Action(#[source] ActionError),
    /// It has none of the actions that there are.
    #[error("invalid handler: neither exec, httpGet nor sleep")]
    Nothing,
}

/// Whose hook it is.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) runtime: &'a dyn Runtime,
    pub(super) container: &'a Container,
    pub(super) id: &'a ContainerId,
    /// The Pod's address.
    pub(super) address: Option<IpAddr>,
}

/// Runs it to its end; what the user should hear of an HTTP hook that was answered in another way than it was written.
/// Dropping this ends a command that runs in the container.
///
/// # Errors
/// See [`HookError`].
pub(super) async fn run(subject: Subject<'_>, handler: &LifecycleHandler) -> Result<Option<String>, HookError> {
    if let Some(exec) = &handler.exec {
        let words = exec.command.clone().unwrap_or_default();
        let command = words.join(" ");
        return match attempt::run(subject.runtime, subject.id, &words, || {}).await {
            Ok((0, _)) => Ok(None),
            Ok((code, output)) => Err(HookError::Exit { command, code, output }),
            Err(source) => Err(HookError::Exec { command, source }),
        };
    }
    if let Some(get) = &handler.http_get {
        let mut get = get.clone();
        if matches!(&get.port, IntOrString::String(port) if port.is_empty()) {
            get.port = IntOrString::Int(80);
        }
        let get = action::get(&get, subject.container, subject.address, AGENT).map_err(HookError::Action)?;
        return ask(get).await;
    }
    if let Some(sleep) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
        return Ok(None);
    }
    Err(HookError::Nothing)
}

/// Asks once; where TLS is wanted and not spoken, once more without, and without what only TLS may carry.
async fn ask(wanted: Get) -> Result<Option<String>, HookError> {
    let error = match http::get(&wanted).await {
        Ok(_) => return Ok(None),
        Err(error) => error,
    };
    if !(wanted.https && error.not_tls) {
        return Err(HookError::Http(error.to_string()));
    }
    let secret = |name: &str| name.eq_ignore_ascii_case("authorization");
    let headers = wanted.headers.iter().filter(|(name, _)| !secret(name)).cloned().collect();
    let plain = Get { https: false, headers, ..wanted };
    http::get(&plain).await.map_err(|error| HookError::Http(error.to_string()))?;
    let place = format!("{}:{}", plain.host, plain.port);
    Ok(Some(format!("request to HTTPS lifecycle hook {place} got HTTP response, retry with HTTP succeeded")))
}
