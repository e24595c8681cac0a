//! A container's environment from its spec and the objects that names. Pure.
//!
//! The order and precedence are the kubelet's: `envFrom` in order, then `env` in order with `$(VAR)` seeing everything
//! before it and the service variables, then the service variables that nothing has overridden.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvFromSource, EnvVarSource, Secret};

use super::downward;
use super::expand::expand;
use crate::pod::PodContext;

/// A container's environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// Name and value, each name once, in the order of declaration.
    pub variables: Vec<(String, String)>,
    /// Keys of an `envFrom` that cannot be names, one text per source, for an event
    /// (`InvalidEnvironmentVariableNames`).
    pub warnings: Vec<String>,
}

/// The objects that exist, by name.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// ConfigMaps of the Pod's namespace.
    pub config_maps: HashMap<String, Arc<ConfigMap>>,
    /// Secrets of the Pod's namespace.
    pub secrets: HashMap<String, Arc<Secret>>,
}

/// The ConfigMaps that a container's environment names.
pub fn config_maps(container: &Container) -> BTreeSet<&str> {
    let from = container.env_from.iter().flatten().filter_map(|from| from.config_map_ref.as_ref());
    let keys = value_sources(container).filter_map(|source| source.config_map_key_ref.as_ref());
    from.map(|from| from.name.as_str()).chain(keys.map(|key| key.name.as_str())).collect()
}

/// The Secrets that a container's environment names.
pub fn secrets(container: &Container) -> BTreeSet<&str> {
    let from = container.env_from.iter().flatten().filter_map(|from| from.secret_ref.as_ref());
    let keys = value_sources(container).filter_map(|source| source.secret_key_ref.as_ref());
    from.map(|from| from.name.as_str()).chain(keys.map(|key| key.name.as_str())).collect()
}

fn value_sources(container: &Container) -> impl Iterator<Item = &EnvVarSource> {
    container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref())
}

/// The container's environment.
///
/// # Errors
/// What is missing and not optional, in the kubelet's words.
pub fn environment(
    ctx: &PodContext<'_>,
    container: &Container,
    sources: &Sources,
    services: Vec<(String, String)>,
) -> Result<Environment, String> {
    let namespace = ctx.pod.metadata.namespace.as_deref().unwrap_or("default");
    let mut declared = Declared::default();
    let mut warnings = Vec::new();
    for from in container.env_from.iter().flatten() {
        declared.include(from, sources, namespace, &mut warnings)?;
    }
    let services: BTreeMap<String, String> = services.into_iter().collect();
    for variable in container.env.iter().flatten() {
        let text = variable.value.as_deref().unwrap_or_default();
        let value = match &variable.value_from {
            Some(source) if text.is_empty() => match value(ctx, container, sources, source)? {
                Some(value) => value,
                None => continue,
            },
            _ => expand(text, |name| declared.get(name).or_else(|| services.get(name).map(String::as_str))),
        };
        declared.set(&variable.name, value);
    }
    for (name, value) in services {
        if declared.get(&name).is_none() {
            declared.set(&name, value);
        }
    }
    Ok(Environment { variables: declared.variables, warnings })
}

/// Variables in order, each name once.
#[derive(Default)]
struct Declared {
    variables: Vec<(String, String)>,
    positions: HashMap<String, usize>,
}

impl Declared {
    fn get(&self, name: &str) -> Option<&str> {
        self.positions.get(name).map(|position| self.variables[*position].1.as_str())
    }

    fn set(&mut self, name: &str, value: String) {
        if let Some(position) = self.positions.get(name) {
            self.variables[*position].1 = value;
        } else {
            self.positions.insert(name.to_owned(), self.variables.len());
            self.variables.push((name.to_owned(), value));
        }
    }

