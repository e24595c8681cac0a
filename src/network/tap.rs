//! The cable of a machine: a tap device on the node's bridge, in the place of a Docker Pod's veth pair.
//!
//! A VMM that opens its tap by name can do so only from the network namespace that this is in. For such a one it is made in a
//! namespace of its own, with a cable from there to the bridge; on the host everything is named, guarded and led as otherwise.
//!
//! What leaves a guest is filtered before the bridge looks at it (see `guard`): a guest that has no address yet
//! reaches nobody, and one that has sends as itself or not at all.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use async_trait::async_trait;

use super::NetworkError;
pub use super::bridge::mac_of;

/// A hardware address.
pub type Mac = [u8; 6];

/// A tap device on the bridge.
#[derive(Clone, Debug)]
pub struct Tap {
    /// The interface: the port of the bridge, and the device where that is another.
    pub name: String,
    /// The open device, if it was made for nobody else: it goes away when the last one who has it closes it.
    pub device: Option<Arc<OwnedFd>>,
    /// The network namespace of a device that is opened by name: all that is in it goes away, and the port with it, when the
    /// last process there has ended and the last one who has this closes it.
    pub namespace: Option<Arc<OwnedFd>>,
}

/// What a guest has to know of the Pod network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Surroundings {
    /// Through which it reaches everybody.
    pub gateway: IpAddr,
    /// Bytes of the largest packet.
    pub mtu: u32,
}

/// Joins machines to the node's Pod network.
#[async_trait]
pub trait Taps: Send + Sync {
    /// What guests have to know of the network.
    ///
    /// # Errors
    /// There is no network, as the node is ending.
    async fn surroundings(&self) -> Result<Surroundings, NetworkError>;

    /// Makes the tap of this sandbox, in the place of one that is there; its guest reaches nobody yet.
    ///
    /// With an `owner` the device is for a process of that user to open by name, in a network namespace that has nothing but
    /// this and what joins it to the bridge. Otherwise it is returned open.
    ///
    /// # Errors
    /// The kernel's refusal; nothing is left behind that [`remove_tap`](Self::remove_tap) does not remove.
    async fn make_tap(&self, sandbox: &str, owner: Option<u32>) -> Result<Tap, NetworkError>;

    /// Gives the guest behind the sandbox's tap its address: the hardware address that goes with it, which the guest has
    /// to have ([`mac_of`]), is all it may send from, and packets are led there that were refused before. A process must
    /// have the device open. Doing it again with another address is fine.
    ///
    /// # Errors
    /// [`NetworkError::Kernel`] if there is no such tap, or nobody has opened it.
    async fn lead(&self, sandbox: &str, address: IpAddr) -> Result<(), NetworkError>;

    /// Takes the tap away; from then on its address refuses. Removing what is not there is Ok.
    async fn remove_tap(&self, sandbox: &str) -> Result<(), NetworkError>;

    /// Takes away every tap but those of these sandboxes; how many there were. To be called after a restart, once it is
    /// known which sandboxes there are.
    async fn remove_other_taps(&self, sandboxes: &[String]) -> Result<usize, NetworkError>;
}
