//! lambdalet: a Kubernetes node in one binary.
//!
//! It registers a Node, takes the Pods that the scheduler binds to it, runs each as a group of Docker containers with
//! an address of its own, or as a microVM, and says how they are. This page is the tour; `--document-private-items` shows all of it.
//!
//! ```text
//! API server --watch--> pod::watch --spec--> pod::worker --verb--> runtime::SandboxRuntime --> docker | microvm
//!     ^                                          |    '--address--> network::ipam                 |
//!     |                                          '--observed--> pod::status                       |
//!     |                                                             |                             v
//!     |<----------------------- PATCH ---------------------- pod::publish           network::bridge (cable)
//!     |<---- POST, PATCH, PUT ---- node::{object, lease}
//!     '----- GET logs ----> kubelet_api --PodTargets--> pod::directory
//!                               '-----------------verb-----------------> runtime::SandboxRuntime
//! ```
//!
//! In the order in which things happen:
//!
//! * [`args`] reads the command line and wires the rooms; nothing else names concrete types.
//! * [`config`] is what the node was told: kubelet's defaults, then the file, then the flags.
//! * [`check`] says what is missing on this host, for `lambdalet check`.
//! * [`apiserver`] is the way to the API server, and what its failures mean.
//! * [`node`] registers the Node, keeps its status true and renews its lease.
//! * [`pod`] owns every Pod from the first look to the last: one worker per UID, plan, status, events.
//! * [`function`] makes a pool of replicas of a labelled Pod: settings, queue, scaling; pure values.
//! * [`function_server`] starts single replicas for a resource manager that asks by gRPC, past Kubernetes.
//! * [`controller`] approves the serving certificates that nodes ask for, in `lambdalet controller`.
//! * [`cri`] serves the runtime to crictl and to other kubelets, in `lambdalet cri`.
//! * [`runtime`] is the seam: verbs with CRI's names and rules, and the drivers behind them: Docker, microVMs, CRI.
//! * [`network`] gives each Pod an address and plugs its cable.
//! * [`kubelet_api`] is the node's HTTPS API: logs, exec, attach, port-forward, Pods, health and metrics, for
//!   those who may.
//!
//! What all of them use:
//!
//! * [`shutdown`] holds the named tasks: the first signal drains, the second aborts, a failure ends the process.
//! * [`telemetry`] writes log lines, and errors with their whole chain of causes.
//! * [`events`] writes events on Pods and on the Node.
//! * [`metrics`] is the registry behind `/metrics`.
//! * `file` replaces and removes files of our own.
//! * `thread` does work that must not be done on a shared thread.
//! * [`memory`] lets go of code that is not run.
//! * [`quantity`] reads and writes Kubernetes quantities exactly.
//! * [`spdy`] reads and writes the frames of SPDY/3.1, for clients of the kubelet API and of a runtime's streams.
//! * [`certificate`] reads and writes certificates, and says when one is to be renewed.
//! * [`retry`] says when to try again, and tells a failure that goes on once a minute.
//! * [`failpoint`] names the steps at which a test may kill the process.
//!
//! Imports point one way: [`args`], then [`node`], [`pod`], [`kubelet_api`], [`function`], [`function_server`],
//! [`controller`], [`cri`] and [`check`], then [`runtime`], then
//! [`network`]. `tests/layout.rs` holds the code to it.

pub mod apiserver;
pub mod args;
pub mod certificate;
pub mod check;
pub mod config;
pub mod controller;
pub mod cri;
pub mod events;
pub mod failpoint;
mod file;
pub mod function;
pub mod function_server;
pub mod kubelet_api;
pub mod memory;
pub mod metrics;
pub mod network;
pub mod node;
pub mod pod;
pub mod quantity;
pub mod retry;
pub mod runtime;
pub mod shutdown;
pub mod spdy;
pub mod telemetry;
mod thread;
mod turns;
