//! Pure: what is shown, and how.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerState, Pod};
use serde::Serialize;

use super::figures::{PodUsage, Pool};
use super::screen::Size;
use crate::args::functions::age;

/// Lines besides the rows of both tables: the first line, their heads, and an empty line before each.
const LINES_AROUND: usize = 5;

/// Everything at one time.
#[derive(Debug, Default, Serialize)]
pub(super) struct View {
    pub(super) time: Timestamp,
    pub(super) nodes: Vec<String>,
    pub(super) sandboxes: Vec<Sandbox>,
    pub(super) functions: Vec<Function>,
    /// What could not be read, and why.
    pub(super) notes: Vec<String>,
}

/// A Pod.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Sandbox {
    namespace: String,
    name: String,
    node: String,
    /// As kubectl has it.
    state: String,
    ready: usize,
    containers: usize,
    cpu_millicores: Option<u64>,
    memory_bytes: Option<u64>,
    restarts: i32,
    age_seconds: i64,
}

/// A function Pod.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Function {
    namespace: String,
    name: String,
    node: String,
    replicas: Option<u64>,
    replicas_max: Option<u64>,
    environments_busy: Option<u64>,
    environments_idle: Option<u64>,
    queued: Option<u64>,
    calls_per_second: Option<f64>,
    age_seconds: i64,
}

impl View {
    /// What uses most comes first.
    pub(super) fn sort(&mut self) {
        let name = |namespace: &String, name: &String| (namespace.clone(), name.clone());
        self.sandboxes.sort_by_key(|pod| {
            (std::cmp::Reverse((pod.cpu_millicores, pod.memory_bytes)), name(&pod.namespace, &pod.name))
        });
        self.functions.sort_by(|a, b| {
            let busy = |function: &Function| (function.environments_busy, function.queued);
            let calls = b.calls_per_second.unwrap_or(0.0).total_cmp(&a.calls_per_second.unwrap_or(0.0));
            calls
                .then_with(|| busy(b).cmp(&busy(a)))
                .then_with(|| name(&a.namespace, &a.name).cmp(&name(&b.namespace, &b.name)))
        });
    }
}

impl Sandbox {
    pub(super) fn of(pod: &Pod, usage: PodUsage, now: Timestamp) -> Self {
        let (namespace, name, node) = names(pod);
        let statuses = || pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
        Self {
            namespace,
            name,
            node,
            state: state(pod),
            ready: statuses().filter(|status| status.ready).count(),
            containers: pod.spec.as_ref().map_or(0, |spec| spec.containers.len()),
            cpu_millicores: usage.cpu,
            memory_bytes: usage.memory,
            restarts: statuses().map(|status| status.restart_count).sum(),
            age_seconds: seconds(pod, now),
        }
    }

    fn cells(&self) -> [String; 9] {
        [
            self.namespace.clone(),
            self.name.clone(),
            self.node.clone(),
            self.state.clone(),
            format!("{}/{}", self.ready, self.containers),
            self.cpu_millicores.map_or_else(none, |milli| format!("{milli}m")),
            self.memory_bytes.map_or_else(none, |bytes| format!("{}Mi", bytes >> 20)),
            self.restarts.to_string(),
            age(self.age_seconds),
        ]
    }
}

impl Function {
    pub(super) fn of(pod: &Pod, pool: Option<Pool>, calls: Option<f64>, now: Timestamp) -> Self {
        let (namespace, name, node) = names(pod);
        Self {
            namespace,
            name,
            node,
            replicas: pool.map(|pool| pool.replicas),
            replicas_max: pool.map(|pool| pool.max),
            environments_busy: pool.map(|pool| pool.busy),
            environments_idle: pool.map(|pool| pool.idle),
            queued: pool.map(|pool| pool.queued),
            calls_per_second: calls,
            age_seconds: seconds(pod, now),
        }
    }

    fn cells(&self) -> [String; 9] {
        let number = |number: Option<u64>| number.map_or_else(none, |number| number.to_string());
        [
            self.namespace.clone(),
            self.name.clone(),
            self.node.clone(),
            self.replicas.zip(self.replicas_max).map_or_else(none, |(now, max)| format!("{now}/{max}")),
            number(self.environments_busy),
            number(self.environments_idle),
            number(self.queued),
            self.calls_per_second.map_or_else(none, |calls| format!("{calls:.1}")),
            age(self.age_seconds),
        ]
    }
}

fn names(pod: &Pod) -> (String, String, String) {
    let text = |text: Option<&String>| text.cloned().unwrap_or_else(none);
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref());
    (text(pod.metadata.namespace.as_ref()), text(pod.metadata.name.as_ref()), text(node))
}

