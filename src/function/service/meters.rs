//! What pools count, by function. Numbers of the moment are read from the pools at each scrape, and a pool that is gone
//! shows nothing any more.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;

use super::Service;
use crate::function::front::FunctionLabels;
use crate::function::pool_state::Summary;
use crate::metrics::Metrics;

/// Seconds that an environment takes to start: from a prepared one to a large runtime with a slow disk.
const START_BUCKETS: [f64; 10] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];

/// What one pool has counted.
#[derive(Debug)]
pub(super) struct Counts {
    cold_starts: Counter,
    starts: Histogram,
    node_starts: Histogram,
    pub(super) prepared: Counter,
}

impl Default for Counts {
    fn default() -> Self {
        let histogram = || Histogram::new(START_BUCKETS);
        Self {
            cold_starts: Counter::default(),
            starts: histogram(),
            node_starts: histogram(),
            prepared: Counter::default(),
        }
    }
}

impl Counts {
    /// A call that waits since then got an environment that is ready since then. It was a cold start if the call was
    /// there first.
    pub(super) fn granted(&self, since: Instant, ready: Option<Instant>) {
        if ready.is_some_and(|ready| ready > since) {
            self.cold_starts.inc();
        }
    }

    /// An environment took so long to start, and of that so long until its processes ran; it had been prepared, or not.
    pub(super) fn started(&self, took: Duration, node: Duration, prepared: bool) {
        self.starts.observe(took.as_secs_f64());
        self.node_starts.observe(node.as_secs_f64());
        if prepared {
            self.prepared.inc();
        }
    }
}

/// The metrics of all pools; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Meters(Arc<Mutex<BTreeMap<String, Pool>>>);

#[derive(Clone, Debug)]
struct Pool {
    labels: FunctionLabels,
    service: Weak<Service>,
}

/// A function's series that differ by state.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    namespace: String,
    pod: String,
    uid: String,
    state: &'static str,
}

impl Meters {
    /// Registers the `lambdalet_function_*` metrics of the pools; once per registry.
    pub fn new(metrics: &Metrics) -> Self {
        let meters = Self::default();
        metrics.register(|registry| registry.register_collector(Box::new(meters.clone())));
        meters
    }

    /// Shows a pool for as long as it lives.
    pub fn show(&self, labels: FunctionLabels, service: &Arc<Service>) {
        let pool = Pool { service: Arc::downgrade(service), labels };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(pool.labels.uid.clone(), pool);
    }

    fn living(&self) -> Vec<(FunctionLabels, Arc<Service>)> {
        let mut pools = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|_, pool| pool.service.strong_count() > 0);
        pools.values().filter_map(|pool| Some((pool.labels.clone(), pool.service.upgrade()?))).collect()
    }
}

