//! The addresses of Pods: none is given away that a sandbox of an earlier process still has.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::OnceCell;

use crate::network::NetworkError;
use crate::network::ipam::Ipam;
use crate::runtime::{RuntimeError, SandboxRuntime};
use crate::telemetry::chain;

/// Why a Pod gets no address.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// It is not known which addresses are in use.
    #[error("failed to list the sandboxes that have addresses")]
    Runtime(#[from] RuntimeError),
    /// There is none, or its record cannot be written.
    #[error("failed to give the Pod an address")]
    Network(#[from] NetworkError),
}

/// Who has which address.
pub struct Addresses {
    ipam: Arc<Ipam>,
    adopted: OnceCell<()>,
}

impl Addresses {
    /// The addresses of `ipam`.
    pub fn new(ipam: Arc<Ipam>) -> Self {
        Self { ipam, adopted: OnceCell::new() }
    }

    /// The Pod's address; the same for every sandbox it ever has. Before the first one is given, those of the sandboxes
    /// that are there are noted: their records may be lost or unreadable, and none may be given twice.
    ///
    /// # Errors
    /// The runtime does not answer, no address is free, or a record could not be written.
    pub async fn allot(&self, runtime: &dyn SandboxRuntime, pod_uid: &str) -> Result<IpAddr, AddressError> {
        self.adopted.get_or_try_init(|| self.adopt(runtime)).await?;
        Ok(self.ipam.allocate(pod_uid)?)
    }

    async fn adopt(&self, runtime: &dyn SandboxRuntime) -> Result<(), AddressError> {
        for sandbox in runtime.list_pod_sandboxes(None).await? {
            let Some(address) = sandbox.address else { continue };
            match self.ipam.adopt(&sandbox.pod.uid, address) {
                Err(error @ NetworkError::Refused { .. }) => {
                    tracing::warn!(pod = %sandbox.pod, error = chain(&error), "a sandbox has an address that is not its own");
                }
                adopted => adopted?,
            }
        }
        Ok(())
    }

    /// Starts the cool-down of the Pod's address: the Pod object is gone.
    ///
    /// # Errors
    /// The record could not be written; the Pod then still holds the address.
    pub fn release(&self, pod_uid: &str) -> Result<(), NetworkError> {
        self.ipam.release(pod_uid)
    }

    /// The address can be given away at once: nobody outside this node was ever told of it.
    ///
    /// # Errors
    /// The record could not be removed.
    pub fn discard(&self, key: &str) -> Result<(), NetworkError> {
        self.ipam.discard(key)
    }

    /// The addresses that Pods hold, with the Pod's UID.
    pub fn held(&self) -> Vec<(IpAddr, String)> {
        self.ipam.held()
    }
}
