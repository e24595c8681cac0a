//! The node's API as a client meets it: a real listener, a mock API server, a runtime that only has logs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]

mod access;
mod bounds;
mod endpoints;
mod logs;
mod support;
