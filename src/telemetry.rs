//! What the process says about itself: log lines, metrics, and errors printed with their whole cause.

use std::error::Error;
use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Starts logging to stderr. `RUST_LOG`, where set, wins over `verbosity`.
///
/// # Errors
/// If `RUST_LOG` does not parse, or logging was started before.
pub fn init(format: LogFormat, verbosity: u8) -> anyhow::Result<()> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => {
            EnvFilter::try_new(&text).map_err(|error| anyhow::anyhow!("RUST_LOG={text:?} is no log filter: {error}"))?
        }
        _ => EnvFilter::new(directives(verbosity)),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("failed to start logging: {error}"))
}

/// The log filter of a kubelet-like verbosity: 0 what an operator wants to know, 2 also what libraries say, 4 debugging
/// this node, 6 every step of it, 8 every step of everything.
fn directives(verbosity: u8) -> &'static str {
    match verbosity {
        // The API client repeats each failed attempt as an error of its own; the room that asked says it once, with names.
        0..=1 => "warn,kube_client=off,kube_runtime=off,lambdalet=info",
        2..=3 => "info",
        4..=5 => "info,lambdalet=debug",
        6..=7 => "debug,lambdalet=trace",
        8.. => "trace",
    }
}

/// The error with every cause, joined by `: `, leaving out a cause whose text the message before it already ends with
/// (some libraries repeat their source in `Display`).
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Link {
        text: &'static str,
        #[source]
        source: Option<Box<Link>>,
    }

    #[test]
    fn every_verbosity_is_a_valid_filter() {
        for verbosity in 0..=10 {
            assert!(EnvFilter::try_new(directives(verbosity)).is_ok(), "{verbosity}");
        }
    }

    #[test]
    fn chain_prints_each_cause_once() {
        let root = Link { text: "connection refused", source: None };
        let repeating = Link { text: "request failed: connection refused", source: Some(Box::new(root)) };
        let top = Link { text: "failed to list Pods", source: Some(Box::new(repeating)) };
        assert_eq!(chain(&top), "failed to list Pods: request failed: connection refused");
    }
}
