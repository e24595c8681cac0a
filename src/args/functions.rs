//! `lambdalet functions`: the functions of a cluster as a table.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Args;
use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::ListParams;
use kube::runtime::watcher::{self, Event};

use super::client::ClientArgs;
use super::print;
use crate::function::labels;

/// The Pod condition whose message has the numbers.
const CONDITION: &str = "lambdalet.dev/Replicas";
/// The columns, with the least width of each but the last; a name that is longer pushes the rest aside.
const COLUMNS: [(&str, usize); 8] = [
    ("NAMESPACE", 12),
    ("POD", 28),
    ("NODE", 14),
    ("REPLICAS", 8),
    ("ENVIRONMENTS", 12),
    ("BUSY", 4),
    ("QUEUED", 6),
    ("AGE", 0),
];

/// Flags of `functions`.
#[derive(Debug, Args)]
pub(super) struct FunctionsArgs {
    #[command(flatten)]
    client: ClientArgs,
    /// Those of every namespace
    #[arg(long, short = 'A', conflicts_with = "namespace")]
    all_namespaces: bool,
    /// Stay, and print a line whenever the numbers of one change
    #[arg(long, short)]
    watch: bool,
}

/// Prints the table.
pub(super) async fn functions(args: FunctionsArgs) -> anyhow::Result<ExitCode> {
    let FunctionsArgs { client, all_namespaces, watch } = args;
    let (api, namespace) = client.connect().await?;
    let pods: Api<Pod> = match all_namespaces {
        true => Api::all(api.client.clone()),
        false => Api::namespaced(api.client.clone(), &namespace),
    };
    let listed = api.request(pods.list(&ListParams::default())).await?;
    let now = Timestamp::now();
    let rows: Vec<_> = listed.iter().filter_map(|pod| Row::of(pod, now)).collect();
    if rows.is_empty() && !watch {
        let place = if all_namespaces { "in this cluster".to_owned() } else { format!("in namespace {namespace}") };
        eprintln!("There are no functions {place}.");
        return Ok(ExitCode::SUCCESS);
    }
    print(table(&rows).as_bytes())?;
    if watch { follow(pods, rows).await } else { Ok(ExitCode::SUCCESS) }
}

/// Prints changes until standard output is closed.
async fn follow(pods: Api<Pod>, rows: Vec<Row>) -> anyhow::Result<ExitCode> {
    let mut known: BTreeMap<String, Row> = rows.into_iter().map(|row| (row.key(), row)).collect();
    let mut events = watcher::watcher(pods, watcher::Config::default()).boxed();
    while let Some(event) = events.next().await {
        let pod = match event {
            Ok(Event::Apply(pod) | Event::InitApply(pod)) => pod,
            Ok(Event::Delete(pod)) => {
                if let Some(row) = Row::of(&pod, Timestamp::now()) {
                    known.remove(&row.key());
                }
                continue;
            }
            Ok(Event::Init | Event::InitDone) => continue,
            Err(error) => {
                eprintln!("lambdalet: the watch was interrupted: {}", crate::telemetry::chain(&error));
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                continue;
            }
        };
        let Some(row) = Row::of(&pod, Timestamp::now()) else { continue };
        let changed = known.get(&row.key()).is_none_or(|before| before.numbers() != row.numbers());
        if changed && !said(&row) {
            break;
        }
        known.insert(row.key(), row);
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a line; false once nobody reads any more.
fn said(row: &Row) -> bool {
    use std::io::Write as _;
    std::io::stdout().write_all(line(&row.cells).as_bytes()).is_ok()
}

/// One function.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    cells: [String; COLUMNS.len()],
}

impl Row {
    /// `None` for a Pod that is no function.
    fn of(pod: &Pod, now: Timestamp) -> Option<Self> {
        if !labels::is_function(pod) {
            return None;
        }
        let meta = &pod.metadata;
        let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let condition = conditions.into_iter().find(|condition| condition.type_ == CONDITION);
        let numbers = condition.and_then(|condition| Numbers::read(condition.message.as_deref()?)).unwrap_or_default();
        let age = meta.creation_timestamp.as_ref().map_or_else(none, |made| age(now.duration_since(made.0).as_secs()));
        let text = |text: &Option<String>| text.clone().unwrap_or_else(none);
        let node = pod.spec.as_ref().map_or_else(none, |spec| text(&spec.node_name));
        let Numbers { replicas, environments, busy, queued } = numbers;
        let cells = [text(&meta.namespace), text(&meta.name), node, replicas, environments, busy, queued, age];
        Some(Self { cells })
    }

    fn key(&self) -> String {
        self.cells[..2].join("/")
    }

    /// All but its age.
    fn numbers(&self) -> &[String] {
        &self.cells[..COLUMNS.len() - 1]
    }
}

/// The words of the condition: `3/20 replicas, 15 environments, 7 busy, 0 queued`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Numbers {
    replicas: String,
    environments: String,
    busy: String,
    queued: String,
}

