//! The store against a registry in this process, with the real `mkfs.erofs`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{Response, StatusCode, Uri};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::unpack::tests::Layer;
use super::*;
use crate::telemetry::chain;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a registry serves, and how often each layer was asked for.
#[derive(Default)]
struct Served {
    content: Mutex<HashMap<String, (Vec<u8>, &'static str)>>,
    layer_requests: AtomicUsize,
    /// Requests for layers are not answered.
    stuck: AtomicBool,
}

/// A registry in this process that speaks plain HTTP.
struct Registry {
    host: String,
    served: Arc<Served>,
    _server: JoinSet<()>,
}

impl Registry {
    async fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let served = Arc::new(Served::default());
        let routes = Router::new().fallback(serve).with_state(Arc::clone(&served));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Self { host, served, _server: server }
    }

    fn put(&self, path: &str, bytes: Vec<u8>, kind: &'static str) {
        self.served.content.lock().unwrap().insert(path.to_owned(), (bytes, kind));
    }

    fn blob(&self, bytes: &[u8]) -> serde_json::Value {
        let digest = digest_of(bytes);
        self.put(&format!("/v2/app/blobs/{digest}"), bytes.to_vec(), "application/octet-stream");
        serde_json::json!({ "mediaType": "application/x", "digest": digest, "size": bytes.len() })
    }

    /// Puts an image there; its id, and its manifest's digest.
    fn image(&self, tag: &str, layers: &[Vec<u8>]) -> (ImageId, String) {
        let diff_ids: Vec<_> = layers.iter().map(|layer| digest_of(layer)).collect();
        let config = serde_json::json!({ "architecture": "amd64", "os": "linux", "rootfs": { "diff_ids": diff_ids },
            "config": { "User": "7", "Cmd": ["/run"], "WorkingDir": "/w" } });
        let config = config.to_string().into_bytes();
        let blobs: Vec<_> = layers.iter().map(|layer| self.blob(layer)).collect();
        let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": self.blob(&config),
            "layers": blobs });
        let manifest = manifest.to_string().into_bytes();
        let digest = digest_of(&manifest);
        for name in [tag, &digest] {
            self.put(&format!("/v2/app/manifests/{name}"), manifest.clone(), MANIFEST);
        }
        (ImageId::from(digest_of(&config)), digest)
    }

    fn reference(&self, tag: &str) -> String {
        format!("{}/app:{tag}", self.host)
    }

    fn options(&self) -> Options {
        Options { insecure_registries: vec![self.host.clone()], ..Options::default() }
    }

    async fn store(&self, root: &Path) -> Store {
        Store::open(root, self.options()).await.unwrap()
    }
}

async fn serve(State(served): State<Arc<Served>>, uri: Uri) -> Response<axum::body::Body> {
    if uri.path() == "/v2/" {
        return Response::new("{}".into());
    }
    let found = served.content.lock().unwrap().get(uri.path()).cloned();
    let Some((bytes, kind)) = found else {
        let words = r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such"}]}"#;
        return Response::builder().status(StatusCode::NOT_FOUND).body(words.into()).unwrap();
    };
    if uri.path().contains("/blobs/") && !bytes.starts_with(b"{") {
        served.layer_requests.fetch_add(1, Ordering::SeqCst);
        if served.stuck.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }
    Response::builder().header("content-type", kind).body(bytes.into()).unwrap()
}

/// These need the program, and root to give files away.
fn possible() -> bool {
    let why = match Mkfs::find(Path::new("mkfs.erofs")) {
        Err(error) => Some(error.to_string()),
        Ok(_) if !rustix::process::geteuid().is_root() => Some("only root can give files away".to_owned()),
        Ok(_) => None,
    };
    if let Some(why) = &why {
        println!("skipped: {why}");
    }
    why.is_none()
}

fn layers(text: &str) -> [Vec<u8>; 2] {
    [Layer::default().file("etc/name", "old").tar(), Layer::default().file("etc/name", text).file("run", "!").tar()]
}

/// Everything in the store's directory.
fn files(root: &Path) -> Vec<String> {
    let mut files = Vec::new();
    for part in ["images", "names", "tmp"] {
        for entry in fs::read_dir(root.join(part)).unwrap() {
            files.push(format!("{part}/{}", entry.unwrap().file_name().display()));
        }
    }
    files.sort();
    files
}

