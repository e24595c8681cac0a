//! What a user of the node sees, on a real cluster: a real scheduler, a real API server, a real Docker.
//!
//! `hack/test --cluster` brings all of it up and runs these. By hand, with a cluster from `hack/cluster --dir D up`:
//! `LAMBDALET_TEST_CLUSTER=D cargo test --test cluster -- --ignored --test-threads=4 [FILTER]`.
//! Without that variable each test says so and passes, so that `--ignored` alone is harmless.
//!
//! Most tests share one node and get a namespace each ([`harness::on_shared_node`]); what stops, kills or configures a
//! node has one of its own ([`harness::on_own_node`]). After each test, nothing of its Pods may be left on the host.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]
#![allow(clippy::too_many_lines, reason = "a scenario reads best in one piece")]
#![allow(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]

mod harness;
#[path = "../queries/mod.rs"]
mod queries;

mod admission;
mod bad_input;
mod certificates;
mod cni;
mod containerd;
mod debug;
mod deletion;
mod environment;
mod exec;
mod fakecloud;
mod function_tools;
mod functions;
mod hardening;
mod identity;
mod images;
mod lifecycle;
mod logs;
mod microvm;
mod network;
mod node;
mod node_shutdown;
mod outage;
mod probes;
mod resize;
mod resources;
mod restart;
mod sidecars;
mod statics;
mod statistics;
mod volumes;
