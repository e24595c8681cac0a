//! Every kind of volume this node has: content, modes, owners, where it lives, and that it follows its source.

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::ResourceExt as _;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::harness::pods::{STAY, busybox_with, container, is_ready, phase, waiting, waits_for, with};
use crate::harness::wait::{SOON, poll};
use crate::harness::{Case, on_shared_node};

/// Runs a script with one volume mounted at `/v`.
async fn with_volume(t: &Case, volume: Value, script: &str) -> String {
    let name = format!("volume-{:x}", rand::random_range(0..0xffff_ffffu32));
    t.output_of(&name, spec_with(volume, script)).await
}

fn spec_with(volume: Value, script: &str) -> Value {
    let mounts = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]});
    json!({"volumes": [with(json!({"name": "v"}), volume)], "containers": [busybox_with(script, mounts)]})
}

/// The file system a path of the container is on.
const TYPE: &str = "awk '$2 == \"/v\" {print $3}' /proc/mounts";

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_empty_dir_is_empty_writable_by_anybody_and_shared_by_the_containers() {
    on_shared_node(async |t| {
        let mounts = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]});
        let first = with(container("first", "ls -A /v; stat -c %a /v; echo hello >/v/file"), mounts.clone());
        let as_nobody = json!({"securityContext": {"runAsUser": 65534}});
        let main = with(busybox_with("cat /v/file; touch /v/mine && echo mine", mounts), as_nobody);
        let spec = json!({"volumes": [{"name": "v", "emptyDir": {}}], "initContainers": [first], "containers": [main]});
        assert_eq!(t.output_of("shared", spec).await, "hello\nmine\n");
        assert_eq!(t.log("shared", "first").await, "777\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_empty_dir_outlives_a_restart_of_its_container() {
    on_shared_node(async |t| {
        let script = "if [ -e /v/was ]; then echo again; trap 'exit 0' TERM; while true; do sleep 3600 & wait; done; fi; touch /v/was";
        t.pod("keeps", spec_with(json!({"emptyDir": {}}), script)).await;
        t.log_with("keeps", "main", "again").await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_empty_dir_in_memory_is_a_tmpfs_of_its_size() {
    on_shared_node(async |t| {
        let volume = json!({"emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}});
        let script = format!(
            "{TYPE}; df -k /v | awk 'NR == 2 {{print $2}}'; head -c 9000000 /dev/zero 2>/dev/null >/v/too-much || echo full"
        );
        let log = with_volume(t, volume, &script).await;
        assert!(log.starts_with("tmpfs\n8192\n") && log.ends_with("full\n"), "{log}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_config_map_is_a_directory_of_files() {
    on_shared_node(async |t| {
        let object = json!({"data": {"text": "hello"}, "binaryData": {"bytes": "AAH/"}});
        t.make::<ConfigMap>("settings", object).await;
        let script = "ls /v; cat /v/text; echo; od -An -tx1 /v/bytes; stat -Lc %a /v/text; touch /v/x 2>/dev/null || echo read-only";
        let log = with_volume(t, json!({"configMap": {"name": "settings"}}), script).await;
        assert_eq!(log, "bytes\ntext\nhello\n 00 01 ff\n644\nread-only\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn chosen_keys_get_their_paths_and_modes() {
    on_shared_node(async |t| {
        t.config_map("settings", json!({"a": "1", "b": "2", "c": "3"})).await;
        let items = json!([{"key": "a", "path": "deep/er/a.txt"}, {"key": "b", "path": "b.sh", "mode": 0o755}]);
        let volume = json!({"configMap": {"name": "settings", "items": items, "defaultMode": 0o400}});
        let log = with_volume(
            t,
            volume,
            "cd /v; find . -follow -type f | grep -v '/\\.\\.' | sort; stat -Lc %a deep/er/a.txt b.sh",
        )
        .await;
        assert_eq!(log, "./b.sh\n./deep/er/a.txt\n400\n755\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_secret_is_in_memory_inside_and_outside_and_gone_with_its_pod() {
    on_shared_node(async |t| {
        t.secret("keys", json!({"password": "very-s3cret-word"})).await;
        let script = format!("cat /v/password; echo; {TYPE}; stat -f -c %T /v; {STAY}");
        let pod =
            t.pod("holder", spec_with(json!({"secret": {"secretName": "keys", "defaultMode": 0o440}}), &script)).await;
        t.running("holder").await;
        let log = t.log_with("holder", "main", "up").await;
        assert_eq!(log, "very-s3cret-word\ntmpfs\ntmpfs\nup\n");

        let place = t.node.root.join("secrets").join(pod.uid().unwrap());
        let type_ = crate::harness::node::output("findmnt", &["-no", "FSTYPE", "-T", place.to_str().unwrap()]);
        assert_eq!(type_.trim(), "tmpfs", "{}", place.display());
        let outside = crate::harness::node::output(
            "grep",
            &["-rl", "--exclude-dir=secrets", "very-s3cret-word", t.node.root.to_str().unwrap()],
        );
        assert_eq!(outside, "", "a secret was written to disk");
        t.delete("holder", None).await;
        t.gone("holder", SOON).await;
        t.nothing_remains().await;
        assert!(!place.exists());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_optional_source_that_is_missing_is_an_empty_directory() {
    on_shared_node(async |t| {
        for volume in [
            json!({"configMap": {"name": "none", "optional": true}}),
            json!({"secret": {"secretName": "none", "optional": true}}),
        ] {
            assert_eq!(with_volume(t, volume, "ls /v").await, "");
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_missing_source_holds_the_pod_back_until_it_is_there() {
    on_shared_node(async |t| {
        t.pod("waits", spec_with(json!({"configMap": {"name": "later"}}), STAY)).await;
        let message = t.event("waits", "FailedMount").await;
        assert!(message.contains("later"), "{message}");
        assert_eq!(phase(&t.api::<Pod>().get("waits").await.unwrap()), "Pending");
        t.config_map("later", json!({"a": "1"})).await;
        t.until("waits", "up after all", is_ready).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_changed_config_map_reaches_a_running_pod_at_once() {
    on_shared_node(async |t| {
        t.config_map("settings", json!({"a": "old", "gone": "x"})).await;
        let script = "while ! grep -q new /v/a; do sleep 0.1; done; echo followed; ls /v; ".to_owned() + STAY;
        t.pod("follows", spec_with(json!({"configMap": {"name": "settings"}}), &script)).await;
        t.running("follows").await;
        let change = Patch::Merge(json!({"data": {"a": "new", "gone": null, "more": "y"}}));
        t.api::<ConfigMap>().patch("settings", &PatchParams::default(), &change).await.unwrap();
        let changed = Instant::now();
        // Far less than a sync period, after which it would have come anyway.
        let log = poll("the change in the Pod", Duration::from_secs(5), async || {
            let log = t.log("follows", "main").await;
            if log.contains("up") { Ok(log) } else { Err(log) }
        })
        .await;
        println!("the Pod's log told of the change after {:?}", changed.elapsed());
        assert_eq!(log, "followed\na\nmore\nup\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_changed_label_reaches_the_pods_own_volume_at_once() {
    on_shared_node(async |t| {
        let items = json!([{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]);
        let script = "while ! grep -q new /v/labels; do sleep 0.1; done; ".to_owned() + STAY;
        t.pod("labelled", spec_with(json!({"downwardAPI": {"items": items}}), &script)).await;
        t.running("labelled").await;
        let change = Patch::Merge(json!({"metadata": {"labels": {"l": "new"}}}));
        t.api::<Pod>().patch("labelled", &PatchParams::default(), &change).await.unwrap();
        poll("the label in the Pod", Duration::from_secs(5), async || {
            let log = t.log("labelled", "main").await;
            if log.contains("up") { Ok(()) } else { Err(log) }
        })
        .await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_sub_path_shows_a_part_of_its_volume_and_an_expression_is_expanded() {
    on_shared_node(async |t| {
        t.config_map("settings", json!({"a": "from the map", "b": "2"})).await;
        let fill = container("fill", "mkdir -p /e/made; echo inside >/e/made/file; ln -s /etc /e/out");
        let fill = with(fill, json!({"volumeMounts": [{"name": "e", "mountPath": "/e"}]}));
        let mounts = json!({
            "env": [{"name": "WHO", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
            "volumeMounts": [
                {"name": "e", "mountPath": "/part", "subPath": "made"},
                {"name": "e", "mountPath": "/file", "subPath": "made/file", "readOnly": true},
                {"name": "e", "mountPath": "/new", "subPathExpr": "of/$(WHO)"},
                {"name": "c", "mountPath": "/etc/a.conf", "subPath": "a"},
                {"name": "e", "mountPath": "/all"},
            ],
        });
        let script = "ls /part; cat /file; echo x 2>/dev/null >/file || echo read-only; cat /etc/a.conf; echo; \
                      touch /new/mine; ls /all/of/parts; ls /etc | grep -c a.conf";
        let spec = json!({
            "volumes": [{"name": "e", "emptyDir": {}}, {"name": "c", "configMap": {"name": "settings"}}],
            "initContainers": [fill], "containers": [busybox_with(script, mounts)],
        });
        assert_eq!(t.output_of("parts", spec).await, "file\ninside\nread-only\nfrom the map\nmine\n1\n");
        t.delete("parts", None).await;
        t.gone("parts", SOON).await;
        t.nothing_remains().await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_sub_path_that_leads_out_of_its_volume_holds_the_container_back() {
    on_shared_node(async |t| {
        let fill =
            with(container("fill", "ln -s /etc /e/out"), json!({"volumeMounts": [{"name": "e", "mountPath": "/e"}]}));
        let mounts = json!({"volumeMounts": [{"name": "e", "mountPath": "/host", "subPath": "out"}]});
        let spec = json!({
            "volumes": [{"name": "e", "emptyDir": {}}],
            "initContainers": [fill], "containers": [busybox_with(STAY, mounts)],
        });
        t.pod("escapes", spec).await;
        let held = |pod: &Pod| waits_for(pod, "main") == Some("CreateContainerConfigError");
        let pod = t.until("escapes", "held back", held).await;
        let why = waiting(&pod, "main").and_then(|w| w.message.clone()).unwrap_or_default();
        assert_eq!(why, "failed to prepare subPath for volumeMount \"e\" of container \"main\"");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_claim_of_a_local_volume_is_mounted_and_one_of_a_missing_driver_is_named() {
    on_shared_node(async |t| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "kept").unwrap();
        let here = json!({"key": "kubernetes.io/hostname", "operator": "Exists"});
        let sources = [
            (
                "local",
                json!({"local": {"path": dir.path()}, "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}}}),
            ),
            ("foreign", json!({"csi": {"driver": "csi.example.com", "volumeHandle": "v"}})),
        ];
        for (name, source) in sources {
            let volume = format!("{}-{name}", t.namespace);
            let spec = json!({"capacity": {"storage": "1Mi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "",
                "persistentVolumeReclaimPolicy": "Retain", "claimRef": {"namespace": t.namespace, "name": name}});
            let volumes: kube::Api<PersistentVolume> = kube::Api::all(t.client.clone());
            let object = json!({"metadata": {"name": volume}, "spec": with(spec, source)});
            volumes.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
            let claim = json!({"spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "volumeName": volume,
                "resources": {"requests": {"storage": "1Mi"}}}});
            t.make::<PersistentVolumeClaim>(name, claim).await;
        }
        let claimed = |name: &str| json!({"persistentVolumeClaim": {"claimName": name}});
        assert_eq!(with_volume(t, claimed("local"), "cat /v/file; echo new >/v/written").await, "kept");
        assert_eq!(std::fs::read_to_string(dir.path().join("written")).unwrap(), "new\n");
        t.pod("foreign", spec_with(claimed("foreign"), STAY)).await;
        let message = t.event("foreign", "FailedMount").await;
        assert!(message.contains("csi with driver csi.example.com"), "{message}");
        let volumes: kube::Api<PersistentVolume> = kube::Api::all(t.client.clone());
        for name in ["local", "foreign"] {
            volumes.delete(&format!("{}-{name}", t.namespace), &Default::default()).await.unwrap();
        }
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_downward_api_writes_the_pods_fields_into_files() {
    on_shared_node(async |t| {
        let items = json!([
            {"path": "name", "fieldRef": {"fieldPath": "metadata.name"}},
            {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
            {"path": "annotations", "fieldRef": {"fieldPath": "metadata.annotations"}, "mode": 0o600},
            {"path": "memory", "resourceFieldRef": {"containerName": "main", "resource": "limits.memory", "divisor": "1Mi"}},
        ]);
        let mut spec = spec_with(
            json!({"downwardAPI": {"items": items}}),
            "cd /v; for f in *; do echo \"$f: $(cat $f)\"; done; stat -Lc %a annotations",
        );
        spec["restartPolicy"] = json!("Never");
        spec["containers"][0]["resources"] = json!({"limits": {"memory": "32Mi"}});
        let metadata = json!({"labels": {"b": "2", "a": "1"}, "annotations": {"note": "say \"hi\"\n"}});
        t.labelled_pod("fields", metadata, spec).await;
        t.until("fields", "at its end", crate::harness::pods::has_ended).await;
        let log = t.log("fields", "main").await;
        let expected =
            "annotations: note=\"say \\\"hi\\\"\\n\"\nlabels: a=\"1\"\nb=\"2\"\nmemory: 32\nname: fields\n600\n";
        assert_eq!(log, expected);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_projected_volume_joins_its_sources() {
    on_shared_node(async |t| {
        t.config_map("settings", json!({"a": "1"})).await;
        t.secret("keys", json!({"password": "2"})).await;
        let sources = json!([
            {"configMap": {"name": "settings"}},
            {"secret": {"name": "keys", "items": [{"key": "password", "path": "sub/password", "mode": 0o400}]}},
            {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
        ]);
        let script = "cd /v; cat a sub/password name; echo; stat -Lc %a sub/password";
        let log = with_volume(t, json!({"projected": {"sources": sources, "defaultMode": 0o444}}), script).await;
        assert_eq!(log, format!("12{}\n400\n", t.namespace));
    });
}

/// The payload of a JSON web token.
fn claims(token: &str) -> Value {
    use base64::Engine as _;
    let payload = token.trim().split('.').nth(1).unwrap_or_else(|| panic!("not a token: {token:?}"));
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_projected_token_is_bound_to_its_pod_and_audience_and_private() {
    on_shared_node(async |t| {
        let token = json!({"serviceAccountToken": {"path": "token", "audience": "shop", "expirationSeconds": 600}});
        let mut spec = spec_with(
            json!({"projected": {"sources": [token]}}),
            "cat /v/token; echo; stat -Lc '%a %u' /v/token; awk '$2 == \"/v\" {print $3}' /proc/mounts",
        );
        spec["securityContext"] = json!({"runAsUser": 1000});
        let pod = t.run_pod("holder", spec).await;
        let log = t.log("holder", "main").await;
        let lines: Vec<&str> = log.lines().collect();
        assert_eq!(&lines[1..], ["600 1000", "tmpfs"]);
        let claims = claims(lines[0]);
        assert_eq!(claims["aud"], json!(["shop"]));
        assert_eq!(claims["sub"], json!(format!("system:serviceaccount:{}:default", t.namespace)));
        assert_eq!(claims["kubernetes.io"]["pod"]["uid"], json!(pod.uid().unwrap()));
        assert_eq!(claims["kubernetes.io"]["node"]["name"], json!(t.node.name));
        let life = claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap();
        assert_eq!(life, 600);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn the_default_token_speaks_for_the_pod_at_the_api_server() {
    on_shared_node(async |t| {
        let place = "/var/run/secrets/kubernetes.io/serviceaccount";
        let log = t.script(&format!("cd {place}; cat namespace; echo; head -n 1 ca.crt; cat token")).await;
        let lines: Vec<&str> = log.lines().collect();
        assert_eq!(&lines[..2], [t.namespace.as_str(), "-----BEGIN CERTIFICATE-----"]);
        let server = t.cluster.fact("APISERVER_URL");
        let ca = t.cluster.dir.join("ca.crt");
        let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}).to_string();
        let answer = crate::harness::node::output(
            "curl",
            &[
                "-sS",
                "--noproxy",
                "*",
                "--cacert",
                ca.to_str().unwrap(),
                "-H",
                &format!("Authorization: Bearer {}", lines[2]),
                "-H",
                "Content-Type: application/json",
                "-d",
                &review,
                &format!("{server}/apis/authentication.k8s.io/v1/selfsubjectreviews"),
            ],
        );
        let who: Value = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e}: {answer}"));
        let name = format!("system:serviceaccount:{}:default", t.namespace);
        assert_eq!(who["status"]["userInfo"]["username"], json!(name));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_host_path_of_each_type_is_checked_and_mounted() {
    on_shared_node(async |t| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "from the host").unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let volume = |name: &str, type_: &str| json!({"hostPath": {"path": path(name), "type": type_}});
        assert_eq!(
            with_volume(t, volume("", "Directory"), "cat /v/file; echo written >/v/back").await,
            "from the host"
        );
        assert_eq!(std::fs::read_to_string(dir.path().join("back")).unwrap(), "written\n");
        assert_eq!(with_volume(t, volume("file", "File"), "cat /v").await, "from the host");
        assert_eq!(
            with_volume(t, volume("new-dir", "DirectoryOrCreate"), "stat -c '%F %a' /v").await,
            "directory 755\n"
        );
        assert_eq!(
            with_volume(t, volume("new-file", "FileOrCreate"), "stat -c '%F %a' /v").await,
            "regular empty file 644\n"
        );
        assert_eq!(
            with_volume(t, json!({"hostPath": {"path": "/dev/null", "type": "CharDevice"}}), "stat -c %F /v").await,
            "character special file\n"
        );
        // What is there is left there.
        assert!(dir.path().join("new-dir").is_dir() && dir.path().join("file").is_file());
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_host_path_that_is_not_what_it_should_be_holds_the_pod_back() {
    on_shared_node(async |t| {
        let volume = json!({"hostPath": {"path": "/etc/passwd", "type": "Directory"}});
        t.pod("waits", spec_with(volume, STAY)).await;
        let message = t.event("waits", "FailedMount").await;
        assert!(message.contains("/etc/passwd") && message.contains("directory"), "{message}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_read_only_mount_is_read_only() {
    on_shared_node(async |t| {
        let mounts = json!({"volumeMounts": [
            {"name": "v", "mountPath": "/v", "readOnly": true},
            {"name": "v", "mountPath": "/w"},
        ]});
        let main = busybox_with("touch /w/a && ls /v; touch /v/b 2>/dev/null || echo refused", mounts);
        let spec = json!({"volumes": [{"name": "v", "emptyDir": {}}], "containers": [main]});
        assert_eq!(t.output_of("ro", spec).await, "a\nrefused\n");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn fs_group_owns_the_volumes_and_is_a_group_of_the_processes() {
    on_shared_node(async |t| {
        t.secret("keys", json!({"password": "2"})).await;
        let mounts = json!({"volumeMounts": [{"name": "e", "mountPath": "/e"}, {"name": "s", "mountPath": "/s"}]});
        let main = busybox_with(
            "id -G; stat -c %g /e; touch /e/new; stat -c %g /e/new; stat -Lc '%g %a' /s/password; cat /s/password",
            mounts,
        );
        let spec = json!({
            "securityContext": {"runAsUser": 1000, "runAsGroup": 2000, "fsGroup": 3000, "supplementalGroups": [4000]},
            "volumes": [{"name": "e", "emptyDir": {}}, {"name": "s", "secret": {"secretName": "keys", "defaultMode": 0o400}}],
            "containers": [main],
        });
        let log = t.output_of("groups", spec).await;
        let lines: Vec<&str> = log.lines().collect();
        let mut groups: Vec<&str> = lines[0].split(' ').collect();
        groups.sort_unstable();
        assert_eq!(groups, ["2000", "3000", "4000"]);
        assert_eq!(&lines[1..], ["3000", "3000", "3000 440", "2"]);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_unsupported_kind_of_volume_is_named() {
    on_shared_node(async |t| {
        let volume = json!({"nfs": {"server": "192.0.2.1", "path": "/"}});
        t.pod("nfs", spec_with(volume, STAY)).await;
        let message = t.event("nfs", "FailedMount").await;
        assert!(message.contains("\"v\"") && message.to_lowercase().contains("nfs"), "{message}");
    });
}
