//! Pure: which streams belong together.

use std::collections::VecDeque;

use bytes::Bytes;
use tokio::time::Instant;

use super::pair::Pair;
use crate::kubelet_api::streaming::STREAM_CREATION;
use crate::kubelet_api::streaming::pipe::{Inbox, Outbox};
use crate::spdy::headers::Headers;

/// Longest name that a client may give a pair; kubectl counts them.
const LONGEST_KEY: usize = 64;

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
    /// Reads the headers of a stream; `None` if they are not those of a port-forward, or longer than any client's.
    pub(super) fn of(id: u32, headers: &Headers) -> Option<Self> {
        let port = headers.get("port")?.parse().ok().filter(|port| *port > 0)?;
        let side = match headers.get("streamtype")? {
            "data" => Side::Data,
            "error" => Side::Error,
            _ => return None,
        };
        // Clients older than the header open the stream for errors first and the one for data right after it.
        let implied = || if side == Side::Error { id } else { id.saturating_sub(2) }.to_string();
        let key = match headers.get("requestid") {
            Some(named) if named.len() > LONGEST_KEY => return None,
            named => named.map_or_else(implied, str::to_owned),
        };
        Some(Self { key, side, port })
    }
}

/// A pair of which one stream is there.
#[derive(Debug)]
pub(super) struct Half {
    claim: Claim,
    inbox: Inbox,
    outbox: Outbox,
    until: Instant,
}

impl Half {
    /// Says why, if there is a stream for that, and gives it up.
    pub(super) async fn give_up(self) {
        match self.claim.side {
            Side::Error => {
                let text = format!("timed out waiting for the other stream of port {}", self.claim.port);
                let _ = self.outbox.send(Bytes::from(text)).await;
                self.outbox.end().await;
            }
            Side::Data => self.outbox.fail().await,
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

/// Pairs that are not complete. Bounded by the streams that a connection may have: those that the client gave up make
/// room there, so they are not kept here either.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    /// In the order in which they came. Clients open both streams at once, so that it is short.
    waiting: VecDeque<Half>,
}

impl Pairs {
    /// Finds the partner of a stream.
    pub(super) fn add(&mut self, claim: Claim, (inbox, outbox): (Inbox, Outbox), now: Instant) -> Added {
        self.waiting.retain(|half| !half.inbox.is_reset());
        let at = self.waiting.iter().position(|half| half.claim.key == claim.key);
        if at.is_some_and(|at| self.waiting[at].claim.side == claim.side) {
            return Added::Twice(outbox);
        }
        let Some(first) = at.and_then(|at| self.waiting.remove(at)) else {
            self.waiting.push_back(Half { claim, inbox, outbox, until: now + STREAM_CREATION });
            return Added::Waiting;
        };
        Added::Complete(match claim.side {
            Side::Data => Pair { port: claim.port, inbox, data: outbox, errors: first.outbox },
            Side::Error => Pair { port: first.claim.port, inbox: first.inbox, data: first.outbox, errors: outbox },
        })
    }

    /// When the oldest is to be given up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.front().map(|half| half.until)
    }

    /// Those that have waited long enough.
    pub(super) fn expired(&mut self, now: Instant) -> Vec<Half> {
        let expired = self.waiting.iter().take_while(|half| half.until <= now).count();
        self.waiting.drain(..expired).collect()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::kubelet_api::streaming::pipe::{Budget, Feed, stream};

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn claim(id: u32, pairs: &[(&str, &str)]) -> Option<Claim> {
        Claim::of(id, &headers(pairs))
    }

    fn opened(id: u32) -> (Feed, (Inbox, Outbox)) {
        let (feed, inbox, outbox) = stream(id, &Budget::default(), &mpsc::channel(1).0);
        (feed, (inbox, outbox))
    }

    fn ends(id: u32) -> (Inbox, Outbox) {
        opened(id).1
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
        let named = |length| claim(1, &[("port", "80"), ("streamtype", "data"), ("requestid", &"x".repeat(length))]);
        assert!(named(LONGEST_KEY).is_some() && named(LONGEST_KEY + 1).is_none());
    }

    #[test]
    fn halves_that_the_client_gave_up_are_not_kept() {
        let (mut pairs, now) = (Pairs::default(), Instant::now());
        let mut feeds = Vec::new();
        for id in (1..20_000).step_by(2) {
            let (feed, stream) = opened(id);
            let side = if id % 4 == 1 { "error" } else { "data" };
            let claim = claim(id, &[("port", "80"), ("streamtype", side), ("requestid", &id.to_string())]).unwrap();
            assert!(matches!(pairs.add(claim, stream, now), Added::Waiting));
            feed.reset();
            feeds.push(feed);
        }
        let held = feeds.iter().filter(|feed| feed.is_alive()).count();
        assert_eq!((held, pairs.waiting.len()), (1, 1), "only the last, until the next comes");
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
