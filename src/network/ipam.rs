//! Which Pod has which address: crash-safe, never handing one out twice.
