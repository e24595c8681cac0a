//! Pods as microVMs, on real guests: nothing is different for whoever uses them, but the kernel they run on.

mod functions;
mod replicas;
mod restart;
mod waiting;

use std::sync::Once;
use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Node as NodeObject, Pod, Service};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use crate::exec;
use crate::harness::http::get;
use crate::harness::node::Options;
use crate::harness::pods::{
    STAY, busybox, busybox_with, has_ended, is_ready, pod_ip, pod_message, pod_reason, status, terminated, with,
};
use crate::harness::wait::{SOON, poll};
use crate::harness::{BUSYBOX, Case, Shared, on_node_of, on_shared_node};

/// How long a guest's kernel may take to be there without hardware for it, on a machine that has other work.
const BOOT: Duration = Duration::from_secs(60);
/// The class of `manifests/runtimeclasses.yaml`.
const CLASS: &str = "lambdalet-microvm";

/// The node with guests that these tests share.
static VMS: Shared = Shared::new("vms");

/// The guest bundle, or a word about its absence.
fn bundle() -> Option<String> {
    let bundle = std::env::var("LAMBDALET_TEST_GUEST").ok();
    if bundle.is_none() {
        eprintln!("skipped: LAMBDALET_TEST_GUEST names no guest; run hack/test");
    }
    bundle
}

/// How a node with guests is started.
fn options(bundle: &str, more: &[&str]) -> Options {
    let labels = "--node-labels=lambdalet.dev/runtime-microvm=true";
    Options::flags(&[&["--guest-image", bundle, "--vmm", "qemu", "--microvm-accel", "tcg", labels], more].concat())
}

/// Runs a test whose Pods may be microVMs.
fn on_vms(test: impl AsyncFnOnce(&Case)) {
    let Some(bundle) = bundle() else { return };
    on_node_of(&VMS, &options(&bundle, &[]), async |t| {
        make_classes(t);
        test(t).await;
    });
}

/// The RuntimeClasses, as the manifest has them: once, since of two that apply what is not there one fails.
fn make_classes(t: &Case) {
    static MADE: Once = Once::new();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/runtimeclasses.yaml");
    MADE.call_once(|| drop(t.kubectl_text(&["apply", "-f", file])));
}

/// A spec as a microVM's.
fn in_vm(spec: Value) -> Value {
    with(spec, json!({"runtimeClassName": CLASS}))
}

async fn runs(t: &Case, name: &str) -> Pod {
    t.until_within(name, "Running and ready", BOOT, is_ready).await
}

