//! What the API counts of itself.

use std::time::Duration;

use http::{Method, StatusCode};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::metrics::Metrics;

/// Seconds until the response head: from an answer out of memory to one that waits for a cold container.
const BUCKETS: [f64; 8] = [0.001, 0.005, 0.025, 0.1, 0.5, 2.0, 10.0, 60.0];

/// Why a connection was not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Lost {
    /// TLS failed or took too long.
    Handshake,
    /// The bound on connections was reached.
    Full,
    /// It had proved nothing, or idled, when its place was needed.
    Evicted,
}

/// A question put to the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Review {
    /// TokenReview.
    Token,
    /// SubjectAccessReview.
    Access,
}

/// Its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Verdict {
    Allowed,
    Denied,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    method: &'static str,
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LostLabels {
    reason: Lost,
}

/// What a connection that is not HTTP any more is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum StreamKind {
    Exec,
    Attach,
    PortForward,
    Run,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StreamLabels {
    kind: StreamKind,
}

/// Counts as open until it is dropped.
#[derive(Debug)]
pub(super) struct OpenStream(Gauge);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReviewLabels {
    review: Review,
    verdict: Verdict,
}

/// Handles into the registry. A clone counts into the same.
#[derive(Clone, Debug)]
pub(super) struct Meters {
    requests: Family<RequestLabels, Counter>,
    seconds: Histogram,
    lost: Family<LostLabels, Counter>,
    reviews: Family<ReviewLabels, Counter>,
    streams: Family<StreamLabels, Gauge>,
    /// Connections open now.
    pub(super) connections: Gauge,
    /// Log bytes handed to clients.
    pub(super) log_bytes: Counter,
}

impl Meters {
    pub(super) fn new(metrics: &Metrics) -> Self {
        let meters = Self {
            requests: Family::default(),
            seconds: Histogram::new(BUCKETS),
            lost: Family::default(),
            reviews: Family::default(),
            streams: Family::default(),
            connections: Gauge::default(),
            log_bytes: Counter::default(),
        };
        metrics.register(|registry| {
            let registry = registry.sub_registry_with_prefix("api");
            registry.register("requests", "Requests answered by the node's own API", meters.requests.clone());
            registry.register("request_seconds", "Time to the response head", meters.seconds.clone());
            registry.register("connections_lost", "Connections that were not served", meters.lost.clone());
            registry.register("reviews", "Questions to the API server about clients", meters.reviews.clone());
            registry.register(
                "streams",
                "Sessions of exec, attach, port-forward and run open now",
                meters.streams.clone(),
            );
            registry.register("connections", "Connections open now", meters.connections.clone());
            registry.register("log_bytes", "Container log bytes sent", meters.log_bytes.clone());
        });
        meters
    }

    pub(super) fn request(&self, route: &'static str, method: &Method, code: StatusCode, took: Duration) {
        let labels = RequestLabels { route, method: method_label(method), code: code.as_u16() };
        self.requests.get_or_create(&labels).inc();
        self.seconds.observe(took.as_secs_f64());
    }

    pub(super) fn open(&self, kind: StreamKind) -> OpenStream {
        let gauge = self.streams.get_or_create(&StreamLabels { kind }).clone();
        gauge.inc();
        OpenStream(gauge)
    }

    pub(super) fn lost(&self, reason: Lost) {
        self.lost.get_or_create(&LostLabels { reason }).inc();
    }

    pub(super) fn review(&self, review: Review, verdict: Verdict) {
        self.reviews.get_or_create(&ReviewLabels { review, verdict }).inc();
    }
}

/// A closed set: a client must not be able to make series.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}