/// Waits until nothing is half made; that is cleaned up in the background.
async fn swept(root: &Path) {
    let begun = Instant::now();
    while fs::read_dir(root.join("tmp")).unwrap().next().is_some() {
        assert!(begun.elapsed() < PATIENCE, "{:?}", files(root));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The image's files, as its own tool reads them.
fn extracted(image: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("fsck.erofs");
    command.arg(format!("--extract={}", folder.path().join("root").display())).arg(image);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    folder
}

#[tokio::test]
async fn an_image_becomes_a_file_system_and_is_there_after_a_restart() {
    if !possible() {
        return;
    }
    let (registry, root) = (Registry::start().await, tempfile::tempdir().unwrap());
    let (id, digest) = registry.image("1", &layers("new"));
    let store = registry.store(root.path()).await;
    assert_eq!(store.image_status(&registry.reference("1")).await.unwrap(), None);
    assert_eq!(store.pull_image(&registry.reference("1"), &[]).await.unwrap(), id);
    for store in [&store, &registry.store(root.path()).await] {
        let by_digest = format!("{}/app@{digest}", registry.host);
        let image = store.image_status(&registry.reference("1")).await.unwrap().unwrap();
        assert_eq!((&image.id, image.user.as_str()), (&id, "7"));
        assert_eq!(
            (image.tags.as_slice(), image.digests.as_slice()),
            ([registry.reference("1")].as_slice(), [by_digest.clone()].as_slice())
        );
        for name in [by_digest.as_str(), id.as_str()] {
            assert_eq!(store.image_status(name).await.unwrap().as_ref(), Some(&image), "{name}");
        }
        assert_eq!(store.list_images().await.unwrap(), std::slice::from_ref(&image));
        assert_eq!(store.image_fs_info().await.unwrap().used, Some(image.size));
        let block = store.block(&id).await.unwrap();
        assert_eq!(fs::metadata(&block.path).unwrap().len(), image.size);
        assert_eq!(
            (block.config.cmd.as_slice(), block.config.working_dir.as_str()),
            (["/run".to_owned()].as_slice(), "/w")
        );
        let tree = extracted(&block.path);
        assert_eq!(fs::read_to_string(tree.path().join("root/etc/name")).unwrap(), "new");
    }
    swept(root.path()).await;
}

#[tokio::test]
async fn the_same_image_gives_the_same_bytes() {
    if !possible() {
        return;
    }
    let registry = Registry::start().await;
    let (id, _) = registry.image("1", &layers("new"));
    let mut made = Vec::new();
    for _ in 0..2 {
        let root = tempfile::tempdir().unwrap();
        let store = registry.store(root.path()).await;
        store.pull_image(&registry.reference("1"), &[]).await.unwrap();
        made.push(fs::read(store.block(&id).await.unwrap().path.clone()).unwrap());
        // The clock must not show.
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    assert!(made[0] == made[1]);
}

#[tokio::test]
async fn many_pulls_of_an_image_are_one() {
    if !possible() {
        return;
    }
    let (registry, root) = (Registry::start().await, tempfile::tempdir().unwrap());
    registry.image("1", &layers("new"));
    registry.image("2", &layers("new"));
    let store = registry.store(root.path()).await;
    let pulls = (0..8).map(|at| {
        let (store, reference) = (store.clone(), registry.reference(if at % 2 == 0 { "1" } else { "2" }));
        async move { store.pull_image(&reference, &[]).await.unwrap() }
    });
    let ids = futures::future::join_all(pulls).await;
    assert!(ids.iter().all(|id| *id == ids[0]));
    assert_eq!(registry.served.layer_requests.load(Ordering::SeqCst), 2, "each layer once");
    assert_eq!(store.list_images().await.unwrap()[0].tags.len(), 2);
}

#[tokio::test]
async fn what_is_damaged_or_half_made_is_dropped_at_the_next_start() {
    if !possible() {
        return;
    }
    let registry = Registry::start().await;
    registry.image("1", &layers("new"));
    let damages: [fn(&Path); 5] = [
        |image| fs::write(image.join("record.json"), "{").unwrap(),
        |image| fs::remove_file(image.join("record.json")).unwrap(),
        |image| fs::remove_file(image.join("rootfs.erofs")).unwrap(),
        |image| fs::write(image.join("rootfs.erofs"), [0; 4096]).unwrap(),
        |image| fs::rename(image, image.with_file_name("0".repeat(64))).unwrap(),
    ];
    for damage in damages {
        let root = tempfile::tempdir().unwrap();
        let store = registry.store(root.path()).await;
        let id = store.pull_image(&registry.reference("1"), &[]).await.unwrap();
        drop(store);
        damage(&root.path().join("images").join(id.as_str().trim_start_matches("sha256:")));
        fs::create_dir_all(root.path().join("tmp/left/tree/deep")).unwrap();
        fs::write(root.path().join("names/stray.json"), "{}").unwrap();
        let store = registry.store(root.path()).await;
        assert_eq!(files(root.path()), Vec::<String>::new());
        assert_eq!(store.image_status(&registry.reference("1")).await.unwrap(), None);
        assert_eq!(store.pull_image(&registry.reference("1"), &[]).await.unwrap(), id);
        store.block(&id).await.unwrap();
    }
}

#[tokio::test]
async fn an_image_in_use_stays_and_a_removed_one_leaves_nothing() {
    if !possible() {
        return;
    }
    let (registry, root) = (Registry::start().await, tempfile::tempdir().unwrap());
    registry.image("1", &layers("new"));
    let store = registry.store(root.path()).await;
    let id = store.pull_image(&registry.reference("1"), &[]).await.unwrap();
    let blocks = (store.block(&id).await.unwrap(), store.block(&id).await.unwrap());
    for block in [blocks.0, blocks.1] {
        let error = store.remove_image(&id).await.unwrap_err();
        assert_eq!(error.kind(), Kind::AlreadyExists, "{error}");
        drop(block);
    }
    for _ in 0..2 {
        store.remove_image(&id).await.unwrap();
        assert_eq!(store.image_status(&registry.reference("1")).await.unwrap(), None);
        assert_eq!(store.block(&id).await.unwrap_err().kind(), Kind::NotFound);
    }
    swept(root.path()).await;
    assert_eq!(files(root.path()), Vec::<String>::new());
    assert_eq!(store.image_fs_info().await.unwrap().used, Some(0));
}

#[tokio::test]
async fn a_tag_means_what_was_pulled_last() {
    if !possible() {
        return;
    }
    let (registry, root) = (Registry::start().await, tempfile::tempdir().unwrap());
    let (old, _) = registry.image("1", &layers("old"));
    let store = registry.store(root.path()).await;
    store.pull_image(&registry.reference("1"), &[]).await.unwrap();
    let (new, _) = registry.image("1", &layers("new"));
    store.pull_image(&registry.reference("1"), &[]).await.unwrap();
    for store in [&store, &registry.store(root.path()).await] {
        assert_eq!(store.image_status(&registry.reference("1")).await.unwrap().unwrap().id, new);
        let image = store.image_status(old.as_str()).await.unwrap().unwrap();
        assert_eq!((image.tags.len(), image.digests.len()), (0, 1));
    }
}

#[tokio::test]
async fn this_platforms_image_is_taken_from_an_index() {
    if !possible() {
        return;
    }
    let (registry, root) = (Registry::start().await, tempfile::tempdir().unwrap());
    let (_, other) = registry.image("other", &layers("other"));
    let (id, own) = registry.image("own", &layers("own"));
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let entry = |digest: &str, architecture: &str| {
        serde_json::json!({ "mediaType": MANIFEST, "digest": digest, "size": 1,
            "platform": { "architecture": architecture, "os": "linux" } })
    };
    let index = |entries: Vec<serde_json::Value>| {
        serde_json::json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries }).to_string().into_bytes()
    };
    registry.put("/v2/app/manifests/all", index(vec![entry(&other, "s390x"), entry(&own, architecture)]), INDEX);
    registry.put("/v2/app/manifests/none", index(vec![entry(&other, "s390x")]), INDEX);
    let store = registry.store(root.path()).await;
    assert_eq!(store.pull_image(&registry.reference("all"), &[]).await.unwrap(), id);
    // Both digests are names of it.
    assert_eq!(store.image_status(id.as_str()).await.unwrap().unwrap().digests.len(), 2);
    let error = store.pull_image(&registry.reference("none"), &[]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{}", chain(&error));
}

#[tokio::test]
async fn what_is_not_what_its_digest_says_is_refused_and_leaves_nothing() {
    if !possible() {
        return;
    }
    let (registry, root) = (Registry::start().await, tempfile::tempdir().unwrap());
    let [lower, upper] = layers("new");
    let blob = format!("/v2/app/blobs/{}", digest_of(&upper));
    let store = registry.store(root.path()).await;
    let mut longer = upper.clone();
    longer.resize(upper.len() + 512, 0);
    let mut other = upper.clone();
    other[600] ^= 1;
    for wrong in [longer, other, upper[..upper.len() - 512].to_vec()] {
        registry.image("1", &[lower.clone(), upper.clone()]);
        registry.put(&blob, wrong, "application/octet-stream");
        store.pull_image(&registry.reference("1"), &[]).await.unwrap_err();
    }
    // Each layer is as its manifest says; the config names others.
    let hostile = Layer::default().file("../escape", "x").tar();
    registry.image("2", &[hostile]);
    let error = store.pull_image(&registry.reference("2"), &[]).await.unwrap_err();
    assert!(chain(&error).to_string().contains("leads out"), "{}", chain(&error));
    let absent = store.pull_image(&registry.reference("absent"), &[]).await.unwrap_err();
    assert_eq!(absent.kind(), Kind::NotFound);
    swept(root.path()).await;
    assert_eq!(files(root.path()), Vec::<String>::new());
}

#[tokio::test]
async fn what_exceeds_a_limit_is_refused_with_the_figure() {
    if !possible() {
        return;
    }
    let registry = Registry::start().await;
    registry.image("1", &layers("new"));
    for (limits, word) in [
        (Limits { layers: 1, ..Limits::default() }, "2 layers"),
        (Limits { compressed: 100, ..Limits::default() }, "at most 100"),
        (Limits { config: 10, ..Limits::default() }, "at most 10"),
        (Limits { entries: 2, ..Limits::default() }, "more than 2 files"),
    ] {
        let root = tempfile::tempdir().unwrap();
        let options = Options { limits, ..registry.options() };
        let store = Store::open(root.path(), options).await.unwrap();
        let error = store.pull_image(&registry.reference("1"), &[]).await.unwrap_err();
        assert!(chain(&error).to_string().contains(word), "{}", chain(&error));
        assert_eq!(error.kind(), Kind::Internal);
    }
}

#[tokio::test]
async fn a_pull_that_nobody_waits_for_leaves_nothing_and_the_next_succeeds() {
    if !possible() {
        return;
    }
    let (registry, root) = (Registry::start().await, tempfile::tempdir().unwrap());
    let (id, _) = registry.image("1", &layers("new"));
    let store = registry.store(root.path()).await;
    registry.served.stuck.store(true, Ordering::SeqCst);
    let reference = registry.reference("1");
    {
        let mut pull = std::pin::pin!(store.pull_image(&reference, &[]));
        let begun = Instant::now();
        while registry.served.layer_requests.load(Ordering::SeqCst) == 0 {
            assert!(tokio::time::timeout(Duration::from_millis(5), &mut pull).await.is_err());
            assert!(begun.elapsed() < PATIENCE);
        }
    }
    swept(root.path()).await;
    assert_eq!(files(root.path()), Vec::<String>::new());
    registry.served.stuck.store(false, Ordering::SeqCst);
    assert_eq!(store.pull_image(&reference, &[]).await.unwrap(), id);
}

#[tokio::test]
async fn a_missing_tool_is_told_with_what_to_install() {
    let root = tempfile::tempdir().unwrap();
    for mkfs in ["no-such-mkfs", "/no/such/mkfs", "/etc/passwd", "/etc"] {
        let options = Options { mkfs: mkfs.into(), ..Options::default() };
        let error = Store::open(root.path(), options).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains("erofs-utils"), "{error}");
    }
}

#[test]
fn names_are_shown_as_people_write_them() {
    for (name, shown) in [
        ("docker.io/library/busybox:1", "busybox:1"),
        ("docker.io/user/app:1", "user/app:1"),
        ("quay.io/library/app:1", "quay.io/library/app:1"),
        ("localhost:5000/library/a:1", "localhost:5000/library/a:1"),
    ] {
        assert_eq!(familiar(name), shown);
    }
}
