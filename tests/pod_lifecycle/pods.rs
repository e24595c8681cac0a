//! Pods as users write them.

use serde_json::{Value, json};

use super::api::NODE;

/// A Pod in the making.
pub(crate) struct PodBuilder(Value);

/// A Pod of that name whose one container `main` runs until it is stopped.
pub(crate) fn pod(name: &str) -> PodBuilder {
    PodBuilder(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": "default", "name": name },
        "spec": {
            "nodeName": NODE, "restartPolicy": "Always", "terminationGracePeriodSeconds": 30,
            "containers": [container("main", "serve")],
        },
    }))
}

fn container(name: &str, command: &str) -> Value {
    let words: Vec<&str> = command.split(' ').collect();
    json!({ "name": name, "image": "busybox:1", "imagePullPolicy": "IfNotPresent", "command": words })
}

impl PodBuilder {
    /// What `main` does, in the words of the fake runtime.
    pub(crate) fn runs(self, command: &str) -> Self {
        let words: Vec<&str> = command.split(' ').collect();
        self.with("/spec/containers/0/command", json!(words))
    }

    /// One more container.
    pub(crate) fn and(mut self, name: &str, command: &str) -> Self {
        self.0["spec"]["containers"].as_array_mut().unwrap().push(container(name, command));
        self
    }

    /// One more init container.
    pub(crate) fn init(mut self, name: &str, command: &str) -> Self {
        let spec = &mut self.0["spec"];
        if spec["initContainers"].is_null() {
            spec["initContainers"] = json!([]);
        }
        spec["initContainers"].as_array_mut().unwrap().push(container(name, command));
        self
    }

    /// The restart policy.
    pub(crate) fn policy(self, policy: &str) -> Self {
        self.with("/spec/restartPolicy", json!(policy))
    }

    /// Any field by its JSON pointer; the last step is made if it is not there.
    pub(crate) fn with(mut self, pointer: &str, value: Value) -> Self {
        let (parent, last) = pointer.rsplit_once('/').unwrap();
        self.0.pointer_mut(parent).unwrap()[last] = value;
        self
    }

    /// A volume with the content of that ConfigMap.
    pub(crate) fn mounts_config(self, map: &str) -> Self {
        self.with("/spec/volumes", json!([{ "name": "config", "configMap": { "name": map } }]))
            .with("/spec/containers/0/volumeMounts", json!([{ "name": "config", "mountPath": "/config" }]))
    }

    /// Requests of `main`.
    pub(crate) fn requests(self, cpu: &str) -> Self {
        self.with("/spec/containers/0/resources", json!({ "requests": { "cpu": cpu } }))
    }

    pub(crate) fn build(self) -> Value {
        self.0
    }
}
