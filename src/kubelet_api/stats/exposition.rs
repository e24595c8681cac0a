//! Pure: Prometheus' text format 0.0.4, with the times of samples, which the metrics library does not write.

use std::fmt::Write;

use axum::response::{IntoResponse, Response};
use http::header;
use jiff::Timestamp;

/// Its media type.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kubelet_api) enum Kind {
    Counter,
    Gauge,
}

/// A text in the making.
#[derive(Debug, Default)]
pub(in crate::kubelet_api) struct Exposition(String);

/// Samples of one name; nothing is written of a family that has none.
#[derive(Debug)]
pub(in crate::kubelet_api) struct Family<'a> {
    text: &'a mut String,
    name: &'a str,
    help: &'a str,
    kind: Kind,
    begun: bool,
}

/// The answer that carries a text.
pub(in crate::kubelet_api) fn answer(text: String) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response()
}

impl Exposition {
    /// Begins a family; one name must not be begun twice.
    pub(in crate::kubelet_api) fn family<'a>(&'a mut self, name: &'a str, kind: Kind, help: &'a str) -> Family<'a> {
        Family { text: &mut self.0, name, help, kind, begun: false }
    }

    pub(in crate::kubelet_api) fn finish(self) -> String {
        self.0
    }
}

impl Family<'_> {
    /// Adds a value; without a time it is that of the scrape.
    pub(in crate::kubelet_api) fn sample(&mut self, labels: &[(&str, &str)], value: f64, time: Option<Timestamp>) {
        if !self.begun {
            self.begun = true;
            let kind = match self.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
            };
            // Writing to a String cannot fail, here and below.
            let _ = write!(self.text, "# HELP {0} {1}\n# TYPE {0} {kind}\n", self.name, self.help);
        }
        self.text.push_str(self.name);
        for (at, (label, value)) in labels.iter().enumerate() {
            self.text.push(if at == 0 { '{' } else { ',' });
            self.text.push_str(label);
            self.text.push_str("=\"");
            self.escaped(value);
            self.text.push('"');
        }
        let _ = write!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
        if let Some(time) = time {
            let _ = write!(self.text, " {}", time.as_millisecond());
        }
        self.text.push('\n');
    }

    fn escaped(&mut self, value: &str) {
        if !value.contains(['\\', '"', '\n']) {
            return self.text.push_str(value);
        }
        for c in value.chars() {
            match c {
                '\\' => self.text.push_str("\\\\"),
                '"' => self.text.push_str("\\\""),
                '\n' => self.text.push_str("\\n"),
                c => self.text.push(c),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_labels_value_and_time() {
        let mut exposition = Exposition::default();
        let mut family = exposition.family("a_total", Kind::Counter, "Things.");
        family.sample(&[("x", "1"), ("y", "a\"b\\c\nd")], 1.5, Timestamp::from_millisecond(1_234).ok());
        family.sample(&[], 1e21, None);
        exposition.family("b", Kind::Gauge, "None of these.");
        let wanted = "# HELP a_total Things.\n# TYPE a_total counter\na_total{x=\"1\",y=\"a\\\"b\\\\c\\nd\"} 1.5 1234\n\
                      a_total 1000000000000000000000\n";
        assert_eq!(exposition.finish(), wanted);
    }
}
