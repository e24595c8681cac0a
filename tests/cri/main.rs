//! CRI v1 as a client meets it: a real socket, a real gRPC client. [`promises`] are what any runtime keeps, one test for
//! each; they are asked of a runtime in memory, and of whatever `LAMBDALET_TEST_CRI` names. The others are ours alone.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]
#![allow(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]

mod containers;
mod driver;
mod events;
mod images;
mod logs;
mod promises;
mod robustness;
mod runtime;
mod sandboxes;
mod script;
mod streams;
mod support;
mod whole;
