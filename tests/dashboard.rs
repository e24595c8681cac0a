//! The dashboard and the alerts of `manifests/grafana` ask for nothing that `docs/metrics.md` does not list. That a node
//! shows all of it is seen in the cluster's tests.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod queries;

use std::collections::{BTreeMap, BTreeSet};

use lambdalet::runtime::verb::Verb;

/// Names in backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The metrics of the page by the names under which they are scraped, with their labels.
fn documented(page: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut metrics = BTreeMap::new();
    let mut of_functions = false;
    for line in page.lines() {
        match line {
            line if line.starts_with("Those of functions") => of_functions = true,
            line if line.starts_with("Without those labels") => of_functions = false,
            _ => {}
        }
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let ["", name, kind, labels, ..] = cells[..] else { continue };
        let Some(name) = name.strip_prefix('`').and_then(|name| name.strip_suffix('`')) else { continue };
        let mut labels: BTreeSet<String> = quoted(labels).map(str::to_owned).collect();
        if of_functions {
            labels.extend(["namespace", "pod", "uid"].map(str::to_owned));
        }
        if kind == "histogram" {
            metrics.insert(format!("{name}_sum"), labels.clone());
            metrics.insert(format!("{name}_count"), labels.clone());
            labels.insert("le".to_owned());
            metrics.insert(format!("{name}_bucket"), labels);
        } else {
            metrics.insert(name.to_owned(), labels);
        }
    }
    metrics
}

#[test]
fn every_query_parses_and_asks_for_what_is_documented() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let page = std::fs::read_to_string(path).unwrap();
    let metrics = documented(&page);
    let words: BTreeSet<&str> = quoted(&page).chain(Verb::ALL.iter().map(|verb| verb.name())).collect();
    for query in queries::all() {
        for used in query.uses() {
            let labels =
                metrics.get(&used.metric).unwrap_or_else(|| panic!("{query}: {} is not documented", used.metric));
            for label in used.labels.iter().filter(|label| !queries::OF_THE_TARGET.contains(&label.as_str())) {
                assert!(labels.contains(label), "{query}: {} has no label {label}, but {labels:?}", used.metric);
            }
            for (label, value) in &used.values {
                assert!(words.contains(value.as_str()), "{query}: {label} is never {value:?}");
            }
        }
    }
}