impl Default for Numbers {
    fn default() -> Self {
        Self { replicas: none(), environments: none(), busy: none(), queued: none() }
    }
}

impl Numbers {
    fn read(text: &str) -> Option<Self> {
        let words: BTreeMap<&str, &str> =
            text.split(", ").filter_map(|part| part.split_once(' ')).map(|(number, of)| (of, number)).collect();
        let number = |of: &str| words.get(of).map(|number| (*number).to_owned());
        Some(Self {
            replicas: number("replicas")?,
            environments: number("environments")?,
            busy: number("busy")?,
            queued: number("queued")?,
        })
    }
}

fn none() -> String {
    "-".to_owned()
}

fn table(rows: &[Row]) -> String {
    let head = COLUMNS.map(|(name, _)| name.to_owned());
    std::iter::once(line(&head)).chain(rows.iter().map(|row| line(&row.cells))).collect()
}

fn line(cells: &[String; COLUMNS.len()]) -> String {
    let padded = cells.iter().zip(COLUMNS).map(|(cell, (_, width))| format!("{cell:width$}"));
    format!("{}\n", padded.collect::<Vec<_>>().join("  ").trim_end())
}

/// An age in its largest unit, or two of them while it is young, as kubectl has it.
pub(super) fn age(seconds: i64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        ..120 => format!("{}s", seconds.max(0)),
        120..600 => format!("{minutes}m{}s", seconds % 60),
        600..10_800 => format!("{minutes}m"),
        10_800..172_800 => format!("{hours}h"),
        _ => format!("{days}d"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::function::pool_state::Summary;

    fn pod(labels: serde_json::Value, message: Option<&str>) -> Pod {
        let conditions: Vec<_> =
            message.iter().map(|text| json!({"type": CONDITION, "status": "True", "message": text})).collect();
        let pod = json!({
            "metadata": {
                "namespace": "shop", "name": "resize", "labels": labels, "creationTimestamp": "2026-01-02T03:00:00Z",
            },
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"conditions": conditions},
        });
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn a_row_says_what_the_condition_says() {
        let summary = Summary { replicas: 3, max: 20, environments: 15, busy: 7, ..Summary::default() }.to_string();
        let labels = json!({"com.openfaas.scale.max": "20"});
        let now = "2026-01-02T03:05:09Z".parse().unwrap();
        let row = Row::of(&pod(labels.clone(), Some(&summary)), now).unwrap();
        assert_eq!(row.cells, ["shop", "resize", "n1", "3/20", "15", "7", "0", "5m9s"]);
        for unreadable in [None, Some("something else")] {
            let row = Row::of(&pod(labels.clone(), unreadable), now).unwrap();
            assert_eq!(row.cells[3..7], ["-", "-", "-", "-"]);
        }
        assert_eq!(Row::of(&pod(json!({}), Some(&summary)), now), None, "not a function");
    }

    #[test]
    fn columns_stand_below_each_other() {
        let row = Row { cells: ["a", "b", "c", "3/20", "15", "7", "0", "5s"].map(str::to_owned) };
        let text = table(&[row]);
        let (head, body) = text.split_once('\n').unwrap();
        for (name, cell) in [("REPLICAS", "3/20"), ("QUEUED", "0 "), ("AGE", "5s")] {
            assert!(body[head.find(name).unwrap()..].starts_with(cell), "{text}");
        }
    }

    #[test]
    fn ages_are_those_of_kubectl() {
        let ages = [0, 119, 120, 599, 600, 10_799, 10_800, 172_799, 172_800].map(age);
        assert_eq!(ages, ["0s", "119s", "2m0s", "9m59s", "10m", "179m", "3h", "47h", "2d"]);
    }
}
