//! Functions whose environments are microVMs.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::{BOOT, bundle, in_vm, on_vms, options, runs};
use crate::fakecloud;
use crate::harness::http::send;
use crate::harness::leaks::vmms;
use crate::harness::pods::{busybox_with, pod_condition, pod_ip};
use crate::harness::wait::poll;
use crate::harness::{Case, on_own_node};

/// `/cgi-bin/id` tells who answers, a second later.
const SERVER: &str = "mkdir -p /www/cgi-bin
printf '#!/bin/sh\\nsleep 1\\necho\\ncat /proc/sys/kernel/random/boot_id\\n' >/www/cgi-bin/id
chmod +x /www/cgi-bin/id; trap 'exit 0' TERM; httpd -f -p 8080 -h /www & wait";

/// The guest that answers.
async fn called(address: &str) -> Result<String, String> {
    let answer = send(&format!("{address}:8080"), Request::get("/cgi-bin/id"), Bytes::new(), BOOT).await?;
    if answer.status == StatusCode::OK {
        Ok(answer.text())
    } else {
        Err(format!("{}: {}", answer.status, answer.text()))
    }
}

fn replicas(pod: &Pod) -> String {
    pod_condition(pod, "lambdalet.dev/Replicas").and_then(|c| c.message.clone()).unwrap_or_default()
}

async fn has(t: &Case, pod: &str, wanted: &str) {
    t.until_within(pod, wanted, BOOT, |pod| replicas(pod).starts_with(wanted)).await;
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_of_microvms_goes_from_zero_to_two_environments_and_back() {
    on_vms(async |t| {
        let limits = json!({"resources": {"limits": {"cpu": "200m", "memory": "64Mi"}}});
        let spec = in_vm(json!({"containers": [busybox_with(SERVER, limits)], "terminationGracePeriodSeconds": 5}));
        let metadata = json!({
            "labels": {"com.openfaas.scale.min": "0", "com.openfaas.scale.max": "3", "execenvironment.count": "2"},
            "annotations": {"lambdalet.dev/idle-timeout": "3s", "lambdalet.dev/reserve": "0", "lambdalet.dev/queue-timeout": "60s"},
        });
        t.labelled_pod("f", metadata, spec).await;
        let pod = runs(t, "f").await;
        let address = pod_ip(&pod).to_owned();
        has(t, "f", "0/3 replicas, 0 environments").await;
        let first = called(&address).await.unwrap();
        assert_eq!(called(&address).await.unwrap(), first, "the same environment again");
        // Two calls at once, each in a guest of its own.
        let seen = poll("two environments", BOOT, async || {
            let (one, other) = tokio::join!(called(&address), called(&address));
            let seen = BTreeSet::from([one?, other?]);
            if seen.len() == 2 { Ok(seen) } else { Err(format!("{seen:?}")) }
        })
        .await;
        assert_eq!(seen.len(), 2);
        has(t, "f", "1/3 replicas, 2 environments").await;
        has(t, "f", "0/3 replicas, 0 environments").await;
        poll("no guest of the function", Duration::from_secs(20), async || {
            let machines = vmms(&t.node, &t.namespace);
            if machines.is_empty() { Ok(()) } else { Err(format!("{machines:?}")) }
        })
        .await;
        assert!(!called(&address).await.unwrap().is_empty(), "from zero again");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_lambda_of_fakecloud_is_a_microvm_where_the_node_says_so() {
    let Some(bundle) = bundle() else { return };
    on_own_node("vmcloud", options(&bundle, &["--runtime", "microvm"]), fakecloud::on_microvms);
}
