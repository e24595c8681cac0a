//! The queries of the dashboard and the alerts, taken apart: which metrics they name, with which labels.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use promql_parser::label::{MatchOp, Matcher};
use promql_parser::parser::{self, Expr, LabelModifier, VectorSelector};
use serde::Deserialize;
use serde_json::Value;

/// Labels that Prometheus itself puts on what it scrapes.
pub(crate) const OF_THE_TARGET: [&str; 2] = ["instance", "job"];

/// A query and where it stands.
pub(crate) struct Query {
    pub(crate) place: String,
    pub(crate) text: String,
}

/// A rule file of Prometheus, as far as ours goes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    groups: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "that it is there and readable is all that is asked of a name and a time")]
struct Group {
    name: String,
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "as above")]
struct Rule {
    alert: String,
    expr: String,
    #[serde(rename = "for")]
    lasts: Option<String>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

/// One metric that a query reads.
#[derive(Debug, Default)]
pub(crate) struct Use {
    pub(crate) metric: String,
    /// Labels that it must have.
    pub(crate) labels: BTreeSet<String>,
    /// Labels with values that are written out; the cluster's tests do not look at them.
    #[allow(dead_code, reason = "one of two users reads it")]
    pub(crate) values: Vec<(String, String)>,
}

/// Every query there is.
pub(crate) fn all() -> Vec<Query> {
    let read = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests/grafana").join(name);
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let dashboard: Value = serde_json::from_str(&read("dashboard.json")).unwrap();
    let alerts: Rules = serde_saphyr::from_str(&read("alerts.yaml")).unwrap();
    let list = |value: &Value| value.as_array().unwrap().clone();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let mut queries = Vec::new();
    for panel in list(&dashboard["panels"]).iter().filter(|panel| panel["type"] != "row") {
        for target in list(&panel["targets"]) {
            queries.push(Query { place: format!("panel {}", panel["title"]), text: plain(&text(&target["expr"])) });
        }
    }
    for variable in list(&dashboard["templating"]["list"]).iter().filter(|variable| variable["type"] == "query") {
        // label_values(SELECTOR, LABEL)
        let query = text(&variable["query"]["query"]);
        let (selector, label) =
            query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')')?.rsplit_once(", ")).unwrap();
        let text = format!("count by ({label}) ({})", plain(selector));
        queries.push(Query { place: format!("variable {}", variable["name"]), text });
    }
    for rule in alerts.groups.into_iter().flat_map(|group| group.rules) {
        assert!(rule.labels.contains_key("severity") && rule.annotations.contains_key("summary"), "{}", rule.alert);
        queries.push(Query { place: format!("alert {}", rule.alert), text: rule.expr });
    }
    assert!(queries.len() > 40, "only {} queries were found", queries.len());
    queries
}

/// With something in place of Grafana's variables.
fn plain(query: &str) -> String {
    let plain = query.replace("$__rate_interval", "5m");
    ["$instance", "$namespace", "$function"].iter().fold(plain, |query, variable| query.replace(variable, ".*"))
}

impl Query {
    /// The metrics that it reads.
    ///
    /// # Panics
    /// If it does not parse.
    pub(crate) fn uses(&self) -> Vec<Use> {
        let expression = parser::parse(&self.text).unwrap_or_else(|error| panic!("{self}: {error}"));
        let mut uses = Vec::new();
        walk(&expression, &BTreeSet::new(), &mut uses);
        assert!(!uses.is_empty(), "{self} reads no metric");
        uses
    }
}

impl std::fmt::Display for Query {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

/// `wanted`: labels that what is around it groups or matches by.
fn walk(expression: &Expr, wanted: &BTreeSet<String>, uses: &mut Vec<Use>) {
    let with = |modifier: Option<&LabelModifier>| {
        let more = modifier.filter(|modifier| modifier.is_include()).map(|modifier| modifier.labels().labels.clone());
        wanted.iter().cloned().chain(more.unwrap_or_default()).collect::<BTreeSet<_>>()
    };
    match expression {
        Expr::Aggregate(aggregate) => walk(&aggregate.expr, &with(aggregate.modifier.as_ref()), uses),
        Expr::Binary(binary) => {
            let wanted = with(binary.modifier.as_ref().and_then(|modifier| modifier.matching.as_ref()));
            walk(&binary.lhs, &wanted, uses);
            walk(&binary.rhs, &wanted, uses);
        }
        Expr::Call(call) => call.args.args.iter().for_each(|argument| walk(argument, wanted, uses)),
        Expr::Paren(paren) => walk(&paren.expr, wanted, uses),
        Expr::Unary(unary) => walk(&unary.expr, wanted, uses),
        Expr::Subquery(subquery) => walk(&subquery.expr, wanted, uses),
        Expr::VectorSelector(selector) => uses.push(read(selector, wanted)),
        Expr::MatrixSelector(matrix) => uses.push(read(&matrix.vs, wanted)),
        Expr::NumberLiteral(_) | Expr::StringLiteral(_) => {}
        Expr::Extension(_) => panic!("an expression that is no PromQL"),
    }
}

fn read(selector: &VectorSelector, wanted: &BTreeSet<String>) -> Use {
    let mut labels = wanted.clone();
    let mut values = Vec::new();
    for Matcher { op, name, value } in &selector.matchers.matchers {
        labels.insert(name.clone());
        let written: Vec<&str> = match op {
            MatchOp::Equal | MatchOp::NotEqual => vec![value],
            MatchOp::Re(_) | MatchOp::NotRe(_) => value.split('|').filter(|value| *value != ".*").collect(),
        };
        values.extend(written.into_iter().map(|value| (name.clone(), value.to_owned())));
    }
    Use { metric: selector.name.clone().expect("a metric is named"), labels, values }
}
