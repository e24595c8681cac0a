//! Guests that wait for Pods (`--microvm-warm`).

use serde_json::json;

use super::{BOOT, bundle, in_vm, make_classes, options, runs, says};
use crate::harness::leaks::{all_vmms, vmms};
use crate::harness::pods::{STAY, busybox};
use crate::harness::wait::{SOON, poll};
use crate::harness::{Case, on_own_node};

/// The VMM of the guest that waits, once there is one: a machine like those of Pods that no Pod has.
async fn waiting(t: &Case) -> i32 {
    poll("a guest that waits", BOOT, async || {
        let of_pods = vmms(&t.node, &t.namespace);
        let others: Vec<_> = vmms(&t.node, "").into_iter().filter(|pid| !of_pods.contains(pid)).collect();
        match others[..] {
            [one] => Ok(one),
            _ => Err(format!("{others:?}")),
        }
    })
    .await
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_gets_the_guest_that_waits_and_none_waits_for_a_node_that_is_gone() {
    let Some(bundle) = bundle() else { return };
    on_own_node("vmwarm", options(&bundle, &["--microvm-warm", "1"]), async |t| {
        make_classes(t);
        let spec = || in_vm(json!({"containers": [busybox(STAY)], "terminationGracePeriodSeconds": 1}));
        // The first boots. Of the second a template is made, and of that the one that waits.
        for name in ["first", "second"] {
            t.pod(name, spec()).await;
            runs(t, name).await;
        }
        let waited = waiting(t).await;
        t.pod("third", spec()).await;
        let third = runs(t, "third").await.metadata.uid.unwrap();
        assert_eq!(vmms(&t.node, &third), [waited]);
        assert_eq!(says(t, "third", "hostname"), "third", "it was told who it is");
        let random = |pod| says(t, pod, "cat /proc/sys/kernel/random/uuid");
        assert_ne!(random("second"), random("third"));

        let next = waiting(t).await;
        t.node.restart(&t.client).await;
        poll("the end of the one that waited for a node that was killed", SOON, async || {
            let left = all_vmms(&t.node);
            if left.contains(&next) { Err(format!("{left:?}")) } else { Ok(()) }
        })
        .await;
        assert_eq!(vmms(&t.node, &third), [waited], "a Pod keeps its own");
        assert_eq!(says(t, "third", "hostname"), "third");
        let pods = vmms(&t.node, &t.namespace);
        t.node.stop(SOON).await;
        assert_eq!(all_vmms(&t.node), pods, "with it those that wait end");
    });
}
