//! The node's own HTTPS API, as the API server and scrapers know it from a kubelet.

pub mod targets;
