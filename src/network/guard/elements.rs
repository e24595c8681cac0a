//! Elements of sets of nftables, added, removed and listed without a process: `nft` takes some ten milliseconds to start.
//! What they mean is in the rules, which `nft` makes.
//!
//! ```text
//! batch     BATCH_BEGIN | NEWSETELEM or DELSETELEM each | BATCH_END      all of it is done, or nothing
//! message   nlmsghdr, 16 bytes | nfgenmsg, 4 | table | set | elements { element { key { value } } }
//! ```
//! (linux/netfilter/nfnetlink.h and nf_tables.h.) As with routes the kernel answers before `send` returns.

use std::io;

use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr};

/// Kinds of messages of every family (linux/netlink.h).
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// What is listed changed meanwhile.
const INTERRUPTED: u16 = 0x10;
/// Kinds of nfnetlink's messages; those of nftables have its number in the upper byte.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NFTABLES: u16 = 10;
const NEW: u16 = NFTABLES << 8 | 12;
const GET: u16 = NFTABLES << 8 | 13;
const DELETE: u16 = NFTABLES << 8 | 14;
/// The family of tables that see frames of bridges.
const BRIDGE: u8 = 7;
/// Attributes: of a list of elements, of one of them, of its key.
const TABLE: u16 = 1;
const SET: u16 = 2;
const ELEMENTS: u16 = 3;
const ELEMENT: u16 = 1;
const KEY: u16 = 1;
const VALUE: u16 = 1;
/// Marks an attribute that holds others.
const NESTED: u16 = 1 << 15;
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
/// How often a list is begun anew that changes while it is read.
const TRIES: u32 = 20;

/// An element of a set, by its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Element {
    pub(super) set: &'static str,
    pub(super) key: Vec<u8>,
}

/// Adds and removes elements of sets of this table, all at once. Adding what is there is Ok.
///
/// # Errors
/// The kernel's: `ENOENT` without the table or a set, or if something to be removed is not there. Nothing has changed then.
pub(super) fn change(table: &str, added: &[Element], removed: &[Element]) -> io::Result<()> {
    let added = added.iter().map(|element| (NEW, NLM_F_CREATE, element));
    let changes = added.chain(removed.iter().map(|element| (DELETE, 0, element)));
    let mut batch = message(BATCH_BEGIN, NLM_F_REQUEST, (0, NFTABLES), &[]);
    let mut unanswered = 0_usize;
    for (kind, flags, Element { set, key }) in changes {
        let element = nested(ELEMENT, &nested(KEY, &attribute(VALUE, key)));
        let body = [place(table, set), nested(ELEMENTS, &element)].concat();
        batch.extend(message(kind, NLM_F_REQUEST | NLM_F_ACK | flags, (BRIDGE, 0), &body));
        unanswered += 1;
    }
    if unanswered == 0 {
        return Ok(());
    }
    batch.extend(message(BATCH_END, NLM_F_REQUEST, (0, NFTABLES), &[]));
    let socket = open()?;
    socket.send(&batch, 0)?;
    while unanswered > 0 {
        let (datagram, _) = socket.recv_from_full()?;
        for answer in answers(&datagram).filter(|answer| answer.kind == ERROR) {
            outcome(answer.body)?;
            unanswered = unanswered.saturating_sub(1);
        }
    }
    Ok(())
}

/// Every element of a set.
///
/// # Errors
/// The kernel's: `ENOENT` without the table or the set.
pub(super) fn list(table: &str, set: &'static str) -> io::Result<Vec<Element>> {
    for _ in 0..TRIES {
        if let Some(keys) = read(table, set)? {
            return Ok(keys.into_iter().map(|key| Element { set, key }).collect());
        }
    }
    Err(io::Error::other("it never stays the same for as long as it is read"))
}

/// The keys of a set; `None` if it changed meanwhile.
fn read(table: &str, set: &str) -> io::Result<Option<Vec<Vec<u8>>>> {
    let socket = open()?;
    socket.send(&message(GET, NLM_F_REQUEST | NLM_F_DUMP, (BRIDGE, 0), &place(table, set)), 0)?;
    let (mut keys, mut whole) = (Vec::new(), true);
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for answer in answers(&datagram) {
            whole &= answer.flags & INTERRUPTED == 0;
            match answer.kind {
                ERROR => outcome(answer.body)?,
                DONE => return outcome(answer.body).map(|()| whole.then_some(keys)),
                NEW => keys.extend(elements(answer.body).map(<[u8]>::to_vec)),
                _ => {}
            }
        }
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // An answer that is not there by now never comes.
    socket.set_non_blocking(true)?;
    Ok(socket)
}

