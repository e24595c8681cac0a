//! Functions: a labelled Pod is a pool of replicas behind the Pod's own address.
//!
//! ```text
//! client --> front --lease--> service --Event--> pool_state::Pool --Action--> service --verb--> Replicas (the Pod loop)
//!              '--call--> environment                  |
//!                                              ledger::Ledger: what replicas borrow beyond what Pods request
//! ```
//! A **replica** is what its environments share: a cgroup with the Pod's limits, or a VM. An **environment** is a
//! sandbox with an address of its own, in which one call runs at a time (more only where the Pod says so). A **call** is
//! one invocation, from the front's acceptance to its end.
//!
//! The policy is pure: values and `now` go in, values come out, so that every rule has a property test and the
//! simulation (`hack/sim`, docs/functions-simulation.md) runs the very same code.
//!
//! * [`labels`] says whether a Pod is a function, and reads its settings and complaints.
//! * [`settings`] are those values, with defaults and bounds.
//! * [`protocol`] tells the Lambda runtime interface emulator from a plain HTTP server.
//! * [`pool_state`] is the pool of one function: queue, environments, scaling, drain.
//! * [`ledger`] is the node's capacity as pools borrow it.
//! * [`service`] carries out what a pool decides, and hands leases to the front.
//! * [`front`] takes the calls: HTTP on the Pod's address, one environment leased for each.

pub mod front;
pub mod labels;
pub mod ledger;
pub mod pool_state;
pub mod protocol;
pub mod service;
pub mod settings;