fn seconds(pod: &Pod, now: Timestamp) -> i64 {
    pod.metadata.creation_timestamp.as_ref().map_or(0, |made| now.duration_since(made.0).as_secs().max(0))
}

/// The phase, or why it is not what was wanted.
fn state(pod: &Pod) -> String {
    if pod.metadata.deletion_timestamp.is_some() {
        return "Terminating".to_owned();
    }
    let Some(status) = &pod.status else { return "Unknown".to_owned() };
    let statuses = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    let reason = |state: &ContainerState| {
        let waiting = state.waiting.as_ref().and_then(|waiting| waiting.reason.clone());
        waiting.or_else(|| state.terminated.as_ref().filter(|end| end.exit_code != 0)?.reason.clone())
    };
    let trouble = statuses.filter_map(|status| status.state.as_ref()).find_map(reason);
    trouble.or_else(|| status.reason.clone()).or_else(|| status.phase.clone()).unwrap_or_else(|| "Unknown".to_owned())
}

fn none() -> String {
    "-".to_owned()
}

/// Both tables as text. With a size what does not fit is left out, and that is said.
pub(super) fn table(view: &View, size: Option<Size>) -> String {
    let functions: Vec<_> = view.functions.iter().map(Function::cells).collect();
    let sandboxes: Vec<_> = view.sandboxes.iter().map(Sandbox::cells).collect();
    let around = LINES_AROUND + view.notes.len();
    let rows = size.map_or(usize::MAX, |(_, rows)| rows.saturating_sub(around));
    // Functions take what they need of one half, and of the other what Pods leave.
    let for_functions = functions.len().min((rows / 2).max(rows.saturating_sub(sandboxes.len())));
    let for_sandboxes = sandboxes.len().min(rows - for_functions.min(rows));

    let mut lines = vec![format!(
        "lambdalet top  {}  nodes: {}  sandboxes: {}  functions: {}{}",
        view.time.strftime("%H:%M:%SZ"),
        if view.nodes.is_empty() { "none".to_owned() } else { view.nodes.join(", ") },
        sandboxes.len(),
        functions.len(),
        if size.is_some() { "  (q: quit)" } else { "" },
    )];
    lines.extend(view.notes.iter().map(|note| format!("note: {note}")));
    let head = ["NAMESPACE", "POD", "NODE", "STATE", "READY", "CPU", "MEMORY", "RESTARTS", "AGE"];
    part(&mut lines, (head, 4), &sandboxes, for_sandboxes);
    if !functions.is_empty() {
        let head = ["NAMESPACE", "FUNCTION", "NODE", "REPLICAS", "BUSY", "IDLE", "QUEUED", "CALLS/S", "AGE"];
        part(&mut lines, (head, 3), &functions, for_functions);
    }
    let width = size.map_or(usize::MAX, |(columns, _)| columns);
    let height = size.map_or(usize::MAX, |(_, rows)| rows);
    let shown = |line: &String| line.chars().filter(|c| !c.is_control()).take(width).collect::<String>() + "\n";
    lines.iter().take(height).map(shown).collect()
}

