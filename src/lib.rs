//! lambdalet: a Kubernetes node in one binary.

pub mod failpoint;
pub mod kubelet_api;
pub mod metrics;
pub mod network;
pub mod node;
pub mod pod;
pub mod quantity;
pub mod runtime;
pub mod telemetry;
