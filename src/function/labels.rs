//! What makes a Pod a function, and what its labels say.
//!
//! The keys are those of the function server this follows, which took them from OpenFaaS; ours are below
//! `lambdalet.dev/`. Every key may be a label or an annotation (some clients can set only one of the two); a label wins.
//!
//! | key | value | default |
//! |---|---|---|
//! | `com.openfaas.scale.min` | whole number >= 0: replicas kept when idle | 0 |
//! | `com.openfaas.scale.max` | whole number > 0: replicas at most, those starting and stopping included | 20 |
//! | `execenvironment.count` | whole number > 0: environments per replica at most, started lazily | 5 for RIE, 1 for HTTP and in microVMs |
//! | `com.openfaas.cpu` | whole number > 0: vCPUs of a replica whose Pod gives no cpu limit | 1 |
//! | `com.openfaas.memory` | MiB > 0 of a replica whose Pod gives no memory limit | 512 |
//! | `lambdalet.dev/protocol` | `rie` or `http` | see [`protocol::detect`] |
//! | `lambdalet.dev/invocation-port` | 1-65535: where an environment listens | RIE: 8080; HTTP: the first declared TCP port, or 8080 |
//! | `lambdalet.dev/requests-per-environment` | 1-10000: calls at once in one plain HTTP server | 1 |
//! | `lambdalet.dev/idle-timeout` | `1s`-`24h`: a replica idle for so long is removed | 5m |
//! | `lambdalet.dev/freeze-after` | `never`, or `10ms`-`1h`: an environment idle for so long is frozen | never |
//! | `lambdalet.dev/queue-length` | 1-10000: calls that wait at most | 1000 |
//! | `lambdalet.dev/queue-timeout` | `100ms`-`15m`: how long a call waits at most | 30s |
//! | `lambdalet.dev/listen-timeout` | `100ms`-`15m`: an environment that does not listen after so long is given up | 30s |
//! | `lambdalet.dev/warm-up` | `true` or `false`: send a no-op to an environment that starts without a call | false |
//! | `lambdalet.dev/reserve` | 0-100: environments made in advance and not started | 1 |
//!
//! Durations are written as Go writes them, which is what Kubernetes users know. RIE takes one call at a time, unless
//! the container sets `AWS_LAMBDA_MAX_CONCURRENCY`, which makes RIE take that many (its managed concurrency).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::protocol::{self, ImageConfig, Protocol};
use super::settings::{DEFAULT_CALLS, DEFAULT_CPU, DEFAULT_MEMORY_MIB, DEFAULT_PORT, Settings, Size};
use crate::config::values::GoDuration;
use crate::quantity::Quantity;

/// Replicas kept when idle.
pub const MIN: &str = "com.openfaas.scale.min";
/// Replicas at most.
pub const MAX: &str = "com.openfaas.scale.max";
/// Environments per replica at most.
pub const ENVIRONMENTS: &str = "execenvironment.count";
/// vCPUs of a replica.
pub const CPU: &str = "com.openfaas.cpu";
/// MiB of a replica.
pub const MEMORY: &str = "com.openfaas.memory";
/// What speaks in an environment.
pub const PROTOCOL: &str = "lambdalet.dev/protocol";
/// Where an environment listens.
pub const PORT: &str = "lambdalet.dev/invocation-port";
/// Calls at once in a plain HTTP server.
pub const REQUESTS: &str = "lambdalet.dev/requests-per-environment";
/// When an idle replica is removed.
pub const IDLE_TIMEOUT: &str = "lambdalet.dev/idle-timeout";
/// When an idle environment is frozen.
pub const FREEZE_AFTER: &str = "lambdalet.dev/freeze-after";
/// Calls that wait at most.
pub const QUEUE_LENGTH: &str = "lambdalet.dev/queue-length";
/// How long a call waits at most.
pub const QUEUE_TIMEOUT: &str = "lambdalet.dev/queue-timeout";
/// How long an environment may take to listen.
pub const LISTEN_TIMEOUT: &str = "lambdalet.dev/listen-timeout";
/// Whether environments are warmed by a no-op.
pub const WARM_UP: &str = "lambdalet.dev/warm-up";
/// Environments that are prepared in advance.
pub const RESERVE: &str = "lambdalet.dev/reserve";
/// The variable that turns on RIE's managed concurrency.
pub const MAX_CONCURRENCY: &str = "AWS_LAMBDA_MAX_CONCURRENCY";

/// A Pod with any of these is a function.
const MARKS: [&str; 3] = [MIN, MAX, ENVIRONMENTS];
/// Names the container that serves, where a Pod has several; kubectl goes by it too. Otherwise it is the first.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";
/// Longest part of a bad value that a complaint repeats, in characters.
const LONGEST_VALUE: usize = 64;

/// What a function Pod says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// What the pool goes by.
    pub settings: Settings,
    /// What was written wrong, each for a Warning event `InvalidFunctionLabel`.
    pub complaints: Vec<Complaint>,
}

