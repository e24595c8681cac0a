//! What a probe or a hook does, from the Pod's words: pure.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::machine::Pace;
use crate::pod::inputs::expand::expand;

/// What is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A command in the container.
    Exec(Vec<String>),
    /// An HTTP GET from the node.
    Http(Get),
    /// A TCP connection from the node.
    Tcp {
        /// A name or an address.
        host: String,
        /// Its port.
        port: u16,
    },
    /// `grpc.health.v1.Health/Check` at the Pod.
    Grpc {
        /// The Pod's address.
        host: String,
        /// Its port.
        port: u16,
        /// The service asked about; empty is the server as a whole.
        service: String,
    },
}

/// One HTTP GET.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Get {
    /// Over TLS, whoever answers.
    pub https: bool,
    /// A name or an address, without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Path and query, beginning with `/`.
    pub path: String,
    /// What the user adds, in order.
    pub headers: Vec<(String, String)>,
    /// Who asks, unless the user says otherwise.
    pub agent: &'static str,
}

/// An action that cannot be carried out as written. `Display` is part of the event that tells of it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ActionError {
    /// No port of that name, or not a port.
    #[error("invalid port {0:?}")]
    Port(String),
    /// None of the actions there are.
    #[error("missing probe handler")]
    Nothing,
    /// The Pod has no address yet.
    #[error("the Pod has no address")]
    NoAddress,
}

/// Who asks, in a kubelet's words; servers tell probes from users by it.
pub const PROBE_AGENT: &str = "kube-probe/1.36";

/// What the probe does. The Pod's address is where it goes unless it names a host.
///
/// # Errors
/// See [`ActionError`].
pub fn of_probe(probe: &Probe, container: &Container, address: Option<IpAddr>) -> Result<Action, ActionError> {
    let at_pod = || address.map(|address| address.to_string()).ok_or(ActionError::NoAddress);
    if let Some(exec) = &probe.exec {
        let fixed = |name: &str| {
            let mut known = container.env.iter().flatten().filter(|var| var.value_from.is_none());
            known.rfind(|var| var.name == name).map(|var| var.value.as_deref().unwrap_or_default())
        };
        return Ok(Action::Exec(exec.command.iter().flatten().map(|word| expand(word, fixed)).collect()));
    }
    if let Some(action) = &probe.http_get {
        return get(action, container, address, PROBE_AGENT).map(Action::Http);
    }
    if let Some(action) = &probe.tcp_socket {
        let host = match action.host.as_deref().filter(|host| !host.is_empty()) {
            Some(host) => host.to_owned(),
            None => at_pod()?,
        };
        return Ok(Action::Tcp { host, port: port(&action.port, container)? });
    }
    if let Some(action) = &probe.grpc {
        let port = u16::try_from(action.port).map_err(|_| ActionError::Port(action.port.to_string()))?;
        return Ok(Action::Grpc { host: at_pod()?, port, service: action.service.clone().unwrap_or_default() });
    }
    Err(ActionError::Nothing)
}

/// An HTTP GET of a probe or of a hook.
///
/// # Errors
/// See [`ActionError`].
pub fn get(
    action: &HTTPGetAction,
    container: &Container,
    address: Option<IpAddr>,
    agent: &'static str,
) -> Result<Get, ActionError> {
    let host = match action.host.as_deref().filter(|host| !host.is_empty()) {
        Some(host) => host.trim_start_matches('[').trim_end_matches(']').to_owned(),
        None => address.ok_or(ActionError::NoAddress)?.to_string(),
    };
    let path = action.path.as_deref().unwrap_or_default();
    Ok(Get {
        https: action.scheme.as_deref().is_some_and(|scheme| scheme.eq_ignore_ascii_case("https")),
        host,
        port: port(&action.port, container)?,
        path: escaped(path),
        headers: action.http_headers.iter().flatten().map(|h| (h.name.clone(), h.value.clone())).collect(),
        agent,
    })
}

