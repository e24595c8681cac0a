//! A registry of one image that speaks plain HTTP, in this process.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Response, StatusCode};
use axum::routing::get;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// The registry; it ends when dropped.
pub(crate) struct Registry {
    /// `127.0.0.1:port`.
    pub(crate) host: String,
    pub(crate) manifest_digest: String,
    pub(crate) image_id: String,
    _server: JoinSet<()>,
}

struct Content {
    blobs: HashMap<String, Vec<u8>>,
    manifest: Vec<u8>,
    manifest_digest: String,
    /// The `Authorization` header it wants.
    wanted: Option<String>,
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

impl Registry {
    /// Serves `team/app:1`, whose only file is `note`; to this user only, if one is given.
    pub(crate) async fn start(note: &str, user: Option<(&str, &str)>) -> Self {
        Self::of_file("note", (0o644, note.as_bytes()), user).await
    }

    /// The same with another file, of that mode.
    pub(crate) async fn of_file(name: &str, (mode, bytes): (u32, &[u8]), user: Option<(&str, &str)>) -> Self {
        let mut layer = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(mode);
        layer.append_data(&mut header, name, bytes).unwrap();
        let layer = layer.into_inner().unwrap();
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = serde_json::json!({ "architecture": architecture, "os": "linux",
            "config": { "Cmd": [format!("/{name}")], "User": "1000" },
            "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] } })
        .to_string()
        .into_bytes();
        let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config),
                "size": config.len() },
            "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(&layer),
                "size": layer.len() }] })
        .to_string()
        .into_bytes();
        let (manifest_digest, image_id) = (digest(&manifest), digest(&config));
        let content = Content {
            blobs: [layer, config].map(|blob| (digest(&blob), blob)).into(),
            manifest,
            manifest_digest: manifest_digest.clone(),
            wanted: user.map(|(name, password)| format!("Basic {}", STANDARD.encode(format!("{name}:{password}")))),
        };
        let routes = Router::new()
            .route("/v2/", get(hello))
            .route("/v2/team/app/{kind}/{name}", get(serve))
            .with_state(Arc::new(content));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Self { host, manifest_digest, image_id, _server: server }
    }
}

fn refused(content: &Content, headers: &HeaderMap) -> Option<Response<Body>> {
    let given = headers.get("authorization").and_then(|value| value.to_str().ok());
    if content.wanted.is_none() || given == content.wanted.as_deref() {
        return None;
    }
    let answer = Response::builder().status(StatusCode::UNAUTHORIZED).header("www-authenticate", "Basic realm=\"r\"");
    Some(answer.body(Body::from(r#"{"errors":[{"code":"UNAUTHORIZED","message":"no"}]}"#)).unwrap())
}

async fn hello(State(content): State<Arc<Content>>, headers: HeaderMap) -> Response<Body> {
    refused(&content, &headers).unwrap_or_else(|| Response::new(Body::from("{}")))
}

async fn serve(
    State(content): State<Arc<Content>>,
    Path((kind, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    if let Some(refused) = refused(&content, &headers) {
        return refused;
    }
    let found = match kind.as_str() {
        "manifests" if name == "1" || name == content.manifest_digest => {
            Some((content.manifest.clone(), MANIFEST_TYPE))
        }
        "blobs" => content.blobs.get(&name).map(|blob| (blob.clone(), "application/octet-stream")),
        _ => None,
    };
    match found {
        Some((bytes, media_type)) => Response::builder()
            .header("content-type", media_type)
            .header("docker-content-digest", digest(&bytes))
            .body(Body::from(bytes))
            .unwrap(),
        None => Response::builder()
            .status(StatusCode::NOT_FOUND)
            .body(Body::from(r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such"}]}"#))
            .unwrap(),
    }
}
