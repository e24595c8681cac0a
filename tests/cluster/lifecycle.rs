//! From Pending to the end: phases, conditions, init containers, restarts, events.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, Pod};
use kube::ResourceExt as _;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::harness::pods::{
    STAY, busybox, busybox_with, container, exit_code, has_ended, holds, identity, is_ready, last_terminated, phase,
    pod_condition, pod_ip, pod_message, pod_reason, restarts, sleeper, status, terminated, waiting, waits_for,
};
use crate::harness::wait::{SOON, show};
use crate::harness::{BUSYBOX, DEBIAN, on_shared_node};

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_running_pod_has_every_condition_address_and_id() {
    on_shared_node(async |t| {
        t.pod("web", sleeper()).await;
        let pod = t.running("web").await;
        let status = pod.status.as_ref().unwrap();
        for type_ in ["PodScheduled", "PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready"] {
            assert!(holds(&pod, type_), "{type_}: {}", show(&pod));
            let condition = pod_condition(&pod, type_).unwrap();
            assert!(condition.last_transition_time.is_some(), "{type_} has no time");
        }
        assert_eq!(status.host_ip.as_deref(), Some(t.cluster.fact("HOST_ADDRESS")));
        assert_eq!(status.host_ips.as_ref().unwrap()[0].ip, t.cluster.fact("HOST_ADDRESS"));
        assert!(t.node.has_address(pod_ip(&pod)), "{}", pod_ip(&pod));
        assert_eq!(status.pod_ips.as_ref().unwrap()[0].ip, pod_ip(&pod));
        assert!(status.start_time.is_some());
        let main = crate::harness::pods::status(&pod, "main").unwrap();
        assert!(main.container_id.as_ref().unwrap().starts_with("docker://"), "{main:?}");
        assert!(!main.image_id.is_empty() && main.image == BUSYBOX, "{main:?}");
        assert!(main.ready && main.started == Some(true) && main.restart_count == 0, "{main:?}");
        assert!(main.state.as_ref().unwrap().running.as_ref().unwrap().started_at.is_some());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn conditions_name_the_generation_they_were_computed_for() {
    on_shared_node(async |t| {
        t.pod("web", sleeper()).await;
        t.running("web").await;
        let change = json!({"spec": {"activeDeadlineSeconds": 3600}});
        let changed = t.api::<Pod>().patch("web", &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
        let generation = changed.metadata.generation;
        assert_eq!(generation, Some(2), "the API server counts changes of the spec");
        let seen = |pod: &Pod| {
            let status = pod.status.as_ref().unwrap();
            let own = status.conditions.iter().flatten().filter(|c| c.type_ != "PodScheduled");
            status.observed_generation == generation && own.map(|c| c.observed_generation).all(|g| g == generation)
        };
        t.until("web", "at observedGeneration 2 everywhere", seen).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_whose_containers_all_exit_zero_succeeds() {
    on_shared_node(async |t| {
        let spec = json!({"containers": [container("a", "echo one"), container("b", "echo two")]});
        let pod = t.run_pod("job", spec).await;
        assert_eq!(phase(&pod), "Succeeded");
        for name in ["a", "b"] {
            let end = terminated(&pod, name).unwrap();
            assert_eq!((end.exit_code, end.reason.as_deref()), (0, Some("Completed")));
            assert!(end.started_at.as_ref().unwrap().0 <= end.finished_at.as_ref().unwrap().0, "{end:?}");
            assert!(end.container_id.as_ref().unwrap().starts_with("docker://"));
        }
        assert_eq!(pod_condition(&pod, "Ready").unwrap().reason.as_deref(), Some("PodCompleted"));
        assert!(holds(&pod, "Initialized"));
        assert!(!pod_ip(&pod).is_empty(), "the address stays in the status: {}", show(&pod));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_with_one_failed_container_fails_with_its_exit_code() {
    on_shared_node(async |t| {
        let spec = json!({"containers": [container("good", "exit 0"), container("bad", "exit 42")]});
        let pod = t.run_pod("job", spec).await;
        assert_eq!(phase(&pod), "Failed");
        let end = terminated(&pod, "bad").unwrap();
        assert_eq!((end.exit_code, end.reason.as_deref()), (42, Some("Error")));
        assert_eq!(exit_code(&pod, "good"), Some(0));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_runs_until_its_last_container_ends() {
    on_shared_node(async |t| {
        let spec =
            json!({"restartPolicy": "Never", "containers": [container("short", "exit 0"), container("long", STAY)]});
        t.pod("pair", spec).await;
        let half = |p: &Pod| exit_code(p, "short") == Some(0) && status(p, "long").is_some_and(|s| s.ready);
        let pod = t.until("pair", "half ended", half).await;
        assert_eq!(phase(&pod), "Running");
        assert!(!holds(&pod, "Ready"));
        let message = pod_condition(&pod, "ContainersReady").unwrap().message.clone().unwrap();
        assert_eq!(message, "containers with unready status: [short]");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn init_containers_run_one_after_the_other_before_the_others() {
    on_shared_node(async |t| {
        let stamp = |name: &str| format!("echo {name} >>/shared/order; sleep 0.2; echo {name} done >>/shared/order");
        let mounted = |c: Value| {
            crate::harness::pods::with(c, json!({"volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}))
        };
        let spec = json!({
            "volumes": [{"name": "shared", "emptyDir": {}}],
            "initContainers": [mounted(container("first", &stamp("first"))), mounted(container("second", &stamp("second")))],
            "containers": [mounted(busybox("cat /shared/order"))],
        });
        let pod = t.run_pod("ordered", spec).await;
        assert_eq!(t.log("ordered", "main").await, "first\nfirst done\nsecond\nsecond done\n");
        for name in ["first", "second"] {
            let status = status(&pod, name).unwrap();
            assert!(status.ready, "an init container that succeeded is ready: {status:?}");
            assert_eq!(exit_code(&pod, name), Some(0));
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn while_an_init_container_runs_the_pod_is_pending_and_says_so() {
    on_shared_node(async |t| {
        let spec = json!({"initContainers": [container("setup", STAY)], "containers": [busybox(STAY)]});
        t.pod("slow", spec).await;
        let busy = |p: &Pod| status(p, "setup").is_some_and(|s| s.state.as_ref().unwrap().running.is_some());
        let pod = t.until("slow", "in its init container", busy).await;
        assert_eq!(phase(&pod), "Pending");
        assert_eq!(waits_for(&pod, "main"), Some("PodInitializing"));
        let condition = pod_condition(&pod, "Initialized").unwrap();
        assert_eq!(
            (condition.status.as_str(), condition.reason.as_deref()),
            ("False", Some("ContainersNotInitialized"))
        );
        assert_eq!(condition.message.as_deref(), Some("containers with incomplete status: [setup]"));
        assert!(holds(&pod, "PodReadyToStartContainers"), "sandbox and volumes are there");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_failed_init_container_fails_a_pod_that_never_restarts() {
    on_shared_node(async |t| {
        let spec =
            json!({"initContainers": [container("setup", "echo no way; exit 3")], "containers": [busybox(STAY)]});
        let pod = t.run_pod("doomed", spec).await;
        assert_eq!(phase(&pod), "Failed");
        assert_eq!(exit_code(&pod, "setup"), Some(3));
        assert_eq!(waits_for(&pod, "main"), Some("PodInitializing"), "it was never started: {}", show(&pod));
        assert_eq!(t.log("doomed", "setup").await, "no way\n");
        assert_eq!(
            t.kubectl_text(&["get", "pod", "doomed", "--no-headers"]).split_whitespace().nth(2),
            Some("Init:Error")
        );
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_failed_init_container_is_tried_again_otherwise() {
    on_shared_node(async |t| {
        let volume = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]});
        let setup =
            crate::harness::pods::with(container("setup", "test -e /v/tried || { touch /v/tried; exit 1; }"), volume);
        let spec = json!({
            "volumes": [{"name": "v", "emptyDir": {}}],
            "initContainers": [setup],
            "containers": [busybox(STAY)],
        });
        t.pod("stubborn", spec).await;
        let pod = t.running("stubborn").await;
        assert_eq!(restarts(&pod, "setup"), 1);
        assert_eq!(last_terminated(&pod, "setup").unwrap().exit_code, 1);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn on_failure_restarts_what_failed_until_it_succeeds() {
    on_shared_node(async |t| {
        let volume = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]});
        let spec = json!({
            "restartPolicy": "OnFailure",
            "volumes": [{"name": "v", "emptyDir": {}}],
            "containers": [busybox_with("test -e /v/tried || { touch /v/tried; exit 5; }", volume)],
        });
        let pod = t.run_pod("retry", spec).await;
        assert_eq!((phase(&pod), restarts(&pod, "main")), ("Succeeded", 1));
        assert_eq!(last_terminated(&pod, "main").unwrap().exit_code, 5);
        assert_eq!(exit_code(&pod, "main"), Some(0));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn always_restarts_what_succeeded_too() {
    on_shared_node(async |t| {
        t.pod("loop", json!({"containers": [busybox("exit 0")]})).await;
        let pod = t.until("loop", "restarted", |p| restarts(p, "main") == 1).await;
        assert!(!has_ended(&pod));
        t.until("loop", "in its last state Completed", |p| {
            last_terminated(p, "main").is_some_and(|t| t.reason.as_deref() == Some("Completed"))
        })
        .await;
    });
}

/// The first restart is immediate, the second waits 10 s after the end of the first, the third 20 s.
#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_crashing_container_waits_ten_then_twenty_seconds() {
    on_shared_node(async |t| {
        t.pod("crash", json!({"containers": [busybox("exit 1")]})).await;
        let looping = |p: &Pod| waits_for(p, "main") == Some("CrashLoopBackOff");
        let pod = t.until("crash", "in CrashLoopBackOff", looping).await;
        assert_eq!(restarts(&pod, "main"), 1);
        assert_eq!(phase(&pod), "Running", "a Pod that ran once and will again");
        let uid = pod.uid().unwrap();
        let text = format!("back-off 10s restarting failed container=main pod=crash_{}({uid})", t.namespace);
        assert_eq!(waiting(&pod, "main").unwrap().message.as_deref(), Some(text.as_str()));
        let ended = last_terminated(&pod, "main").unwrap().finished_at.clone().unwrap().0;
        assert!(
            t.event("crash", "BackOff").await.starts_with("Back-off restarting failed container main in pod crash_")
        );

        let again = |p: &Pod| restarts(p, "main") == 2 && last_terminated(p, "main").is_some() && looping(p);
        let pod = t.until("crash", "in its second wait", again).await;
        let started = last_terminated(&pod, "main").unwrap().started_at.clone().unwrap().0;
        let waited = started.duration_since(ended).as_secs_f64();
        // Times in a status are whole seconds.
        assert!((9.0..13.0).contains(&waited), "waited {waited} s");
        assert!(waiting(&pod, "main").unwrap().message.as_ref().unwrap().starts_with("back-off 20s "));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_restarted_container_keeps_the_pods_address_and_neighbours() {
    on_shared_node(async |t| {
        let spec = json!({"containers": [container("dies", "sleep 2"), container("stays", STAY)]});
        t.pod("pair", spec).await;
        let before = t.running("pair").await;
        let after = t.until("pair", "restarted", |p| restarts(p, "dies") == 1 && is_ready(p)).await;
        assert_eq!(pod_ip(&before), pod_ip(&after));
        assert_eq!(identity(&before, "stays"), identity(&after, "stays"));
        assert_ne!(identity(&before, "dies").0, identity(&after, "dies").0);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_container_that_is_killed_behind_our_back_is_restarted() {
    on_shared_node(async |t| {
        t.pod("web", sleeper()).await;
        let before = t.running("web").await;
        let id = status(&before, "main").unwrap().container_id.clone().unwrap();
        crate::harness::node::output("docker", &["kill", id.trim_start_matches("docker://")]);
        let after = t.until("web", "restarted", |p| restarts(p, "main") == 1 && is_ready(p)).await;
        let end = last_terminated(&after, "main").unwrap();
        assert_eq!((end.exit_code, end.reason.as_deref()), (137, Some("Error")));
        assert_eq!(pod_ip(&before), pod_ip(&after));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_container_over_its_memory_limit_is_oom_killed() {
    on_shared_node(async |t| {
        let limits = json!({"resources": {"limits": {"memory": "16Mi"}}});
        let spec = json!({"containers": [busybox_with("tail /dev/zero", limits)]});
        let pod = t.run_pod("greedy", spec).await;
        let end = terminated(&pod, "main").unwrap();
        assert_eq!((end.exit_code, end.reason.as_deref()), (137, Some("OOMKilled")));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_active_deadline_ends_a_pod_and_says_so() {
    on_shared_node(async |t| {
        let spec =
            json!({"activeDeadlineSeconds": 6, "terminationGracePeriodSeconds": 1, "containers": [busybox(STAY)]});
        t.pod("late", spec).await;
        let pod = t.until("late", "past its deadline", |p| phase(p) == "Failed").await;
        assert_eq!(pod_reason(&pod), "DeadlineExceeded");
        assert_eq!(pod_message(&pod), "Pod was active on the node longer than the specified deadline");
        let start = pod.status.as_ref().unwrap().start_time.clone().unwrap().0;
        let end = terminated(&pod, "main").unwrap().finished_at.clone().unwrap().0;
        let lived = end.duration_since(start).as_secs();
        assert!((5..=9).contains(&lived), "it lived {lived} s");
        t.event("late", "DeadlineExceeded").await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_termination_message_is_what_the_container_wrote_to_its_file() {
    on_shared_node(async |t| {
        let main =
            busybox_with("echo -n why >/tmp/end; echo not this; exit 1", json!({"terminationMessagePath": "/tmp/end"}));
        let pod = t.run_pod("says", json!({"containers": [main]})).await;
        assert_eq!(terminated(&pod, "main").unwrap().message.as_deref(), Some("why"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_long_termination_message_is_cut_at_4096_bytes() {
    on_shared_node(async |t| {
        let main = busybox("yes | head -c 10000 >/dev/termination-log");
        let pod = t.run_pod("long", json!({"containers": [main]})).await;
        assert_eq!(terminated(&pod, "main").unwrap().message.as_ref().unwrap().len(), 4096);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_log_is_the_termination_message_of_what_failed_without_one() {
    on_shared_node(async |t| {
        let policy = json!({"terminationMessagePolicy": "FallbackToLogsOnError"});
        let fail = busybox_with("echo first; echo last words; exit 1", policy.clone());
        let pod = t.run_pod("fails", json!({"containers": [fail]})).await;
        assert_eq!(terminated(&pod, "main").unwrap().message.as_deref(), Some("first\nlast words\n"));

        let fine = busybox_with("echo all fine", policy.clone());
        let pod = t.run_pod("fine", json!({"containers": [fine]})).await;
        assert_eq!(terminated(&pod, "main").unwrap().message, None, "only of what failed");

        let both = busybox_with("echo noise; echo -n file >/dev/termination-log; exit 1", policy);
        let pod = t.run_pod("both", json!({"containers": [both]})).await;
        assert_eq!(terminated(&pod, "main").unwrap().message.as_deref(), Some("file"), "the file goes first");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pods_life_is_told_by_the_kubelets_events() {
    on_shared_node(async |t| {
        let mut spec = sleeper();
        spec["terminationGracePeriodSeconds"] = json!(5);
        t.pod("told", spec).await;
        t.running("told").await;
        assert_eq!(t.event("told", "Pulled").await, format!("Container image {BUSYBOX:?} already present on machine"));
        t.event("told", "Created").await;
        t.event("told", "Started").await;
        t.delete("told", None).await;
        t.gone("told", SOON).await;
        assert_eq!(t.event("told", "Killing").await, "Stopping container main");
        let params = ListParams::default().fields("involvedObject.name=told");
        let events = t.api::<Event>().list(&params).await.unwrap();
        let of_container = events.iter().find(|e| e.reason.as_deref() == Some("Started")).unwrap();
        assert_eq!(of_container.involved_object.field_path.as_deref(), Some("spec.containers{main}"));
        assert_eq!(of_container.reporting_instance.as_ref(), Some(&t.node.name));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_deployment_rolls_from_one_version_to_the_next() {
    on_shared_node(async |t| {
        let template = |version: &str| {
            json!({
                "metadata": {"labels": {"app": "web", "version": version}},
                "spec": {
                    "nodeSelector": {"lambdalet.dev/test": t.node.name},
                    "terminationGracePeriodSeconds": 2,
                    "containers": [busybox(STAY)],
                },
            })
        };
        let labels = json!({"matchLabels": {"app": "web"}});
        let spec = json!({"replicas": 3, "selector": labels, "template": template("1")});
        t.make::<k8s_openapi::api::apps::v1::Deployment>("web", json!({"spec": spec})).await;
        let wait = ["rollout", "status", "deployment/web", "--timeout=60s"];
        t.kubectl_text(&wait);
        let change = json!({"spec": {"template": template("2")}});
        let deployments = t.api::<k8s_openapi::api::apps::v1::Deployment>();
        deployments.patch("web", &PatchParams::default(), &Patch::Merge(change)).await.unwrap();
        t.kubectl_text(&wait);
        let ready = t.kubectl_text(&["get", "deployment", "web", "-o", "jsonpath={.status.readyReplicas}"]);
        assert_eq!(ready, "3");
        let delete = ["delete", "deployment", "web", "--cascade=foreground", "--timeout=60s"];
        t.kubectl_text(&delete);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_job_completes() {
    on_shared_node(async |t| {
        let mut spec = json!({"restartPolicy": "Never", "containers": [busybox("echo done")]});
        spec["nodeSelector"] = json!({"lambdalet.dev/test": t.node.name});
        let job = json!({"spec": {"completions": 3, "parallelism": 3, "template": {"spec": spec}}});
        t.make::<k8s_openapi::api::batch::v1::Job>("three", job).await;
        t.kubectl_text(&["wait", "--for=condition=Complete", "job/three", "--timeout=60s"]);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_that_needs_more_than_the_node_has_left_is_refused() {
    on_shared_node(async |t| {
        // Named to the node, it does not pass the scheduler.
        let main = busybox_with(STAY, json!({"resources": {"requests": {"cpu": "1000"}}}));
        t.pod("huge", json!({"nodeName": t.node.name, "containers": [main]})).await;
        let pod = t.until("huge", "refused", |p| phase(p) == "Failed").await;
        assert_eq!(pod_reason(&pod), "OutOfcpu");
        let message = pod_message(&pod);
        assert!(message.contains("Node didn't have enough resource: cpu, requested: 1000000, used: "), "{message}");
        t.event("huge", "OutOfcpu").await;
        assert!(status(&pod, "main").is_none_or(|s| s.container_id.is_none()), "nothing was started");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_pod_whose_node_selector_does_not_match_is_refused() {
    on_shared_node(async |t| {
        let spec = json!({
            "nodeName": t.node.name,
            "nodeSelector": {"lambdalet.dev/no-such-label": "x"},
            "containers": [busybox(STAY)],
        });
        t.pod("elsewhere", spec).await;
        let pod = t.until("elsewhere", "refused", |p| phase(p) == "Failed").await;
        assert_eq!(pod_reason(&pod), "NodeAffinity");
        t.event("elsewhere", "NodeAffinity").await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn ten_pods_at_once_are_all_running_within_ten_seconds() {
    on_shared_node(async |t| {
        for number in 0..10 {
            t.pod(&format!("many-{number}"), sleeper()).await;
        }
        let mut addresses = std::collections::BTreeSet::new();
        for number in 0..10 {
            let name = format!("many-{number}");
            let pod = t.until_within(&name, "Running", Duration::from_secs(10), is_ready).await;
            addresses.insert(pod_ip(&pod).to_owned());
        }
        assert_eq!(addresses.len(), 10, "every Pod has an address of its own");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_running_container_gives_way_to_one_of_the_image_it_is_set_to() {
    on_shared_node(async |t| {
        let both = json!({"restartPolicy": "Never", "containers": [busybox(STAY), container("other", STAY)]});
        t.pod("p", both).await;
        let before = t.running("p").await;
        t.kubectl_text(&["set", "image", "pod/p", &format!("main={DEBIAN}")]);
        let renewed = |pod: &Pod| is_ready(pod) && restarts(pod, "main") == 1;
        let after = t.until("p", "its container renewed", renewed).await;
        assert_eq!(status(&after, "main").unwrap().image, DEBIAN);
        assert_eq!(identity(&after, "other"), identity(&before, "other"), "what was not changed stays");
        assert_eq!(pod_ip(&after), pod_ip(&before));
        assert_eq!(t.event("p", "Killing").await, "Container main definition changed, will be restarted");
    });
}
