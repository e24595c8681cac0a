//! The network of the sandboxes: the node's own allocator and bridge, in a range that a client may choose while nobody
//! has an address.

use std::collections::HashSet;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;
use tokio::sync::{Mutex as AsyncMutex, watch};
use tonic::Code;
use tracing::{info, warn};

use super::failure::{CriError, status};
use super::shelf::{self, Key};
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
    /// One changes the range or takes an address of it at a time. Holds a bridge that nobody is plugged in at: that of the
    /// range before until it is gone, or of one that is not remembered yet.
    changing: AsyncMutex<Option<Bridge>>,
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
        let ipam = Arc::new(Ipam::open(&root.join(ADDRESSES), range, DEFAULT_COOL_DOWN)?);
        let (root, kept) = (root.to_owned(), Mutex::new(Arc::clone(&ipam)));
        let network = Self { root, plug, ipam: kept, changing: AsyncMutex::default() };
        network.make_bridge(ipam, &mut None).await?;
        Ok(network)
    }

    fn ipam(&self) -> Arc<Ipam> {
        Arc::clone(&self.ipam.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes the bridge, and then remembers the range: one that has no bridge would fail each start from now on.
    async fn make_bridge(&self, ipam: Arc<Ipam>, unused: &mut Option<Bridge>) -> Result<(), CriError> {
        if let Some(plug) = &self.plug {
            *unused = Some(Bridge::ensure(&plug.name, ipam.gateway(), ipam.range()).await?);
        }
        shelf::write(&self.root, "pod-cidr.new", RANGE, format!("{}\n", ipam.range()).as_bytes())?;
        *self.ipam.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&ipam);
        if let Some(plug) = &self.plug {
            info!(bridge = plug.name, range = %ipam.range(), "the network of the sandboxes is up");
            plug.bridge.send_replace(unused.take());
        }
        Ok(())
    }

    /// Why no sandbox can be plugged in now, if none can.
    pub(super) fn trouble(&self) -> Option<String> {
        let plug = self.plug.as_ref().filter(|plug| plug.bridge.borrow().is_none())?;
        Some(format!("bridge {} is not there: the range of the sandboxes is being changed, or could not be", plug.name))
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
        let mut unused = self.changing.lock().await;
        let mut ipam = self.ipam();
        if ipam.range() == range.trunc() {
            if self.trouble().is_none() {
                return Ok(());
            }
        } else {
            let held = ipam.held().len();
            if held > 0 {
                let text = format!("the range stays {}: {held} sandboxes have addresses of it", ipam.range());
                return Err(status(Code::FailedPrecondition, &text));
            }
            let opened = Ipam::open(&self.root.join(ADDRESSES), range, DEFAULT_COOL_DOWN);
            ipam = Arc::new(opened.map_err(CriError::from)?);
        }
        // Its rules are those of the range before, and it would not give them up.
        if let Some(bridge) = self.plug.as_ref().and_then(|plug| plug.bridge.send_replace(None)) {
            *unused = Some(bridge);
        }
        if let Some(bridge) = unused.clone() {
            bridge.remove().await.map_err(CriError::from)?;
            *unused = None;
        }
        Ok(self.make_bridge(ipam, &mut unused).await?)
    }

    /// The sandbox's address.
    ///
    /// # Errors
    /// [`Code::Unavailable`] while there is no bridge: the driver would wait for it without an end.
    pub(super) async fn allot(&self, sandbox: &Key) -> Result<IpAddr, tonic::Status> {
        let _changing = self.changing.lock().await;
        if let Some(trouble) = self.trouble() {
            return Err(status(Code::Unavailable, &trouble));
        }
        Ok(self.ipam().allocate(&holder(sandbox)).map_err(CriError::from)?)
    }

    /// The sandbox is not ready any more: no port of the host leads to its address, which is no longer its own.
    pub(super) async fn leave(&self, sandbox: &Key) {
        self.free(&holder(sandbox)).await;
    }

    async fn free(&self, holder: &str) {
        if let Err(error) = self.close_ports(holder).await {
            warn!(sandbox = holder, error = chain(&error), "ports of the host still lead to a sandbox that is gone");
        }
        if let Err(error) = self.ipam().release(holder) {
            warn!(sandbox = holder, error = chain(&error), "failed to release an address");
        }
    }

    /// Notes the addresses of sandboxes that are ready. No other has an address, or ports of the host.
    pub(super) async fn adopt(&self, sandboxes: &[SandboxStatus]) {
        let _changing = self.changing.lock().await;
        let ipam = self.ipam();
        let ready: Vec<_> = sandboxes.iter().filter(|sandbox| sandbox.state == SandboxState::Ready).collect();
        for sandbox in &ready {
            if let Some(address) = sandbox.address()
                && let Err(error) = ipam.adopt(&holder(&(*sandbox).into()), address)
            {
                warn!(pod = %sandbox.pod, error = chain(&error), "a sandbox has an address that is not its own");
            }
        }
        let held = ipam.held().into_iter().map(|(_, holder)| holder);
        let with_ports = self.bridge().map(|bridge| bridge.pods_with_ports()).unwrap_or_default();
        let ready: HashSet<String> = ready.into_iter().map(|sandbox| holder(&sandbox.into())).collect();
        for gone in held.chain(with_ports).filter(|holder| !ready.contains(holder)) {
            self.free(&gone).await;
        }
    }

    /// Makes exactly these ports of the host lead to the sandbox.
    pub(super) async fn open_ports(
        &self,
        sandbox: &Key,
        address: IpAddr,
        ports: Vec<HostPort>,
    ) -> Result<(), CriError> {
        match self.bridge() {
            Some(bridge) if !ports.is_empty() => Ok(bridge.open_ports(&holder(sandbox), &[address], ports).await?),
            _ => Ok(()),
        }
    }

    async fn close_ports(&self, holder: &str) -> Result<(), NetworkError> {
        match self.bridge() {
            Some(bridge) => bridge.close_ports(holder).await,
            None => Ok(()),
        }
    }

    fn bridge(&self) -> Option<Bridge> {
        self.plug.as_ref().and_then(|plug| plug.bridge.borrow().clone())
    }
}

