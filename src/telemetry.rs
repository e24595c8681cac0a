//! What the process says about itself: log lines, metrics, and errors printed with their whole cause.

use std::error::Error;

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
    fn chain_prints_each_cause_once() {
        let root = Link { text: "connection refused", source: None };
        let repeating = Link { text: "request failed: connection refused", source: Some(Box::new(root)) };
        let top = Link { text: "failed to list Pods", source: Some(Box::new(repeating)) };
        assert_eq!(chain(&top), "failed to list Pods: request failed: connection refused");
    }
}
