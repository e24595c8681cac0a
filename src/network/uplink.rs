//! The cable before there is a network: a driver is made first, the range of addresses is known only once the Node is
//! registered.

use std::net::IpAddr;

use async_trait::async_trait;
use tokio::sync::watch;

use super::bridge::Bridge;
use super::cni::{Attachment, Cni};
use super::tap::{Surroundings, Tap, Taps};
use super::{Cable, NetworkError};

/// A cable that waits for its bridge, or leads to the network that plugins make.
#[derive(Debug)]
pub struct Uplink {
    bridge: watch::Receiver<Option<Bridge>>,
    plugins: Option<Cni>,
}

impl Uplink {
    /// The cable, and where to put the bridge once it is there.
    pub fn new() -> (Self, watch::Sender<Option<Bridge>>) {
        let (sender, bridge) = watch::channel(None);
        (Self { bridge, plugins: None }, sender)
    }

    /// The same where plugins make the network: there will never be a bridge.
    pub fn by_plugins(plugins: Option<Cni>) -> (Self, watch::Sender<Option<Bridge>>) {
        let (uplink, sender) = Self::new();
        (Self { plugins, ..uplink }, sender)
    }

    async fn bridge(&self) -> Result<Bridge, NetworkError> {
        if self.plugins.is_some() {
            return Err(no_bridge("CNI plugins make the Pod network, and they plug no taps"));
        }
        let mut bridge = self.bridge.clone();
        let found = bridge.wait_for(Option::is_some).await.ok().and_then(|bridge| bridge.clone());
        found.ok_or_else(|| no_bridge("the node is ending"))
    }
}

#[async_trait]
impl Cable for Uplink {
    async fn plug(&self, pid: i32, sandbox: &str, addresses: &[IpAddr]) -> Result<(), NetworkError> {
        match &self.plugins {
            Some(plugins) => plugins.plug(pid, sandbox, addresses).await,
            None => self.bridge().await?.plug(pid, sandbox, addresses).await,
        }
    }

    async fn attach(&self, pid: i32, sandbox: &str, attachment: &Attachment) -> Result<Vec<IpAddr>, NetworkError> {
        match &self.plugins {
            Some(plugins) => plugins.attach(pid, sandbox, attachment).await,
            None => self.bridge().await?.attach(pid, sandbox, attachment).await,
        }
    }

    async fn attached(&self, sandbox: &str) -> Result<Vec<IpAddr>, NetworkError> {
        match &self.plugins {
            Some(plugins) => plugins.attached(sandbox).await,
            None => self.bridge().await?.attached(sandbox).await,
        }
    }

    async fn unplug(&self, sandbox: &str) -> Result<(), NetworkError> {
        match &self.plugins {
            Some(plugins) => plugins.unplug(sandbox).await,
            None => self.bridge().await?.unplug(sandbox).await,
        }
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
        match &self.plugins {
            // That of an earlier configuration went with its machine.
            Some(_) => Ok(()),
            None => self.bridge().await?.remove_tap(sandbox).await,
        }
    }

    async fn remove_other_taps(&self, sandboxes: &[String]) -> Result<usize, NetworkError> {
        match &self.plugins {
            Some(_) => Ok(0),
            None => self.bridge().await?.remove_other_taps(sandboxes).await,
        }
    }
}

fn no_bridge(why: &'static str) -> NetworkError {
    let source = std::io::Error::other(why);
    NetworkError::Kernel { action: "find the Pod network's bridge".to_owned(), source }
}
