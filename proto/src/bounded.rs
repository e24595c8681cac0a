//! Messages of the agent's protocol, whose repeated fields are counted before anything of them is decoded.
//!
//! An empty message in a list is two bytes on the wire and a hundred and more in memory. A limit of bytes alone would let
//! a guest that means harm have its node take a hundred times what it sends.

use std::any::TypeId;
use std::marker::PhantomData;

use bytes::{Buf, Bytes};
use prost::{DecodeError, Message, decode_length_delimiter};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::ProstEncoder;

use crate::agent::v1::{ContainerState, ListContainersReply, LogBatch, StatsReply};
use crate::{MAX_CONTAINERS, MAX_INTERFACES, MAX_RECORDS, MAX_VOLUMES};

/// Fields of a message that stands in one of those lists, or has no list but annotations; more than any has.
const MOST_INSIDE: usize = 128;

/// What is no message of the protocol.
#[derive(Debug, thiserror::Error)]
pub enum NoMessage {
    /// Too many fields, or what no field begins with.
    #[error("a message has more fields than any")]
    TooMany,
    /// Fields of the wrong kind.
    #[error("failed to decode a message")]
    Malformed(#[source] DecodeError),
}

/// Decodes a message, unless more repeats in it than in any that an agent sends. Requests have no such bounds: who sends
/// them is believed.
///
/// # Errors
/// What is no such message.
pub fn decode<M: Message + Default + 'static>(bytes: Bytes) -> Result<M, NoMessage> {
    if let Some((most, inside)) = bounds(TypeId::of::<M>()) {
        count(&bytes, most, inside).ok_or(NoMessage::TooMany)?;
    }
    M::decode(bytes).map_err(NoMessage::Malformed)
}

/// Most fields of an answer, each repetition counted; and of each message in it, where all that has a length is one.
fn bounds(of: TypeId) -> Option<(usize, Option<usize>)> {
    let bounds = [
        (TypeId::of::<ListContainersReply>(), MAX_CONTAINERS, Some(MOST_INSIDE)),
        (TypeId::of::<StatsReply>(), MAX_CONTAINERS + MAX_INTERFACES + MAX_VOLUMES + MOST_INSIDE, Some(MOST_INSIDE)),
        (TypeId::of::<LogBatch>(), MAX_RECORDS + MOST_INSIDE, Some(MOST_INSIDE)),
        (TypeId::of::<ContainerState>(), MOST_INSIDE, None),
    ];
    bounds.into_iter().find(|(known, ..)| *known == of).map(|(_, most, inside)| (most, inside))
}

/// `None` if there are more, or other things than fields (Protocol Buffers, "Encoding"; groups, which nobody sends any
/// more, are others).
fn count(mut bytes: &[u8], most: usize, inside: Option<usize>) -> Option<()> {
    for _ in 0..most {
        if bytes.is_empty() {
            return Some(());
        }
        let key = decode_length_delimiter(&mut bytes).ok()?;
        let length = match key & 7 {
            0 => decode_length_delimiter(&mut bytes).map(|_| 0).ok()?,
            1 => 8,
            2 => decode_length_delimiter(&mut bytes).ok()?,
            5 => 4,
            _ => return None,
        };
        let (field, rest) = bytes.split_at_checked(length)?;
        if let (2, Some(inside)) = (key & 7, inside) {
            count(field, inside, None)?;
        }
        bytes = rest;
    }
    bytes.is_empty().then_some(())
}

/// The codec of the agent's verbs, which is [`decode`] on the way in.
#[derive(Debug)]
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BoundedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(PhantomData)
    }
}

/// The decoder of [`BoundedCodec`].
#[derive(Debug)]
pub struct BoundedDecoder<U>(PhantomData<U>);

