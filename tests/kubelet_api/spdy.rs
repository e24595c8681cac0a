//! A SPDY/3.1 client for tests, written apart from the server's framer, and the tests of the framer against it.

use std::collections::BTreeMap;

use bytes::{Buf, BufMut, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use http::Method;
use lambdalet::spdy::headers::DICTIONARY;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::support::{Node, tls};

/// Writes what a client sends.
pub(crate) struct ClientFrames {
    deflate: Compress,
    pub(crate) out: BytesMut,
}

impl Default for ClientFrames {
    fn default() -> Self {
        let mut deflate = Compress::new(Compression::best(), true);
        deflate.set_dictionary(&DICTIONARY).unwrap();
        Self { deflate, out: BytesMut::new() }
    }
}

impl ClientFrames {
    pub(crate) fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) {
        self.out.put_u32(0x8003_0000 | u32::from(kind));
        self.out.put_u32(u32::from(flags) << 24 | u32::try_from(payload.len()).unwrap());
        self.out.put_slice(payload);
    }

    /// A deflated block of these headers.
    pub(crate) fn block(&mut self, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut plain = Vec::new();
        plain.put_u32(u32::try_from(headers.len()).unwrap());
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.put_u32(u32::try_from(text.len()).unwrap());
            plain.put_slice(text.as_bytes());
        }
        self.deflated(&plain)
    }

    pub(crate) fn deflated(&mut self, plain: &[u8]) -> Vec<u8> {
        let mut block = vec![0; plain.len() + 1024];
        let (read, written) = (self.deflate.total_in(), self.deflate.total_out());
        self.deflate.compress(plain, &mut block, FlushCompress::Sync).unwrap();
        assert_eq!(self.deflate.total_in() - read, plain.len() as u64);
        block.truncate(usize::try_from(self.deflate.total_out() - written).unwrap());
        block
    }

    pub(crate) fn syn_stream(&mut self, id: u32, headers: &[(&str, &str)], ended: bool) {
        let mut payload = Vec::new();
        payload.put_u32(id);
        payload.put_slice(&[0; 6]);
        payload.extend(self.block(headers));
        self.control(1, u8::from(ended), &payload);
    }

    pub(crate) fn data(&mut self, id: u32, bytes: &[u8], ended: bool) {
        self.out.put_u32(id);
        self.out.put_u32(u32::from(ended) << 24 | u32::try_from(bytes.len()).unwrap());
        self.out.put_slice(bytes);
    }

    pub(crate) fn reset(&mut self, id: u32) {
        self.control(3, 0, &[id.to_be_bytes(), 5_u32.to_be_bytes()].concat());
    }

    pub(crate) fn ping(&mut self, id: u32) {
        self.control(6, 0, &id.to_be_bytes());
    }
}

/// What a server sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ServerFrame {
    Reply(u32),
    Data { id: u32, bytes: Vec<u8>, ended: bool },
    Reset { id: u32, status: u32 },
    Ping(u32),
    GoAway(u32),
    Settings,
}

/// Reads what a server sends.
pub(crate) struct ServerFrames {
    inflate: Decompress,
    pub(crate) input: BytesMut,
}

impl Default for ServerFrames {
    fn default() -> Self {
        Self { inflate: Decompress::new(true), input: BytesMut::new() }
    }
}

