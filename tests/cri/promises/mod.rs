//! What CRI promises, whoever keeps it: one test for each promise. They run against the server of this process, and
//! against any other (`hack/cri-compare` makes a table of them).

mod containers;
mod events;
mod images;
mod logs;
mod mounts;
mod namespaces;
mod processes;
mod real;
mod runtime;
mod sandboxes;
mod security;
pub(crate) mod streams;
