//! The network of the sandboxes: the node's own allocator and bridge, in a range that a client may choose while nobody
//! has an address.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;
use tokio::sync::watch;
use tonic::Code;
use tracing::{info, warn};

use super::failure::{CriError, status};
use super::shelf;
use crate::network::NetworkError;
use crate::network::bridge::Bridge;
use crate::network::ipam::{DEFAULT_COOL_DOWN, Ipam};
use crate::network::ports::HostPort;
use crate::runtime::types::{SandboxState, SandboxStatus};
use crate::telemetry::chain;

/// The file that remembers the range.
const RANGE: &str = "pod-cidr";
/// Where the addresses' records are.
const ADDRESSES: &str = "addresses";

/// Where the cables are plugged.
#[derive(Clone, Debug)]
pub struct Plug {
    /// Name of the bridge, at most 15 characters.
    pub name: String,
    /// Who waits for the bridge: the driver's cable ([`crate::network::uplink::Uplink`]).
    pub bridge: watch::Sender<Option<Bridge>>,
}

/// Who has which address, and where it is plugged.
pub(super) struct Network {
    root: PathBuf,
    plug: Option<Plug>,
    ipam: Mutex<Arc<Ipam>>,
    /// One change of the range at a time.
    changing: tokio::sync::Mutex<()>,
}

impl Network {
    /// Opens the records below `root` and makes the bridge, if there is to be one. The range is the one it had before,
    /// else `default`; `chosen` wins over both.
    ///
    /// # Errors
    /// Files or the kernel.
    pub(super) async fn open(
        root: &Path,
        (chosen, default): (Option<IpNet>, IpNet),
        plug: Option<Plug>,
    ) -> Result<Self, CriError> {
        let before = fs::read_to_string(root.join(RANGE)).ok().and_then(|text| text.trim().parse().ok());
        let range = chosen.or(before).unwrap_or(default);
        let ipam = Ipam::open(&root.join(ADDRESSES), range, DEFAULT_COOL_DOWN)?;
        let network =
            Self { root: root.to_owned(), plug, ipam: Mutex::new(Arc::new(ipam)), changing: Default::default() };
        network.make_bridge().await?;
        Ok(network)
    }

    fn ipam(&self) -> Arc<Ipam> {
        Arc::clone(&self.ipam.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn make_bridge(&self) -> Result<(), CriError> {
        let ipam = self.ipam();
        shelf::write(&self.root, "pod-cidr.new", RANGE, format!("{}\n", ipam.range()).as_bytes())?;
        if let Some(plug) = &self.plug {
            let bridge = Bridge::ensure(&plug.name, ipam.gateway(), ipam.range()).await?;
            info!(bridge = plug.name, range = %ipam.range(), "the network of the sandboxes is up");
            plug.bridge.send_replace(Some(bridge));
        }
        Ok(())
    }

    /// The range that addresses come from.
    pub(super) fn range(&self) -> IpNet {
        self.ipam().range()
    }

    /// Takes addresses from another range from now on.
    ///
    /// # Errors
    /// [`Code::FailedPrecondition`] while a sandbox has an address, and what files and the kernel refuse.
    pub(super) async fn set_range(&self, range: IpNet) -> Result<(), tonic::Status> {
        let _changing = self.changing.lock().await;
        let before = self.ipam();
        if before.range() == range.trunc() {
            return Ok(());
        }
        let held = before.held().len();
        if held > 0 {
            let text = format!("the range stays {}: {held} sandboxes have addresses of it", before.range());
            return Err(status(Code::FailedPrecondition, &text));
        }
        let ipam = Ipam::open(&self.root.join(ADDRESSES), range, DEFAULT_COOL_DOWN).map_err(CriError::from)?;
        // Its rules are those of the range before, and it would not give them up.
        let bridge = self.plug.as_ref().and_then(|plug| plug.bridge.send_replace(None));
        if let Some(bridge) = bridge {
            bridge.remove().await.map_err(CriError::from)?;
        }
        *self.ipam.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(ipam);
        Ok(self.make_bridge().await?)
    }

    /// The Pod's address.
    pub(super) fn allot(&self, uid: &str) -> Result<IpAddr, CriError> {
        Ok(self.ipam().allocate(uid)?)
    }

    /// No sandbox of the Pod has its address any more.
    pub(super) fn release(&self, uid: &str) {
        if let Err(error) = self.ipam().release(uid) {
            warn!(pod_uid = uid, error = chain(&error), "failed to release an address");
        }
    }

    /// Notes the addresses of sandboxes that are ready, and releases all others.
    pub(super) fn adopt(&self, sandboxes: &[SandboxStatus]) {
        let ipam = self.ipam();
        let ready: Vec<_> = sandboxes.iter().filter(|sandbox| sandbox.state == SandboxState::Ready).collect();
        for sandbox in &ready {
            if let Some(address) = sandbox.address()
                && let Err(error) = ipam.adopt(&sandbox.pod.uid, address)
            {
                warn!(pod = %sandbox.pod, error = chain(&error), "a sandbox has an address that is not its own");
            }
        }
        for (_, uid) in ipam.held() {
            if !ready.iter().any(|sandbox| sandbox.pod.uid == uid) {
                self.release(&uid);
            }
        }
    }

    /// Makes exactly these ports of the host lead to the Pod.
    pub(super) async fn open_ports(&self, uid: &str, address: IpAddr, ports: Vec<HostPort>) -> Result<(), CriError> {
        match self.bridge() {
            Some(bridge) if !ports.is_empty() => Ok(bridge.open_ports(uid, &[address], ports).await?),
            _ => Ok(()),
        }
    }

    /// No port of the host leads to the Pod any more.
    pub(super) async fn close_ports(&self, uid: &str) -> Result<(), NetworkError> {
        match self.bridge() {
            Some(bridge) => bridge.close_ports(uid).await,
            None => Ok(()),
        }
    }

    fn bridge(&self) -> Option<Bridge> {
        self.plug.as_ref().and_then(|plug| plug.bridge.borrow().clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    async fn open(root: &Path, chosen: Option<&str>) -> Network {
        Network::open(root, (chosen.map(range), range("10.1.0.0/16")), None).await.unwrap()
    }

    #[tokio::test]
    async fn the_range_can_be_chosen_while_nobody_has_an_address_and_is_remembered() {
        let root = tempfile::tempdir().unwrap();
        let network = open(root.path(), None).await;
        network.set_range(range("10.2.0.0/24")).await.unwrap();
        assert_eq!(network.allot("a").unwrap(), "10.2.0.2".parse::<IpAddr>().unwrap());
        let refused = network.set_range(range("10.3.0.0/24")).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        network.set_range(range("10.2.0.0/24")).await.unwrap();
        drop(network);
        let network = open(root.path(), None).await;
        assert_eq!(network.range(), range("10.2.0.0/24"));
        assert_eq!(network.allot("a").unwrap(), "10.2.0.2".parse::<IpAddr>().unwrap());
        assert_eq!(open(root.path(), Some("10.9.0.0/16")).await.range(), range("10.9.0.0/16"));
    }

    #[tokio::test]
    async fn addresses_of_sandboxes_that_are_gone_are_released_at_the_start() {
        let root = tempfile::tempdir().unwrap();
        let network = open(root.path(), None).await;
        network.allot("a").unwrap();
        network.adopt(&[]);
        network.set_range(range("10.2.0.0/24")).await.unwrap();
    }
}
