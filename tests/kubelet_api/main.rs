//! The node's API as a client meets it: a real listener, a mock API server, a runtime that has logs and processes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]

mod access;
mod bounds;
mod endpoints;
mod exec;
mod exposition;
mod logs;
mod port_forward;
mod processes;
mod spdy;
mod statistics;
mod support;
mod websocket;