impl<U: Message + Default + 'static> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let bytes = source.copy_to_bytes(source.remaining());
        // As gRPC has it for what does not parse.
        decode(bytes).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::MAX_MESSAGE;
    use crate::agent::v1::{ContainerSpec, ContainerUsage, InterfaceUsage, LogRecord, Usage, VolumeUsage};

    fn states(count: usize) -> ListContainersReply {
        let annotations = (0..64).map(|number| (format!("a{number}"), "b".to_owned())).collect();
        let state = ContainerState {
            id: "web".to_owned(),
            phase: 1,
            created_ns: u64::MAX,
            exit_code: -1,
            annotations,
            ..ContainerState::default()
        };
        ListContainersReply { containers: vec![state; count] }
    }

    fn read<M: Message + Default + 'static>(message: &impl Message) -> Result<M, NoMessage> {
        decode(message.encode_to_vec().into())
    }

    #[test]
    fn what_an_agent_says_is_read_as_it_is() {
        let all = states(MAX_CONTAINERS);
        assert_eq!(read::<ListContainersReply>(&all).unwrap(), all);
        assert_eq!(read::<ContainerState>(&all.containers[0]).unwrap(), all.containers[0]);
        let interface = InterfaceUsage { name: "eth0".to_owned(), received: vec![1; 4], sent: vec![2; 4] };
        let stats = StatsReply {
            pod: Some(Usage { cpu_ns: u64::MAX, ..Usage::default() }),
            containers: vec![ContainerUsage::default(); MAX_CONTAINERS],
            interfaces: vec![interface; MAX_INTERFACES],
            volumes: vec![VolumeUsage { name: "v".to_owned(), bytes: 1, inodes: 2 }; MAX_VOLUMES],
            memory_total: 1,
            ..StatsReply::default()
        };
        assert_eq!(read::<StatsReply>(&stats).unwrap(), stats);
        let record = LogRecord { time_ns: 1, data: "line\n".into(), ..LogRecord::default() };
        let batch = LogBatch { records: vec![record; MAX_RECORDS], next: u64::MAX, lost: 1 };
        assert_eq!(read::<LogBatch>(&batch).unwrap(), batch);
        assert_eq!(read::<LogBatch>(&LogBatch::default()).unwrap(), LogBatch::default());
    }

    #[test]
    fn a_flood_of_empty_messages_is_refused_before_it_is_decoded() {
        let refused = |outcome| matches!(outcome, Err(NoMessage::TooMany));
        let flood = |tag: u8, count: usize| Bytes::from([tag << 3 | 2, 0].repeat(count));
        assert!(refused(decode::<ListContainersReply>(flood(1, MAX_MESSAGE / 2)).map(drop)));
        assert!(refused(decode::<ListContainersReply>(flood(1, MAX_CONTAINERS + 1)).map(drop)));
        assert!(decode::<ListContainersReply>(flood(1, MAX_CONTAINERS)).is_ok());
        assert!(refused(decode::<StatsReply>(flood(3, MAX_MESSAGE / 2)).map(drop)));
        assert!(refused(decode::<LogBatch>(flood(1, MAX_MESSAGE / 2)).map(drop)));
        // Of annotations, alone and in a list.
        let one = flood(11, MAX_MESSAGE / 2);
        assert!(refused(decode::<ContainerState>(one.clone()).map(drop)));
        let mut list = vec![1 << 3 | 2];
        prost::encode_length_delimiter(one.len(), &mut list).unwrap();
        list.extend_from_slice(&one);
        assert!(refused(decode::<ListContainersReply>(list.into()).map(drop)));
        // What the node asks may be long.
        let spec = ContainerSpec { env: vec!["A=1".to_owned(); 1 << 16], ..ContainerSpec::default() };
        assert_eq!(read::<ContainerSpec>(&spec).unwrap(), spec);
    }

    proptest! {
        /// What is decoded was within its bounds, however it was written.
        #[test]
        fn no_bytes_become_more_than_the_bounds(empty in 0..400_usize, tail in prop::collection::vec(any::<u8>(), 0..40)) {
            let bytes = [[0x0a, 0].repeat(empty), tail].concat();
            if let Ok(list) = decode::<ListContainersReply>(bytes.into()) {
                prop_assert!(list.containers.len() <= MAX_CONTAINERS);
                prop_assert!(list.containers.iter().all(|one| one.annotations.len() <= MOST_INSIDE));
            }
        }
    }
}
