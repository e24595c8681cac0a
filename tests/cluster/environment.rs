//! What a container finds in its environment, command and arguments.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, Service};
use serde_json::{Value, json};

use crate::harness::pods::{STAY, busybox, busybox_with, is_ready, pod_ip, waiting, waits_for};
use crate::harness::{BUSYBOX, Case, on_shared_node};

/// Runs `env` with these fields in the container, and reads what it wrote.
async fn environment(t: &Case, more: Value) -> BTreeMap<String, String> {
    let name = format!("env-{:x}", rand::random_range(0..0xffff_ffffu32));
    let text = t.output_of(&name, json!({"containers": [busybox_with("env", more)]})).await;
    text.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn variables_refer_to_earlier_ones_and_unknown_ones_stay_as_written() {
    on_shared_node(async |t| {
        let env = json!([
            {"name": "A", "value": "a"},
            {"name": "B", "value": "$(A)b"},
            {"name": "C", "value": "$(LATER) $$(A) $(B)"},
            {"name": "LATER", "value": "z"},
            {"name": "with-dash.and.dot", "value": "kept"},
        ]);
        let found = environment(t, json!({"env": env})).await;
        assert_eq!(found["B"], "ab");
        assert_eq!(found["C"], "$(LATER) $(A) ab");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn command_and_arguments_expand_variables() {
    on_shared_node(async |t| {
        let main = json!({
            "name": "main", "image": BUSYBOX,
            "env": [{"name": "WHAT", "value": "this"}],
            "command": ["/bin/echo", "$(WHAT)"],
            "args": ["$(WHAT)-$$(WHAT)", "$(NOBODY)"],
        });
        let log = t.output_of("echo", json!({"containers": [main]})).await;
        assert_eq!(log, "this this-$(WHAT) $(NOBODY)\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn arguments_alone_follow_the_images_entry_point_or_replace_its_command() {
    on_shared_node(async |t| {
        // This image has a CMD only, which arguments replace.
        let main = json!({"name": "main", "image": BUSYBOX, "args": ["echo", "as", "told"]});
        assert_eq!(t.output_of("args", json!({"containers": [main]})).await, "as told\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn variables_come_from_keys_of_config_maps_and_secrets() {
    on_shared_node(async |t| {
        t.config_map("settings", json!({"colour": "green"})).await;
        t.secret("keys", json!({"password": "s3cret\nwith a line"})).await;
        let env = json!([
            {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "colour"}}},
            {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "password"}}},
            {"name": "NO_KEY", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "none", "optional": true}}},
            {"name": "NO_MAP", "valueFrom": {"secretKeyRef": {"name": "none", "key": "none", "optional": true}}},
            {"name": "BOTH", "value": "$(COLOUR)!"},
        ]);
        let main = busybox_with(
            "printf '%s|' \"$COLOUR\" \"$PASSWORD\" \"${NO_KEY-unset}\" \"${NO_MAP-unset}\" \"$BOTH\"",
            json!({"env": env}),
        );
        let log = t.output_of("keys", json!({"containers": [main]})).await;
        assert_eq!(log, "green|s3cret\nwith a line|unset|unset|green!|");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn whole_config_maps_and_secrets_become_variables_and_single_ones_win() {
    on_shared_node(async |t| {
        t.config_map("settings", json!({"A": "map", "B": "map", "C": "map"})).await;
        t.secret("keys", json!({"B": "secret", "C": "secret"})).await;
        let found = environment(
            t,
            json!({
                "envFrom": [
                    {"configMapRef": {"name": "settings"}},
                    {"secretRef": {"name": "keys"}},
                    {"prefix": "P_", "configMapRef": {"name": "settings"}},
                    {"configMapRef": {"name": "none", "optional": true}},
                ],
                "env": [{"name": "C", "value": "own $(P_A)"}],
            }),
        )
        .await;
        assert_eq!((found["A"].as_str(), found["B"].as_str(), found["C"].as_str()), ("map", "secret", "own map"));
        assert_eq!(found["P_B"], "map");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_pods_own_fields_are_variables() {
    on_shared_node(async |t| {
        let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
        let env = json!([
            field("NAME", "metadata.name"),
            field("NAMESPACE", "metadata.namespace"),
            field("POD_UID", "metadata.uid"),
            field("LABEL", "metadata.labels['app']"),
            field("ANNOTATION", "metadata.annotations['note']"),
            field("NODE", "spec.nodeName"),
            field("ACCOUNT", "spec.serviceAccountName"),
            field("HOST_IP", "status.hostIP"),
            field("HOST_IPS", "status.hostIPs"),
            field("POD_IP", "status.podIP"),
            field("POD_IPS", "status.podIPs"),
        ]);
        let metadata = json!({"labels": {"app": "web"}, "annotations": {"note": "two words"}});
        let spec = json!({"restartPolicy": "Never", "containers": [busybox_with("env", json!({"env": env}))]});
        let made = t.labelled_pod("fields", metadata, spec).await;
        let pod = t.until("fields", "at its end", crate::harness::pods::has_ended).await;
        let log = t.log("fields", "main").await;
        let found: BTreeMap<&str, &str> = log.lines().filter_map(|line| line.split_once('=')).collect();
        let host = t.cluster.fact("HOST_ADDRESS");
        let expected = [
            ("NAME", "fields"),
            ("NAMESPACE", t.namespace.as_str()),
            ("POD_UID", made.metadata.uid.as_deref().unwrap()),
            ("LABEL", "web"),
            ("ANNOTATION", "two words"),
            ("NODE", t.node.name.as_str()),
            ("ACCOUNT", "default"),
            ("HOST_IP", host),
            ("HOST_IPS", host),
            ("POD_IP", pod_ip(&pod)),
            ("POD_IPS", pod_ip(&pod)),
        ];
        for (name, value) in expected {
            assert_eq!(found.get(name), Some(&value), "{name}");
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_containers_own_resources_are_variables() {
    on_shared_node(async |t| {
        let field = |name: &str, resource: &str, divisor: &str| json!({"name": name, "valueFrom": {"resourceFieldRef": {"resource": resource, "divisor": divisor}}});
        let found = environment(
            t,
            json!({
                "resources": {"requests": {"cpu": "250m", "memory": "32Mi"}, "limits": {"cpu": "1500m", "memory": "64Mi"}},
                "env": [
                    field("CPU", "limits.cpu", "0"),
                    field("MILLIS", "limits.cpu", "1m"),
                    field("REQUEST", "requests.cpu", "1m"),
                    field("BYTES", "limits.memory", "1"),
                    field("MEBI", "requests.memory", "1Mi"),
                ],
            }),
        )
        .await;
        let expected = [("CPU", "2"), ("MILLIS", "1500"), ("REQUEST", "250"), ("BYTES", "67108864"), ("MEBI", "32")];
        for (name, value) in expected {
            assert_eq!(found[name], value, "{name}");
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_resource_without_a_limit_reads_as_the_nodes_allocatable() {
    on_shared_node(async |t| {
        let env = json!([{"name": "MEMORY", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}}]);
        let found = environment(t, json!({"env": env})).await;
        let node = t.node.ready(&t.client).await;
        let allocatable = &node.status.unwrap().allocatable.unwrap()["memory"].0;
        let kibi: u64 = allocatable.trim_end_matches("Ki").parse().unwrap();
        let bytes: u64 = found["MEMORY"].parse().unwrap();
        assert_eq!(bytes / 1024, kibi);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn services_of_the_namespace_are_variables_unless_the_pod_declines() {
    on_shared_node(async |t| {
        let ports = json!([{"name": "web", "port": 80}, {"name": "metrics", "port": 9090, "protocol": "UDP"}]);
        let service: Service = t.make("my-shop", json!({"spec": {"ports": ports}})).await;
        let address = service.spec.unwrap().cluster_ip.unwrap();
        // The node may hear of the Service a moment after it was made.
        let found = crate::harness::wait::poll("the Service's variables", crate::harness::wait::SOON, async || {
            let found = environment(t, json!({})).await;
            if found.contains_key("MY_SHOP_SERVICE_HOST") { Ok(found) } else { Err(format!("{found:?}")) }
        })
        .await;
        let tcp = format!("tcp://{address}:80");
        let expected = [
            ("MY_SHOP_SERVICE_HOST", address.as_str()),
            ("MY_SHOP_SERVICE_PORT", "80"),
            ("MY_SHOP_SERVICE_PORT_WEB", "80"),
            ("MY_SHOP_SERVICE_PORT_METRICS", "9090"),
            ("MY_SHOP_PORT", tcp.as_str()),
            ("MY_SHOP_PORT_80_TCP", tcp.as_str()),
            ("MY_SHOP_PORT_80_TCP_PROTO", "tcp"),
            ("MY_SHOP_PORT_80_TCP_PORT", "80"),
            ("MY_SHOP_PORT_80_TCP_ADDR", address.as_str()),
            ("MY_SHOP_PORT_9090_UDP_PROTO", "udp"),
            ("KUBERNETES_SERVICE_HOST", t.cluster.fact("SERVICE_IP")),
            ("KUBERNETES_SERVICE_PORT_HTTPS", "443"),
        ];
        for (name, value) in expected {
            assert_eq!(found.get(name).map(String::as_str), Some(value), "{name}");
        }
        let spec = json!({"enableServiceLinks": false, "containers": [busybox("env")]});
        let log = t.output_of("declines", spec).await;
        assert!(!log.contains("MY_SHOP"), "{log}");
        assert!(log.contains("KUBERNETES_SERVICE_HOST="), "the API server's stays: {log}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_missing_key_holds_the_container_back_until_it_is_there() {
    on_shared_node(async |t| {
        t.config_map("settings", json!({"other": "1"})).await;
        let env = json!([{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "wanted"}}}]);
        t.pod("waits", json!({"containers": [busybox_with(STAY, json!({"env": env}))]})).await;
        let held = |p: &Pod| waits_for(p, "main") == Some("CreateContainerConfigError");
        let pod = t.until("waits", "held back", held).await;
        let message = waiting(&pod, "main").unwrap().message.clone().unwrap();
        assert!(message.contains("wanted") && message.contains("settings"), "{message}");
        assert!(t.event("waits", "Failed").await.starts_with("Error: "));
        let patch = kube::api::Patch::Merge(json!({"data": {"wanted": "here"}}));
        let maps = t.api::<k8s_openapi::api::core::v1::ConfigMap>();
        maps.patch("settings", &kube::api::PatchParams::default(), &patch).await.unwrap();
        t.until("waits", "up after all", is_ready).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_working_directory_is_where_the_container_starts() {
    on_shared_node(async |t| {
        let spec = json!({"containers": [busybox_with("pwd", json!({"workingDir": "/usr/bin"}))]});
        assert_eq!(t.output_of("pwd", spec).await, "/usr/bin\n");
    });
}
