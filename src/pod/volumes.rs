//! The Pod's volumes on the host.
