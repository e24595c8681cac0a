//! What a function's Pod sets for its pool: the values behind the labels, with their defaults and bounds.

use std::time::Duration;

use super::protocol::Protocol;

/// Replicas kept when idle.
pub const DEFAULT_MIN: u32 = 0;
/// Replicas at most.
pub const DEFAULT_MAX: u32 = 20;
/// Environments of a replica that runs the Lambda runtime interface emulator.
pub const DEFAULT_ENVIRONMENTS_RIE: u32 = 5;
/// Environments of a replica that runs a plain HTTP server.
pub const DEFAULT_ENVIRONMENTS_HTTP: u32 = 1;
/// vCPUs of a replica whose Pod gives no cpu limit.
pub const DEFAULT_CPU: u32 = 1;
/// MiB of a replica whose Pod gives no memory limit.
pub const DEFAULT_MEMORY_MIB: u32 = 512;
/// Where an environment listens.
pub const DEFAULT_PORT: u16 = 8080;
/// Calls at once in one environment.
pub const DEFAULT_CALLS: u32 = 1;
/// An idle replica is removed after this long. docs/functions-simulation.md shows what other values cost.
pub const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// Calls that wait at most.
pub const DEFAULT_QUEUE_LENGTH: u32 = 1000;
/// A call waits this long at most.
pub const DEFAULT_QUEUE_TIMEOUT: Duration = Duration::from_secs(30);

/// An environment listens within this long of its start. A Lambda runtime listens at once and loads the user's code on
/// its first call.
pub const DEFAULT_LISTEN_TIMEOUT: Duration = Duration::from_secs(30);

/// Environments that are prepared before they are asked for.
pub const DEFAULT_RESERVE: u32 = 1;

/// How a pool behaves. Every field may change while the pool lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// What speaks in an environment; decides two defaults and how the front talks to it.
    pub protocol: Protocol,
    /// Replicas kept when idle.
    pub min: u32,
    /// Replicas at most, those starting and stopping included; never below `min`, never 0.
    pub max: u32,
    /// Environments per replica at most, started as calls need them; never 0.
    pub environments: u32,
    /// Calls at once in one environment; never 0. More than one only where the environment can: a plain HTTP server
    /// whose Pod says so, or RIE with managed concurrency.
    pub calls: u32,
    /// TCP port an environment listens on.
    pub port: u16,
    /// A replica without a call for this long is removed.
    pub idle_timeout: Duration,
    /// An environment without a call for this long is frozen; `None`: never.
    pub freeze_after: Option<Duration>,
    /// Calls that wait at most; never 0, since a call to a pool at zero has to wait for a start.
    pub queue_length: u32,
    /// A call waits this long at most.
    pub queue_timeout: Duration,
    /// An environment whose processes run but that does not listen after this long is given up.
    pub listen_timeout: Duration,
    /// Whether an environment that starts without a call is sent a no-op, so that its code is loaded.
    pub warm_up: bool,
    /// Environments that are prepared before they are asked for, as many as there may be: made, and not started.
    pub reserve: u32,
    /// What one replica may use.
    pub size: Size,
}

/// What a replica takes from the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Thousandths of a CPU.
    pub cpu_millis: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

impl Settings {
    /// What holds for a function that sets nothing.
    pub fn of(protocol: Protocol) -> Self {
        let environments = match protocol {
            Protocol::Rie => DEFAULT_ENVIRONMENTS_RIE,
            Protocol::Http => DEFAULT_ENVIRONMENTS_HTTP,
        };
        Self {
            protocol,
            min: DEFAULT_MIN,
            max: DEFAULT_MAX,
            environments,
            calls: DEFAULT_CALLS,
            port: DEFAULT_PORT,
            idle_timeout: DEFAULT_IDLE_TIMEOUT,
            freeze_after: None,
            queue_length: DEFAULT_QUEUE_LENGTH,
            queue_timeout: DEFAULT_QUEUE_TIMEOUT,
            listen_timeout: DEFAULT_LISTEN_TIMEOUT,
            warm_up: false,
            reserve: DEFAULT_RESERVE,
            size: Size { cpu_millis: u64::from(DEFAULT_CPU) * 1000, memory_bytes: u64::from(DEFAULT_MEMORY_MIB) << 20 },
        }
    }
}
