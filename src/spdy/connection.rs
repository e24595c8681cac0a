//! The server's side of a SPDY connection without its socket: bytes in, events out.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};

use super::SpdyError;
use super::frame::{Decoder, Frame, ResetReason};
use super::headers::Headers;

/// What the bytes of a client come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It opened a stream.
    Opened {
        /// The stream's id, higher than all before.
        id: u32,
        /// What it is for.
        headers: Headers,
        /// Nothing will come on it.
        ended: bool,
    },
    /// Data of a stream that is open for it.
    Data {
        /// The stream.
        id: u32,
        /// Possibly none.
        bytes: Bytes,
        /// Nothing more will come on it.
        ended: bool,
    },
    /// It gave a stream up.
    Reset {
        /// The stream.
        id: u32,
    },
    /// It must be sent the same PING.
    Ping(u32),
    /// It opened a stream that it may not have: send a reset.
    Refused {
        /// The stream.
        id: u32,
        /// Why.
        reason: ResetReason,
    },
}

/// What the client may still do with a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remote {
    Open,
    Ended,
}

/// Reads frames and keeps the table of streams. A stream stays in it until it is reset or [forgotten](Self::forget).
#[derive(Debug)]
pub struct Connection {
    decoder: Decoder,
    streams: HashMap<u32, Remote>,
    limit: usize,
    last: u32,
    gone_away: bool,
}

impl Connection {
    /// A connection that may have this many streams at once.
    pub fn new(limit: usize) -> Self {
        Self { decoder: Decoder::default(), streams: HashMap::new(), limit, last: 0, gone_away: false }
    }

    /// The next event, or `None` if more bytes are needed. What is left in `input` is short (see [`Decoder`]).
    ///
    /// # Errors
    /// The client does not speak SPDY/3.1, or overdoes it. The connection is at its end then.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Event>, SpdyError> {
        while let Some(frame) = self.decoder.next(input)? {
            if let Some(event) = self.take(frame) {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    fn take(&mut self, frame: Frame) -> Option<Event> {
        match frame {
            Frame::SynStream { id, headers, ended } => self.open(id, headers, ended),
            Frame::Data { id, bytes, ended } => {
                // What comes for a stream that was given up here was under way: it is nobody's.
                let remote = self.streams.get_mut(&id).filter(|remote| **remote == Remote::Open)?;
                if ended {
                    *remote = Remote::Ended;
                }
                Some(Event::Data { id, bytes, ended })
            }
            Frame::Reset { id } => self.streams.remove(&id).map(|_| Event::Reset { id }),
            Frame::Ping(id) => Some(Event::Ping(id)),
            Frame::GoAway => {
                self.gone_away = true;
                None
            }
        }
    }

    fn open(&mut self, id: u32, headers: Headers, ended: bool) -> Option<Event> {
        if id.is_multiple_of(2) || id <= self.last || self.gone_away {
            return Some(Event::Refused { id, reason: ResetReason::Protocol });
        }
        self.last = id;
        if self.streams.len() >= self.limit {
            return Some(Event::Refused { id, reason: ResetReason::Refused });
        }
        self.streams.insert(id, if ended { Remote::Ended } else { Remote::Open });
        Some(Event::Opened { id, headers, ended })
    }

    /// This side is done with the stream; what still comes for it is dropped.
    pub fn forget(&mut self, id: u32) {
        self.streams.remove(&id);
    }

    /// Streams in the table.
    pub fn streams(&self) -> usize {
        self.streams.len()
    }

    /// Whether the table is full: another stream would be refused.
    pub fn is_full(&self) -> bool {
        self.streams.len() >= self.limit
    }
}