impl ServerFrames {
    pub(crate) fn next(&mut self) -> Option<ServerFrame> {
        let mut head = self.input.get(..8)?;
        let (first, second) = (head.get_u32(), head.get_u32());
        let (flags, length) = (second >> 24, usize::try_from(second & 0x00ff_ffff).unwrap());
        self.input.get(..8 + length)?;
        self.input.advance(8);
        let mut payload = self.input.split_to(length);
        if first & 0x8000_0000 == 0 {
            return Some(ServerFrame::Data { id: first, bytes: payload.to_vec(), ended: flags == 1 });
        }
        assert_eq!(first >> 16, 0x8003);
        let word = payload.get_u32();
        Some(match first & 0xffff {
            2 => {
                // As Go's framer: all of the block must be used up, it ends with a flush, and it holds no headers.
                assert!(payload.ends_with(&[0, 0, 0xff, 0xff]));
                let mut plain = [0; 64];
                let (read, written) = (self.inflate.total_in(), self.inflate.total_out());
                self.inflate.decompress(&payload, &mut plain, FlushDecompress::Sync).unwrap();
                assert_eq!(self.inflate.total_in() - read, payload.len() as u64);
                assert_eq!((self.inflate.total_out() - written, &plain[..4]), (4, &[0; 4][..]));
                ServerFrame::Reply(word)
            }
            3 => ServerFrame::Reset { id: word, status: payload.get_u32() },
            4 => ServerFrame::Settings,
            6 => ServerFrame::Ping(word),
            7 => ServerFrame::GoAway(word),
            other => panic!("a control frame of type {other}"),
        })
    }
}

/// An upgraded connection.
pub(crate) struct Spdy {
    pub(crate) reader: SpdyReader,
    pub(crate) writer: SpdyWriter,
}

pub(crate) struct SpdyReader {
    io: ReadHalf<TlsStream<TcpStream>>,
    frames: ServerFrames,
}

pub(crate) struct SpdyWriter {
    io: WriteHalf<TlsStream<TcpStream>>,
    pub(crate) frames: ClientFrames,
    next: u32,
}

/// The answer to a request for an upgrade.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) rest: BytesMut,
}

/// Sends a request by hand and reads the answer's head, and for a refusal its body.
pub(crate) async fn ask(
    io: &mut TlsStream<TcpStream>,
    method: &Method,
    path: &str,
    headers: &[(&str, &str)],
) -> Answer {
    let mut request = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n");
    for (name, value) in headers {
        request += &format!("{name}: {value}\r\n");
    }
    io.write_all(format!("{request}\r\n").as_bytes()).await.unwrap();
    let mut rest = BytesMut::new();
    let end = loop {
        if let Some(at) = rest.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        assert!(io.read_buf(&mut rest).await.unwrap() > 0, "no answer");
    };
    let head = String::from_utf8(rest.split_to(end).to_vec()).unwrap().to_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    if let Some(length) = head.lines().find_map(|line| line.strip_prefix("content-length: ")) {
        let length: usize = length.parse().unwrap();
        while rest.len() < length {
            assert!(io.read_buf(&mut rest).await.unwrap() > 0, "half an answer");
        }
    }
    Answer { status, head, rest }
}

impl Spdy {
    /// Asks for an upgrade as the API server.
    pub(crate) async fn connect(node: &Node, path: &str, protocols: &[&str]) -> Result<Self, Answer> {
        let mut io =
            tls(node.address, Some(node.authority.api_server()), rustls::ALL_VERSIONS, &["http/1.1"]).await.unwrap();
        let mut headers = vec![("connection", "Upgrade"), ("upgrade", "SPDY/3.1")];
        headers.extend(protocols.iter().map(|protocol| ("x-stream-protocol-version", *protocol)));
        let answer = ask(&mut io, &Method::POST, path, &headers).await;
        if answer.status != 101 {
            return Err(answer);
        }
        assert!(answer.head.contains("\r\nupgrade: spdy/3.1\r\n"), "{}", answer.head);
        let (reader, writer) = tokio::io::split(io);
        let frames = ServerFrames { input: answer.rest, ..ServerFrames::default() };
        Ok(Self {
            reader: SpdyReader { io: reader, frames },
            writer: SpdyWriter { io: writer, frames: ClientFrames::default(), next: 1 },
        })
    }

    /// Opens a stream for each kind.
    pub(crate) async fn streams<const N: usize>(&mut self, kinds: [&str; N]) -> [u32; N] {
        let ids = kinds.map(|kind| self.writer.open(&[("streamtype", kind)]));
        self.writer.send().await;
        ids
    }
}

