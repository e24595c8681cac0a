//! Sessions over wires that carry anything else besides.

use std::cell::RefCell;

use proptest::collection::vec;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinSet;

use super::*;

/// Answers every byte with its complement.
async fn complement(mut stream: DuplexStream) {
    let mut piece = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut piece).await {
        piece[..length].iter_mut().for_each(|byte| *byte = !*byte);
        if stream.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}

async fn guest(wire: DuplexStream) -> SessionError {
    let (reader, writer) = split(wire);
    serve_sessions(reader, writer, complement).await
}

/// Sends bytes through a session and checks the answer.
async fn converse(stream: &mut DuplexStream, bytes: &[u8]) {
    let (mut reader, mut writer) = split(stream);
    let mut answer = vec![0; bytes.len()];
    let (written, read) = tokio::join!(writer.write_all(bytes), reader.read_exact(&mut answer));
    written.unwrap();
    read.unwrap();
    assert!(answer.iter().zip(bytes).all(|(answer, byte)| *answer == !*byte));
}

fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(std::time::Duration::from_secs(20), future).await.expect("in time") })
}

#[test]
fn bytes_pass_both_ways() {
    block_on(async {
        let (ours, theirs) = duplex(1000);
        let mut tasks = JoinSet::new();
        tasks.spawn(guest(theirs));
        let (mut stream, session) = NodeSession::open(ours, 7).await.unwrap();
        tasks.spawn(session.run());
        converse(&mut stream, &vec![5; 300_000]).await;
        converse(&mut stream, b"and on").await;
    });
}

#[test]
fn a_new_session_ends_the_old_one_and_sees_nothing_of_it() {
    block_on(async {
        // The wire outlives its users, as a port does.
        let (ours, theirs) = duplex(1 << 20);
        let (mut to_guest, mut from_guest) = (Vec::new(), ours);
        let mut tasks = JoinSet::new();
        tasks.spawn(guest(theirs));
        encode_all(&mut to_guest, 1, &[1; 100]);
        from_guest.write_all(&to_guest).await.unwrap();
        // The first node dies in the middle of a frame; its answers lie unread on the wire.
        from_guest.write_all(&to_guest[..30]).await.unwrap();
        let (mut stream, session) = NodeSession::open(from_guest, 2).await.unwrap();
        tasks.spawn(session.run());
        converse(&mut stream, b"fresh").await;
    });
}

#[test]
fn a_session_is_opened_again_until_the_guest_answers() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        // Smaller than what opens a session: the guest is told in pieces.
        let (ours, theirs) = duplex(1000);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let (reader, writer) = split(theirs);
            let mut wire = Wire::new(reader);
            for _ in 0..3 {
                assert_eq!(next_open(&mut wire).await.unwrap(), 7);
            }
            // One that comes while the first is being answered changes nothing.
            serve_sessions(wire.reader, writer, complement).await
        });
        let (mut stream, session) = NodeSession::open(ours, 7).await.unwrap();
        tasks.spawn(session.run());
        converse(&mut stream, &vec![5; 300_000]).await;
    });
}

#[test]
fn a_gap_ends_the_session() {
    block_on(async {
        let (ours, theirs) = duplex(1 << 20);
        let mut tasks = JoinSet::new();
        let (mut reader, mut writer) = split(theirs);
        tasks.spawn(async move {
            let mut out = BytesMut::new();
            encode(&Frame::control(Kind::Accept, 9), &mut out);
            encode(&Frame { session: 9, number: 1, kind: Kind::Data, payload: Bytes::from_static(b"x") }, &mut out);
            writer.write_all(&out).await.unwrap();
            let mut sink = Vec::new();
            let _ = reader.read_to_end(&mut sink).await;
            SessionError::Ended
        });
        let (mut stream, session) = NodeSession::open(ours, 9).await.unwrap();
        assert!(matches!(session.run().await, SessionError::Lost { expected: 0, got: 1 }));
        let mut rest = Vec::new();
        assert_eq!(stream.read_to_end(&mut rest).await.unwrap(), 0);
    });
}

