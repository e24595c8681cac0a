//! What a hostile guest may say: frames of any bytes, and messages of any bytes through the checks of the node's client.
#![no_main]

use bytes::{Bytes, BytesMut};
use lambdalet_fuzz::said::{self, MAX_CONTAINERS, MAX_NAME, MAX_TEXT};
use lambdalet_proto::agent::v1;
use lambdalet_proto::{MAX_MESSAGE, bounded};
use lambdalet_proto::session::frame::{Decoder, Frame, Kind, MAX_FRAME, MAX_PAYLOAD, encode};
use libfuzzer_sys::fuzz_target;
use prost::Message;

/// The first byte says what the rest is, the second how it is cut or from where a log was asked.
fuzz_target!(|data: &[u8]| {
    let [what, how, rest @ ..] = data else { return };
    match what % 7 {
        0 => frames(rest, usize::from(*how) + 1),
        1 => read(rest, |reply| said::containers(reply).map(|list| {
            assert!(list.len() <= MAX_CONTAINERS);
            list.iter().for_each(container);
        })),
        2 => read(rest, |reply| said::container(reply).map(|one| container(&one))),
        3 => read(rest, |reply| said::event(reply).map(|event| match event {
            said::Event::Started(id) | said::Event::OutOfMemory(id) | said::Event::Removed(id) => name(&id),
            said::Event::Exited(id, code) => {
                name(&id);
                assert!((0..=255).contains(&code));
            }
            said::Event::Subscribed | said::Event::Lost(_) => {}
        })),
        4 => read(rest, |reply| said::log_batch(reply, u64::from(*how)).map(|batch| {
            let bytes: usize = batch.records.iter().map(|record| record.bytes.len()).sum();
            assert!(bytes <= MAX_MESSAGE && batch.next >= u64::from(*how) + bytes as u64);
        })),
        5 => read(rest, |reply| said::stats(reply).map(|stats| {
            assert!(stats.containers.len() <= MAX_CONTAINERS);
            stats.containers.iter().for_each(|container| name(&container.id));
        })),
        _ => read(rest, |reply| said::hello(reply).map(|hello| {
            assert!(hello.agent_version.len() <= MAX_TEXT && hello.kernel_release.len() <= MAX_TEXT);
        })),
    }
});

fn read<M: Message + Default + 'static>(bytes: &[u8], check: impl FnOnce(M) -> Result<(), said::OutOfBounds>) {
    if let Ok(message) = bounded::decode::<M>(Bytes::copy_from_slice(bytes)) {
        // A refusal is as good.
        let _ = check(message);
    }
}

fn container(container: &said::Container) {
    name(&container.id);
    assert!((0..=255).contains(&container.exit_code) && container.message.len() <= MAX_TEXT);
    assert!(!container.message.contains(char::is_control));
}

fn name(id: &str) {
    assert!(!id.is_empty() && id.len() <= MAX_NAME && !id.contains('/'));
}

/// Any bytes, then a frame: it is found, whatever came before it.
fn frames(bytes: &[u8], cut: usize) {
    let wanted = Frame { session: 7, number: 3, kind: Kind::Data, payload: Bytes::from_static(b"wanted") };
    let mut all = BytesMut::from(bytes);
    all.extend_from_slice(&[0; MAX_FRAME]);
    encode(&wanted, &mut all);
    let (mut decoder, mut input, mut last) = (Decoder::default(), BytesMut::new(), None);
    for piece in all.chunks(cut) {
        input.extend_from_slice(piece);
        while let Some(frame) = decoder.next(&mut input) {
            assert!(frame.payload.len() <= MAX_PAYLOAD);
            last = Some(frame);
        }
        assert!(input.len() < MAX_FRAME, "{} bytes are kept", input.len());
    }
    assert_eq!(last, Some(wanted));
}