impl SpdyWriter {
    /// Opens a stream with the next send.
    pub(crate) fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next;
        self.next += 2;
        self.frames.syn_stream(id, headers, false);
        id
    }

    pub(crate) async fn send(&mut self) {
        let _ = self.try_send().await;
    }

    pub(crate) async fn try_send(&mut self) -> std::io::Result<()> {
        let out = self.frames.out.split();
        self.io.write_all(&out).await?;
        self.io.flush().await
    }

    pub(crate) async fn data(&mut self, id: u32, bytes: &[u8], ended: bool) {
        self.frames.data(id, bytes, ended);
        self.send().await;
    }
}

impl SpdyReader {
    /// The next frame; `None` at the end of the connection.
    pub(crate) async fn next(&mut self) -> Option<ServerFrame> {
        loop {
            if let Some(frame) = self.frames.next() {
                return Some(frame);
            }
            if !matches!(self.io.read_buf(&mut self.frames.input).await, Ok(1..)) {
                return None;
            }
        }
    }

    /// Reads until each of these streams has ended; what came on all.
    pub(crate) async fn until_ended(&mut self, ids: &[u32]) -> BTreeMap<u32, Vec<u8>> {
        let (mut all, mut open) = (BTreeMap::<_, Vec<u8>>::new(), ids.to_vec());
        while !open.is_empty() {
            match self.next().await.expect("the connection ended early") {
                ServerFrame::Data { id, bytes, ended } => {
                    all.entry(id).or_default().extend(bytes);
                    open.retain(|known| *known != id || !ended);
                }
                ServerFrame::Reset { id, .. } => open.retain(|known| *known != id),
                ServerFrame::Reply(_) | ServerFrame::Ping(_) | ServerFrame::Settings => {}
                ServerFrame::GoAway(_) => panic!("GOAWAY before the streams ended"),
            }
        }
        all
    }
}

mod framer {
    use lambdalet::spdy::SpdyError;
    use lambdalet::spdy::connection::{Connection, Event};
    use lambdalet::spdy::frame::{Encoder, MAX_CONTROL, ResetReason};
    use lambdalet::spdy::headers::MAX_INFLATED;
    use proptest::prelude::*;

    use super::*;