/// A value that was not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// The label, annotation or variable.
    pub label: String,
    /// What it says; a long one is shortened.
    pub value: String,
    /// What it should be.
    pub expected: String,
    /// What is used instead.
    pub used: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {:?}, not {}; using {}", self.label, self.value, self.expected, self.used)
    }
}

/// Whether the Pod is a function: it has one of the labels `com.openfaas.scale.min`, `com.openfaas.scale.max` and
/// `execenvironment.count`, or an annotation of that name.
pub fn is_function(pod: &Pod) -> bool {
    MARKS.iter().any(|key| text(pod, key).is_some())
}

/// Reads a function Pod; `None`: it is no function. `image` is that of [`container`], or `None` while it is not on the
/// node (read again once it is).
pub fn read(pod: &Pod, image: Option<&ImageConfig>) -> Option<Reading> {
    if !is_function(pod) {
        return None;
    }
    let mut reader = Reader { pod, complaints: Vec::new() };
    let settings = reader.settings(image);
    Some(Reading { settings, complaints: reader.complaints })
}

/// The container whose image is the function: the one that `kubectl.kubernetes.io/default-container` names, or the
/// first.
pub fn container(pod: &Pod) -> Option<&Container> {
    let containers = &pod.spec.as_ref()?.containers;
    let named = pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(DEFAULT_CONTAINER));
    named.and_then(|name| containers.iter().find(|c| c.name == *name)).or(containers.first())
}

/// Changes what holds for a function whose environments are microVMs: each is a machine with the limits of a replica, so
/// a replica is one of them unless its Pod says otherwise.
pub fn settle_in_guests(pod: &Pod, settings: &mut Settings) {
    if text(pod, ENVIRONMENTS).is_none() {
        settings.environments = 1;
    }
}

fn text<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    let of = |map: &'a Option<BTreeMap<String, String>>| map.as_ref().and_then(|map| map.get(key));
    of(&pod.metadata.labels).or_else(|| of(&pod.metadata.annotations)).map(String::as_str)
}

struct Reader<'a> {
    pod: &'a Pod,
    complaints: Vec<Complaint>,
}

