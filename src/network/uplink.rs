//! The cable before there is a bridge: a driver is made first, the range of addresses is known only once the Node is
//! registered.

use std::net::IpAddr;

use async_trait::async_trait;
use tokio::sync::watch;

use super::bridge::Bridge;
use super::tap::{Surroundings, Tap, Taps};
use super::{Cable, NetworkError};

/// A cable that waits for its bridge.
#[derive(Debug)]
pub struct Uplink {
    bridge: watch::Receiver<Option<Bridge>>,
}

impl Uplink {
    /// The cable, and where to put the bridge once it is there.
    pub fn new() -> (Self, watch::Sender<Option<Bridge>>) {
        let (sender, bridge) = watch::channel(None);
        (Self { bridge }, sender)
    }

    async fn bridge(&self) -> Result<Bridge, NetworkError> {
        let mut bridge = self.bridge.clone();
        let found = bridge.wait_for(Option::is_some).await.ok().and_then(|bridge| bridge.clone());
        found.ok_or_else(ending)
    }
}

#[async_trait]
impl Cable for Uplink {
    async fn plug(&self, pid: i32, sandbox: &str, address: IpAddr) -> Result<(), NetworkError> {
        self.bridge().await?.plug(pid, sandbox, address).await
    }

    async fn unplug(&self, sandbox: &str) -> Result<(), NetworkError> {
        self.bridge().await?.unplug(sandbox).await
    }
}

#[async_trait]
impl Taps for Uplink {
    async fn surroundings(&self) -> Result<Surroundings, NetworkError> {
        self.bridge().await?.surroundings().await
    }

    async fn make_tap(&self, sandbox: &str, owner: Option<u32>) -> Result<Tap, NetworkError> {
        self.bridge().await?.make_tap(sandbox, owner).await
    }

    async fn lead(&self, sandbox: &str, address: IpAddr) -> Result<(), NetworkError> {
        self.bridge().await?.lead(sandbox, address).await
    }

    async fn remove_tap(&self, sandbox: &str) -> Result<(), NetworkError> {
        self.bridge().await?.remove_tap(sandbox).await
    }

    async fn remove_other_taps(&self, sandboxes: &[String]) -> Result<usize, NetworkError> {
        self.bridge().await?.remove_other_taps(sandboxes).await
    }
}

fn ending() -> NetworkError {
    let source = std::io::Error::other("the node is ending");
    NetworkError::Kernel { action: "find the Pod network's bridge".to_owned(), source }
}