    /// Something a client does.
    #[derive(Clone, Debug)]
    enum Act {
        Open(Vec<(String, String)>, bool),
        Data(u32, Vec<u8>, bool),
        Reset(u32),
        Ping(u32),
        Settings(Vec<u8>),
        WindowUpdate(u32),
        Unknown(Vec<u8>),
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let id = || (0_u32..6).prop_map(|n| 2 * n + 1);
        let header = ("[a-z]{1,9}", "[ -~]{1,20}");
        let act = prop_oneof![
            3 => (prop::collection::vec(header, 0..4), any::<bool>()).prop_map(|(headers, ended)| Act::Open(headers, ended)),
            4 => (id(), prop::collection::vec(any::<u8>(), 0..300), prop::bool::weighted(0.1))
                .prop_map(|(id, bytes, ended)| Act::Data(id, bytes, ended)),
            1 => id().prop_map(Act::Reset),
            1 => id().prop_map(Act::Ping),
            1 => prop::collection::vec(any::<u8>(), 4..40).prop_map(Act::Settings),
            1 => id().prop_map(Act::WindowUpdate),
            1 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Act::Unknown),
        ];
        prop::collection::vec(act, 0..30)
    }

    fn bytes_of(acts: &[Act]) -> Vec<u8> {
        let (mut frames, mut next) = (ClientFrames::default(), 1);
        for act in acts {
            match act {
                Act::Open(headers, ended) => {
                    let pairs: Vec<_> = headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
                    frames.syn_stream(next, &pairs, *ended);
                    next += 2;
                }
                Act::Data(id, bytes, ended) => frames.data(*id, bytes, *ended),
                Act::Reset(id) => frames.reset(*id),
                Act::Ping(id) => frames.ping(*id),
                Act::Settings(payload) => frames.control(4, 0, payload),
                Act::WindowUpdate(id) => frames.control(9, 0, &[id.to_be_bytes(), 9_u32.to_be_bytes()].concat()),
                Act::Unknown(payload) => frames.control(77, 3, payload),
            }
        }
        frames.out.to_vec()
    }

    /// What the acts come to for a server, written anew.
    fn model(acts: &[Act]) -> Vec<Event> {
        let (mut events, mut open, mut next) = (Vec::new(), BTreeMap::new(), 1);
        for act in acts {
            match act {
                Act::Open(headers, ended) => {
                    open.insert(next, !ended);
                    let headers = headers.iter().cloned().collect();
                    events.push(Event::Opened { id: next, headers, ended: *ended });
                    next += 2;
                }
                Act::Data(id, bytes, ended) if open.get(id) == Some(&true) && (*ended || !bytes.is_empty()) => {
                    open.insert(*id, !ended);
                    events.push(Event::Data { id: *id, bytes: bytes.clone().into(), ended: *ended });
                }
                Act::Reset(id) if open.remove(id).is_some() => events.push(Event::Reset { id: *id }),
                Act::Ping(id) => events.push(Event::Ping(*id)),
                _ => {}
            }
        }
        events
    }

    /// Data of one stream in one piece, as it does not matter how it was cut.
    fn joined(events: Vec<Event>) -> Vec<Event> {
        let mut joined: Vec<Event> = Vec::new();
        for event in events {
            if let (Event::Data { id, bytes, ended }, Some(Event::Data { id: last, bytes: before, ended: over })) =
                (&event, joined.last_mut())
                && id == last
                && !*over
            {
                *before = [&before[..], bytes].concat().into();
                *over = *ended;
                continue;
            }
            joined.push(event);
        }
        joined
    }

    fn events(bytes: &[u8], cuts: &[usize]) -> Result<Vec<Event>, SpdyError> {
        let (mut connection, mut input, mut events) = (Connection::new(8), BytesMut::new(), Vec::new());
        let mut at = 0;
        for cut in cuts.iter().copied().chain(std::iter::repeat(4096)) {
            let end = (at + cut.max(1)).min(bytes.len());
            input.extend_from_slice(&bytes[at..end]);
            while let Some(event) = connection.next(&mut input)? {
                events.push(event);
            }
            assert!(input.len() <= MAX_CONTROL + 8, "{} bytes are kept", input.len());
            at = end;
            if at == bytes.len() {
                return Ok(events);
            }
        }
        unreachable!("the cuts never end")
    }

    proptest! {
        #[test]
        fn frames_cut_anywhere_give_the_same_events(acts in acts(), cuts in prop::collection::vec(1_usize..50, 0..200)) {
            let acts: Vec<_> = acts.into_iter().scan(0, |opened, act| {
                *opened += usize::from(matches!(act, Act::Open(..)));
                Some((*opened <= 8 || !matches!(act, Act::Open(..))).then_some(act))
            }).flatten().collect();
            let bytes = bytes_of(&acts);
            prop_assert_eq!(joined(events(&bytes, &cuts).unwrap()), joined(model(&acts)));
        }

        #[test]
        fn no_bytes_are_too_strange(bytes: Vec<u8>, acts in acts(), at: prop::sample::Index, cuts in prop::collection::vec(1_usize..50, 0..50)) {
            let _ = events(&bytes, &cuts);
            // A client that breaks the rules in the middle.
            let mut mixed = bytes_of(&acts);
            let at = if mixed.is_empty() { 0 } else { at.index(mixed.len()) };
            mixed.splice(at..at, bytes);
            let _ = events(&mixed, &cuts);
        }

        #[test]
        fn what_a_server_writes_a_client_reads(sent in prop::collection::vec((1_u32..100, prop::collection::vec(any::<u8>(), 0..200), 0_u8..6), 0..40)) {
            let (mut encoder, mut frames, mut wanted) = (Encoder::default(), ServerFrames::default(), Vec::new());
            for (id, bytes, kind) in sent {
                let out = &mut frames.input;
                wanted.push(match kind {
                    0 => { encoder.reply(out, id); ServerFrame::Reply(id) }
                    1 => { encoder.reset(out, id, ResetReason::Refused); ServerFrame::Reset { id, status: 3 } }
                    2 => { encoder.ping(out, id); ServerFrame::Ping(id) }
                    3 => { encoder.go_away(out, id); ServerFrame::GoAway(id) }
                    4 => { encoder.no_settings(out); ServerFrame::Settings }
                    _ => { encoder.data(out, id, &bytes, false); ServerFrame::Data { id, bytes, ended: false } }
                });
            }
            let read: Vec<_> = std::iter::from_fn(|| frames.next()).collect();
            prop_assert_eq!(read, wanted);
        }
    }

    fn only_error(frames: &ClientFrames) -> SpdyError {
        events(&frames.out, &[]).unwrap_err()
    }

    #[test]
    fn a_block_that_inflates_to_too_much_is_refused() {
        let mut frames = ClientFrames::default();
        let block = frames.deflated(&vec![0; 2 * MAX_INFLATED]);
        assert!(block.len() < 300, "{} bytes are no bomb", block.len());
        frames.control(1, 0, &[&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0], &block[..]].concat());
        assert!(matches!(only_error(&frames), SpdyError::HeadersTooLarge));
        let mut frames = ClientFrames::default();
        frames.syn_stream(1, &vec![("a", "b"); 65], false);
        assert!(matches!(only_error(&frames), SpdyError::HeadersTooLarge));
    }

    #[test]
    fn a_control_frame_that_is_too_long_is_refused_before_it_is_there() {
        let mut frames = ClientFrames::default();
        frames.out.put_u32(0x8003_0001);
        frames.out.put_u32(u32::try_from(MAX_CONTROL + 1).unwrap());
        assert!(matches!(only_error(&frames), SpdyError::TooLong(_)));
    }

    #[test]
    fn a_frame_of_sixteen_mebibytes_is_handed_on_as_it_comes() {
        let mut frames = ClientFrames::default();
        frames.syn_stream(1, &[], false);
        frames.data(1, &vec![7; (1 << 24) - 1], true);
        let mut left = (1_usize << 24) - 1;
        for event in events(&frames.out, &[]).unwrap().into_iter().skip(1) {
            let Event::Data { bytes, ended, .. } = event else { panic!("{event:?}") };
            left -= bytes.len();
            assert_eq!(ended, left == 0);
        }
        assert_eq!(left, 0);
    }

    #[test]
    fn streams_beyond_the_limit_are_refused_until_others_are_forgotten() {
        let (mut connection, mut frames) = (Connection::new(2), ClientFrames::default());
        for id in [1, 3, 5, 5, 2] {
            frames.syn_stream(id, &[], false);
        }
        let mut refused = Vec::new();
        while let Some(event) = connection.next(&mut frames.out).unwrap() {
            if let Event::Refused { id, reason } = event {
                refused.push((id, reason));
            }
        }
        assert_eq!(refused, [(5, ResetReason::Refused), (5, ResetReason::Protocol), (2, ResetReason::Protocol)]);
        assert!(connection.is_full());
        connection.forget(1);
        frames.syn_stream(7, &[], false);
        assert!(matches!(connection.next(&mut frames.out).unwrap(), Some(Event::Opened { id: 7, .. })));
        assert_eq!(connection.streams(), 2);
    }

    #[test]
    fn broken_frames_are_told_apart() {
        let with = |kind, flags, payload: &[u8]| {
            let mut frames = ClientFrames::default();
            frames.control(kind, flags, payload);
            only_error(&frames)
        };
        assert!(matches!(with(1, 0, &[0; 9]), SpdyError::Malformed));
        assert!(matches!(with(3, 0, &[0; 8]), SpdyError::StreamZero));
        assert!(matches!(with(1, 0, &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2, 3]), SpdyError::HeaderBlock));
        let mut frames = ClientFrames::default();
        frames.out.put_slice(&[0x80, 2, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1]);
        assert!(matches!(only_error(&frames), SpdyError::Version));
    }
}
