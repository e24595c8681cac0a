//! What the API server holds, and how writes change it.

use std::collections::BTreeMap;

use http::StatusCode;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::NODE;
use super::faults::Fault;

/// An accepted status write: whose, and what was sent.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) uid: String,
    pub(crate) status: Value,
}

/// What a watch finds after a version.
pub(super) enum Happened {
    Event(u64, Value),
    Nothing,
    /// The watch is over.
    Cut,
}

/// Something that happened to an object.
struct Record {
    version: u64,
    kind: String,
    type_: &'static str,
    object: Value,
}

#[derive(Default)]
pub(crate) struct State {
    /// By kind, namespace and name.
    objects: BTreeMap<(String, String, String), Value>,
    history: Vec<Record>,
    version: u64,
    /// Watches from before this version must list again.
    pub(super) forgotten: u64,
    /// Watches that began at another number are over.
    pub(super) cut: u64,
    pub(super) faults: Vec<(&'static str, String, Fault)>,
    /// Answer everything with 503.
    pub(super) down: bool,
    /// Verb and path of every request so far.
    pub(crate) log: Vec<String>,
    /// Every status write accepted so far.
    pub(crate) statuses: Vec<Stored>,
    /// Every event so far.
    pub(crate) events: Vec<Value>,
}

/// Why a request is refused.
pub(super) struct Refusal {
    pub(super) code: StatusCode,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

pub(super) fn not_found(kind: &str, name: &str) -> Refusal {
    let message = format!("{kind} {name:?} not found");
    Refusal { code: StatusCode::NOT_FOUND, reason: "NotFound", message }
}

fn wrong_uid(wanted: &Value, found: &Value) -> Refusal {
    let message = format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}");
    Refusal { code: StatusCode::CONFLICT, reason: "Conflict", message }
}

impl State {
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn next_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    pub(super) fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        self.objects.get(&(kind.to_owned(), namespace.to_owned(), name.to_owned())).cloned()
    }

    pub(super) fn all(&self, kind: &str, of_this_node: bool) -> Vec<Value> {
        let wanted = |object: &&Value| !of_this_node || object["spec"]["nodeName"] == NODE;
        self.objects
            .iter()
            .filter(|((of, ..), _)| of == kind)
            .map(|(_, object)| object)
            .filter(wanted)
            .cloned()
            .collect()
    }

    /// What a watch of this kind that has seen `from` is told next.
    pub(super) fn after(&self, from: u64, kind: &str, of_this_node: bool, cut: u64) -> Happened {
        if self.cut != cut {
            return Happened::Cut;
        }
        let wanted = |record: &&Record| {
            record.version > from && record.kind == kind && (!of_this_node || record.object["spec"]["nodeName"] == NODE)
        };
        match self.history.iter().find(wanted) {
            Some(record) => Happened::Event(record.version, json!({ "type": record.type_, "object": record.object })),
            None => Happened::Nothing,
        }
    }

    pub(super) fn create(&mut self, kind: &str, mut object: Value) -> String {
        let uid = format!("uid-{}", self.version + 1);
        object["metadata"]["uid"] = json!(uid);
        object["metadata"]["creationTimestamp"] = json!(Timestamp::now().to_string());
        self.put(kind, object, "ADDED");
        uid
    }

    /// Creates a Pod that the node itself asks for.
    pub(super) fn accept(&mut self, pod: Value) -> Result<Value, Refusal> {
        let text = |field: &str| pod["metadata"][field].as_str().unwrap_or_default().to_owned();
        let (namespace, name) = (text("namespace"), text("name"));
        if self.get("pods", &namespace, &name).is_some() {
            let message = format!("pods {name:?} already exists");
            return Err(Refusal { code: StatusCode::CONFLICT, reason: "AlreadyExists", message });
        }
        self.create("pods", pod);
        self.get("pods", &namespace, &name).ok_or_else(|| not_found("pods", &name))
    }