/// Path and query with what HTTP does not allow there escaped.
fn escaped(path: &str) -> String {
    let mut whole = String::with_capacity(path.len() + 1);
    if !path.starts_with('/') {
        whole.push('/');
    }
    // A fragment is never sent.
    for byte in path.split('#').next().unwrap_or_default().bytes() {
        match byte {
            b'!'..=b'~' if !b"\"<>\\^`{|}".contains(&byte) => whole.push(char::from(byte)),
            byte => whole.push_str(&format!("%{byte:02X}")),
        }
    }
    whole
}

fn port(port: &IntOrString, container: &Container) -> Result<u16, ActionError> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|p| p.name.as_ref() == Some(name));
            match named {
                Some(port) => port.container_port,
                None => name.parse().map_err(|_| ActionError::Port(name.clone()))?,
            }
        }
    };
    u16::try_from(number).ok().filter(|port| *port > 0).ok_or_else(|| ActionError::Port(number.to_string()))
}

/// The numbers of a probe; the API server has filled in the defaults, and refuses what makes no sense.
pub fn pace(probe: &Probe) -> Pace {
    let seconds = |value: Option<i32>, default: u64| {
        Duration::from_secs(value.and_then(|value| u64::try_from(value).ok()).filter(|v| *v > 0).unwrap_or(default))
    };
    let count = |value: Option<i32>, default| value.and_then(|v| u32::try_from(v).ok()).unwrap_or(default).max(1);
    Pace {
        delay: seconds(probe.initial_delay_seconds, 0),
        period: seconds(probe.period_seconds, 10),
        timeout: seconds(probe.timeout_seconds, 1),
        successes: count(probe.success_threshold, 1),
        failures: count(probe.failure_threshold, 3),
        costly: probe.exec.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn action(probe: Value) -> Result<Action, ActionError> {
        let container = json!({
            "name": "c", "ports": [{ "name": "web", "containerPort": 8080 }],
            "env": [{ "name": "A", "value": "a" }, { "name": "B", "valueFrom": {} }],
        });
        let container: Container = serde_json::from_value(container).unwrap();
        of_probe(&serde_json::from_value(probe).unwrap(), &container, Some(IpAddr::from([10, 0, 0, 9])))
    }

    #[test]
    fn the_pod_is_asked_unless_a_host_is_named() {
        let asked = action(json!({ "httpGet": { "port": "web", "path": "healthz?x=1 2#y", "scheme": "HTTPS" } }));
        let Ok(Action::Http(get)) = asked else { panic!("{asked:?}") };
        assert_eq!((get.https, get.host.as_str(), get.port), (true, "10.0.0.9", 8080));
        assert_eq!(get.path, "/healthz?x=1%202");
        let tcp = |host: &str, port| Ok(Action::Tcp { host: host.into(), port });
        assert_eq!(action(json!({ "tcpSocket": { "port": 5, "host": "h" } })), tcp("h", 5));
        assert_eq!(action(json!({ "tcpSocket": { "port": "5" } })), tcp("10.0.0.9", 5));
        let grpc = Action::Grpc { host: "10.0.0.9".into(), port: 9, service: "s".into() };
        assert_eq!(action(json!({ "grpc": { "port": 9, "service": "s" } })), Ok(grpc));
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        assert_eq!(action(json!({ "tcpSocket": { "port": "db" } })), Err(ActionError::Port("db".into())));
        assert_eq!(action(json!({ "httpGet": { "port": 70000 } })), Err(ActionError::Port("70000".into())));
        assert_eq!(action(json!({})), Err(ActionError::Nothing));
    }

    #[test]
    fn a_command_sees_the_variables_that_are_written_out() {
        let exec = json!({ "exec": { "command": ["echo", "$(A)", "$(B)", "$$(A)"] } });
        let words = ["echo", "a", "$(B)", "$(A)"].map(str::to_owned).to_vec();
        assert_eq!(action(exec), Ok(Action::Exec(words)));
    }

    #[test]
    fn numbers_have_the_apis_defaults() {
        let defaults = pace(&Probe::default());
        let seconds = [defaults.delay, defaults.period, defaults.timeout].map(|d| d.as_secs());
        assert_eq!((seconds, defaults.successes, defaults.failures), ([0, 10, 1], 1, 3));
    }
}
