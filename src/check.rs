//! `lambdalet check`: what on this host keeps a node from working, what that means, and what to do. Changes nothing.

mod cluster;
mod cri;
mod docker;
mod host;
mod microvm;

use std::fmt;
use std::path::Path;

use crate::config::{RuntimeKind, Settings};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Ok,
    /// A node runs, with something missing.
    Warn,
    /// A node does not run, or runs no Pods.
    Fail,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug)]
pub struct Finding {
    /// How bad.
    pub level: Level,
    /// What was looked at, in a word or two.
    pub subject: &'static str,
    /// What was found, and what that means.
    pub found: String,
    /// What to do about it; empty if nothing.
    pub remedy: String,
}

impl Finding {
    fn ok(subject: &'static str, found: impl Into<String>) -> Self {
        Self { level: Level::Ok, subject, found: found.into(), remedy: String::new() }
    }

    fn warn(subject: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { level: Level::Warn, subject, found: found.into(), remedy: remedy.into() }
    }

    fn fail(subject: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { level: Level::Fail, subject, found: found.into(), remedy: remedy.into() }
    }
}

/// Everything that was looked at; `Display` is the table.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In the order they were looked at.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether something keeps a node from working.
    pub fn failed(&self) -> bool {
        self.findings.iter().any(|finding| finding.level == Level::Fail)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.findings.iter().map(|finding| finding.subject.len()).max().unwrap_or(0);
        for Finding { level, subject, found, remedy } in &self.findings {
            writeln!(f, "{:<5} {subject:<width$}  {found}", level.name())?;
            if !remedy.is_empty() {
                writeln!(f, "{:<5} {:<width$}  -> {remedy}", "", "")?;
            }
        }
        let count = |level| self.findings.iter().filter(|finding| finding.level == level).count();
        let (failed, warned) = (count(Level::Fail), count(Level::Warn));
        match (failed, warned) {
            (0, 0) => writeln!(f, "\nThis host can be a node."),
            (0, _) => writeln!(f, "\nThis host can be a node; {warned} of {} checks warn.", self.findings.len()),
            _ => writeln!(f, "\n{failed} of {} checks failed: this host cannot be a node yet.", self.findings.len()),
        }
    }
}

/// Looks at everything `run` with these settings would need.
pub async fn examine(settings: &Settings, kubeconfig: Option<&Path>) -> Report {
    let mut findings = host::rights();
    findings.push(host::root_dir(&settings.pods.root_dir));
    findings.push(host::port(&settings.serving).await);
    findings.push(host::client_ca(settings.serving.client_ca_file.as_deref()));
    match &settings.pods.cni {
        None => findings.extend(host::network(&settings.pods.pod_cidrs).await),
        Some(told) => findings.push(host::plugins(told).await),
    }
    match settings.runtime.kind {
        RuntimeKind::Docker => findings.extend(docker::examine(&settings.runtime.docker_endpoint).await),
        RuntimeKind::Cri => findings.extend(cri::examine(&settings.runtime.cri_endpoint).await),
        RuntimeKind::Microvm => findings.push(docker::beside_microvms(&settings.runtime.docker_endpoint)),
        RuntimeKind::Fake => {
            findings.push(Finding::warn("runtime", "fake: Pods are remembered, not run", "for tests only"));
        }
    }
    if matches!(settings.runtime.kind, RuntimeKind::Docker | RuntimeKind::Microvm) {
        findings.extend(microvm::examine(settings).await);
    }
    findings.push(host::cluster_dns(&settings.pods.cluster_dns));
    findings.extend(cluster::examine(&settings.node.name, kubeconfig).await);
    Report { findings }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_a_table_that_ends_with_the_verdict() {
        let findings = vec![
            Finding::ok("docker", "20.10.24"),
            Finding::warn("clock", "3 s behind", "start chrony"),
            Finding::fail("kubeconfig", "there is none", "pass --kubeconfig"),
        ];
        let report = Report { findings };
        assert!(report.failed());
        let text = report.to_string();
        assert!(text.contains("FAIL  kubeconfig  there is none\n"), "{text}");
        assert!(text.contains("                  -> pass --kubeconfig\n"), "{text}");
        assert!(text.ends_with("1 of 3 checks failed: this host cannot be a node yet.\n"), "{text}");
    }
}