    fn include(
        &mut self,
        from: &EnvFromSource,
        sources: &Sources,
        namespace: &str,
        warnings: &mut Vec<String>,
    ) -> Result<(), String> {
        let prefix = from.prefix.as_deref().unwrap_or_default();
        let (kind, name, data) = if let Some(map) = &from.config_map_ref {
            match sources.config_maps.get(&map.name) {
                Some(found) => ("configMap", &map.name, found.data.clone().unwrap_or_default()),
                None if map.optional == Some(true) => return Ok(()),
                None => return Err(format!("configmap {:?} not found", map.name)),
            }
        } else if let Some(secret) = &from.secret_ref {
            match sources.secrets.get(&secret.name) {
                Some(found) => {
                    let data = found.data.iter().flatten();
                    ("secret", &secret.name, data.map(|(key, value)| (key.clone(), text(&value.0))).collect())
                }
                None if secret.optional == Some(true) => return Ok(()),
                None => return Err(format!("secret {:?} not found", secret.name)),
            }
        } else {
            return Ok(());
        };
        let mut invalid = Vec::new();
        for (key, value) in data {
            let variable = format!("{prefix}{key}");
            if is_name(&variable) { self.set(&variable, value) } else { invalid.push(variable) }
        }
        if !invalid.is_empty() {
            warnings.push(format!(
                "keys [{}] from the EnvFrom {kind} {namespace}/{name} were skipped: they cannot be names of environment variables",
                invalid.join(", ")
            ));
        }
        Ok(())
    }
}

/// `None`: it is not there and may be missing.
fn value(
    ctx: &PodContext<'_>,
    container: &Container,
    sources: &Sources,
    source: &EnvVarSource,
) -> Result<Option<String>, String> {
    let namespace = ctx.pod.metadata.namespace.as_deref().unwrap_or("default");
    if let Some(selector) = &source.field_ref {
        return downward::field(ctx, &selector.field_path).map(Some);
    }
    if let Some(selector) = &source.resource_field_ref {
        return downward::resource(ctx, Some(container), selector).map(Some);
    }
    if let Some(key) = &source.config_map_key_ref {
        let optional = key.optional == Some(true);
        let Some(found) = sources.config_maps.get(&key.name) else {
            return absent(optional, || format!("configmap {:?} not found", key.name));
        };
        return match found.data.as_ref().and_then(|data| data.get(&key.key)) {
            Some(value) => Ok(Some(value.clone())),
            None => absent(optional, || format!("couldn't find key {} in ConfigMap {namespace}/{}", key.key, key.name)),
        };
    }
    if let Some(key) = &source.secret_key_ref {
        let optional = key.optional == Some(true);
        let Some(found) = sources.secrets.get(&key.name) else {
            return absent(optional, || format!("secret {:?} not found", key.name));
        };
        return match found.data.as_ref().and_then(|data| data.get(&key.key)) {
            Some(value) => Ok(Some(text(&value.0))),
            None => absent(optional, || format!("couldn't find key {} in Secret {namespace}/{}", key.key, key.name)),
        };
    }
    if let Some(key) = &source.file_key_ref {
        return Err(format!("fileKeyRef (key {} of file {}) is not supported by this node", key.key, key.path));
    }
    Ok(Some(String::new()))
}

fn absent(optional: bool, message: impl Fn() -> String) -> Result<Option<String>, String> {
    if optional { Ok(None) } else { Err(message()) }
}

