//! What becomes of a refusal on the wire, and how long a caller wants to wait.

use std::time::Duration;

use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

use super::replicas::{Reason, Refusal, TryAgain};
use crate::telemetry::chain;

/// Tells a gRPC client that retries by itself how long to wait (gRFC A6).
const PUSHBACK: &str = "grpc-retry-pushback-ms";
/// How long a caller wants to wait (the gRPC protocol's `Timeout`).
const TIMEOUT: &str = "grpc-timeout";

/// The status of a refusal.
pub(super) fn of(refusal: &Refusal) -> Status {
    let code = match refusal {
        Refusal::Invalid { .. } => Code::InvalidArgument,
        Refusal::NotAssigned => Code::NotFound,
        Refusal::TryAgain(TryAgain { reason, .. }) => match reason {
            Reason::Replicas | Reason::Memory | Reason::Address | Reason::Calls => Code::ResourceExhausted,
            Reason::Releasing | Reason::Ending => Code::Unavailable,
        },
        Refusal::Missing(_) => Code::Unavailable,
        Refusal::Failed { .. } => Code::Internal,
    };
    let mut metadata = MetadataMap::new();
    if let Refusal::TryAgain(TryAgain { retry_after, .. }) = refusal {
        metadata.insert(PUSHBACK, MetadataValue::from(u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX)));
    }
    Status::with_metadata(code, chain(refusal), metadata)
}

/// How long the caller waits, but no longer than `most`. What is no timeout is none.
pub(super) fn patience(metadata: &MetadataMap, most: Duration) -> Duration {
    let told = metadata.get(TIMEOUT).and_then(|value| value.to_str().ok()).and_then(parse);
    told.map_or(most, |told| told.min(most))
}

/// At most eight digits and a unit.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 60 * 60)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_refusal_has_its_code_and_says_why() {
        let try_again = |reason| Refusal::TryAgain(TryAgain { reason, retry_after: Duration::from_millis(2500) });
        let failed = Refusal::failed("start replica a", std::io::Error::other("no space"));
        for (refusal, code, text) in [
            (Refusal::invalid("cpu", "too many"), Code::InvalidArgument, "cpu: too many"),
            (Refusal::NotAssigned, Code::NotFound, "VM setup is not assigned"),
            (Refusal::Missing("no driver".to_owned()), Code::Unavailable, "no driver"),
            (failed, Code::Internal, "failed to start replica a: no space"),
            (try_again(Reason::Memory), Code::ResourceExhausted, "memory"),
            (try_again(Reason::Replicas), Code::ResourceExhausted, "try again in 2 s"),
            (try_again(Reason::Address), Code::ResourceExhausted, "address"),
            (try_again(Reason::Calls), Code::ResourceExhausted, "calls"),
            (try_again(Reason::Releasing), Code::Unavailable, "still being released"),
            (try_again(Reason::Ending), Code::Unavailable, "ending"),
        ] {
            let status = of(&refusal);
            assert_eq!(status.code(), code, "{refusal:?}");
            assert!(status.message().contains(text), "{status:?}");
            let pushback = status.metadata().get(PUSHBACK).map(|value| value.to_str().unwrap().to_owned());
            let expected = matches!(refusal, Refusal::TryAgain(_)).then(|| "2500".to_owned());
            assert_eq!(pushback, expected, "{refusal:?}");
        }
    }

    #[test]
    fn a_caller_waits_as_long_as_it_says_but_not_for_ever() {
        let most = Duration::from_secs(60);
        let of = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert(TIMEOUT, text.parse().unwrap());
            patience(&metadata, most)
        };
        assert_eq!(of("1500m"), Duration::from_millis(1500));
        assert_eq!(of("0S"), Duration::ZERO);
        assert_eq!(of("7u"), Duration::from_micros(7));
        for long in ["2M", "99999999H", "", "S", "5", "-1S", "1 S", "123456789S"] {
            assert_eq!(of(long), most, "{long:?}");
        }
        assert_eq!(patience(&MetadataMap::new(), most), most);
    }

    proptest! {
        #[test]
        fn no_text_is_waited_for_longer_than_allowed(text in ".{0,12}") {
            prop_assert!(parse(&text).is_none_or(|told| told <= Duration::from_secs(99_999_999 * 60 * 60)));
        }
    }
}