/// By what name a sandbox holds its address and its ports: a Pod may have two that are ready, each with its own.
fn holder(sandbox: &Key) -> String {
    match sandbox.attempt {
        0 => sandbox.uid.clone(),
        attempt => format!("{}/{attempt}", sandbox.uid),
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::network::bridge::tests::{on_a_host, shell};
    use crate::network::ports::Protocol;
    use crate::runtime::types::PodRef;

    const BRIDGE: &str = "lbcri";

    fn range(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn key(uid: &str) -> Key {
        Key::of_sandboxes(uid)
    }

    fn plug(name: &str) -> Plug {
        Plug { name: name.to_owned(), bridge: watch::Sender::new(None) }
    }

    async fn open(root: &Path, chosen: Option<&str>) -> Network {
        Network::open(root, (chosen.map(range), range("10.1.0.0/16")), None).await.unwrap()
    }

    async fn plugged(root: &Path) -> Network {
        Network::open(root, (None, range("10.1.0.0/16")), Some(plug(BRIDGE))).await.unwrap()
    }

    #[tokio::test]
    async fn the_range_can_be_chosen_while_nobody_has_an_address_and_is_remembered() {
        let root = tempfile::tempdir().unwrap();
        let network = open(root.path(), None).await;
        network.set_range(range("10.2.0.0/24")).await.unwrap();
        assert_eq!(network.allot(&key("a")).await.unwrap(), "10.2.0.2".parse::<IpAddr>().unwrap());
        let refused = network.set_range(range("10.3.0.0/24")).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        network.set_range(range("10.2.0.0/24")).await.unwrap();
        drop(network);
        let network = open(root.path(), None).await;
        assert_eq!(network.range(), range("10.2.0.0/24"));
        assert_eq!(network.allot(&key("a")).await.unwrap(), "10.2.0.2".parse::<IpAddr>().unwrap());
        assert_eq!(open(root.path(), Some("10.9.0.0/16")).await.range(), range("10.9.0.0/16"));
    }

    #[tokio::test]
    async fn a_range_without_a_bridge_fails_each_time_and_is_not_remembered() {
        let root = tempfile::tempdir().unwrap();
        let mut network = open(root.path(), None).await;
        // A name that no bridge can have.
        network.plug = Some(plug(""));
        for _ in 0..2 {
            network.set_range(range("10.2.0.0/24")).await.unwrap_err();
            // Nor is the range before as it was.
            network.set_range(range("10.1.0.0/16")).await.unwrap_err();
            assert!(network.trouble().is_some());
            assert_eq!(network.allot(&key("a")).await.unwrap_err().code(), Code::Unavailable);
        }
        assert_eq!(open(root.path(), None).await.range(), range("10.1.0.0/16"));
        network.plug = None;
        network.set_range(range("10.2.0.0/24")).await.unwrap();
        assert_eq!(network.trouble(), None);
        assert_eq!(network.allot(&key("a")).await.unwrap(), "10.2.0.2".parse::<IpAddr>().unwrap());
    }

    #[tokio::test]
    async fn nobody_gets_an_address_while_the_range_changes() {
        let root = tempfile::tempdir().unwrap();
        let network = open(root.path(), None).await;
        let change = network.changing.lock().await;
        assert!(network.allot(&key("a")).now_or_never().is_none());
        drop(change);
        network.allot(&key("a")).await.unwrap();
    }

    #[test]
    fn a_range_whose_bridge_could_not_be_made_is_made_by_the_next_request() {
        on_a_host(async || {
            let root = tempfile::tempdir().unwrap();
            let mut network = plugged(root.path()).await;
            let named = |name: &str, network: &mut Network| network.plug.as_mut().unwrap().name = name.to_owned();
            named("", &mut network);
            for _ in 0..2 {
                network.set_range(range("10.2.0.0/24")).await.unwrap_err();
            }
            assert!(network.trouble().is_some() && !shell("ip -o link").contains(BRIDGE));
            named(BRIDGE, &mut network);
            network.set_range(range("10.2.0.0/24")).await.unwrap();
            assert_eq!(network.trouble(), None);
            assert!(shell("ip -o addr").contains("10.2.0.1/24"));
        });
    }

    #[tokio::test]
    async fn addresses_of_sandboxes_that_are_gone_are_released_at_the_start() {
        let root = tempfile::tempdir().unwrap();
        let network = open(root.path(), None).await;
        network.allot(&key("a")).await.unwrap();
        network.adopt(&[]).await;
        network.set_range(range("10.2.0.0/24")).await.unwrap();
    }

    #[test]
    fn ports_of_the_host_that_led_to_sandboxes_that_are_gone_are_closed_at_the_start() {
        on_a_host(async || {
            let root = tempfile::tempdir().unwrap();
            let port = |host_port| HostPort { protocol: Protocol::Tcp, host_ip: None, host_port, pod_port: 80 };
            let before = plugged(root.path()).await;
            let mut addresses = Vec::new();
            for (uid, host_port) in [("gone", 8080), ("released", 8081), ("ready", 8082)] {
                let address = before.allot(&key(uid)).await.unwrap();
                addresses.push(address);
                before.open_ports(&key(uid), address, vec![port(host_port)]).await.unwrap();
            }
            // Ended between the two steps of a removal the other way round.
            before.ipam().release("released").unwrap();
            drop(before);
            let network = plugged(root.path()).await;
            assert!(shell("iptables -t nat -S").contains("--dport 8080"));
            let ready = SandboxStatus {
                id: "sandbox".into(),
                pod: PodRef { uid: "ready".into(), namespace: "n".into(), name: "p".into() },
                attempt: 0,
                state: SandboxState::Ready,
                created_at: jiff::Timestamp::UNIX_EPOCH,
                addresses: addresses.split_off(2),
                pid: None,
            };
            network.adopt(std::slice::from_ref(&ready)).await;
            let rules = shell("iptables -t nat -S");
            let open = [8080, 8081, 8082].map(|port| rules.contains(&format!("--dport {port}")));
            assert_eq!(open, [false, false, true], "{rules}");
            assert_eq!(network.ipam().held(), [(ready.addresses[0], "ready".to_owned())]);
        });
    }
}