/// What a command in the Pod's main container says.
fn says(t: &Case, pod: &str, script: &str) -> String {
    t.kubectl_text(&["exec", pod, "--", "sh", "-c", script]).trim().to_owned()
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_in_a_microvm_is_a_pod() {
    on_vms(async |t| {
        t.config_map("settings", json!({"colour": "green"})).await;
        let script = "echo to stdout; echo to stderr >&2; mkdir /www; echo served >/www/index.html; touch /www/ready
            httpd -p 8080 -h /www; trap 'exit 0' TERM; while true; do sleep 3600 & wait; done";
        // A busy host answers late for a guest whose processor it translates.
        let probe =
            |path: &str| json!({"httpGet": {"port": 8080, "path": path}, "periodSeconds": 1, "timeoutSeconds": 20});
        let more = json!({
            "volumeMounts": [{"name": "settings", "mountPath": "/settings"}, {"name": "scratch", "mountPath": "/scratch"}],
            "resources": {"limits": {"memory": "64Mi", "cpu": "500m"}},
            "readinessProbe": probe("/ready"), "livenessProbe": probe("/"),
            "env": [{"name": "ME", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        });
        let volumes =
            json!([{"name": "settings", "configMap": {"name": "settings"}}, {"name": "scratch", "emptyDir": {}}]);
        let spec =
            json!({"containers": [busybox_with(script, more)], "volumes": volumes, "terminationGracePeriodSeconds": 5});
        t.pod("web", in_vm(spec)).await;
        let pod = runs(t, "web").await;
        let id = status(&pod, "main").unwrap().container_id.clone().unwrap();
        assert!(id.starts_with("microvm://"), "{id}");
        let address = pod_ip(&pod).to_owned();
        assert!(t.node.has_address(&address), "{address}");

        let log = t.log_with("web", "main", "to stderr").await;
        assert!(log.contains("to stdout\n"), "{log}");
        let kernel = says(t, "web", "uname -r");
        let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_ne!(kernel, own.trim(), "it has a kernel of its own");
        assert_eq!(says(t, "web", "echo $ME; hostname"), format!("{address}\nweb"));
        assert_eq!(says(t, "web", "cat /settings/colour; echo; touch /scratch/x && echo written"), "green\nwritten");
        let failed = t.kubectl(&["exec", "web", "--", "sh", "-c", "exit 7"]).unwrap_err();
        assert!(failed.contains("exit code 7"), "{failed}");
        assert_eq!(get(&format!("{address}:8080"), "/").await.unwrap().text(), "served\n");
        assert!(
            t.script(&format!("timeout 5 wget -q -O - http://{address}:8080/")).await.ends_with("served\n"),
            "from a Pod"
        );
        assert_eq!(exec::fetched(t, "web", 8080).await, "served\n", "through kubectl port-forward");

        let maps = t.api::<ConfigMap>();
        let patch = Patch::Merge(json!({"data": {"colour": "red"}}));
        maps.patch("settings", &PatchParams::default(), &patch).await.unwrap();
        poll("the new configuration in the guest", SOON, async || {
            match says(t, "web", "cat /settings/colour").as_str() {
                "red" => Ok(()),
                old => Err(old.to_owned()),
            }
        })
        .await;

        says(t, "web", "rm /www/ready");
        t.until("web", "unready by its probe", |pod| !is_ready(pod)).await;
        says(t, "web", "touch /www/ready");
        t.running("web").await;
        t.delete("web", None).await;
        t.gone("web", SOON).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn parts_of_volumes_and_images_are_seen_in_a_guest() {
    on_vms(async |t| {
        t.config_map("settings", json!({"colour": "green", "shape": "round"})).await;
        let mounts = json!([
            {"name": "settings", "mountPath": "/etc/colour", "subPath": "colour"},
            {"name": "scratch", "mountPath": "/work", "subPathExpr": "$(ME)/x"},
            {"name": "scratch", "mountPath": "/all"},
            {"name": "image", "mountPath": "/image"},
            {"name": "image", "mountPath": "/programs", "subPath": "bin"},
        ]);
        let me = json!([{"name": "ME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]);
        let volumes = json!([
            {"name": "settings", "configMap": {"name": "settings"}}, {"name": "scratch", "emptyDir": {}},
            {"name": "image", "image": {"reference": BUSYBOX, "pullPolicy": "IfNotPresent"}},
        ]);
        let main = busybox_with(STAY, json!({"volumeMounts": mounts, "env": me}));
        t.pod("parts", in_vm(json!({"containers": [main], "volumes": volumes}))).await;
        runs(t, "parts").await;
        assert_eq!(says(t, "parts", "cat /etc/colour"), "green");
        assert_eq!(says(t, "parts", "echo written >/work/file; cat /all/parts/x/file"), "written");
        assert_eq!(says(t, "parts", "stat -c %a /work"), says(t, "parts", "stat -c %a /all"));
        assert_eq!(says(t, "parts", "cmp /image/bin/busybox /programs/busybox && echo one"), "one");
        assert_eq!(says(t, "parts", "touch /image/x 2>/dev/null || echo read only"), "read only");
        assert_eq!(says(t, "parts", "/programs/busybox true 2>/dev/null || echo no program"), "no program");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn limits_hold_in_a_guest_and_a_crash_is_told_as_any_other() {
    on_vms(async |t| {
        let limits = json!({"resources": {"limits": {"memory": "48Mi"}}});
        let spec = json!({"restartPolicy": "Never", "containers": [busybox_with("tail /dev/zero", limits)]});
        t.pod("greedy", in_vm(spec)).await;
        let pod = t.until_within("greedy", "at its end", BOOT, has_ended).await;
        let end = terminated(&pod, "main").unwrap();
        assert_eq!((end.reason.as_deref(), end.exit_code), (Some("OOMKilled"), 137));

        let words = "echo -n my last words >/dev/termination-log; exit 3";
        t.pod("crash", in_vm(json!({"restartPolicy": "Never", "containers": [busybox(words)]}))).await;
        let pod = t.until_within("crash", "at its end", BOOT, has_ended).await;
        let ended = terminated(&pod, "main").unwrap();
        assert_eq!((ended.exit_code, ended.message.as_deref()), (3, Some("my last words")));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_deployment_of_microvms_stands_behind_its_service() {
    on_vms(async |t| {
        if !t.cluster.has_addons() {
            eprintln!("skipped: hack/cluster addons are not up");
            return;
        }
        let script = "mkdir /www; hostname >/www/index.html; httpd -p 8080 -h /www; trap 'exit 0' TERM
            while true; do sleep 3600 & wait; done";
        let ready = json!({"readinessProbe": {"httpGet": {"port": 8080, "path": "/"}, "periodSeconds": 1}});
        let spec = in_vm(json!({
            "containers": [busybox_with(script, ready)], "nodeSelector": {"lambdalet.dev/test": t.node.name},
            "terminationGracePeriodSeconds": 2,
        }));
        let template = json!({"metadata": {"labels": {"app": "shop"}}, "spec": spec});
        let deployment = json!({"replicas": 2, "selector": {"matchLabels": {"app": "shop"}}, "template": template});
        t.make::<Deployment>("shop", json!({"spec": deployment})).await;
        let service = json!({"spec": {"selector": {"app": "shop"}, "ports": [{"port": 80, "targetPort": 8080}]}});
        let address = t.make::<Service>("shop", service).await.spec.unwrap().cluster_ip.unwrap();
        let mut seen = std::collections::BTreeSet::new();
        poll("two replicas behind the Service", BOOT, async || {
            seen.insert(get(&format!("{address}:80"), "/").await?.text());
            if seen.len() == 2 { Ok(()) } else { Err(format!("{seen:?}")) }
        })
        .await;
        t.kubectl_text(&["delete", "deployment", "shop", "--wait=true"]);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_node_says_what_it_has_and_refuses_what_a_guest_cannot() {
    on_vms(async |t| {
        let node: NodeObject = Api::all(t.client.clone()).get(&t.node.name).await.unwrap();
        let handlers = node.status.unwrap().runtime_handlers.unwrap();
        let names: Vec<_> = handlers.iter().filter_map(|handler| handler.name.as_deref()).collect();
        assert_eq!(names, ["", "docker", "microvm"]);
        let mounted = busybox_with("true", json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}));
        let on_host = json!({"containers": [mounted], "volumes": [{"name": "v", "hostPath": {"path": "/etc"}}]});
        for (name, spec, why) in [
            ("pid", json!({"containers": [busybox("true")], "hostPID": true}), "hostPID: true"),
            ("path", on_host, "hostPath /etc, and a microVM sees nothing of the host"),
        ] {
            t.pod(name, in_vm(spec)).await;
            let pod = t.until(name, "refused", has_ended).await;
            assert_eq!(pod_reason(&pod), "UnsupportedPodFeature");
            assert!(pod_message(&pod).contains(why), "{}", pod_message(&pod));
        }
        let noted = json!({"annotations": {"lambdalet.dev/runtime": "microvm", "lambdalet.dev/vmm": "firecracker"}});
        t.labelled_pod("vmm", noted, json!({"containers": [busybox("true")]})).await;
        let pod = t.until("vmm", "refused", has_ended).await;
        let told = pod_message(&pod);
        assert!(told.contains("microvm-firecracker") && told.contains("then start the node again"), "{told}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_node_without_a_guest_says_what_to_install() {
    on_shared_node(async |t| {
        let noted = json!({"annotations": {"lambdalet.dev/runtime": "microvm"}});
        t.labelled_pod("vm", noted, json!({"containers": [busybox(STAY)]})).await;
        let pod = t.until("vm", "refused", has_ended).await;
        assert_eq!(pod_reason(&pod), "UnsupportedPodFeature");
        let told = pod_message(&pod);
        assert!(told.contains("/usr/share/lambdalet/guest/vmlinux is missing"), "{told}");
        assert!(told.contains("--guest-image DIR"), "{told}");
        assert!(t.event("vm", "UnsupportedPodFeature").await.contains("--guest-image"));
    });
}