#[test]
fn garbage_in_a_session_ends_it_and_endless_garbage_before_it_too() {
    block_on(async {
        let (ours, mut theirs) = duplex(1 << 20);
        let mut out = BytesMut::new();
        encode(&Frame::control(Kind::Accept, 9), &mut out);
        out.extend_from_slice(&[0; 10]);
        encode(&Frame { session: 9, number: 0, kind: Kind::Data, payload: Bytes::from_static(b"x") }, &mut out);
        theirs.write_all(&out).await.unwrap();
        let (_stream, session) = NodeSession::open(ours, 9).await.unwrap();
        assert!(matches!(session.run().await, SessionError::Garbage(10)));

        let (ours, mut theirs) = duplex(1 << 20);
        let babble = async move {
            let mut out = BytesMut::new();
            encode(&Frame { session: 1, number: 0, kind: Kind::Data, payload: vec![1; 9999].into() }, &mut out);
            while theirs.write_all(&out).await.is_ok() {}
        };
        let (opened, ()) = tokio::join!(NodeSession::open(ours, 9), babble);
        assert!(matches!(opened.err(), Some(SessionError::Garbage(_))));
    });
}

fn encode_all(out: &mut Vec<u8>, session: SessionId, payload: &[u8]) {
    let mut bytes = BytesMut::new();
    encode(&Frame::control(Kind::Open, session), &mut bytes);
    let payload = Bytes::copy_from_slice(payload);
    encode(&Frame { session, number: 0, kind: Kind::Data, payload }, &mut bytes);
    out.extend_from_slice(&bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What lies on both directions of the wire: old sessions, cut anywhere, and garbage.
    #[test]
    fn a_session_opens_whatever_lies_on_the_wire(
        to_guest in vec(any::<u8>(), 0..3000), to_node in vec(any::<u8>(), 0..3000),
        old in vec(any::<u8>(), 0..500), cut in any::<prop::sample::Index>(), said in vec(any::<u8>(), 1..2000),
    ) {
        block_on(async {
            let (mut ours, mut theirs) = duplex(1 << 20);
            let mut stale = Vec::new();
            encode_all(&mut stale, 1, &old);
            stale.truncate(cut.index(stale.len() + 1));
            ours.write_all(&[&to_guest[..], &stale].concat()).await.unwrap();
            theirs.write_all(&[&to_node[..], &stale].concat()).await.unwrap();
            let conversed = RefCell::new(false);
            let node = async {
                let (mut stream, session) = NodeSession::open(ours, 2).await.unwrap();
                tokio::select! {
                    () = converse(&mut stream, &said) => *conversed.borrow_mut() = true,
                    ended = session.run() => panic!("{ended}"),
                }
            };
            tokio::select! {
                () = node => {}
                ended = guest(theirs) => panic!("{ended}"),
            }
            assert!(conversed.into_inner());
        });
    }
}

/// A guest that says anything, without an end.
async fn babble(mut wire: DuplexStream) {
    while wire.write_all(&[0xa5; 4096]).await.is_ok() {}
}

#[test]
fn one_who_never_says_a_frame_is_not_listened_to_for_ever() {
    block_on(async {
        let mut tasks = JoinSet::new();
        let (ours, theirs) = duplex(256 << 10);
        tasks.spawn(babble(theirs));
        let opened = NodeSession::open(ours, 7).await;
        assert!(matches!(opened.err(), Some(SessionError::Garbage(more)) if more > MAX_STALE));

        let (ours, mut theirs) = duplex(256 << 10);
        let mut accept = BytesMut::new();
        encode(&Frame::control(Kind::Accept, 7), &mut accept);
        theirs.write_all(&accept).await.unwrap();
        let (_stream, session) = NodeSession::open(ours, 7).await.unwrap();
        tasks.spawn(babble(theirs));
        assert!(matches!(session.run().await, SessionError::Garbage(_)));
    });
}
