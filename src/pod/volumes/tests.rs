//! Volumes as a container finds them, made against a small API server in this process.

use std::collections::HashMap;
use std::convert::Infallible;
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use jiff::Timestamp;
use kube::client::Body;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use super::projection::{CONTENT_PERIOD, LEAST_PERIOD};
use super::*;
use crate::node::NodeFacts;
use crate::quantity::Quantity;

/// Runs the test on a thread with mounts of its own, or says why not.
pub(super) fn in_a_mount_namespace(test: impl FnOnce() + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root to mount");
        return;
    }
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).unwrap();
        test();
    };
    std::thread::spawn(run).join().unwrap();
}

/// An API server that has these objects by path, and gives tokens good for `token_life` seconds.
#[derive(Default)]
struct Api {
    objects: Mutex<HashMap<String, Value>>,
    token_requests: Mutex<Vec<Value>>,
    token_life: i64,
}

impl Api {
    fn put(&self, path: &str, object: Value) {
        self.objects.lock().unwrap().insert(path.to_owned(), object);
    }

    async fn answer(&self, request: Request<Body>) -> (StatusCode, Value) {
        let path = request.uri().path().to_owned();
        if path.ends_with("/token") {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            self.token_requests.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
            let now = Timestamp::now().as_second();
            let claims = json!({"iat": now, "exp": now + self.token_life}).to_string();
            let token = format!("h.{}.{}", URL_SAFE_NO_PAD.encode(claims), self.token_requests.lock().unwrap().len());
            return (
                StatusCode::CREATED,
                json!({"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1",
                "metadata": {}, "spec": {"audiences": []}, "status": {"token": token, "expirationTimestamp": "2030-01-01T00:00:00Z"}}),
            );
        }
        match self.objects.lock().unwrap().get(&path) {
            Some(object) => (StatusCode::OK, object.clone()),
            None => (
                StatusCode::NOT_FOUND,
                json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
                "reason": "NotFound", "message": "not found", "code": 404}),
            ),
        }
    }

    fn client(self: &Arc<Self>) -> Client {
        let api = Arc::clone(self);
        let service = tower::service_fn(move |request| {
            let api = Arc::clone(&api);
            async move {
                let (status, body) = api.answer(request).await;
                let answer = Response::builder().status(status).header("content-type", "application/json");
                Ok::<_, Infallible>(answer.body(Body::from(body.to_string().into_bytes())).unwrap())
            }
        });
        Client::new(service, "default")
    }
}

struct Host {
    api: Arc<Api>,
    dir: tempfile::TempDir,
    node: NodeFacts,
}

impl Host {
    fn manager(&self) -> VolumeManager {
        let client = self.api.client();
        let objects = Arc::new(Objects::new(client.clone(), Duration::ZERO));
        VolumeManager::new(client, objects, self.dir.path())
    }
}

fn pod(volumes: Value, more: Value) -> Pod {
    let mounts: Vec<Value> =
        volumes.as_array().unwrap().iter().map(|volume| json!({"name": volume["name"], "mountPath": "/x"})).collect();
    let mut pod = json!({"metadata": {"name": "web", "namespace": "shop", "uid": "u-1", "labels": {"app": "web"}},
        "spec": {"serviceAccountName": "robot", "volumes": volumes, "containers": [{"name": "main", "volumeMounts": mounts}]}});
    for (key, value) in more.as_object().unwrap() {
        pod["spec"][key] = value.clone();
    }
    serde_json::from_value(pod).unwrap()
}

/// Runs the test with a prepared volume manager on a host of its own.
fn on_a_host<F: Future<Output = ()>>(token_life: i64, test: impl FnOnce(Host) -> F + Send + 'static) {
    in_a_mount_namespace(move || {
        let node = NodeFacts {
            name: "n1".into(),
            capacity: BTreeMap::new(),
            addresses: vec!["192.0.2.1".parse().unwrap()],
            allocatable: BTreeMap::from([("memory".into(), Quantity::from_units(64 << 20))]),
        };
        let api = Arc::new(Api { token_life, ..Api::default() });
        let host = Host { api, dir: tempfile::tempdir().unwrap(), node };
        let root = host.dir.path().to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            host.manager().prepare().await.unwrap();
            host.manager().prepare().await.unwrap();
            test(host).await;
        });
        mounts::remove_tree(&root).unwrap();
    });
}

