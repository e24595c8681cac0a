//! The function server from outside: gRPC clients of Rust, Python and Go, TLS, and a resource manager.

// Helpers of tests may unwrap as tests do.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod binary;
mod calls;
mod clients;
mod manager;
mod support;
mod tls;
