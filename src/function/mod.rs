//! Function Pods: pools of replicas behind the Pod's own address.
//!
//! * [`front`] takes the calls: HTTP on the Pod's address, one environment leased for each.

pub mod front;
