//! The cable before there is a bridge: a driver is made first, the range of addresses is known only once the Node is
//! registered.

use std::net::IpAddr;

use async_trait::async_trait;
use tokio::sync::watch;

use super::bridge::Bridge;
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

    async fn bridge(&self) -> Option<Bridge> {
        let mut bridge = self.bridge.clone();
        bridge.wait_for(Option::is_some).await.ok()?.clone()
    }
}

#[async_trait]
impl Cable for Uplink {
    async fn plug(&self, pid: i32, sandbox: &str, address: IpAddr) -> Result<(), NetworkError> {
        match self.bridge().await {
            Some(bridge) => bridge.plug(pid, sandbox, address).await,
            None => Err(ending()),
        }
    }

    async fn unplug(&self, sandbox: &str) -> Result<(), NetworkError> {
        match self.bridge().await {
            Some(bridge) => bridge.unplug(sandbox).await,
            None => Err(ending()),
        }
    }
}

fn ending() -> NetworkError {
    let source = std::io::Error::other("the node is ending");
    NetworkError::Kernel { action: "find the Pod network's bridge".to_owned(), source }
}
