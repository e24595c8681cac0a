//! The few requests to the kernel's network configuration that the Pod network is made of.
//!
//! The socket is a blocking one: the kernel answers such a request before `send` returns, so nothing ever waits, and a
//! thread that has just entered another namespace needs no event loop there.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    BridgePortState, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
    State,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

/// `ENODEV`, the kernel's word for "no such interface".
const NO_SUCH_DEVICE: i32 = nix::errno::Errno::ENODEV as i32;

/// `ESRCH`, the kernel's word for "no such route".
const NO_SUCH_ROUTE: i32 = nix::errno::Errno::ESRCH as i32;

/// A hardware address.
pub(super) type Mac = [u8; 6];

/// A netlink socket in the network namespace of the thread that opened it.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// What we look at of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// A text for people that the kernel keeps with the interface; empty if there is none.
    pub(super) alias: String,
    pub(super) mtu: u32,
    pub(super) mac: Vec<u8>,
    /// Index of the other end of a veth pair, in that end's namespace.
    pub(super) peer: Option<u32>,
    /// That namespace, by the number that it has in this one; `None` if it is this one.
    pub(super) beyond: Option<i32>,
    /// Index of the bridge it is a port of.
    pub(super) bridge: Option<u32>,
    pub(super) is_bridge: bool,
    /// The kernel has noticed that both ends are up, and lets packets out.
    pub(super) operational: bool,
    /// As a port of a bridge, it takes part in forwarding.
    pub(super) forwarding: bool,
}

/// Both ends of a cable to be made.
pub(super) struct Pair<'a> {
    /// Name of the end here.
    pub(super) name: &'a str,
    /// The bridge it joins.
    pub(super) bridge: u32,
    /// Name of the end in the other namespace.
    pub(super) peer_name: &'a str,
    /// Hardware address of that end.
    pub(super) peer_mac: Mac,
    /// The other namespace.
    pub(super) namespace: BorrowedFd<'a>,
    /// Of both ends.
    pub(super) mtu: u32,
}

