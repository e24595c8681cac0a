//! The few requests of rtnetlink(7) that the agent needs, written by hand: a library for all of them would be larger than
//! the rest of the agent.
//!
//! ```text
//! nlmsghdr: | length, 4 | type, 2 | flags, 2 | sequence, 4 | port, 4 |   then ifinfomsg, ifaddrmsg or rtmsg, attributes
//! ```

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket};

/// Bytes of an answer that matter: its header and the error number.
const HEADER: usize = 16;
/// Attributes of links, addresses and routes (linux/if_link.h, if_addr.h, rtnetlink.h).
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;

/// A conversation with the kernel.
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// One request being written.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: libc::c_int) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        Self(bytes)
    }

    fn body(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        // It fits: values are addresses and names.
        self.0.extend_from_slice(&((value.len() + 4) as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

impl Netlink {
    /// Opens a conversation.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Takes a link down and gives it a name, which one that is up keeps.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn rename(&mut self, index: u32, name: &str) -> io::Result<()> {
        self.ask(Request::new(libc::RTM_NEWLINK, 0).body(&link(index, 0)))?;
        let request = Request::new(libc::RTM_NEWLINK, 0).body(&link(index, 0));
        self.ask(request.attribute(IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat()))
    }

    /// Brings a link up, with this hardware address where there is one; `mtu` 0 leaves it.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn set_up(&mut self, index: u32, mac: Option<[u8; 6]>, mtu: u32) -> io::Result<()> {
        let mut request = Request::new(libc::RTM_NEWLINK, 0).body(&link(index, 1));
        if let Some(mac) = mac {
            request = request.attribute(IFLA_ADDRESS, &mac);
        }
        if mtu > 0 {
            request = request.attribute(IFLA_MTU, &mtu.to_ne_bytes());
        }
        self.ask(request)
    }

    /// Gives a link an address. One that it has is fine.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let (family, bytes) = parts(address);
        // ifaddrmsg: family, prefix, flags (no duplicate address detection: the node allots them), scope, index.
        let body = [&[family, prefix, 0x02, 0][..], &index.to_ne_bytes()].concat();
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        let request = Request::new(libc::RTM_NEWADDR, flags).body(&body);
        self.ask(request.attribute(IFA_LOCAL, &bytes).attribute(IFA_ADDRESS, &bytes))
    }

    /// Adds a route, through a gateway or on the link. One that is there is replaced.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(crate) fn add_route(&mut self, to: (IpAddr, u8), gateway: Option<IpAddr>, index: u32) -> io::Result<()> {
        let (family, bytes) = parts(to.0);
        let scope = if gateway.is_some() { libc::RT_SCOPE_UNIVERSE } else { libc::RT_SCOPE_LINK };
        // rtmsg: family, prefixes, tos, table, protocol, scope, type, flags.
        let table = [libc::RT_TABLE_MAIN, libc::RTPROT_STATIC, scope, libc::RTN_UNICAST];
        let body = [&[family, to.1, 0, 0][..], &table, &[0; 4]].concat();
        let mut request = Request::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE).body(&body);
        if to.1 > 0 {
            request = request.attribute(RTA_DST, &bytes);
        }
        if let Some(gateway) = gateway {
            request = request.attribute(RTA_GATEWAY, &parts(gateway).1);
        }
        self.ask(request.attribute(RTA_OIF, &index.to_ne_bytes()))
    }

    fn ask(&mut self, request: Request) -> io::Result<()> {
        let mut bytes = request.0;
        self.sequence += 1;
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        sendto(self.socket.as_raw_fd(), &bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut answer = [0; 4096];
        let read = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let error = answer.get(HEADER..HEADER + 4).filter(|_| read >= HEADER + 4);
        let error = error.and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map_or(-libc::EPROTO, i32::from_ne_bytes);
        if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-error)) }
    }
}

/// ifinfomsg: family, padding, type, index, flags, which flags change (up).
fn link(index: u32, flags: u32) -> Vec<u8> {
    [&[0; 4][..], &index.to_ne_bytes(), &flags.to_ne_bytes(), &1_u32.to_ne_bytes()].concat()
}

fn parts(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (libc::AF_INET as u8, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6 as u8, address.octets().to_vec()),
    }
}