impl Reader<'_> {
    fn settings(&mut self, image: Option<&ImageConfig>) -> Settings {
        let protocol = self.protocol(image);
        let default = Settings::of(protocol);
        let min = self.number(MIN, default.min, 0, u32::MAX);
        Settings {
            protocol,
            min,
            max: self.max(min, default.max),
            environments: self.number(ENVIRONMENTS, default.environments, 1, u32::MAX),
            calls: self.calls(protocol, image),
            port: self.port(protocol),
            idle_timeout: self.duration(IDLE_TIMEOUT, default.idle_timeout, [1_000, 24 * 3_600_000]),
            freeze_after: match text(self.pod, FREEZE_AFTER) {
                None | Some("never") => None,
                Some(_) => self.optional_duration(FREEZE_AFTER, [10, 3_600_000]),
            },
            queue_length: self.number(QUEUE_LENGTH, default.queue_length, 1, 10_000),
            queue_timeout: self.duration(QUEUE_TIMEOUT, default.queue_timeout, [100, 900_000]),
            listen_timeout: self.duration(LISTEN_TIMEOUT, default.listen_timeout, [100, 900_000]),
            warm_up: self.value(WARM_UP, false, "true or false", |text| text.parse().ok()),
            reserve: self.number(RESERVE, default.reserve, 0, 100),
            size: self.size(),
        }
    }

    fn protocol(&mut self, image: Option<&ImageConfig>) -> Protocol {
        let empty = Vec::new();
        let container = container(self.pod);
        let command = container.and_then(|c| c.command.as_ref()).unwrap_or(&empty);
        let args = container.and_then(|c| c.args.as_ref()).unwrap_or(&empty);
        let detected = protocol::detect(command, args, image);
        self.value(PROTOCOL, detected, "rie or http", |text| {
            [Protocol::Rie, Protocol::Http].into_iter().find(|protocol| protocol.name() == text)
        })
    }

    fn max(&mut self, min: u32, default: u32) -> u32 {
        let max = self.number(MAX, default, 1, u32::MAX);
        if max < min && text(self.pod, MAX).is_some() {
            self.complain(MAX, max, "at least com.openfaas.scale.min", min);
        }
        max.max(min)
    }

    /// Calls at once in one environment. RIE takes one, whatever the annotation says, or what its own variable says.
    fn calls(&mut self, protocol: Protocol, image: Option<&ImageConfig>) -> u32 {
        if protocol == Protocol::Http {
            return self.number(REQUESTS, DEFAULT_CALLS, 1, 10_000);
        }
        if let Some(value) = text(self.pod, REQUESTS)
            && value != "1"
        {
            self.complain(REQUESTS, value, "for a Lambda runtime, which AWS_LAMBDA_MAX_CONCURRENCY is for", 1);
        }
        let set = container(self.pod).and_then(|c| c.env.as_ref()?.iter().rev().find(|v| v.name == MAX_CONCURRENCY));
        let value = match set {
            // Where the value comes from elsewhere it is not known here.
            Some(variable) => variable.value.clone().unwrap_or_default(),
            None => match image.and_then(|image| image.environment.get(MAX_CONCURRENCY)) {
                Some(value) => value.clone(),
                None => return DEFAULT_CALLS,
            },
        };
        value.parse().ok().filter(|calls| *calls > 0).unwrap_or_else(|| {
            self.complain(MAX_CONCURRENCY, &value, "a whole number > 0 that is written in the Pod", DEFAULT_CALLS);
            DEFAULT_CALLS
        })
    }

    fn port(&mut self, protocol: Protocol) -> u16 {
        let declared = container(self.pod).and_then(|c| c.ports.as_ref()).into_iter().flatten();
        let mut tcp = declared.filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"));
        let first = tcp.next().and_then(|port| u16::try_from(port.container_port).ok()).filter(|port| *port > 0);
        let default = match protocol {
            Protocol::Rie => DEFAULT_PORT,
            Protocol::Http => first.unwrap_or(DEFAULT_PORT),
        };
        self.value(PORT, default, "a port from 1 to 65535", |text| text.parse().ok().filter(|port| *port > 0))
    }

    /// The Pod's limits, where each container has one, as for any Pod; the labels otherwise.
    fn size(&mut self) -> Size {
        let cpu = self.number(CPU, DEFAULT_CPU, 1, u32::MAX);
        let memory = self.number(MEMORY, DEFAULT_MEMORY_MIB, 1, u32::MAX);
        let limit = |name: &str| self.pod.spec.as_ref().and_then(|spec| limit(spec, name));
        let positive = |number: i64| u64::try_from(number).ok().filter(|number| *number > 0);
        Size {
            cpu_millis: limit("cpu").and_then(|q| positive(q.milli_value())).unwrap_or(u64::from(cpu) * 1000),
            memory_bytes: limit("memory").and_then(|q| positive(q.value())).unwrap_or(u64::from(memory) << 20),
        }
    }

    fn number(&mut self, key: &str, default: u32, least: u32, most: u32) -> u32 {
        let expected = match (least, most) {
            (0, u32::MAX) => "a whole number >= 0".to_owned(),
            (_, u32::MAX) => format!("a whole number >= {least}"),
            _ => format!("a whole number from {least} to {most}"),
        };
        self.value(key, default, &expected, |text| text.parse().ok().filter(|number| (least..=most).contains(number)))
    }

    /// A duration within bounds, which are in milliseconds.
    fn duration(&mut self, key: &str, default: Duration, bounds: [u64; 2]) -> Duration {
        let shown = GoDuration(default);
        self.value(key, shown, &expected_duration(bounds), |text| parse_duration(text, bounds)).0
    }

    fn optional_duration(&mut self, key: &str, bounds: [u64; 2]) -> Option<Duration> {
        let value = text(self.pod, key)?;
        let parsed = parse_duration(value, bounds);
        if parsed.is_none() {
            self.complain(key, value, &format!("never, or {}", expected_duration(bounds)), "never");
        }
        parsed.map(|duration| duration.0)
    }

    fn value<T: fmt::Display>(
        &mut self,
        key: &str,
        default: T,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> T {
        let Some(value) = text(self.pod, key) else { return default };
        parse(value.trim()).unwrap_or_else(|| {
            self.complain(key, value, expected, &default);
            default
        })
    }

    fn complain(&mut self, label: &str, value: impl fmt::Display, expected: &str, used: impl fmt::Display) {
        let value = value.to_string();
        let value = match value.char_indices().nth(LONGEST_VALUE) {
            Some((end, _)) => format!("{}…", &value[..end]),
            None => value,
        };
        let (label, expected, used) = (label.to_owned(), expected.to_owned(), used.to_string());
        self.complaints.push(Complaint { label, value, expected, used });
    }
}

fn parse_duration(text: &str, [least, most]: [u64; 2]) -> Option<GoDuration> {
    let within = Duration::from_millis(least)..=Duration::from_millis(most);
    GoDuration::from_str(text).ok().filter(|duration| within.contains(&duration.0))
}

fn expected_duration([least, most]: [u64; 2]) -> String {
    let shown = |millis: u64| match millis {
        0..1_000 => format!("{millis}ms"),
        1_000..60_000 => format!("{}s", millis / 1_000),
        60_000..3_600_000 => format!("{}m", millis / 60_000),
        _ => format!("{}h", millis / 3_600_000),
    };
    format!("a duration from {} to {}", shown(least), shown(most))
}

fn limit(spec: &PodSpec, name: &str) -> Option<Quantity> {
    let of = |resources: Option<&k8s_openapi::api::core::v1::ResourceRequirements>| {
        resources?.limits.as_ref()?.get(name)?.0.parse::<Quantity>().ok()
    };
    if let Some(whole) = of(spec.resources.as_ref()) {
        return Some(whole);
    }
    let each: Option<Vec<Quantity>> = spec.containers.iter().map(|c| of(c.resources.as_ref())).collect();
    each.filter(|limits| !limits.is_empty()).map(|limits| limits.into_iter().sum())
}

#[cfg(test)]
mod tests;