// === impl Netlink ===

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// The interface of that name, if there is one.
    pub(super) fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        self.look_up(LinkMessageBuilder::<LinkUnspec>::new().name(name).build())
    }

    /// The interface of that name in another namespace, by the number that it has in this one.
    pub(super) fn link_beyond(&mut self, namespace: i32, name: &str) -> io::Result<Option<Link>> {
        let mut message = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
        message.attributes.push(LinkAttribute::IfNetnsId(namespace));
        self.look_up(message)
    }

    fn look_up(&mut self, message: LinkMessage) -> io::Result<Option<Link>> {
        match self.exchange(RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST) {
            Ok(answers) => Ok(answers.into_iter().find_map(Link::of)),
            Err(error) if error.raw_os_error() == Some(NO_SUCH_DEVICE) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every interface of the namespace.
    pub(super) fn links(&mut self) -> io::Result<Vec<Link>> {
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.exchange(message, NLM_F_REQUEST | NLM_F_DUMP)?;
        Ok(answers.into_iter().filter_map(Link::of).collect())
    }

    /// MTU of the interface that the default route leaves by.
    pub(super) fn uplink_mtu(&mut self) -> io::Result<Option<u32>> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        let answers = self.exchange(RouteNetlinkMessage::GetRoute(message), NLM_F_REQUEST | NLM_F_DUMP)?;
        let default = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) if route.header.destination_prefix_length == 0 => Some(route),
            _ => None,
        });
        let metric = |route: &RouteMessage| {
            let metric = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Priority(metric) => Some(*metric),
                _ => None,
            });
            metric.unwrap_or(0)
        };
        let oif = default.min_by_key(metric).and_then(|route| {
            route.attributes.into_iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(index),
                _ => None,
            })
        });
        let links = self.links()?;
        Ok(oif.and_then(|index| links.into_iter().find(|link| link.index == index)).map(|link| link.mtu))
    }

    /// Makes a bridge, down.
    pub(super) fn add_bridge(&mut self, name: &str) -> io::Result<()> {
        self.change(RouteNetlinkMessage::NewLink(LinkBridge::new(name).build()), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Makes a bridge that learns nothing, up: what comes in by one port leaves by all others.
    pub(super) fn add_hub(&mut self, name: &str) -> io::Result<()> {
        let hub = LinkBridge::new(name).ageing_time(0).mcast_snooping(false).build();
        self.change(RouteNetlinkMessage::NewLink(hub), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Makes a veth pair across two namespaces: this end a port of the bridge and up, the other down.
    pub(super) fn add_pair(&mut self, pair: &Pair<'_>) -> io::Result<()> {
        // A veth end cannot be set up before it has its other end, so the peer is set up by itself later.
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(pair.peer_name)
            .mtu(pair.mtu)
            .address(pair.peer_mac.to_vec())
            .setns_by_fd(pair.namespace.as_raw_fd())
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(pair.name)
            .mtu(pair.mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .controller(pair.bridge)
            .up()
            .build();
        self.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Lets the bridge send a packet back out of the port it came in by, so that a Pod reaches itself by its Service.
    pub(super) fn set_hairpin(&mut self, port: u32) -> io::Result<()> {
        let message = LinkBridgePort::new(port).append_info_data(InfoBridgePort::HairpinMode(true)).build();
        self.change(RouteNetlinkMessage::NewLink(message), 0)
    }

    /// Sets the interface up.
    pub(super) fn set_up(&mut self, index: u32) -> io::Result<()> {
        self.set(LinkUnspec::new_with_index(index).up().build())
    }

    /// Makes the interface a port of the bridge, and sets it up.
    pub(super) fn enslave(&mut self, index: u32, bridge: u32) -> io::Result<()> {
        self.set(LinkUnspec::new_with_index(index).controller(bridge).up().build())
    }

    /// Gives the interface an MTU.
    pub(super) fn set_mtu(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        self.set(LinkUnspec::new_with_index(index).mtu(mtu).build())
    }

    /// Gives the interface a hardware address and an MTU, and sets it up.
    pub(super) fn configure(&mut self, index: u32, mac: Mac, mtu: u32) -> io::Result<()> {
        self.set(LinkUnspec::new_with_index(index).address(mac.to_vec()).mtu(mtu).up().build())
    }

    /// Deletes the interface; Ok if there is none of that index.
    pub(super) fn delete_link(&mut self, index: u32) -> io::Result<()> {
        let message = LinkUnspec::new_with_index(index).build();
        match self.change(RouteNetlinkMessage::DelLink(message), 0) {
            Err(error) if error.raw_os_error() == Some(NO_SUCH_DEVICE) => Ok(()),
            result => result,
        }
    }

    /// Writes a text beside the interface's name; `ip link` shows it.
    pub(super) fn set_alias(&mut self, index: u32, alias: &str) -> io::Result<()> {
        let mut message = LinkUnspec::new_with_index(index).build();
        message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
        self.set(message)
    }

    /// Gives the interface an address. The rest of its range is not taken to be on the link.
    pub(super) fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.prefix_len = prefix;
        message.header.scope = AddressScope::Universe;
        message.header.index = index;
        message.attributes.extend([AddressAttribute::Local(address), AddressAttribute::Address(address)]);
        // The node gives each address to one Pod, so nothing has to wait for duplicate address detection.
        let nodad = if address.is_ipv6() { AddressFlags::Nodad } else { AddressFlags::empty() };
        message.attributes.push(AddressAttribute::Flags(nodad | AddressFlags::Noprefixroute));
        self.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Gives the interface this address and takes away others of its family and of global scope.
    pub(super) fn set_only_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        self.add_address(index, address, prefix)?;
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        let answers = self.exchange(RouteNetlinkMessage::GetAddress(message), NLM_F_REQUEST | NLM_F_DUMP)?;
        for answer in answers {
            let RouteNetlinkMessage::NewAddress(found) = answer else { continue };
            let wanted =
                found.header.prefix_len == prefix && found.attributes.contains(&AddressAttribute::Address(address));
            if found.header.index == index && found.header.scope == AddressScope::Universe && !wanted {
                self.change(RouteNetlinkMessage::DelAddress(found), 0)?;
            }
        }
        Ok(())
    }

    /// Routes `destination` straight out of the interface, in place of what led there; the host then speaks from
    /// `source`, if it is given.
    pub(super) fn add_link_route(&mut self, index: u32, destination: IpNet, source: Option<IpAddr>) -> io::Result<()> {
        let mut route = link_route(index, destination)?;
        if let Some(source) = source {
            route.attributes.push(RouteAttribute::PrefSource(route_address(source)));
        }
        self.change(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes such a route away; Ok if there is none.
    pub(super) fn delete_link_route(&mut self, index: u32, destination: IpNet) -> io::Result<()> {
        self.delete_route(link_route(index, destination)?)
    }

    /// Has whoever sends to `destination` told that nobody is there.
    pub(super) fn add_unreachable_route(&mut self, destination: IpNet) -> io::Result<()> {
        let route = unreachable_route(destination)?;
        self.change(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Takes such a route away; Ok if there is none.
    pub(super) fn delete_unreachable_route(&mut self, destination: IpNet) -> io::Result<()> {
        self.delete_route(unreachable_route(destination)?)
    }

    fn delete_route(&mut self, route: RouteMessage) -> io::Result<()> {
        match self.change(RouteNetlinkMessage::DelRoute(route), 0) {
            Err(error) if error.raw_os_error() == Some(NO_SUCH_ROUTE) => Ok(()),
            result => result,
        }
    }

    /// Where the main table leads to straight out of the interface, of the family of `like`.
    pub(super) fn link_routes(&mut self, index: u32, like: IpAddr) -> io::Result<Vec<IpNet>> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(like);
        let answers = self.exchange(RouteNetlinkMessage::GetRoute(message), NLM_F_REQUEST | NLM_F_DUMP)?;
        let routes = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        });
        Ok(routes.filter_map(|route| destination_out_of(index, &route)).collect())
    }

    /// Routes everything else by way of `gateway`.
    pub(super) fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let everywhere: IpAddr =
            if gateway.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(everywhere, 0)
            .map_err(io::Error::other)?
            .gateway(gateway)
            .map_err(io::Error::other)?
            .output_interface(index)
            .build();
        self.change(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn set(&mut self, message: LinkMessage) -> io::Result<()> {
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags).map(|_| ())
    }

    fn exchange(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut buffer = vec![0; request.buffer_len()];
        request.serialize(&mut buffer);
        self.socket.send(&buffer, 0)?;
        let many = flags & NLM_F_DUMP == NLM_F_DUMP;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            if self.read(&datagram, many, &mut answers)? {
                return Ok(answers);
            }
        }
    }

    /// Reads one datagram; true once the answer is complete.
    fn read(&self, datagram: &[u8], many: bool, answers: &mut Vec<RouteNetlinkMessage>) -> io::Result<bool> {
        let mut rest = datagram;
        while !rest.is_empty() {
            let malformed = |error| io::Error::new(io::ErrorKind::InvalidData, error);
            let buffer = NetlinkBuffer::new_checked(rest).map_err(|error| malformed(error.to_string()))?;
            let length = usize::try_from(buffer.length()).unwrap_or(rest.len()).next_multiple_of(4).min(rest.len());
            let (sequence, bytes) = (buffer.sequence_number(), &rest[..length]);
            rest = &rest[length..];
            if sequence != self.sequence || length == 0 {
                continue;
            }
            match NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
                Ok(message) => match message.payload {
                    NetlinkPayload::Done(_) => return Ok(true),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Error(_) => return Ok(true),
                    NetlinkPayload::InnerMessage(answer) => {
                        answers.push(answer);
                        if !many {
                            return Ok(true);
                        }
                    }
                    _ => {}
                },
                // An interface of a kind the decoder does not know must not hide the others.
                Err(error) if many => tracing::debug!(%error, "skipping a netlink answer"),
                Err(error) => return Err(malformed(error.to_string())),
            }
        }
        Ok(false)
    }
}

impl Link {
    fn of(message: RouteNetlinkMessage) -> Option<Self> {
        let RouteNetlinkMessage::NewLink(message) = message else { return None };
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            alias: String::new(),
            mtu: 0,
            mac: Vec::new(),
            peer: None,
            beyond: None,
            bridge: None,
            is_bridge: false,
            operational: false,
            forwarding: false,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = alias,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::Link(peer) => link.peer = Some(peer),
                LinkAttribute::LinkNetNsId(number) => link.beyond = Some(number),
                LinkAttribute::Controller(bridge) => link.bridge = Some(bridge),
                LinkAttribute::OperState(state) => link.operational = matches!(state, State::Up | State::Unknown),
                LinkAttribute::LinkInfo(infos) => {
                    link.is_bridge = infos.contains(&LinkInfo::Kind(InfoKind::Bridge));
                    link.forwarding = infos.iter().any(is_forwarding);
                }
                _ => {}
            }
        }
        Some(link)
    }
}

/// A unicast route of the main table without a gateway.
fn link_route(index: u32, destination: IpNet) -> io::Result<RouteMessage> {
    Ok(RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination.addr(), destination.prefix_len())
        .map_err(io::Error::other)?
        .output_interface(index)
        .scope(RouteScope::Link)
        .build())
}

fn unreachable_route(destination: IpNet) -> io::Result<RouteMessage> {
    Ok(RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination.addr(), destination.prefix_len())
        .map_err(io::Error::other)?
        .kind(RouteType::Unreachable)
        .build())
}

fn destination_out_of(index: u32, route: &RouteMessage) -> Option<IpNet> {
    let (mut out, mut destination, mut direct) = (None, None, true);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => out = Some(*oif),
            RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = Some(IpAddr::V4(*address)),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => destination = Some(IpAddr::V6(*address)),
            RouteAttribute::Gateway(_) => direct = false,
            _ => {}
        }
    }
    let header = &route.header;
    let ours = header.table == RouteHeader::RT_TABLE_MAIN && header.kind == RouteType::Unicast;
    let net = IpNet::new(destination?, header.destination_prefix_length).ok()?;
    (ours && direct && out == Some(index)).then_some(net)
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

fn is_forwarding(info: &LinkInfo) -> bool {
    let LinkInfo::PortData(InfoPortData::BridgePort(data)) = info else { return false };
    data.contains(&InfoBridgePort::State(BridgePortState::Forwarding))
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
