//! What an image's config says, as far as it matters here ("Image Configuration" of the OCI image specification).

use std::collections::BTreeMap;

use serde::Deserialize;

/// How a container of an image runs if nothing else is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// USER, as written (`1000`, `1000:1000`, `www-data`, or empty for root).
    pub user: String,
    /// ENTRYPOINT.
    pub entrypoint: Vec<String>,
    /// CMD.
    pub cmd: Vec<String>,
    /// ENV, as `NAME=value`.
    pub env: Vec<String>,
    /// WORKDIR; empty for `/`.
    pub working_dir: String,
    /// STOPSIGNAL (`SIGTERM` or a number); empty for SIGTERM.
    pub stop_signal: String,
    /// VOLUME: directories that the image wants to be writable and its own.
    pub volumes: Vec<String>,
}

/// The whole file.
#[derive(Debug, Deserialize)]
struct File {
    config: Option<Settings>,
    rootfs: Rootfs,
}

#[derive(Debug, Deserialize)]
struct Rootfs {
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

/// Docker writes null for what is empty.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Settings {
    user: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
}

/// A config that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) image: ImageConfig,
    /// Digests of the layers' content, the lowest first.
    pub(super) diff_ids: Vec<String>,
}

/// Reads a config.
///
/// # Errors
/// It is no config of an image.
pub(super) fn read(bytes: &[u8]) -> Result<Read, serde_json::Error> {
    let file: File = serde_json::from_slice(bytes)?;
    let settings = file.config.unwrap_or_default();
    let image = ImageConfig {
        user: settings.user.unwrap_or_default(),
        entrypoint: settings.entrypoint.unwrap_or_default(),
        cmd: settings.cmd.unwrap_or_default(),
        env: settings.env.unwrap_or_default(),
        working_dir: settings.working_dir.unwrap_or_default(),
        stop_signal: settings.stop_signal.unwrap_or_default(),
        volumes: settings.volumes.unwrap_or_default().into_keys().collect(),
    };
    Ok(Read { image, diff_ids: file.rootfs.diff_ids.unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_is_read_with_dockers_nulls_and_without_any_settings() {
        let text = r#"{"architecture":"amd64","config":{"User":"1000:7","Env":["A=b"],"Cmd":null,
            "Entrypoint":["/e","x"],"WorkingDir":"/w","StopSignal":"SIGINT","Volumes":{"/v":{}},"Labels":null},
            "rootfs":{"type":"layers","diff_ids":["sha256:1","sha256:2"]}}"#;
        let read = read(text.as_bytes()).unwrap();
        assert_eq!(read.diff_ids, ["sha256:1", "sha256:2"]);
        let wanted = ImageConfig {
            user: "1000:7".into(),
            entrypoint: vec!["/e".into(), "x".into()],
            cmd: Vec::new(),
            env: vec!["A=b".into()],
            working_dir: "/w".into(),
            stop_signal: "SIGINT".into(),
            volumes: vec!["/v".into()],
        };
        assert_eq!(read.image, wanted);
        let bare = super::read(br#"{"rootfs":{}}"#).unwrap();
        assert_eq!((bare.image, bare.diff_ids.len()), (ImageConfig::default(), 0));
        for none in ["", "{}", "[]", r#"{"rootfs":{"diff_ids":[1]}}"#] {
            assert!(super::read(none.as_bytes()).is_err(), "{none}");
        }
    }
}
