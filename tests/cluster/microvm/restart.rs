//! `kill -9` of the node, and of a machine.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::{BOOT, bundle, in_vm, make_classes, options, runs, says};
use crate::harness::leaks::{Leaks, vmms};
use crate::harness::on_own_node;
use crate::harness::pods::{busybox, identity, is_ready, restarts};
use crate::harness::wait::SOON;

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_microvm_outlives_its_node_and_its_pod_outlives_the_microvm() {
    let Some(bundle) = bundle() else { return };
    on_own_node("vmkill", options(&bundle, &[]), async |t| {
        make_classes(t);
        let before = Leaks::of(&t.node);
        let count = "trap 'exit 0' TERM; n=0; while true; do echo line $n; n=$((n+1)); sleep 0.2; done";
        t.pod("counts", in_vm(json!({"containers": [busybox(count)], "terminationGracePeriodSeconds": 2}))).await;
        let first = runs(t, "counts").await;
        let kernel = says(t, "counts", "cat /proc/sys/kernel/random/boot_id");
        let machines = vmms(&t.node, &t.namespace);
        assert_eq!(machines.len(), 1);
        let at = lines(&t.log("counts", "main").await);

        t.node.kill9();
        t.node.spawn(&[]);
        t.node.adopted(&t.client).await;
        t.log_with("counts", "main", &format!("line {}", at.len() + 5)).await;
        let now = lines(&t.log("counts", "main").await);
        // None is missing, none twice: what was written while nobody looked is there too.
        assert!(now.iter().enumerate().all(|(n, line)| *line == format!("line {n}")), "{now:?}");
        let last = t.running("counts").await;
        assert_eq!(identity(&last, "main"), identity(&first, "main"), "the same attempt, taken over");
        assert_eq!(vmms(&t.node, &t.namespace), machines, "the same machine");
        assert_eq!(says(t, "counts", "cat /proc/sys/kernel/random/boot_id"), kernel);

        kill(Pid::from_raw(machines[0]), Signal::SIGKILL).unwrap();
        let again = |pod: &_| is_ready(pod) && restarts(pod, "main") == 1;
        t.until_within("counts", "restarted by its policy", BOOT, again).await;
        assert_ne!(vmms(&t.node, &t.namespace), machines);
        t.delete("counts", None).await;
        t.gone("counts", SOON).await;
        before.again(&t.node).await;
    });
}

fn lines(log: &str) -> Vec<String> {
    log.lines().map(str::to_owned).collect()
}
