//! lambdalet: a Kubernetes node in one binary.

pub mod apiserver;
pub mod args;
pub mod check;
pub mod config;
pub mod failpoint;
pub mod kubelet_api;
pub mod metrics;
pub mod network;
pub mod node;
pub mod pod;
pub mod quantity;
pub mod runtime;
pub mod shutdown;
pub mod telemetry;
