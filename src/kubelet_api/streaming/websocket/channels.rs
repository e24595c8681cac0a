//! Pure: the messages of the `channel.k8s.io` protocols (KK staging/src/k8s.io/streaming/pkg/httpstream/wsstream).
//!
//! Names nothing else of this crate: `fuzz/` builds it alone.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};

/// In v5: the channel in the next byte is closed by the client.
const CLOSE: u8 = 255;

/// The version of a protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// `channel.k8s.io`, or none named: errors are text.
    V1,
    /// Errors are a `metav1.Status`.
    V4,
    /// And the client can close one channel.
    V5,
}

/// A subprotocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protocol {
    base: Base,
    base64: bool,
}

impl Protocol {
    /// The protocol of that name (`Sec-WebSocket-Protocol`); an empty name is a client that named none.
    pub fn named(name: &str) -> Option<Self> {
        let (base, base64) = match name {
            "" | "channel.k8s.io" => (Base::V1, false),
            "base64.channel.k8s.io" => (Base::V1, true),
            "v4.channel.k8s.io" => (Base::V4, false),
            "v4.base64.channel.k8s.io" => (Base::V4, true),
            "v5.channel.k8s.io" => (Base::V5, false),
            _ => return None,
        };
        Some(Self { base, base64 })
    }

    /// Its version.
    pub fn base(self) -> Base {
        self.base
    }

    /// Reads a client's message.
    ///
    /// # Errors
    /// See [`ChannelError`]; the connection is to be closed then.
    pub fn read(self, message: Bytes) -> Result<Message, ChannelError> {
        let Some(first) = message.first().copied() else { return Ok(Message::Nothing) };
        if self.base == Base::V5 && first == CLOSE {
            return match message[1..] {
                [channel] => Ok(Message::Close(channel)),
                _ => Err(ChannelError::Close(message.len() - 1)),
            };
        }
        if !self.base64 {
            return Ok(Message::Data(first, message.slice(1..)));
        }
        let bytes = STANDARD.decode(&message[1..]).map_err(ChannelError::Base64)?;
        Ok(Message::Data(first.wrapping_sub(b'0'), Bytes::from(bytes)))
    }

    /// The payload that carries these bytes to a client, and whether it is text.
    pub fn write(self, channel: u8, bytes: &[u8]) -> Payload {
        if self.base64 {
            let mut text = String::with_capacity(1 + bytes.len().div_ceil(3) * 4);
            text.push(char::from(b'0' + channel));
            STANDARD.encode_string(bytes, &mut text);
            return Payload::Text(text);
        }
        let mut payload = BytesMut::with_capacity(1 + bytes.len());
        payload.put_u8(channel);
        payload.put_slice(bytes);
        Payload::Binary(payload.freeze())
    }
}

/// What a client sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Bytes, possibly none, of a channel, possibly of none that exists.
    Data(u8, Bytes),
    /// The client is done with this channel.
    Close(u8),
    /// An empty message, as some clients send to keep a connection alive.
    Nothing,
}

/// What a client is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// A binary message.
    Binary(Bytes),
    /// A text message.
    Text(String),
}

/// Why a message cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// Not base64 where it must be.
    #[error("a message is not base64")]
    Base64(#[source] base64::DecodeError),
    /// A close signal for other than one channel.
    #[error("a close signal is followed by {0} bytes, not by one channel")]
    Close(usize),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 5] = [
        "channel.k8s.io",
        "base64.channel.k8s.io",
        "v4.channel.k8s.io",
        "v4.base64.channel.k8s.io",
        "v5.channel.k8s.io",
    ];

    #[test]
    fn each_protocol_has_its_form() {
        let table = [
            ("v4.channel.k8s.io", &b"\x00foo\n"[..], Message::Data(0, Bytes::from_static(b"foo\n"))),
            ("base64.channel.k8s.io", &b"0Zm9vCg=="[..], Message::Data(0, Bytes::from_static(b"foo\n"))),
            ("v4.base64.channel.k8s.io", &b"4"[..], Message::Data(4, Bytes::new())),
            ("v4.channel.k8s.io", &b"\xff\x00"[..], Message::Data(255, Bytes::from_static(b"\0"))),
            ("v5.channel.k8s.io", &b"\xff\x00"[..], Message::Close(0)),
            ("", &b""[..], Message::Nothing),
        ];
        for (name, message, wanted) in table {
            let protocol = Protocol::named(name).unwrap();
            assert_eq!(protocol.read(Bytes::from_static(message)).unwrap(), wanted, "{name} {message:?}");
        }
        assert_eq!(Protocol::named("v5.base64.channel.k8s.io"), None);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let v5 = Protocol::named("v5.channel.k8s.io").unwrap();
        assert_eq!(v5.read(Bytes::from_static(b"\xff")), Err(ChannelError::Close(0)));
        assert_eq!(v5.read(Bytes::from_static(b"\xff\x01\x02")), Err(ChannelError::Close(2)));
        let base64 = Protocol::named("base64.channel.k8s.io").unwrap();
        assert!(matches!(base64.read(Bytes::from_static(b"0=!")), Err(ChannelError::Base64(_))));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(which in 0_usize..5, channel in 0_u8..5, bytes: Vec<u8>) {
            let protocol = Protocol::named(NAMES[which]).unwrap();
            let payload = match protocol.write(channel, &bytes) {
                Payload::Binary(payload) => payload,
                Payload::Text(text) => Bytes::from(text),
            };
            prop_assert_eq!(protocol.read(payload).unwrap(), Message::Data(channel, Bytes::from(bytes)));
        }

        #[test]
        fn no_message_is_too_strange(which in 0_usize..5, bytes: Vec<u8>) {
            let length = bytes.len();
            if let Ok(Message::Data(_, data)) = Protocol::named(NAMES[which]).unwrap().read(Bytes::from(bytes)) {
                prop_assert!(data.len() < length);
            }
        }
    }
}
