//! Images: policies, pulls, credentials, and every way they fail.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use base64::Engine as _;
use k8s_openapi::api::core::v1::{Pod, Secret};
use serde_json::{Value, json};

use crate::harness::node::{free_port, output};
use crate::harness::pods::{busybox_with, has_ended, is_ready, phase, waiting, waits_for};
use crate::harness::wait::{SOON, poll};
use crate::harness::{BUSYBOX, on_shared_node};

/// A registry on the loopback interface, which Docker speaks plain HTTP to, with an image of its own.
struct Registry {
    process: Child,
    port: u16,
    _data: tempfile::TempDir,
}

impl Registry {
    /// Starts it; with a password, only `user` with that password may read and write.
    async fn start(password: Option<&str>) -> Self {
        let data = tempfile::tempdir().unwrap();
        let port = free_port();
        let mut config = json!({
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": data.path().join("data")}},
            "http": {"addr": format!("127.0.0.1:{port}")},
        });
        if let Some(password) = password {
            let line = output(
                "python3",
                &[
                    "-W",
                    "ignore",
                    "-c",
                    "import crypt, sys; print('user:' + crypt.crypt(sys.argv[1], crypt.METHOD_BLOWFISH))",
                    password,
                ],
            );
            let path = data.path().join("htpasswd");
            std::fs::write(&path, line).unwrap();
            config["auth"] = json!({"htpasswd": {"realm": "test", "path": path}});
        }
        let path = data.path().join("config.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let tool = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("hack/build-tools");
        let program = output(tool.to_str().unwrap(), &["--path", "registry"]);
        let process = Command::new(program.trim())
            .args(["serve", path.to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let registry = Self { process, port, _data: data };
        poll("a registry that answers", SOON, async || {
            crate::harness::http::get(&format!("127.0.0.1:{port}"), "/v2/").await.map(drop)
        })
        .await;
        registry
    }

    fn image(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }

    /// Puts busybox there under that name, and forgets it on this host.
    fn push(&self, name: &str, password: Option<&str>) -> String {
        let image = self.image(name);
        let config = tempfile::tempdir().unwrap();
        if let Some(password) = password {
            let auth = base64::engine::general_purpose::STANDARD.encode(format!("user:{password}"));
            let auths = json!({"auths": {format!("127.0.0.1:{}", self.port): {"auth": auth}}});
            std::fs::write(config.path().join("config.json"), auths.to_string()).unwrap();
        }
        output("docker", &["tag", BUSYBOX, &image]);
        output("docker", &["--config", config.path().to_str().unwrap(), "push", "-q", &image]);
        output("docker", &["rmi", &image]);
        let left = output("docker", &["images", "-q", &image]);
        assert_eq!(left, "", "{image} is still here");
        image
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let prefix = format!("127.0.0.1:{}/*/*", self.port);
        for image in output("docker", &["images", "--format", "{{.Repository}}:{{.Tag}}", &prefix]).lines() {
            output("docker", &["rmi", image]);
        }
    }
}

fn running(image: &str, policy: &str) -> Value {
    let main = json!({"name": "main", "image": image, "imagePullPolicy": policy, "command": ["sh", "-c", "echo ran"]});
    json!({"restartPolicy": "Never", "containers": [main]})
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_absent_image_is_pulled_and_the_event_says_how_large_it_is() {
    on_shared_node(async |t| {
        let registry = Registry::start(None).await;
        let image = registry.push("tools/busybox:1", None);
        let pod = t.run_pod("pulls", running(&image, "IfNotPresent")).await;
        assert_eq!(phase(&pod), "Succeeded");
        assert_eq!(t.event("pulls", "Pulling").await, format!("Pulling image {image:?}"));
        let pulled = t.event("pulls", "Pulled").await;
        assert!(
            pulled.starts_with(&format!("Successfully pulled image {image:?} in ")) && pulled.contains("Image size: "),
            "{pulled}"
        );
        let main = crate::harness::pods::status(&pod, "main").unwrap();
        assert_eq!(main.image, image);
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn always_pulls_what_is_present_too() {
    on_shared_node(async |t| {
        let registry = Registry::start(None).await;
        let image = registry.push("tools/busybox:1", None);
        t.run_pod("first", running(&image, "Always")).await;
        t.run_pod("second", running(&image, "Always")).await;
        let pulled = t.event("second", "Pulled").await;
        assert!(pulled.starts_with("Successfully pulled image"), "{pulled}");
        t.run_pod("third", running(&image, "IfNotPresent")).await;
        assert_eq!(t.event("third", "Pulled").await, format!("Container image {image:?} already present on machine"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn never_pulls_nothing() {
    on_shared_node(async |t| {
        t.pod("never", running("lambdalet.test/no-such-image:1", "Never")).await;
        let held = |p: &Pod| waits_for(p, "main") == Some("ErrImageNeverPull");
        let pod = t.until("never", "held back", held).await;
        let message = waiting(&pod, "main").unwrap().message.clone().unwrap();
        assert_eq!(
            message,
            "Container image \"lambdalet.test/no-such-image:1\" is not present with pull policy of Never"
        );
        assert_eq!(phase(&pod), "Pending");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_image_that_does_not_exist_backs_off_and_says_which() {
    on_shared_node(async |t| {
        let registry = Registry::start(None).await;
        let image = registry.image("nobody/nothing:1");
        t.pod("missing", running(&image, "IfNotPresent")).await;
        let pod = t.until("missing", "refused", |p| waits_for(p, "main") == Some("ErrImagePull")).await;
        let message = waiting(&pod, "main").unwrap().message.clone().unwrap();
        assert!(message.contains("nobody/nothing"), "{message}");
        let pod = t.until("missing", "backing off", |p| waits_for(p, "main") == Some("ImagePullBackOff")).await;
        let message = waiting(&pod, "main").unwrap().message.clone().unwrap();
        assert!(message.starts_with(&format!("Back-off pulling image {image:?}")), "{message}");
        assert_eq!(t.event("missing", "BackOff").await, format!("Back-off pulling image {image:?}"));
        assert!(t.event("missing", "Failed").await.contains("nobody/nothing"));
        // Once it is there, the next try finds it.
        registry.push("nobody/nothing:1", None);
        t.until("missing", "at its end after all", has_ended).await;
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_invalid_image_name_is_called_that() {
    on_shared_node(async |t| {
        t.pod("invalid", running("UPPER//case::1", "IfNotPresent")).await;
        let pod = t.until("invalid", "refused", |p| waits_for(p, "main") == Some("InvalidImageName")).await;
        let message = waiting(&pod, "main").unwrap().message.clone().unwrap();
        assert!(message.contains("UPPER//case::1"), "{message}");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_private_image_needs_the_pods_pull_secret() {
    on_shared_node(async |t| {
        let registry = Registry::start(Some("open sesame")).await;
        let image = registry.push("private/busybox:1", Some("open sesame"));
        t.pod("without", running(&image, "Always")).await;
        let refused = |p: &Pod| matches!(waits_for(p, "main"), Some("ErrImagePull" | "ImagePullBackOff"));
        t.until("without", "refused", refused).await;

        let auth = base64::engine::general_purpose::STANDARD.encode("user:open sesame");
        let auths = json!({"auths": {format!("127.0.0.1:{}", registry.port): {"auth": auth}}});
        let secret =
            json!({"type": "kubernetes.io/dockerconfigjson", "stringData": {".dockerconfigjson": auths.to_string()}});
        t.make::<Secret>("pull", secret).await;
        let mut spec = running(&image, "Always");
        spec["imagePullSecrets"] = json!([{"name": "pull"}]);
        let pod = t.run_pod("with", spec).await;
        assert_eq!(phase(&pod), "Succeeded");
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_missing_pull_secret_is_said_and_does_not_stop_a_public_image() {
    on_shared_node(async |t| {
        let registry = Registry::start(None).await;
        let image = registry.push("public/busybox:1", None);
        let mut spec = running(&image, "Always");
        spec["imagePullSecrets"] = json!([{"name": "no-such-secret"}]);
        let pod = t.run_pod("public", spec).await;
        assert_eq!(phase(&pod), "Succeeded");
        assert!(t.event("public", "FailedToRetrieveImagePullSecret").await.contains("no-such-secret"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn one_containers_failing_image_does_not_hold_up_the_others() {
    on_shared_node(async |t| {
        let bad = json!({"name": "bad", "image": "lambdalet.test/no-such-image:1", "imagePullPolicy": "Never"});
        let good = crate::harness::pods::busybox(crate::harness::pods::STAY);
        t.pod("mixed", json!({"containers": [bad, good]})).await;
        let up = |p: &Pod| crate::harness::pods::status(p, "main").is_some_and(|s| s.ready);
        let pod = t.until("mixed", "half up", up).await;
        assert!(!is_ready(&pod));
        assert_eq!(waits_for(&pod, "bad"), Some("ErrImageNeverPull"));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_volume_shows_an_image_and_a_part_of_it_and_nobody_writes_there() {
    on_shared_node(async |t| {
        let registry = Registry::start(None).await;
        let image = registry.push("tools/data:1", None);
        let script = "ls /data; cat /etc/part/../part/passwd | head -1; touch /data/x || echo read-only; \
                      ls -a /data | grep dockerenv || echo exact";
        let mounts = json!([
            {"name": "data", "mountPath": "/data"},
            {"name": "data", "mountPath": "/etc/part", "subPath": "etc"},
        ]);
        let main = busybox_with(script, json!({"volumeMounts": mounts}));
        let volumes = json!([{"name": "data", "image": {"reference": image, "pullPolicy": "IfNotPresent"}}]);
        let spec = json!({"restartPolicy": "Never", "containers": [main], "volumes": volumes});
        let shown = t.output_of("shows", spec.clone()).await;
        for part in ["bin\n", "root:", "read-only", "exact"] {
            assert!(shown.contains(part), "{part:?} is not in {shown}");
        }
        assert_eq!(t.event("shows", "Pulling").await, format!("Pulling image {image:?}"));
        t.output_of("again", spec).await;
        let mut absent = json!({"restartPolicy": "Never", "containers": [busybox_with(
            "true", json!({"volumeMounts": [{"name": "data", "mountPath": "/data"}]}),
        )]});
        let reference = "lambdalet.test/no-such-image:1";
        absent["volumes"] = json!([{"name": "data", "image": {"reference": reference, "pullPolicy": "Never"}}]);
        t.pod("never", absent).await;
        let waits = |pod: &Pod| waiting(pod, "main").and_then(|w| w.reason.as_deref()) == Some("ErrImageNeverPull");
        t.until("never", "waiting for an image that is never pulled", waits).await;
    });
}
