//! Kubernetes quantities (`500m`, `1.5Gi`) as exact numbers.

/// A number of nano-units (10^-9), exact for everything Kubernetes accepts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantity {
    nanos: i128,
}

impl Quantity {
    /// The number in nano-units.
    pub fn nanos(self) -> i128 {
        self.nanos
    }
}
