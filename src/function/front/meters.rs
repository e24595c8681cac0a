//! What the fronts of a node count, by function.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::metrics::Metrics;

/// Seconds that a call waits for its environment, or spends in it: from a warm call to a long cold one.
const CALL_BUCKETS: [f64; 9] = [0.001, 0.005, 0.025, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0];
/// Seconds that the front itself adds.
const OVERHEAD_BUCKETS: [f64; 8] = [0.00002, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.005, 0.025];

/// How a call ended, for its counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Ended {
    /// The environment answered.
    Answered,
    /// The client left before it had the answer.
    ClientGone,
    /// 502: the environment broke or could not be reached.
    Lost,
    /// 429.
    Busy,
    /// 503.
    Unavailable,
    /// 400, 408, 413, 501: the request's own fault.
    Refused,
}

/// Why a connection was not served, or not to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Lost {
    /// The bound on connections was reached.
    Full,
    /// It idled when its place was needed.
    Evicted,
    /// A request head took too long.
    SlowHead,
    /// It did not take its answer.
    SlowReader,
}

/// A function, as its series are told apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FunctionLabels {
    /// Namespace of the Pod.
    pub namespace: String,
    /// Name of the Pod.
    pub pod: String,
    /// UID of the Pod: a namesake's front may still be draining.
    pub uid: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    namespace: String,
    pod: String,
    uid: String,
    outcome: Ended,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LostLabels {
    reason: Lost,
}

/// The metrics of all fronts; clones count into the same.
#[derive(Clone, Debug)]
pub struct Meters {
    calls: Family<CallLabels, Counter>,
    wait: Family<FunctionLabels, Histogram, fn() -> Histogram>,
    run: Family<FunctionLabels, Histogram, fn() -> Histogram>,
    connections: Family<FunctionLabels, Gauge>,
    overhead: Histogram,
    lost: Family<LostLabels, Counter>,
}

/// The metrics of one front; its series go when it is dropped.
pub(super) struct FunctionMeters {
    all: Meters,
    labels: FunctionLabels,
    calls: [Counter; ENDS.len()],
    wait: Histogram,
    run: Histogram,
    pub(super) connections: Gauge,
}

/// In the order in which they are declared.
const ENDS: [Ended; 6] =
    [Ended::Answered, Ended::ClientGone, Ended::Lost, Ended::Busy, Ended::Unavailable, Ended::Refused];

fn call_histogram() -> Histogram {
    Histogram::new(CALL_BUCKETS)
}

impl Meters {
    /// Registers the `lambdalet_function_*` metrics of the fronts; once per registry.
    pub fn new(metrics: &Metrics) -> Self {
        let meters = Self {
            calls: Family::default(),
            wait: Family::new_with_constructor(call_histogram),
            run: Family::new_with_constructor(call_histogram),
            connections: Family::default(),
            overhead: Histogram::new(OVERHEAD_BUCKETS),
            lost: Family::default(),
        };
        metrics.register(|registry| {
            let registry = registry.sub_registry_with_prefix("function");
            registry.register("calls", "Calls of the function by how they ended", meters.calls.clone());
            registry.register("wait_seconds", "Time that calls waited for an environment", meters.wait.clone());
            registry.register("run_seconds", "Time that environments took for calls", meters.run.clone());
            registry.register("connections", "Clients' connections open now", meters.connections.clone());
            let help = "Time that the node itself added to calls, waiting not counted";
            registry.register("overhead_seconds", help, meters.overhead.clone());
            registry.register("connections_lost", "Clients' connections that were not served", meters.lost.clone());
        });
        meters
    }

    pub(super) fn function(&self, labels: FunctionLabels) -> Arc<FunctionMeters> {
        Arc::new(FunctionMeters {
            calls: ENDS.map(|outcome| self.calls.get_or_create_owned(&labels.call(outcome))),
            wait: self.wait.get_or_create_owned(&labels),
            run: self.run.get_or_create_owned(&labels),
            connections: self.connections.get_or_create_owned(&labels),
            all: self.clone(),
            labels,
        })
    }
}

impl FunctionLabels {
    fn call(&self, outcome: Ended) -> CallLabels {
        let Self { namespace, pod, uid } = self.clone();
        CallLabels { namespace, pod, uid, outcome }
    }
}

impl FunctionMeters {
    pub(super) fn ended(&self, how: Ended) {
        self.calls[how as usize].inc();
    }

    pub(super) fn waited(&self, time: Duration) {
        self.wait.observe(time.as_secs_f64());
    }

    pub(super) fn ran(&self, time: Duration) {
        self.run.observe(time.as_secs_f64());
    }

    pub(super) fn added(&self, time: Duration) {
        self.all.overhead.observe(time.as_secs_f64());
    }

    pub(super) fn lost(&self, reason: Lost) {
        self.all.lost.get_or_create(&LostLabels { reason }).inc();
    }
}

impl Drop for FunctionMeters {
    fn drop(&mut self) {
        for outcome in ENDS {
            self.all.calls.remove(&self.labels.call(outcome));
        }
        self.all.wait.remove(&self.labels);
        self.all.run.remove(&self.labels);
        self.all.connections.remove(&self.labels);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_series_of_a_function_go_with_it() {
        let metrics = Metrics::new();
        let meters = Meters::new(&metrics);
        let labels = FunctionLabels { namespace: "n".into(), pod: "p".into(), uid: "u".into() };
        let function = meters.function(labels);
        for outcome in ENDS {
            function.ended(outcome);
            assert_eq!(function.calls[outcome as usize].get(), 1, "{outcome:?}");
        }
        function.waited(Duration::from_millis(3));
        let text = metrics.encode().unwrap();
        let calls = r#"lambdalet_function_calls_total{namespace="n",pod="p",uid="u",outcome="Answered"} 1"#;
        assert!(text.contains(calls), "{text}");
        assert!(text.contains(r#"lambdalet_function_wait_seconds_count{namespace="n",pod="p",uid="u"} 1"#), "{text}");
        drop(function);
        assert!(!metrics.encode().unwrap().contains("uid="));
    }
}
