//! What the process counts: one registry that every room registers into, and what `/proc` says of the process itself.

use std::fmt;
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};

use nix::unistd::{SysconfVar, sysconf};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// Every name begins with this and an underscore.
const PREFIX: &str = "lambdalet";

/// Media type of [`Metrics::encode`]: OpenMetrics 1.0 text, which every Prometheus since 2.5 reads.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The registry, shared by all rooms. A clone is the same registry.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Mutex<Registry>>);

impl Metrics {
    /// A registry holding `lambdalet_build_info` and the `lambdalet_process_*` family.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION")), ("arch", std::env::consts::ARCH)]);
        registry.register("build", "What was built", build);
        registry.register_collector(Box::new(Process));
        Self(Arc::new(Mutex::new(registry)))
    }

    /// Lets a room add its metrics and keep the handles it returns. Names are given without `lambdalet_`, counters
    /// without `_total`. Registering a name twice shows it twice, so a room does this once, when it is made.
    pub fn register<T>(&self, add: impl FnOnce(&mut Registry) -> T) -> T {
        add(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All metrics now, as [`CONTENT_TYPE`].
    ///
    /// # Errors
    /// Only if a metric's own encoder fails.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.0.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(text)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads `/proc/self` at each scrape, so nothing has to be kept up to date in between.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        // What cannot be read is left out: a scrape must not fail because /proc is hidden.
        if let Some(seconds) = cpu_seconds() {
            let metric = ConstCounter::new(seconds);
            let help = "User and system CPU time used";
            let kind = metric.metric_type();
            metric.encode(encoder.encode_descriptor("process_cpu_seconds", help, None, kind)?)?;
        }
        let gauges = [
            ("process_resident_memory_bytes", "Memory held in RAM", resident_bytes()),
            ("process_open_fds", "Open file descriptors", open_files()),
            ("process_start_time_seconds", "Start of the process since the Unix epoch", start_time()),
        ];
        for (name, help, value) in gauges {
            let Some(value) = value else { continue };
            let metric = ConstGauge::new(value);
            let kind = metric.metric_type();
            metric.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        Ok(())
    }
}

/// The fields of `/proc/self/stat` from the third on; the second may hold blanks and parentheses (proc(5)).
fn stat_fields(stat: &str) -> Option<Vec<&str>> {
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace().collect())
}

/// Field `number` (as proc(5) counts them, from 1) of `/proc/self/stat`, in seconds.
fn stat_seconds(number: usize) -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let ticks: f64 = stat_fields(&stat)?.get(number - 3)?.parse().ok()?;
    Some(ticks / sysconf(SysconfVar::CLK_TCK).ok()?? as f64)
}

fn cpu_seconds() -> Option<f64> {
    Some(stat_seconds(14)? + stat_seconds(15)?)
}

fn start_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let boot: f64 = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(boot + stat_seconds(22)?)
}

fn resident_bytes() -> Option<f64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: f64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(pages * sysconf(SysconfVar::PAGE_SIZE).ok()?? as f64)
}

fn open_files() -> Option<f64> {
    // The directory handle that counts is itself an open file.
    Some(fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as f64)
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    fn value(text: &str, name: &str) -> f64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    #[test]
    fn process_metrics_are_plausible() {
        let text = Metrics::new().encode().unwrap();
        assert!(value(&text, "lambdalet_process_resident_memory_bytes ") > 1e5, "{text}");
        assert!(value(&text, "lambdalet_process_open_fds ") >= 3.0);
        assert!(value(&text, "lambdalet_process_cpu_seconds_total ") >= 0.0);
        let now = jiff::Timestamp::now().as_second() as f64;
        let age = now - value(&text, "lambdalet_process_start_time_seconds ");
        assert!((-5.0..3600.0).contains(&age), "age {age}");
    }

    #[test]
    fn every_name_carries_the_prefix_and_rooms_share_one_registry() {
        let metrics = Metrics::new();
        let counter = metrics.clone().register(|registry| {
            let counter = Counter::<u64>::default();
            registry.register("things", "Things done", counter.clone());
            counter
        });
        counter.inc_by(3);
        let text = metrics.encode().unwrap();
        assert!(text.contains("lambdalet_things_total 3\n"), "{text}");
        assert!(text.contains("lambdalet_build_info{version="), "{text}");
        assert!(text.ends_with("# EOF\n"));
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            assert!(line.starts_with("lambdalet_"), "{line}");
        }
    }

    #[test]
    fn a_command_name_with_parentheses_does_not_shift_the_fields() {
        let fields = stat_fields("1 (a) b (c)) S 2 3").unwrap();
        assert_eq!(fields, ["S", "2", "3"]);
    }
}
