//! Frames: what goes over the wire, and how to find it again in the middle of anything.
//!
//! ```text
//!  0      4           12     16     17   18      20         24
//!  | magic | session id | number | kind | 0 | length | checksum | payload …
//! ```
//! Integers are little-endian. The checksum is CRC-32 over the rest of header and payload. It finds cut and mixed frames;
//! against somebody who means it the session's random id does.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Begins every frame. No byte of it is equal to another or to padding, so no part of one looks like a beginning.
const MAGIC: [u8; 4] = [0xd7, 0x4c, 0x1a, 0xe5];
/// Bytes before the payload.
pub const HEADER: usize = 24;
/// Most bytes of payload; a virtio-serial port takes 32 KiB at once.
pub const MAX_PAYLOAD: usize = 16 << 10;
/// Most bytes of a frame.
pub const MAX_FRAME: usize = HEADER + MAX_PAYLOAD;

/// What a session is called; a fresh random number each.
pub type SessionId = u64;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The node begins a session.
    Open,
    /// The guest has begun it.
    Accept,
    /// Bytes of the stream.
    Data,
    /// The sender has ended the session.
    Close,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Open),
            2 => Some(Self::Accept),
            3 => Some(Self::Data),
            4 => Some(Self::Close),
            _ => None,
        }
    }

    fn byte(self) -> u8 {
        match self {
            Self::Open => 1,
            Self::Accept => 2,
            Self::Data => 3,
            Self::Close => 4,
        }
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The session it belongs to.
    pub session: SessionId,
    /// Counts the data frames of one direction, from 0; wraps.
    pub number: u32,
    /// What it is for.
    pub kind: Kind,
    /// At most [`MAX_PAYLOAD`] bytes; only data has any.
    pub payload: Bytes,
}

impl Frame {
    /// A frame without payload.
    pub fn control(kind: Kind, session: SessionId) -> Self {
        Self { session, number: 0, kind, payload: Bytes::new() }
    }
}

/// Writes a frame.
///
/// # Panics
/// If the payload is longer than [`MAX_PAYLOAD`].
pub fn encode(frame: &Frame, out: &mut BytesMut) {
    assert!(frame.payload.len() <= MAX_PAYLOAD, "a payload of {} bytes", frame.payload.len());
    out.reserve(HEADER + frame.payload.len());
    let start = out.len();
    out.put_slice(&MAGIC);
    out.put_u64_le(frame.session);
    out.put_u32_le(frame.number);
    out.put_u8(frame.kind.byte());
    out.put_u8(0);
    // It fits: MAX_PAYLOAD is below 2^16.
    out.put_u16_le(frame.payload.len() as u16);
    let sum = checksum(&out[start..], &frame.payload);
    out.put_u32_le(sum);
    out.put_slice(&frame.payload);
}

/// Writes what ends any frame that the other side still waits for.
pub fn pad(out: &mut BytesMut) {
    out.put_bytes(0, MAX_FRAME);
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&header[..HEADER - 4]);
    sum.update(payload);
    sum.finalize()
}

/// Finds frames in bytes of any origin. It holds at most one frame's worth of what it was given.
#[derive(Debug, Default)]
pub struct Decoder {
    skipped: u64,
}

/// What stands at the beginning of the bytes.
enum Look {
    Frame(Kind, usize),
    Incomplete,
    Garbage,
}

impl Decoder {
    /// Takes the next frame out of `input`, and whatever lies before it. `None`: more bytes are needed; what is left in
    /// `input` is less than [`MAX_FRAME`].
    pub fn next(&mut self, input: &mut BytesMut) -> Option<Frame> {
        loop {
            self.skip_to_magic(input);
            match look(input) {
                Look::Incomplete => return None,
                Look::Garbage => {
                    // A frame may begin inside of what only looked like one.
                    input.advance(1);
                    self.skipped += 1;
                }
                Look::Frame(kind, length) => {
                    let mut frame = input.split_to(HEADER + length);
                    let (mut header, payload) = (frame.split_to(HEADER), frame.freeze());
                    header.advance(MAGIC.len());
                    return Some(Frame { session: header.get_u64_le(), number: header.get_u32_le(), kind, payload });
                }
            }
        }
    }

    /// Bytes so far that were part of no frame.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Leaves the input at the first place where a frame may begin.
    fn skip_to_magic(&mut self, input: &mut BytesMut) {
        let begins = |rest: &[u8]| {
            let length = rest.len().min(MAGIC.len());
            rest[..length] == MAGIC[..length]
        };
        let at = (0..input.len()).find(|at| begins(&input[*at..])).unwrap_or(input.len());
        input.advance(at);
        self.skipped += at as u64;
    }
}