    pub(super) fn put(&mut self, kind: &str, mut object: Value, type_: &'static str) -> Value {
        let version = self.next_version();
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        let key = (kind.to_owned(), text("namespace"), text("name"));
        match type_ {
            "DELETED" => drop(self.objects.remove(&key)),
            _ => drop(self.objects.insert(key, object.clone())),
        }
        self.history.push(Record { version, kind: kind.to_owned(), type_, object: object.clone() });
        if kind == "pods" {
            // Bookmarks come now and then, also right after an event.
            let bookmark = json!({ "kind": "Pod", "apiVersion": "v1", "spec": { "nodeName": NODE },
                "metadata": { "resourceVersion": version.to_string() } });
            let version = self.next_version();
            self.history.push(Record { version, kind: kind.to_owned(), type_: "BOOKMARK", object: bookmark });
        }
        object
    }

    pub(super) fn remove(&mut self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let object = self.get(kind, namespace, name)?;
        Some(self.put(kind, object, "DELETED"))
    }

    /// A strategic merge patch of the status, with the UID as precondition.
    pub(super) fn patch_status(&mut self, namespace: &str, name: &str, body: &Value) -> Result<Value, Refusal> {
        let mut pod = self.get("pods", namespace, name).ok_or_else(|| not_found("pods", name))?;
        let (wanted, found) = (&body["metadata"]["uid"], &pod["metadata"]["uid"]);
        if wanted != found {
            return Err(wrong_uid(wanted, found));
        }
        let uid = found.as_str().unwrap_or_default().to_owned();
        self.statuses.push(Stored { uid, status: body["status"].clone() });
        let before = pod.clone();
        merge(&mut pod["status"], &body["status"]);
        match pod == before {
            true => Ok(pod),
            false => Ok(self.put("pods", pod, "MODIFIED")),
        }
    }

    /// Marks a Pod for deletion, or with no grace left removes it.
    pub(super) fn delete(&mut self, namespace: &str, name: &str, options: &Value) -> Result<Value, Refusal> {
        let mut pod = self.get("pods", namespace, name).ok_or_else(|| not_found("pods", name))?;
        let (wanted, found) = (&options["preconditions"]["uid"], &pod["metadata"]["uid"]);
        if !wanted.is_null() && wanted != found {
            return Err(wrong_uid(wanted, found));
        }
        let spec = pod["spec"]["terminationGracePeriodSeconds"].as_i64();
        let grace = options["gracePeriodSeconds"].as_i64().or(spec).unwrap_or(30);
        if grace == 0 {
            return Ok(self.put("pods", pod, "DELETED"));
        }
        let metadata = &mut pod["metadata"];
        let earlier = metadata["deletionGracePeriodSeconds"].as_i64();
        if earlier.is_none_or(|earlier| grace < earlier) {
            metadata["deletionTimestamp"] = json!(Timestamp::now().to_string());
            metadata["deletionGracePeriodSeconds"] = json!(grace);
            pod = self.put("pods", pod, "MODIFIED");
        }
        Ok(pod)
    }
}

/// As a strategic merge patch does: fields one by one, null removes, conditions by their type, other lists as a whole.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else { return *target = patch.clone() };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in fields {
        match (name.as_str(), value) {
            ("conditions", Value::Array(conditions)) => merge_conditions(&mut target[name], conditions),
            (_, Value::Null) => drop(target.as_object_mut().map(|target| target.remove(name))),
            (_, Value::Object(_)) => merge(&mut target[name], value),
            _ => target[name] = value.clone(),
        }
    }
}

fn merge_conditions(target: &mut Value, patch: &[Value]) {
    if !target.is_array() {
        *target = json!([]);
    }
    let all = target.as_array_mut().expect("it was made a list");
    for condition in patch {
        if condition["$patch"] == "delete" {
            all.retain(|known| known["type"] != condition["type"]);
            continue;
        }
        match all.iter_mut().find(|known| known["type"] == condition["type"]) {
            Some(known) => merge(known, condition),
            None => {
                let mut new = json!({});
                merge(&mut new, condition);
                all.push(new);
            }
        }
    }
}
