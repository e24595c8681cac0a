//! Frames as they lie on the wire (SPDY/3.1, section 2.2 and 2.6).

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::SpdyError;
use super::headers::{HeaderReader, HeaderWriter, Headers};

/// Bytes before the payload of any frame.
const HEAD: usize = 8;
/// Longest control frame that is looked into; those of a kubelet's clients have about a hundred bytes. Longer ones end
/// the connection, or are passed over if their type is not known here.
pub const MAX_CONTROL: usize = 16 << 10;
/// Most bytes of a [`Frame::Data`]: frames may have up to 16 MiB and are handed on as they come.
pub const MAX_PIECE: usize = 64 << 10;

const CONTROL: u32 = 1 << 31;
const VERSION: u32 = 3;
const FIN: u8 = 1;

/// Types of control frames.
mod kind {
    pub(super) const SYN_STREAM: u16 = 1;
    pub(super) const SYN_REPLY: u16 = 2;
    pub(super) const RST_STREAM: u16 = 3;
    pub(super) const SETTINGS: u16 = 4;
    pub(super) const PING: u16 = 6;
    pub(super) const GOAWAY: u16 = 7;
    pub(super) const HEADERS: u16 = 8;
    pub(super) const WINDOW_UPDATE: u16 = 9;
}

/// Why a stream is reset (section 2.6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetReason {
    /// The frame that opened it is wrong.
    Protocol = 1,
    /// There are too many.
    Refused = 3,
    /// It is not needed any more.
    Cancel = 5,
    /// What it was for failed.
    Internal = 6,
}

/// What the other side sent. Frames that say nothing here (SETTINGS, WINDOW_UPDATE, HEADERS, SYN_REPLY and
/// unknown ones) are read and left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Opens a stream.
    SynStream {
        /// Its id.
        id: u32,
        /// What it is for.
        headers: Headers,
        /// Nothing will come on it.
        ended: bool,
    },
    /// A piece of a stream's data.
    Data {
        /// The stream.
        id: u32,
        /// At most [`MAX_PIECE`] bytes, possibly none.
        bytes: Bytes,
        /// Nothing more will come on it.
        ended: bool,
    },
    /// Ends a stream in both directions.
    Reset {
        /// The stream.
        id: u32,
    },
    /// To be sent back as it is.
    Ping(u32),
    /// No more streams will be opened.
    GoAway,
}

/// Where the decoder is.
#[derive(Debug)]
enum State {
    Head,
    Data { id: u32, left: usize, ended: bool },
    Skip { left: usize },
}

/// Takes bytes as they come and gives frames. It keeps no bytes itself: what it leaves in the buffer, less than
/// [`MAX_CONTROL`] and a head, it wants to see again with more behind it.
#[derive(Debug)]
pub struct Decoder {
    state: State,
    headers: HeaderReader,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { state: State::Head, headers: HeaderReader::default() }
    }
}

impl Decoder {
    /// The next frame, or `None` if more bytes are needed.
    ///
    /// # Errors
    /// The bytes are not SPDY/3.1, or beyond a bound. Nothing can be read after that.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, SpdyError> {
        loop {
            match &mut self.state {
                State::Head => {
                    if input.len() < HEAD {
                        return Ok(None);
                    }
                    let (first, flags, length) = head(input);
                    if first & CONTROL == 0 {
                        input.advance(HEAD);
                        self.state = State::Data { id: stream_id(first)?, left: length, ended: flags & FIN != 0 };
                        continue;
                    }
                    match self.control(input, (first, flags, length))? {
                        Step::Frame(frame) => return Ok(Some(frame)),
                        Step::More => return Ok(None),
                        Step::Nothing => {}
                    }
                }
                State::Data { id, left, ended } => {
                    if *left > 0 && input.is_empty() {
                        return Ok(None);
                    }
                    let taken = (*left).min(input.len()).min(MAX_PIECE);
                    let (id, ended) = (*id, *ended && taken == *left);
                    *left -= taken;
                    if *left == 0 {
                        self.state = State::Head;
                    }
                    if taken == 0 && !ended {
                        continue;
                    }
                    // A copy: pieces wait in queues, and must not keep the whole read buffer alive.
                    let bytes = Bytes::copy_from_slice(&input[..taken]);
                    input.advance(taken);
                    return Ok(Some(Frame::Data { id, bytes, ended }));
                }
                State::Skip { left } => {
                    let taken = (*left).min(input.len());
                    input.advance(taken);
                    *left -= taken;
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.state = State::Head;
                }
            }
        }
    }

    fn control(&mut self, input: &mut BytesMut, (first, flags, length): (u32, u8, usize)) -> Result<Step, SpdyError> {
        if first >> 16 & 0x7fff != VERSION {
            return Err(SpdyError::Version);
        }
        let kind = u16::try_from(first & 0xffff).unwrap_or_default();
        let (least, known) = match kind {
            kind::SYN_STREAM => (10, true),
            kind::SYN_REPLY | kind::HEADERS => (4, true),
            kind::RST_STREAM => (8, true),
            kind::PING => (4, true),
            kind::GOAWAY => (4, true),
            // Of no use here: Go's clients neither keep windows nor have settings.
            kind::SETTINGS | kind::WINDOW_UPDATE => (4, false),
            _ => (0, false),
        };
        if length < least {
            return Err(SpdyError::Malformed);
        }
        if !known {
            input.advance(HEAD);
            self.state = State::Skip { left: length };
            return Ok(Step::Nothing);
        }
        if length > MAX_CONTROL {
            return Err(SpdyError::TooLong(length));
        }
        if input.len() < HEAD + length {
            return Ok(Step::More);
        }
        input.advance(HEAD);
        let mut payload = input.split_to(length);
        let word = payload.get_u32() & !CONTROL;
        match kind {
            kind::SYN_STREAM => {
                // Stream it belongs to, priority and credential slot: nothing that a server of streams minds.
                payload.advance(6);
                let headers = self.headers.read(&payload)?;
                Ok(Step::Frame(Frame::SynStream { id: stream_id(word)?, headers, ended: flags & FIN != 0 }))
            }
            kind::SYN_REPLY | kind::HEADERS => {
                // Read all the same, since the blocks share a window.
                self.headers.read(&payload)?;
                if flags & FIN == 0 {
                    return Ok(Step::Nothing);
                }
                Ok(Step::Frame(Frame::Data { id: stream_id(word)?, bytes: Bytes::new(), ended: true }))
            }
            kind::RST_STREAM => Ok(Step::Frame(Frame::Reset { id: stream_id(word)? })),
            // A client's own pings are odd; an even one answers a ping that was never sent.
            kind::PING if word & 1 == 1 => Ok(Step::Frame(Frame::Ping(word))),
            kind::GOAWAY => Ok(Step::Frame(Frame::GoAway)),
            _ => Ok(Step::Nothing),
        }
    }
}