/// A gauge of a function that has one series for each state.
type States = fn(&Summary) -> Vec<(&'static str, usize)>;
/// A gauge of a function.
type Number = fn(&Summary) -> usize;
/// Something that a pool counts.
type Count = fn(&Counts) -> &Counter;
/// Something that a pool times.
type Times = fn(&Counts) -> &Histogram;

const STATES: [(&str, &str, States); 2] = [
    ("function_replicas", "Replicas of the function by state", |summary| {
        let Summary { replicas, starting, ready, leaving, .. } = *summary;
        let warming = replicas.saturating_sub(starting + ready + leaving);
        vec![("starting", starting), ("warming", warming), ("ready", ready), ("leaving", leaving)]
    }),
    ("function_environments", "Execution environments of the function by state", |summary| {
        let Summary { launching, environments, busy, frozen, .. } = *summary;
        let idle = environments.saturating_sub(busy + frozen);
        vec![("starting", launching), ("idle", idle), ("busy", busy), ("frozen", frozen)]
    }),
];
const NUMBERS: [(&str, &str, Number); 3] = [
    ("function_replicas_max", "Replicas that the function may have", |summary| summary.max),
    ("function_queued", "Calls that wait for an environment", |summary| summary.queued),
    ("function_running", "Calls that run", |summary| summary.running),
];
const COUNTERS: [(&str, &str, Count); 2] = [
    ("function_cold_starts", "Calls that waited for an environment to start", |counts| &counts.cold_starts),
    ("function_prepared_starts", "Environments that were prepared when they were started", |counts| &counts.prepared),
];
const HISTOGRAMS: [(&str, &str, Times); 2] = [
    ("function_start_seconds", "Time that environments took to start, until they listened", |counts| &counts.starts),
    (
        "function_start_node_seconds",
        "Of that, the time until their processes ran: the rest is the function's own",
        |counts| &counts.node_starts,
    ),
];

impl Collector for Meters {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let pools = self.living();
        if pools.is_empty() {
            return Ok(());
        }
        let summaries: Vec<_> = pools.iter().map(|(labels, service)| (labels, service.summary_now())).collect();
        for (name, help, states) in STATES {
            let mut family = encoder.encode_descriptor(name, help, None, ConstGauge::new(0_i64).metric_type())?;
            for (labels, summary) in &summaries {
                for (state, number) in states(summary) {
                    let FunctionLabels { namespace, pod, uid } = (*labels).clone();
                    let labels = StateLabels { namespace, pod, uid, state };
                    gauge(number).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        for (name, help, number) in NUMBERS {
            let mut family = encoder.encode_descriptor(name, help, None, gauge(0).metric_type())?;
            for (labels, summary) in &summaries {
                gauge(number(summary)).encode(family.encode_family(*labels)?)?;
            }
        }
        for (name, help, counter) in COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, Counter::<u64>::default().metric_type())?;
            for (labels, service) in &pools {
                counter(&service.counts).encode(family.encode_family(labels)?)?;
            }
        }
        for (name, help, histogram) in HISTOGRAMS {
            let kind = Histogram::new(START_BUCKETS).metric_type();
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (labels, service) in &pools {
                histogram(&service.counts).encode(family.encode_family(labels)?)?;
            }
        }
        Ok(())
    }
}

fn gauge(number: usize) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(number).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;
    use crate::function::pool_state::{EnvironmentId, Exit, ReplicaId};
    use crate::function::protocol::Protocol;
    use crate::function::service::{NotStarted, Replicas, Started};
    use crate::function::settings::Settings;

    /// Nothing can be started.
    struct None;

    #[async_trait]
    impl Replicas for None {
        async fn start_replica(&self, _: ReplicaId) -> Result<(), NotStarted> {
            Err(NotStarted::Denied)
        }
        async fn stop_replica(&self, _: ReplicaId) {}
        async fn start_environment(&self, _: EnvironmentId) -> Result<Started, Exit> {
            std::future::pending().await
        }
        async fn stop_environment(&self, _: EnvironmentId) {}
        async fn prepare(&self, _: EnvironmentId) {}
        async fn dismiss_all_but(&self, _: &std::collections::BTreeSet<EnvironmentId>) {}
        async fn freeze(&self, _: EnvironmentId) {}
        async fn thaw(&self, _: EnvironmentId) -> Result<(), Exit> {
            Ok(())
        }
        fn set_idle(&self, _: ReplicaId, _: Option<Instant>) {}
    }

    #[tokio::test]
    async fn a_pool_is_shown_as_long_as_it_lives() {
        let metrics = Metrics::new();
        let meters = Meters::new(&metrics);
        let (service, _news) = Service::new(Settings::of(Protocol::Http), Arc::new(None), Vec::new());
        let labels = FunctionLabels { namespace: "ns".to_owned(), pod: "p".to_owned(), uid: "u".to_owned() };
        meters.show(labels, &service);
        let before = Instant::now();
        service.counts.granted(before, Some(before));
        service.counts.granted(before, Some(before + Duration::from_millis(1)));
        service.counts.started(Duration::from_millis(300), Duration::from_millis(90), true);
        let text = metrics.encode().unwrap();
        for line in [
            r#"lambdalet_function_replicas{namespace="ns",pod="p",uid="u",state="ready"} 0"#,
            r#"lambdalet_function_environments{namespace="ns",pod="p",uid="u",state="frozen"} 0"#,
            r#"lambdalet_function_replicas_max{namespace="ns",pod="p",uid="u"} 20"#,
            r#"lambdalet_function_queued{namespace="ns",pod="p",uid="u"} 0"#,
            r#"lambdalet_function_running{namespace="ns",pod="p",uid="u"} 0"#,
            r#"lambdalet_function_cold_starts_total{namespace="ns",pod="p",uid="u"} 1"#,
            r#"lambdalet_function_start_seconds_count{namespace="ns",pod="p",uid="u"} 1"#,
            r#"lambdalet_function_start_seconds_bucket{le="0.5",namespace="ns",pod="p",uid="u"} 1"#,
            r#"lambdalet_function_start_node_seconds_bucket{le="0.1",namespace="ns",pod="p",uid="u"} 1"#,
            r#"lambdalet_function_prepared_starts_total{namespace="ns",pod="p",uid="u"} 1"#,
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line} is not in\n{text}");
        }
        drop(service);
        assert!(!metrics.encode().unwrap().contains("lambdalet_function_replicas"));
    }
}
