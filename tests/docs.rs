//! What the documents say of the repository is so: their links lead somewhere, and the metrics they list exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const DOCUMENTS: [&str; 14] = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/benchmarks.md",
    "docs/cri-driver.md",
    "docs/cri.md",
    "docs/fakecloud.md",
    "docs/function-server.md",
    "docs/functions.md",
    "docs/metrics.md",
    "docs/microvms.md",
    "docs/network.md",
    "docs/node.md",
    "manifests/fakecloud/README.md",
];
/// Metrics that a collector makes at each scrape.
const COLLECTED: [&str; 13] = [
    "process_cpu_seconds",
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_start_time_seconds",
    "function_replicas",
    "function_replicas_max",
    "function_environments",
    "function_queued",
    "function_running",
    "function_cold_starts",
    "function_start_seconds",
    "function_start_node_seconds",
    "function_prepared_starts",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The targets of `[text](target)`, without code blocks.
fn links(text: &str) -> Vec<String> {
    let mut code = false;
    let mut links = Vec::new();
    for line in text.lines() {
        code ^= line.trim_start().starts_with("```");
        let targets = line.split("](").skip(1).filter(|_| !code).filter_map(|rest| rest.split_once(')'));
        links.extend(targets.map(|(target, _)| target.to_owned()));
    }
    links
}

/// A heading as a link names it.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter_map(|line| line.strip_prefix('#'));
    let kept = |c: char| c.is_alphanumeric() || c == ' ' || c == '-';
    headings
        .map(|heading| heading.trim_start_matches('#').trim().to_lowercase())
        .map(|heading| heading.chars().filter(|c| kept(*c)).collect::<String>().replace(' ', "-"))
        .collect()
}

#[test]
fn every_link_into_the_repository_leads_somewhere() {
    for document in DOCUMENTS {
        let text = read(document);
        let folder = Path::new(document).parent().unwrap_or(Path::new(""));
        for link in links(&text).iter().filter(|link| !link.starts_with("https://")) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target: PathBuf = folder.join(path);
            assert!(path.is_empty() || root().join(&target).exists(), "{document}: {link} leads nowhere");
            let there = if path.is_empty() { root().join(document) } else { root().join(&target) };
            let known = anchor.is_empty() || anchors(&fs::read_to_string(there).unwrap_or_default()).contains(anchor);
            assert!(known, "{document}: there is no heading {anchor} where {link} leads");
        }
    }
}

/// The first string of each call of `register` and its kin below `src/`, with the prefix of its part of the registry.
fn registered() -> BTreeSet<String> {
    let (mut names, mut folders) = (BTreeSet::new(), vec![root().join("src")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("src can be read") {
            let path = entry.expect("its entries can be read").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).expect("source files are UTF-8");
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            let quoted = |call: &str| -> Vec<String> {
                let calls = text.split(call).skip(1).filter_map(|rest| rest.trim_start().strip_prefix('"'));
                calls.filter_map(|rest| rest.split_once('"')).map(|(name, _)| name.to_owned()).collect()
            };
            let prefix = quoted("sub_registry_with_prefix(").first().map_or(String::new(), |part| format!("{part}_"));
            let calls = ["registry.register(", "registry.register_with_unit("];
            names.extend(calls.iter().flat_map(|call| quoted(call)).map(|name| format!("{prefix}{name}")));
        }
    }
    names
}

#[test]
fn docs_list_exactly_the_metrics_there_are() {
    let text = read("docs/metrics.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `lambdalet_")?.split_once('`'));
    let written: BTreeSet<String> = rows
        .map(|(name, _)| name.trim_end_matches("_total").trim_end_matches("_info"))
        .map(|name| name.strip_suffix("_duration_seconds").map_or(name.to_owned(), |base| format!("{base}_duration")))
        .collect();
    let there: BTreeSet<String> = registered().into_iter().chain(COLLECTED.map(str::to_owned)).collect();
    let missing: Vec<_> = there.difference(&written).collect();
    let gone: Vec<_> = written.difference(&there).collect();
    assert!(missing.is_empty(), "docs/metrics.md does not list {missing:?} (names without lambdalet_)");
    assert!(gone.is_empty(), "docs/metrics.md lists {gone:?}, which nobody registers");
    assert!(there.iter().all(|name| !name.starts_with("lambdalet")), "the registry adds the prefix: {there:?}");
}