/// Reads what begins with (a part of) the magic.
fn look(input: &[u8]) -> Look {
    let Some(header) = input.get(..HEADER) else { return Look::Incomplete };
    let length = usize::from(u16::from_le_bytes([header[18], header[19]]));
    let Some(kind) = Kind::of(header[16]) else { return Look::Garbage };
    if header[17] != 0 || length > MAX_PAYLOAD || (kind != Kind::Data && length > 0) {
        return Look::Garbage;
    }
    let Some(payload) = input.get(HEADER..HEADER + length) else { return Look::Incomplete };
    let sum = u32::from_le_bytes([header[20], header[21], header[22], header[23]]);
    if checksum(header, payload) == sum { Look::Frame(kind, length) } else { Look::Garbage }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn data(session: SessionId, number: u32, payload: &[u8]) -> Frame {
        Frame { session, number, kind: Kind::Data, payload: Bytes::copy_from_slice(payload) }
    }

    fn written(frames: &[Frame]) -> BytesMut {
        let mut out = BytesMut::new();
        frames.iter().for_each(|frame| encode(frame, &mut out));
        out
    }

    /// Feeds bytes in pieces and collects the frames; says how much the decoder kept.
    fn read(bytes: &[u8], piece: usize) -> Vec<Frame> {
        let (mut decoder, mut input, mut frames) = (Decoder::default(), BytesMut::new(), Vec::new());
        for piece in bytes.chunks(piece) {
            input.extend_from_slice(piece);
            frames.extend(std::iter::from_fn(|| decoder.next(&mut input)));
            assert!(input.len() < MAX_FRAME, "{} bytes are kept", input.len());
        }
        frames
    }

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let payload = prop_oneof![vec(any::<u8>(), 0..200), vec(prop::sample::select(MAGIC.to_vec()), 0..60)];
        vec((any::<u64>(), any::<u32>(), payload), 0..8)
            .prop_map(|frames| frames.iter().map(|(id, number, payload)| data(*id, *number, payload)).collect())
    }

    proptest! {
        #[test]
        fn frames_arrive_as_they_were_sent_however_they_are_cut(sent in frames(), piece in 1..300_usize) {
            prop_assert_eq!(read(&written(&sent), piece), sent);
        }

        /// Stale bytes: frames of an older session, cut anywhere, with garbage around them.
        #[test]
        fn after_padding_every_frame_is_found_whatever_came_before(
            old in frames(), cut in any::<prop::sample::Index>(), garbage in vec(any::<u8>(), 0..100),
            sent in frames(), piece in 1..5000_usize,
        ) {
            let mut bytes = garbage;
            let stale = written(&old);
            bytes.extend_from_slice(&stale[..cut.index(stale.len() + 1)]);
            // The longest frame that can have been cut off.
            bytes.extend_from_slice(&written(&[data(1, 1, &[7; MAX_PAYLOAD])])[..HEADER]);
            let mut all = BytesMut::from(&bytes[..]);
            pad(&mut all);
            all.extend_from_slice(&written(&sent));
            let found = read(&all, piece);
            prop_assert!(found.ends_with(&sent));
            // Nothing is invented: what came before were whole frames of the old session.
            let before = &found[..found.len() - sent.len()];
            prop_assert!(before.iter().all(|frame| old.contains(frame)));
        }

        #[test]
        fn a_changed_byte_never_yields_another_frame(sent in frames(), at in any::<prop::sample::Index>(), bit in 0..8_u8) {
            let mut bytes = written(&sent);
            prop_assume!(!bytes.is_empty());
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            pad(&mut bytes);
            prop_assert!(read(&bytes, 4096).iter().all(|frame| sent.contains(frame)));
        }

        #[test]
        fn garbage_is_no_frame(bytes in vec(any::<u8>(), 0..4000), piece in 1..500_usize) {
            prop_assert_eq!(read(&bytes, piece), vec![]);
        }
    }

    #[test]
    fn a_frame_in_the_payload_of_a_broken_one_is_found() {
        let inner = written(&[Frame::control(Kind::Open, 42)]);
        let mut bytes = written(&[data(1, 0, &inner)]);
        bytes[20] ^= 1;
        pad(&mut bytes);
        assert_eq!(read(&bytes, 7), [Frame::control(Kind::Open, 42)]);
    }
}
