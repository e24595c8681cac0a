//! What processes cost, from /proc.

use std::fs;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// Processes that are counted together.
pub(crate) struct Group {
    name: String,
    pids: Vec<u32>,
}

impl Group {
    pub(crate) fn new(name: &str, pids: Vec<u32>) -> Self {
        Self { name: name.to_owned(), pids }
    }

    /// One process, from `NAME=PID`.
    pub(crate) fn named(text: &str) -> anyhow::Result<Self> {
        let Some((name, pid)) = text.split_once('=') else { bail!("--process {text}: expected NAME=PID") };
        let pid = pid.parse().with_context(|| format!("--process {text}: expected NAME=PID"))?;
        Ok(Self::new(name, vec![pid]))
    }

    /// CPU time so far, of those that still run.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        self.pids.iter().filter_map(|pid| cpu_seconds(*pid)).sum()
    }

    /// Memory now, and CPU since `before`. RSS counts a page in each process that has it, PSS in equal parts, so that
    /// only PSS can be added up.
    pub(crate) fn row(&self, before: f64, span: Duration) -> anyhow::Result<Value> {
        let sum = |field: &str| -> anyhow::Result<f64> {
            let each = self.pids.iter().map(|pid| rollup_mb(*pid, field));
            Ok(each.collect::<anyhow::Result<Vec<_>>>()?.iter().sum())
        };
        Ok(json!({
            "process": self.name, "count": self.pids.len(), "rss_mb": sum("Rss:")?, "pss_mb": sum("Pss:")?,
            "cpu_percent": 100.0 * (self.cpu_seconds() - before) / span.as_secs_f64(),
        }))
    }
}

/// Processes whose command line contains this text.
pub(crate) fn processes_with(text: &str) -> Vec<u32> {
    let mine = std::process::id();
    let contains = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&line).replace('\0', " ");
        *pid != mine && words.contains(text)
    };
    all().into_iter().filter(contains).collect()
}

/// Processes that one of these started.
pub(crate) fn children_of(parents: &[u32]) -> Vec<u32> {
    // The parent's id is the second word after the name, which ends with the last bracket.
    let is_child = |pid: &u32| stat(*pid, 1).is_some_and(|parent| parents.contains(&(parent as u32)));
    all().into_iter().filter(is_child).collect()
}

fn all() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// A number of proc(5)'s stat, counted from the state, which is 0.
fn stat(pid: u32, place: usize) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit(')').next()?.split_whitespace().nth(place)?.parse().ok()
}

/// In hundredths of a second there, in user and kernel mode.
fn cpu_seconds(pid: u32) -> Option<f64> {
    Some((stat(pid, 11)? + stat(pid, 12)?) / 100.0)
}

fn rollup_mb(pid: u32, field: &str) -> anyhow::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).with_context(|| format!("process {pid}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}