macro_rules! ctx {
    ($host:expr, $pod:expr) => {
        PodContext {
            key: $pod.metadata.uid.as_deref().unwrap_or_default(),
            pod: &$pod,
            node: &$host.node,
            addresses: &[],
        }
    };
}

#[test]
fn every_kind_of_volume_is_made_found_again_and_removed() {
    on_a_host(3600, |host| async move {
        host.api.put("/api/v1/namespaces/shop/configmaps/conf", json!({"metadata": {}, "data": {"a.ini": "x=1"}}));
        host.api.put("/api/v1/namespaces/shop/secrets/keys", json!({"metadata": {}, "data": {"key": "czNjcjN0"}}));
        let outside = host.dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), "1").unwrap();
        let pod = pod(
            json!([
                {"name": "scratch", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                {"name": "host", "hostPath": {"path": outside, "type": "Directory"}},
                {"name": "conf", "configMap": {"name": "conf"}},
                {"name": "keys", "secret": {"secretName": "keys", "defaultMode": 256}},
                {"name": "info", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
                    {"path": "mem", "resourceFieldRef": {"containerName": "main", "resource": "limits.memory", "divisor": "1Mi"}}]}},
                {"name": "all", "projected": {"sources": [
                    {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607, "audience": "vault"}},
                    {"configMap": {"name": "conf", "items": [{"key": "a.ini", "path": "etc/b.ini"}]}},
                    {"configMap": {"name": "none", "optional": true}}]}},
            ]),
            json!({"securityContext": {"fsGroup": 4321}}),
        );
        let made = host.manager().set_up(ctx!(host, pod)).await.unwrap().volumes;
        let read = |volume: &str, path: &str| fs::read_to_string(made[volume].host_path.join(path)).unwrap();
        assert_eq!(read("conf", "a.ini"), "x=1");
        assert_eq!(read("keys", "key"), "s3cr3t");
        assert_eq!(read("info", "labels"), "app=\"web\"");
        assert_eq!(read("info", "mem"), "64");
        assert_eq!(read("all", "etc/b.ini"), "x=1");
        assert!(read("all", "token").starts_with("h."));
        let token = fs::metadata(made["all"].host_path.join("token")).unwrap();
        assert_eq!((token.gid(), token.mode() & 0o777), (4321, 0o640));
        assert_eq!(fs::metadata(made["keys"].host_path.join("key")).unwrap().mode() & 0o777, 0o440);
        for volume in ["conf", "keys", "info", "all", "shm"] {
            assert!(mounts::is_tmpfs(&made[volume].host_path), "{volume}");
        }
        assert_eq!(made["scratch"].host_path, host.dir.path().join("pods/u-1/volumes/kubernetes.io~empty-dir/scratch"));
        assert_eq!(made["host"].host_path, outside);
        let writable: Vec<_> =
            made.iter().filter(|(_, volume)| !volume.read_only).map(|(name, _)| name.as_str()).collect();
        assert_eq!(writable, ["host", "scratch", "shm"]);
        let request = host.api.token_requests.lock().unwrap()[0]["spec"].clone();
        assert_eq!(
            request,
            json!({"audiences": ["vault"], "expirationSeconds": 3607,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": "u-1"}})
        );

        // Another process finds the same, and the token still fresh.
        assert_eq!(host.manager().set_up(ctx!(host, pod)).await.unwrap().volumes, made);
        assert_eq!(host.api.token_requests.lock().unwrap().len(), 1);
        assert_eq!(host.manager().uids().await.unwrap(), BTreeSet::from(["u-1".to_owned()]));
        host.manager().tear_down("u-1").await.unwrap();
        host.manager().tear_down("u-1").await.unwrap();
        assert!(host.manager().uids().await.unwrap().is_empty());
        assert!(outside.join("precious").exists());
        assert!(mounts::is_tmpfs(&host.dir.path().join("secrets")));
    });
}