/// One table: an empty line, a head, `most` of the rows. Its first `texts` columns are text, the others numbers.
fn part(lines: &mut Vec<String>, (head, texts): ([&str; 9], usize), rows: &[[String; 9]], most: usize) {
    let head = head.map(str::to_owned);
    let shown = || rows.iter().take(most);
    let width = |column: usize| shown().chain([&head]).map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &[String; 9]| {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column < texts {
            true => format!("{cell:width$}"),
            false => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ")
    };
    lines.push(String::new());
    let left_out = rows.len() - shown().count();
    let more = if left_out > 0 { format!("  (and {left_out} more)") } else { String::new() };
    lines.push(line(&head) + &more);
    lines.extend(shown().map(line));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn now() -> Timestamp {
        "2026-01-02T03:05:09Z".parse().unwrap()
    }

    fn pod(name: &str, status: serde_json::Value) -> Pod {
        let pod = json!({
            "metadata": {"namespace": "shop", "name": name, "uid": name, "creationTimestamp": "2026-01-02T03:00:00Z"},
            "spec": {"nodeName": "n1", "containers": [{"name": "a"}, {"name": "b"}]},
            "status": status,
        });
        serde_json::from_value(pod).unwrap()
    }

    fn running() -> serde_json::Value {
        let status = |ready: bool, restarts: u32| json!({"name": "a", "image": "i", "imageID": "i", "ready": ready, "restartCount": restarts, "state": {"running": {}}});
        json!({"phase": "Running", "containerStatuses": [status(true, 2), status(false, 1)]})
    }

    fn view(pods: usize, functions: usize) -> View {
        let mut view = View { time: now(), nodes: vec!["n1".into()], ..View::default() };
        for number in 0..pods {
            let usage = PodUsage { cpu: Some(number as u64), memory: Some((number as u64) << 20) };
            view.sandboxes.push(Sandbox::of(&pod(&format!("p{number}"), running()), usage, now()));
        }
        for number in 0..functions {
            let pool = Pool { replicas: 3, max: 20, busy: 7, idle: 8, queued: 1, calls: 100.0 };
            let name = format!("f{number}");
            view.functions.push(Function::of(&pod(&name, running()), Some(pool), Some(number as f64), now()));
        }
        view.sort();
        view
    }

    #[test]
    fn rows_say_what_there_is_and_dashes_what_is_not_known() {
        let mut view = view(2, 1);
        view.sandboxes.push(Sandbox::of(&pod("x", json!({"phase": "Pending"})), PodUsage::default(), now()));
        view.functions.push(Function::of(&pod("y", json!({})), None, None, now()));
        let text = table(&view, None);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(text.lines().next(), Some("lambdalet top  03:05:09Z  nodes: n1  sandboxes: 3  functions: 2"));
        assert_eq!(rows[3], ["shop", "p1", "n1", "Running", "1/2", "1m", "1Mi", "3", "5m9s"], "most CPU first");
        assert_eq!(rows[5], ["shop", "x", "n1", "Pending", "0/2", "-", "-", "0", "5m9s"]);
        assert_eq!(rows[8], ["shop", "f0", "n1", "3/20", "7", "8", "1", "0.0", "5m9s"]);
        assert_eq!(rows[9], ["shop", "y", "n1", "-", "-", "-", "-", "-", "5m9s"]);
        assert!(!table(&self::view(1, 0), None).contains("FUNCTION"), "no table of none");
    }

    #[test]
    fn columns_stand_below_each_other() {
        let text = table(&view(12, 0), None);
        let lines: Vec<_> = text.lines().skip(2).collect();
        let end = lines[0].find("CPU").unwrap() + 3;
        assert!(lines[1..].iter().all(|line| line[..end].ends_with('m')), "{text}");
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_said() {
        for (pods, functions, columns, rows) in
            [(50, 3, 80, 24), (3, 50, 80, 24), (50, 50, 40, 10), (5, 5, 20, 1), (0, 0, 9, 3)]
        {
            let text = table(&view(pods, functions), Some((columns, rows)));
            assert!(text.lines().count() <= rows, "{rows} rows: {text}");
            assert!(text.lines().all(|line| line.chars().count() <= columns), "{columns} columns: {text}");
        }
        let text = table(&view(50, 3), Some((200, 24)));
        assert!(text.contains("(and 34 more)") && text.contains("f0"), "{text}");
        assert!(table(&view(2, 2), Some((200, 24))).contains("(q: quit)"));
    }

    #[test]
    fn a_state_is_the_reason_where_there_is_one() {
        let container = |state: serde_json::Value| {
            let status =
                json!({"name": "a", "image": "i", "imageID": "i", "ready": false, "restartCount": 0, "state": state});
            json!({"phase": "Running", "containerStatuses": [status]})
        };
        for (status, wanted) in [
            (container(json!({"waiting": {"reason": "CrashLoopBackOff"}})), "CrashLoopBackOff"),
            (container(json!({"terminated": {"exitCode": 1, "reason": "Error"}})), "Error"),
            (container(json!({"terminated": {"exitCode": 0, "reason": "Completed"}})), "Running"),
            (json!({"phase": "Failed", "reason": "Evicted"}), "Evicted"),
            (json!({"phase": "Succeeded"}), "Succeeded"),
        ] {
            assert_eq!(state(&pod("p", status)), wanted);
        }
        let mut leaving = pod("p", running());
        leaving.metadata.deletion_timestamp = leaving.metadata.creation_timestamp.clone();
        assert_eq!(state(&leaving), "Terminating");
    }

    #[test]
    fn a_note_cannot_move_the_cursor() {
        let view = View { notes: vec!["bad \x1b[2J news".into()], ..View::default() };
        assert!(table(&view, None).contains("note: bad [2J news\n"));
    }

    #[test]
    fn json_has_numbers_and_nulls() {
        let mut view = view(1, 1);
        view.functions.push(Function::of(&pod("y", json!({})), None, None, now()));
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["sandboxes"][0]["cpuMillicores"], 0);
        assert_eq!(json["functions"][0]["environmentsBusy"], 7);
        assert!(json["functions"][1]["callsPerSecond"].is_null());
    }
}