// === Writing ===

/// `of`: a family, and the number of the subsystem that a batch is for.
fn message(kind: u16, flags: u16, of: (u8, u16), body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + FAMILY_HEADER + body.len()).unwrap_or(u32::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
    // No sequence is needed on a socket for one request, nor a sender.
    bytes.extend([0; 8]);
    bytes.extend([of.0, 0]);
    bytes.extend(of.1.to_be_bytes());
    bytes.extend(body);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, inner: &[u8]) -> Vec<u8> {
    attribute(kind | NESTED, inner)
}

fn place(table: &str, set: &str) -> Vec<u8> {
    let text = |kind, text: &str| attribute(kind, &[text.as_bytes(), b"\0"].concat());
    [text(TABLE, table), text(SET, set)].concat()
}

// === Reading ===

struct Answer<'a> {
    kind: u16,
    flags: u16,
    body: &'a [u8],
}

/// The messages of a datagram, as far as they make sense.
fn answers(datagram: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let header = rest.first_chunk::<HEADER>()?;
        let [a, b, c, d, kind0, kind1, flags0, flags1, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([a, b, c, d])).ok()?;
        let body = rest.get(HEADER..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let (kind, flags) = (u16::from_ne_bytes([kind0, kind1]), u16::from_ne_bytes([flags0, flags1]));
        Some(Answer { kind, flags, body })
    })
}

/// What the kernel says of a request: 0, or an error number below.
fn outcome(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(code) if code < 0 => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        Some(_) => Ok(()),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "an answer of nothing")),
    }
}

/// The keys of a list of elements.
fn elements(body: &[u8]) -> impl Iterator<Item = &[u8]> {
    inside(body.get(FAMILY_HEADER..).unwrap_or_default(), ELEMENTS)
        .flat_map(|all| inside(all, ELEMENT))
        .flat_map(|one| inside(one, KEY))
        .flat_map(|key| inside(key, VALUE))
}

fn inside(bytes: &[u8], wanted: u16) -> impl Iterator<Item = &[u8]> {
    attributes(bytes).filter(move |(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let [a, b, c, d] = *rest.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & !NESTED, value))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_what_nft_writes() {
        // As `nft --debug=mnl add element` showed it, but for the number that it gives a set of the same batch.
        let element = nested(ELEMENT, &nested(KEY, &attribute(VALUE, b"lt0124\0\0\0\0\0\0\0\0\0\0")));
        let body = [place("lt_t", "taps"), nested(ELEMENTS, &element)].concat();
        let written = message(NEW, NLM_F_REQUEST, (BRIDGE, 0), &body);
        assert_eq!(written.len(), 20 + 12 + 12 + 32);
        assert_eq!(written[..8], [76, 0, 0, 0, 12, 10, 1, 0]);
        assert_eq!(written[16..32], *b"\x07\0\0\0\x09\0\x01\0lt_t\0\0\0\0");
        assert_eq!(written[44..60], [32, 0, 3, 0x80, 28, 0, 1, 0x80, 24, 0, 1, 0x80, 20, 0, 1, 0]);
    }

    #[test]
    fn a_list_is_read_back() {
        let one = |key: &[u8]| nested(ELEMENT, &[nested(KEY, &attribute(VALUE, key)), attribute(9, b"more")].concat());
        let body = [place("t", "s"), nested(ELEMENTS, &[one(b"a"), one(b"longer")].concat())].concat();
        let datagram = [message(NEW, 2, (BRIDGE, 0), &body), message(NEW, 2, (BRIDGE, 0), &body)].concat();
        let keys: Vec<&[u8]> = answers(&datagram).flat_map(|answer| elements(answer.body)).collect();
        assert_eq!(keys, [&b"a"[..], b"longer", b"a", b"longer"]);
    }

    #[test]
    fn refusals_are_errors() {
        assert_eq!(outcome(&(-2_i32).to_ne_bytes()).unwrap_err().raw_os_error(), Some(2));
        outcome(&[0; 20]).unwrap();
        assert!(outcome(&[0; 3]).is_err());
    }

    proptest! {
        #[test]
        fn reading_ends_whatever_it_reads(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(answers(&bytes).count() <= bytes.len());
            prop_assert!(elements(&bytes).count() <= bytes.len());
        }
    }
}
