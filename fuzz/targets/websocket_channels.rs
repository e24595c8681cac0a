//! Messages of every subprotocol: what is read, and what is written and read back.
#![no_main]

use bytes::Bytes;
use lambdalet_fuzz::channels::{Message, Payload, Protocol};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 6] = [
    "",
    "channel.k8s.io",
    "base64.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "v5.channel.k8s.io",
];

fuzz_target!(|data: &[u8]| {
    let [which, message @ ..] = data else { return };
    let Some(protocol) = Protocol::named(NAMES[usize::from(*which) % NAMES.len()]) else { return };
    match protocol.read(Bytes::copy_from_slice(message)) {
        Ok(Message::Data(_, bytes)) => assert!(bytes.len() < message.len()),
        Ok(Message::Close(channel)) => assert_eq!(message, [255, channel]),
        Ok(Message::Nothing) => assert!(message.is_empty()),
        Err(_) => {}
    }
    let payload = match protocol.write(which % 5, message) {
        Payload::Binary(bytes) => bytes,
        Payload::Text(text) => Bytes::from(text),
    };
    let read = protocol.read(payload).expect("what is written can be read");
    assert_eq!(read, Message::Data(which % 5, Bytes::copy_from_slice(message)));
});