/// An environment cannot hold everything a Secret can; what is not UTF-8 is replaced.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Printable ASCII without `=`, as the API allows since 1.34.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b'=')
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::node::NodeFacts;

    fn resolve(container: Value, services: &[(&str, &str)]) -> Result<Environment, String> {
        let pod = serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "shop"}})).unwrap();
        let node =
            NodeFacts { name: "n1".into(), addresses: vec![], capacity: BTreeMap::new(), allocatable: BTreeMap::new() };
        let addresses = ["10.0.0.2".parse().unwrap()];
        let config: ConfigMap = serde_json::from_value(json!({"data": {"A": "1", "B": "2", "no=name": "x"}})).unwrap();
        let secret: Secret = serde_json::from_value(json!({"data": {"B": "czM=", "bad\u{e9}": "eA=="}})).unwrap();
        let sources = Sources {
            config_maps: HashMap::from([("conf".into(), Arc::new(config))]),
            secrets: HashMap::from([("keys".into(), Arc::new(secret))]),
        };
        let mut container = container;
        container["name"] = json!("main");
        let services = services.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let ctx = PodContext { key: "", pod: &pod, node: &node, addresses: &addresses };
        environment(&ctx, &serde_json::from_value(container).unwrap(), &sources, services)
    }

    fn variables(container: Value, services: &[(&str, &str)]) -> Vec<String> {
        let environment = resolve(container, services).unwrap();
        environment.variables.iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    #[test]
    fn later_sources_override_earlier_ones_in_place() {
        let container = json!({
            "envFrom": [{"configMapRef": {"name": "conf"}}, {"secretRef": {"name": "keys"}},
                {"prefix": "P_", "configMapRef": {"name": "conf"}}, {"configMapRef": {"name": "none", "optional": true}}],
            "env": [{"name": "A", "value": "own"}],
        });
        let environment = resolve(container.clone(), &[]).unwrap();
        assert_eq!(variables(container, &[]), ["A=own", "B=s3", "P_A=1", "P_B=2"]);
        assert_eq!(environment.warnings.len(), 3);
        assert!(environment.warnings[0].contains("[no=name]") && environment.warnings[0].contains("shop/conf"));
    }

    #[test]
    fn references_see_what_is_declared_before_them_and_services() {
        let container = json!({"env": [
            {"name": "EARLY", "value": "$(LATE)"},
            {"name": "LATE", "value": "late"},
            {"name": "BOTH", "value": "$(LATE)-$(WEB_SERVICE_HOST)-$$(LATE)-$(NONE)"},
            {"name": "WEB_PORT", "value": "mine"},
            {"name": "SELF", "value": "$(SELF)"},
            {"name": "NOTHING"},
        ]});
        let services = [("WEB_SERVICE_HOST", "10.0.0.9"), ("WEB_PORT", "tcp://10.0.0.9:1")];
        assert_eq!(
            variables(container, &services),
            [
                "EARLY=$(LATE)",
                "LATE=late",
                "BOTH=late-10.0.0.9-$(LATE)-$(NONE)",
                "WEB_PORT=mine",
                "SELF=$(SELF)",
                "NOTHING=",
                "WEB_SERVICE_HOST=10.0.0.9"
            ]
        );
    }

    #[test]
    fn values_come_from_fields_and_keys() {
        let container = json!({"env": [
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "requests.cpu"}}},
            {"name": "MAP", "valueFrom": {"configMapKeyRef": {"name": "conf", "key": "A"}}},
            {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "B"}}},
            {"name": "GONE", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "Z", "optional": true}}},
            {"name": "NONE", "valueFrom": {"configMapKeyRef": {"name": "zip", "key": "Z", "optional": true}}},
        ]});
        assert_eq!(variables(container, &[]), ["IP=10.0.0.2", "CPU=0", "MAP=1", "KEY=s3"]);
    }

    #[test]
    fn what_is_missing_is_named_as_the_kubelet_does() {
        for (container, message) in [
            (json!({"envFrom": [{"secretRef": {"name": "x"}}]}), "secret \"x\" not found"),
            (json!({"envFrom": [{"configMapRef": {"name": "x"}}]}), "configmap \"x\" not found"),
            (
                json!({"env": [{"name": "E", "valueFrom": {"configMapKeyRef": {"name": "conf", "key": "k"}}}]}),
                "couldn't find key k in ConfigMap shop/conf",
            ),
            (
                json!({"env": [{"name": "E", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "k"}}}]}),
                "couldn't find key k in Secret shop/keys",
            ),
            (
                json!({"env": [{"name": "E", "valueFrom": {"secretKeyRef": {"name": "x", "key": "k"}}}]}),
                "secret \"x\" not found",
            ),
            (
                json!({"env": [{"name": "E", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}]}),
                "unsupported fieldPath: spec.x",
            ),
            (
                json!({"env": [{"name": "E", "valueFrom": {"fileKeyRef": {"volumeName": "v", "path": "p", "key": "k"}}}]}),
                "fileKeyRef (key k of file p) is not supported by this node",
            ),
        ] {
            assert_eq!(resolve(container, &[]).unwrap_err(), message);
        }
    }

    #[test]
    fn what_a_container_names_is_known_before_anything_is_fetched() {
        let container: Container = serde_json::from_value(json!({"name": "c",
            "envFrom": [{"configMapRef": {"name": "a"}}, {"secretRef": {"name": "b"}}],
            "env": [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}},
                {"name": "Y", "valueFrom": {"secretKeyRef": {"name": "d", "key": "k"}}}, {"name": "Z", "value": "z"}]}))
        .unwrap();
        assert_eq!(config_maps(&container), BTreeSet::from(["a", "c"]));
        assert_eq!(secrets(&container), BTreeSet::from(["b", "d"]));
    }
}
