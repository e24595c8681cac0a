//! A whole connection: bytes in pieces of any length, either as they are or as what a client does.
#![no_main]

use std::collections::BTreeMap;

use bytes::{BufMut, BytesMut};
use flate2::{Compress, Compression, FlushCompress};
use lambdalet_fuzz::spdy::connection::{Connection, Event};
use lambdalet_fuzz::spdy::frame::{MAX_CONTROL, MAX_PIECE};
use lambdalet_fuzz::spdy::headers::{DICTIONARY, MAX_HEADERS, MAX_INFLATED};
use libfuzzer_sys::fuzz_target;

const STREAMS: usize = 8;

/// The first byte says how the rest is meant, the second how it is cut.
fuzz_target!(|data: &[u8]| {
    let [mode, cut, rest @ ..] = data else { return };
    if mode & 1 == 0 {
        run(rest, usize::from(*cut) + 1);
    } else {
        run(&client(rest), usize::from(*cut) + 1);
    }
});

fn run(bytes: &[u8], cut: usize) {
    let (mut connection, mut input) = (Connection::new(STREAMS), BytesMut::new());
    // Whether the client may still send on a stream.
    let mut open = BTreeMap::new();
    for piece in bytes.chunks(cut) {
        input.extend_from_slice(piece);
        loop {
            match connection.next(&mut input) {
                Ok(Some(event)) => check(event, &mut open, &mut connection),
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(input.len() < MAX_CONTROL + 8, "{} bytes are kept", input.len());
        assert_eq!(connection.streams(), open.len());
        assert!(open.len() <= STREAMS);
    }
}

fn check(event: Event, open: &mut BTreeMap<u32, bool>, connection: &mut Connection) {
    match event {
        Event::Opened { id, headers, ended } => {
            assert!(id % 2 == 1 && open.last_key_value().is_none_or(|(last, _)| *last < id));
            assert!(headers.pairs().len() <= MAX_HEADERS);
            assert!(headers.pairs().iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() <= 4 * MAX_INFLATED);
            open.insert(id, !ended);
        }
        Event::Data { id, bytes, ended } => {
            assert!(bytes.len() <= MAX_PIECE && (ended || !bytes.is_empty()));
            assert_eq!(open.insert(id, !ended), Some(true));
            // Some streams are served to their end here.
            if ended && id % 4 == 1 {
                connection.forget(id);
                open.remove(&id);
            }
        }
        Event::Reset { id } => assert!(open.remove(&id).is_some()),
        Event::Ping(id) => assert!(id % 2 == 1),
        Event::Refused { id, .. } => assert!(id != 0),
    }
}

/// Frames of a client that does one thing for each four bytes: what, on which stream, how much, with which flags.
fn client(acts: &[u8]) -> BytesMut {
    let mut deflate = Compress::new(Compression::fast(), true);
    deflate.set_dictionary(&DICTIONARY).expect("the dictionary is set before anything else");
    let (mut out, mut next) = (BytesMut::new(), 1_u32);
    for act in acts.chunks_exact(4) {
        let (id, amount, flags) = (u32::from(act[1] % 32), u32::from(act[2]), u32::from(act[3] & 3));
        let mut control = |kind: u32, payload: &[u8]| {
            out.put_u32(0x8003_0000 | kind);
            out.put_u32(flags << 24 | u32::try_from(payload.len()).unwrap_or_default());
            out.put_slice(payload);
        };
        match act[0] % 8 {
            0 | 1 => {
                let opened = if act[0] % 8 == 0 { next } else { id };
                let block = block(&mut deflate, amount % 70, act[3]);
                control(1, &[&opened.to_be_bytes()[..], &[0; 6], &block].concat());
                next = next.max(opened).saturating_add(2) | 1;
            }
            2 => control(3, &[id.to_be_bytes(), amount.to_be_bytes()].concat()),
            3 => control(6, &amount.to_be_bytes()),
            4 => control(8, &[&id.to_be_bytes()[..], &block(&mut deflate, amount % 4, act[3])].concat()),
            5 => control(u32::from(act[3]), &vec![act[1]; usize::from(act[2])]),
            _ => {
                out.put_u32(id);
                out.put_u32(flags << 24 | amount * 8);
                out.put_bytes(act[1], usize::from(act[2]) * 8);
            }
        }
    }
    out
}

fn block(deflate: &mut Compress, count: u32, letter: u8) -> Vec<u8> {
    let mut plain = count.to_be_bytes().to_vec();
    for _ in 0..2 * count {
        plain.extend([0, 0, 0, 1, b'a' + letter % 26]);
    }
    let (mut block, before) = (vec![0; plain.len() + 256], deflate.total_out());
    deflate.compress(&plain, &mut block, FlushCompress::Sync).expect("there is room");
    block.truncate(usize::try_from(deflate.total_out() - before).expect("it is short"));
    block
}