/// What a control frame comes to.
enum Step {
    Frame(Frame),
    Nothing,
    More,
}

/// First word, flags and payload length of the frame at the start of `input`, which has at least [`HEAD`] bytes.
fn head(input: &BytesMut) -> (u32, u8, usize) {
    let mut head = &input[..HEAD];
    let (first, second) = (head.get_u32(), head.get_u32());
    let flags = u8::try_from(second >> 24).unwrap_or_default();
    (first, flags, usize::try_from(second & 0x00ff_ffff).unwrap_or_default())
}

fn stream_id(word: u32) -> Result<u32, SpdyError> {
    if word == 0 { Err(SpdyError::StreamZero) } else { Ok(word) }
}

/// Writes the frames that this side sends.
#[derive(Debug, Default)]
pub struct Encoder {
    headers: HeaderWriter,
}

impl Encoder {
    /// DATA. `bytes` has less than 16 MiB.
    pub fn data(&self, out: &mut BytesMut, id: u32, bytes: &[u8], ended: bool) {
        out.reserve(HEAD + bytes.len());
        out.put_u32(id);
        out.put_u32(u32::from(ended) << 24 | u32::try_from(bytes.len()).unwrap_or_default() & 0x00ff_ffff);
        out.put_slice(bytes);
    }

    /// SYN_STREAM, open in both directions. A client's ids are odd and rise.
    pub fn open(&mut self, out: &mut BytesMut, id: u32, headers: &[(&str, &str)]) {
        let block = self.headers.block(headers);
        control(out, kind::SYN_STREAM, 10 + block.len());
        out.put_u32(id);
        // Belongs to no other stream; the highest priority, no credential.
        out.put_slice(&[0; 6]);
        out.put_slice(&block);
    }

    /// SYN_REPLY without headers.
    pub fn reply(&mut self, out: &mut BytesMut, id: u32) {
        let block = self.headers.block(&[]);
        control(out, kind::SYN_REPLY, 4 + block.len());
        out.put_u32(id);
        out.put_slice(&block);
    }

    /// RST_STREAM.
    pub fn reset(&self, out: &mut BytesMut, id: u32, reason: ResetReason) {
        control(out, kind::RST_STREAM, 8);
        out.put_u32(id);
        out.put_u32(reason as u32);
    }

    /// PING.
    pub fn ping(&self, out: &mut BytesMut, id: u32) {
        control(out, kind::PING, 4);
        out.put_u32(id);
    }

    /// SETTINGS with nothing set: a frame that says nothing and needs no answer.
    pub fn no_settings(&self, out: &mut BytesMut) {
        control(out, kind::SETTINGS, 4);
        out.put_u32(0);
    }

    /// GOAWAY with the status OK, naming the last stream that was taken.
    pub fn go_away(&self, out: &mut BytesMut, last: u32) {
        control(out, kind::GOAWAY, 8);
        out.put_u32(last);
        out.put_u32(0);
    }
}

fn control(out: &mut BytesMut, kind: u16, length: usize) {
    out.put_u32(CONTROL | VERSION << 16 | u32::from(kind));
    out.put_u32(u32::try_from(length).unwrap_or_default());
}
