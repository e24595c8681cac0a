//! The front against real sockets: loopback listeners, a stand-in for the Lambda RIE, servers that behave badly.
#![allow(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]

mod bounds;
mod drain;
mod faults;
mod forward;
mod lambda;
mod namespace;
mod support;
