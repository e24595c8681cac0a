//! Pure: which streams belong together.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use tokio::time::Instant;

use super::pair::Pair;
use crate::kubelet_api::streaming::STREAM_CREATION;
use crate::kubelet_api::streaming::pipe::{Inbox, Outbox};
use crate::spdy::headers::Headers;

/// What a stream is of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Data,
    Error,
}

/// What a stream's headers say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// The same for both streams of a pair.
    key: String,
    side: Side,
    port: u16,
}

impl Claim {
    /// Reads the headers of a stream; `None` if they are not those of a port-forward.
    pub(super) fn of(id: u32, headers: &Headers) -> Option<Self> {
        let port = headers.get("port")?.parse().ok().filter(|port| *port > 0)?;
        let side = match headers.get("streamtype")? {
            "data" => Side::Data,
            "error" => Side::Error,
            _ => return None,
        };
        // Clients older than the header open the stream for errors first and the one for data right after it.
        let implied = || if side == Side::Error { id } else { id.saturating_sub(2) }.to_string();
        let key = headers.get("requestid").map_or_else(implied, str::to_owned);
        Some(Self { key, side, port })
    }
}

/// A pair of which one stream is there.
#[derive(Debug)]
pub(super) struct Half {
    port: u16,
    data: Option<(Inbox, Outbox)>,
    error: Option<(Inbox, Outbox)>,
    until: Instant,
}

impl Half {
    fn new(port: u16, now: Instant) -> Self {
        Self { port, data: None, error: None, until: now + STREAM_CREATION }
    }

    /// Says why, if there is a stream for that, and gives both up.
    pub(super) async fn give_up(self) {
        if let Some((_, errors)) = self.error {
            let text = format!("timed out waiting for the other stream of port {}", self.port);
            let _ = errors.send(Bytes::from(text)).await;
            errors.end().await;
        }
        if let Some((_, data)) = self.data {
            data.fail().await;
        }
    }
}

/// What a stream made.
#[derive(Debug)]
pub(super) enum Added {
    /// Its partner is not there yet.
    Waiting,
    /// A pair. Its port is that of the stream for data.
    Complete(Pair),
    /// The pair had such a stream already.
    Twice(Outbox),
}

/// Pairs that are not complete. Bounded by the streams that a connection may have.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    waiting: HashMap<String, Half>,
    /// In the order in which they came; some are complete by now.
    deadlines: VecDeque<(Instant, String)>,
}

impl Pairs {
    /// Finds the partner of a stream.
    pub(super) fn add(&mut self, claim: Claim, stream: (Inbox, Outbox), now: Instant) -> Added {
        let Claim { key, side, port } = claim;
        let half = match self.waiting.remove(&key) {
            Some(half) => half,
            None => {
                let half = Half::new(port, now);
                self.deadlines.push_back((half.until, key.clone()));
                half
            }
        };
        let mut half = half;
        let place = match side {
            Side::Data => &mut half.data,
            Side::Error => &mut half.error,
        };
        if place.is_some() {
            self.waiting.insert(key, half);
            return Added::Twice(stream.1);
        }
        *place = Some(stream);
        if side == Side::Data {
            half.port = port;
        }
        match half {
            Half { port, data: Some((inbox, data)), error: Some((_, errors)), .. } => {
                self.forget_the_complete();
                Added::Complete(Pair { port, inbox, data, errors })
            }
            half => {
                self.waiting.insert(key, half);
                Added::Waiting
            }
        }
    }

    /// When the oldest is to be given up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadlines.front().map(|(until, _)| *until)
    }

    /// Those that have waited long enough.
    pub(super) fn expired(&mut self, now: Instant) -> Vec<Half> {
        let mut expired = Vec::new();
        while let Some((until, key)) = self.deadlines.front()
            && *until <= now
        {
            if self.waiting.get(key).is_some_and(|half| half.until <= now) {
                expired.extend(self.waiting.remove(key));
            }
            self.deadlines.pop_front();
        }
        self.forget_the_complete();
        expired
    }

    fn forget_the_complete(&mut self) {
        while let Some((until, key)) = self.deadlines.front()
            && self.waiting.get(key).is_none_or(|half| half.until != *until)
        {
            self.deadlines.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::kubelet_api::streaming::pipe::{Budget, stream};

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn claim(id: u32, pairs: &[(&str, &str)]) -> Option<Claim> {
        Claim::of(id, &headers(pairs))
    }

    fn ends(id: u32) -> (Inbox, Outbox) {
        let (_, inbox, outbox) = stream(id, &Budget::default(), &mpsc::channel(1).0);
        (inbox, outbox)
    }

    #[test]
    fn streams_of_old_clients_are_paired_by_their_ids() {
        let key = |id, kind| claim(id, &[("port", "80"), ("streamtype", kind)]).unwrap().key;
        assert_eq!((key(5, "error"), key(7, "data")), ("5".to_owned(), "5".to_owned()));
        assert_eq!(claim(9, &[("port", "80"), ("streamtype", "data"), ("requestid", "3")]).unwrap().key, "3");
        for wrong in [&[("port", "0"), ("streamtype", "data")], &[("port", "80"), ("streamtype", "stdin")]] {
            assert_eq!(claim(1, wrong), None);
        }
        assert_eq!(claim(1, &[("streamtype", "data")]), None);
    }

    #[test]
    fn a_pair_is_complete_with_both_streams_in_any_order() {
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        let of = |kind, key| claim(1, &[("port", "80"), ("streamtype", kind), ("requestid", key)]).unwrap();
        assert!(matches!(pairs.add(of("data", "a"), ends(1), now), Added::Waiting));
        assert!(matches!(pairs.add(of("error", "b"), ends(3), now), Added::Waiting));
        assert!(matches!(pairs.add(of("data", "a"), ends(5), now), Added::Twice(_)));
        assert!(matches!(pairs.add(of("error", "a"), ends(7), now), Added::Complete(Pair { port: 80, .. })));
        assert!(matches!(pairs.add(of("data", "b"), ends(9), now), Added::Complete(_)));
        assert_eq!((pairs.deadline(), pairs.waiting.len()), (None, 0));
    }

    #[test]
    fn half_a_pair_is_given_up_in_time() {
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        let of = |kind, key| claim(1, &[("port", "80"), ("streamtype", kind), ("requestid", key)]).unwrap();
        pairs.add(of("data", "a"), ends(1), now);
        pairs.add(of("error", "a"), ends(3), now);
        // The same name again, later.
        let later = now + STREAM_CREATION / 2;
        pairs.add(of("data", "a"), ends(5), later);
        assert!(pairs.expired(now + STREAM_CREATION).is_empty());
        assert_eq!(pairs.deadline(), Some(later + STREAM_CREATION));
        assert_eq!(pairs.expired(later + STREAM_CREATION).len(), 1);
        assert_eq!(pairs.deadline(), None);
    }
}
