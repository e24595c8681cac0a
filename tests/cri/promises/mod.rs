//! What CRI promises, whoever keeps it: one test for each promise. They run against the server of this process, and
//! against any other (`hack/cri-compare` makes a table of them).

mod containers;
mod events;
mod images;
mod logs;
mod runtime;
mod sandboxes;
pub(crate) mod streams;