#[test]
fn changed_content_and_old_tokens_are_renewed() {
    on_a_host(0, |host| async move {
        host.api.put("/api/v1/namespaces/shop/configmaps/conf", json!({"metadata": {}, "data": {"a": "1"}}));
        let pod = pod(
            json!([{"name": "all", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token"}}, {"configMap": {"name": "conf"}}]}}]),
            json!({}),
        );
        let manager = host.manager();
        let made = manager.set_up(ctx!(host, pod)).await.unwrap().volumes;
        let first = fs::read(made["all"].host_path.join("token")).unwrap();
        host.api.put("/api/v1/namespaces/shop/configmaps/conf", json!({"metadata": {}, "data": {"a": "2"}}));
        assert_eq!(manager.refresh(ctx!(host, pod)).await.unwrap().period, Some(LEAST_PERIOD));
        assert_eq!(fs::read_to_string(made["all"].host_path.join("a")).unwrap(), "2");
        assert_ne!(fs::read(made["all"].host_path.join("token")).unwrap(), first);
    });
}

#[test]
fn only_what_can_change_asks_for_another_refresh() {
    on_a_host(3600, |host| async move {
        host.api.put(
            "/api/v1/namespaces/shop/configmaps/fixed",
            json!({"metadata": {}, "immutable": true, "data": {"a": "1"}}),
        );
        host.api.put("/api/v1/namespaces/shop/configmaps/free", json!({"metadata": {}, "data": {"a": "1"}}));
        let manager = host.manager();
        for (volume, wanted) in [
            (json!({"name": "v", "emptyDir": {}}), None),
            (json!({"name": "v", "configMap": {"name": "fixed"}}), None),
            (json!({"name": "v", "configMap": {"name": "free"}}), Some(CONTENT_PERIOD)),
        ] {
            let pod = pod(json!([volume]), json!({}));
            manager.set_up(ctx!(host, pod)).await.unwrap();
            let fresh = manager.refresh(ctx!(host, pod)).await.unwrap();
            assert_eq!(fresh.period, wanted);
            assert_eq!(fresh.uses.len(), usize::from(wanted.is_some()), "what is fixed is not followed");
        }
        let pod = pod(
            json!([{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}]),
            json!({}),
        );
        manager.set_up(ctx!(host, pod)).await.unwrap();
        let left = manager.refresh(ctx!(host, pod)).await.unwrap().period.unwrap().as_secs();
        assert!((2870..=2880).contains(&left), "{left}");
    });
}

#[test]
fn what_is_missing_wrong_or_unsupported_is_named() {
    on_a_host(3600, |host| async move {
        host.api.put("/api/v1/namespaces/shop/configmaps/conf", json!({"metadata": {}, "data": {"a": "1"}}));
        host.api.put(
            "/api/v1/namespaces/shop/persistentvolumeclaims/waiting",
            json!({"metadata": {"name": "waiting", "uid": "c-0"}, "spec": {}, "status": {"phase": "Pending"}}),
        );
        let manager = host.manager();
        for (volume, message) in [
            (
                json!({"name": "v", "configMap": {"name": "x"}}),
                "MountVolume.SetUp failed for volume \"v\" : configmap \"x\" not found",
            ),
            (
                json!({"name": "v", "secret": {"secretName": "x"}}),
                "MountVolume.SetUp failed for volume \"v\" : secret \"x\" not found",
            ),
            (
                json!({"name": "v", "configMap": {"name": "conf", "items": [{"key": "y", "path": "y"}]}}),
                "MountVolume.SetUp failed for volume \"v\" : configmap references non-existent config key: y",
            ),
            (
                json!({"name": "v", "hostPath": {"path": "/no/such", "type": "Directory"}}),
                "MountVolume.SetUp failed for volume \"v\" : hostPath type check failed: /no/such is not a directory",
            ),
            (
                json!({"name": "v", "nfs": {"server": "s", "path": "/p"}}),
                "volume \"v\" has type nfs, which this node does not support",
            ),
            (
                json!({"name": "v", "csi": {"driver": "d"}}),
                "volume \"v\" has type csi, which this node does not support",
            ),
            (
                json!({"name": "v", "persistentVolumeClaim": {"claimName": "waiting"}}),
                "MountVolume.SetUp failed for volume \"v\" : error processing PVC shop/waiting: PVC is not bound",
            ),
            (
                json!({"name": "v", "emptyDir": {"medium": "HugePages"}}),
                "volume \"v\" has type emptyDir with medium HugePages, which this node does not support",
            ),
            (
                json!({"name": "v", "projected": {"sources": [{"clusterTrustBundle": {"path": "p", "name": "n"}}]}}),
                "volume \"v\" has type projected clusterTrustBundle, which this node does not support",
            ),
            (json!({"name": "../v", "emptyDir": {}}), "\"../v\" cannot be the name of a directory"),
        ] {
            let pod = pod(json!([volume]), json!({}));
            let error = manager.set_up(ctx!(host, pod)).await.unwrap_err();
            assert_eq!(crate::telemetry::chain(&error), message);
        }
        for uid in ["", "..", "a/b"] {
            assert!(manager.tear_down(uid).await.is_err());
        }
    });
}

#[test]
fn a_claim_shows_the_local_directory_it_is_bound_to_and_leaves_it_there() {
    on_a_host(3600, |host| async move {
        let local = host.dir.path().join("disk");
        fs::create_dir(&local).unwrap();
        fs::write(local.join("precious"), "1").unwrap();
        host.api.put(
            "/api/v1/namespaces/shop/persistentvolumeclaims/data",
            json!({"metadata": {"name": "data", "uid": "c-1"}, "spec": {"volumeName": "pv-1"}, "status": {"phase": "Bound"}}),
        );
        host.api.put(
            "/api/v1/persistentvolumes/pv-1",
            json!({"metadata": {"name": "pv-1"}, "spec": {"claimRef": {"uid": "c-1"}, "local": {"path": local}}}),
        );
        let pod = pod(
            json!([{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]),
            json!({"securityContext": {"fsGroup": 4321}}),
        );
        let made = host.manager().set_up(ctx!(host, pod)).await.unwrap().volumes;
        assert_eq!(made["v"], MountedVolume { host_path: local.clone(), read_only: false });
        assert_eq!(fs::metadata(local.join("precious")).unwrap().gid(), 4321);
        assert_eq!(host.manager().refresh(ctx!(host, pod)).await.unwrap(), Freshness::default());
        host.manager().tear_down("u-1").await.unwrap();
        assert!(local.join("precious").exists());
    });
}

#[test]
fn volumes_that_nobody_mounts_are_not_made() {
    on_a_host(3600, |host| async move {
        let mut pod = pod(
            json!([{"name": "v", "configMap": {"name": "x"}}, {"name": "w", "nfs": {"server": "s", "path": "/"}}]),
            json!({}),
        );
        pod.spec.as_mut().unwrap().containers[0].volume_mounts = None;
        assert!(host.manager().set_up(ctx!(host, pod)).await.unwrap().volumes.is_empty());
        assert_eq!(host.manager().refresh(ctx!(host, pod)).await.unwrap(), Freshness::default());
    });
}

#[test]
fn secrets_are_never_written_to_disk() {
    in_a_mount_namespace(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let root = tempfile::tempdir().unwrap();
            let client = Arc::new(Api::default()).client();
            let objects = Arc::new(Objects::new(client.clone(), Duration::ZERO));
            let manager = VolumeManager::new(client, objects, root.path());
            let node = NodeFacts {
                name: String::new(),
                addresses: vec![],
                capacity: BTreeMap::new(),
                allocatable: BTreeMap::new(),
            };
            let pod = pod(json!([{"name": "v", "secret": {"secretName": "x", "optional": true}}]), json!({}));
            let error = manager
                .set_up(PodContext {
                    key: pod.metadata.uid.as_deref().unwrap_or_default(),
                    pod: &pod,
                    node: &node,
                    addresses: &[],
                })
                .await
                .unwrap_err();
            assert!(crate::telemetry::chain(&error).contains("not a tmpfs"), "{error}");
        });
    });
}
