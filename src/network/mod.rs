//! The node's Pod network: who has which address ([`ipam`]) and the cable from the sandbox to the host ([`bridge`]).
//!
//! Every driver shares it, so Docker and microVM Pods live on one network and an address is never handed out twice.
//!
//! ```text
//! pod::worker --allocate/release--> Ipam (one file per address)
//! driver      --plug/unplug-------> Cable = Bridge --netlink--> veth pair: lv<hash> on the bridge, eth0 in the sandbox
//!             --attach/unplug-----> Cable = Cni ----plugins---> whatever they make; the addresses are theirs, too ([`cni`])
//!             --make_tap/lead-----> Taps  = Bridge -----------> tap: lt<hash> on the bridge, guarded by nft; or a cable's end
//!                                                               of that name, to a tap in a namespace of the VMM's own
//! ```
//!
//! A Pod reaches everything, its neighbours too, through the gateway: the address has the range's prefix length, yet
//! there is no link route to the range. So every packet is routed by the host, and Service addresses work between two
//! Pods of one node whether or not bridged packets are shown to iptables there (`bridge-nf-call-iptables`).
//!
//! The host in turn has one route for each plugged Pod; whoever calls any other address of the range is refused at once
//! (`routes`).

pub mod bridge;
pub mod cni;
pub mod egress;
mod firewall;
mod guard;
pub mod inside;
pub mod ipam;
mod netlink;
pub mod ports;
mod routes;
pub mod tap;
pub mod uplink;

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use async_trait::async_trait;
use ipnet::IpNet;

use self::cni::{Attachment, CniError};

/// Joins a sandbox to the node's Pod network.
#[async_trait]
pub trait Cable: Send + Sync {
    /// Gives the network namespace of process `pid` the interface `eth0` with these addresses (one of each family at
    /// most), and leads packets there that were refused before. Plugging a plugged sandbox is Ok; an interface that a dead process of the same sandbox left
    /// behind is replaced.
    ///
    /// # Errors
    /// [`NetworkError::Namespace`] if the process is gone. Nothing is left behind on an error that `unplug` does not
    /// remove.
    async fn plug(&self, pid: i32, sandbox: &str, addresses: &[IpAddr]) -> Result<(), NetworkError>;

    /// Gives the network namespace of process `pid` an interface `eth0` with addresses that this network chooses, and says
    /// which. A sandbox that was attached completely keeps what it has.
    ///
    /// # Errors
    /// As [`Cable::plug`], and [`CniError::OtherNetwork`] of a network that is told its addresses.
    async fn attach(&self, pid: i32, sandbox: &str, attachment: &Attachment) -> Result<Vec<IpAddr>, NetworkError> {
        let _ = (pid, attachment);
        self.attached(sandbox).await
    }

    /// The addresses of a sandbox that was attached, by an earlier process perhaps.
    ///
    /// # Errors
    /// [`NetworkError::Cni`] if it was not, or not completely.
    async fn attached(&self, sandbox: &str) -> Result<Vec<IpAddr>, NetworkError> {
        let reason = "CNI plugins gave it an address, and the node uses none now";
        Err(CniError::OtherNetwork { sandbox: sandbox.to_owned(), reason }.into())
    }

    /// Takes the interface away, with both its ends; from then on its address refuses. Unplugging what is not plugged is
    /// Ok.
    async fn unplug(&self, sandbox: &str) -> Result<(), NetworkError>;
}

/// What the Pod network can fail with.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Every usable address is held or cooling down.
    #[error(
        "no free address in {range}: {held} held by Pods, {cooling} released less than the cool-down ago, {quarantined} quarantined"
    )]
    Exhausted {
        /// The node's range.
        range: IpNet,
        /// Addresses that a Pod holds.
        held: usize,
        /// Addresses released too recently.
        cooling: usize,
        /// Addresses whose record could not be read.
        quarantined: usize,
    },
    /// The range has no room for a gateway and a Pod.
    #[error("range {range} is too small for a gateway and Pods")]
    RangeTooSmall {
        /// The range as given.
        range: IpNet,
    },
    /// An address that cannot be given to that Pod.
    #[error("address {address} cannot be given to Pod {pod_uid}: {reason}")]
    Refused {
        /// The address asked for.
        address: IpAddr,
        /// The Pod it was asked for.
        pod_uid: String,
        /// Why not.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("failed to {action} {path}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a network request.
    #[error("failed to {action}")]
    Kernel {
        /// What was tried, on which interface.
        action: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The network namespace of a sandbox could not be entered.
    #[error("failed to enter the network namespace of process {pid}")]
    Namespace {
        /// The process named.
        pid: i32,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A command could not be started.
    #[error("failed to run {command}; is it installed?")]
    Command {
        /// The command line.
        command: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A command reported failure.
    #[error("{command} failed: {output}")]
    CommandFailed {
        /// The command line.
        command: String,
        /// What it wrote to stderr.
        output: String,
    },
    /// Something of that name exists and is not ours to use.
    #[error("interface {name} exists and is not a bridge")]
    NotABridge {
        /// The interface.
        name: String,
    },
    /// Plugins could not do it.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// The name does not fit an interface.
    #[error("bridge name {name:?} is not 1 to 15 letters, digits, '-', '_' or '.'")]
    BadName {
        /// The name as given.
        name: String,
    },
}

/// Writes a kernel parameter, unless it has that value.
fn set_sysctl(key: &str, value: &str) -> Result<(), NetworkError> {
    let path = format!("/proc/sys/{key}");
    let present = std::fs::read_to_string(&path).unwrap_or_default();
    if present.trim() == value {
        // Writing `ip_forward` resets other settings even if the value stays.
        return Ok(());
    }
    std::fs::write(&path, value).map_err(|source| NetworkError::File { action: "write", path: path.into(), source })
}
