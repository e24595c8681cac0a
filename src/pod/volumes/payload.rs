//! What goes into a volume made of files: from the objects it names to paths and bytes. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, Secret};

use crate::pod::PodContext;
use crate::pod::inputs::downward;

/// Permissions of a file for which neither the volume nor the item says any.
pub(super) const DEFAULT_MODE: i32 = 0o644;
/// Longest path of a file in a volume, as in the API's validation.
const LONGEST_PATH: usize = 4096;

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileContent {
    pub(super) bytes: Vec<u8>,
    /// Permission bits.
    pub(super) mode: u32,
    /// Its owner, if not root.
    pub(super) user: Option<u32>,
}

/// The files of a volume by relative path.
pub(super) type Payload = BTreeMap<String, FileContent>;

/// How the keys of an object become files.
pub(super) struct Selection<'a> {
    /// Which keys, where to; all under their own names if absent.
    pub(super) items: Option<&'a [KeyToPath]>,
    /// The volume's `defaultMode`.
    pub(super) mode: i32,
    /// The volume's `defaultUser`.
    pub(super) user: Option<i64>,
    /// Whether a missing key is passed over.
    pub(super) optional: bool,
}

/// The files of a ConfigMap (`None`: it does not exist).
pub(super) fn of_config_map(
    name: &str,
    object: Option<&ConfigMap>,
    selection: &Selection<'_>,
) -> Result<Payload, String> {
    let Some(object) = object else { return missing("configmap", name, selection) };
    let text = object.data.iter().flatten().map(|(key, value)| (key.as_str(), value.as_bytes()));
    let binary = object.binary_data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
    select("configmap references non-existent config key", &text.chain(binary).collect(), selection)
}

/// The files of a Secret (`None`: it does not exist).
pub(super) fn of_secret(name: &str, object: Option<&Secret>, selection: &Selection<'_>) -> Result<Payload, String> {
    let Some(object) = object else { return missing("secret", name, selection) };
    let data = object.data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
    select("references non-existent secret key", &data.collect(), selection)
}

/// The files of a downward API volume.
pub(super) fn of_downward(
    ctx: &PodContext<'_>,
    items: &[DownwardAPIVolumeFile],
    mode: i32,
    user: Option<i64>,
) -> Result<Payload, String> {
    let mut payload = Payload::new();
    for item in items {
        let text = match (&item.field_ref, &item.resource_field_ref) {
            (Some(selector), _) => downward::field(ctx, &selector.field_path)?,
            (None, Some(selector)) => downward::resource(ctx, None, selector)?,
            (None, None) => return Err(format!("file {:?} names no field", item.path)),
        };
        let file = file(text.into_bytes(), item.mode.unwrap_or(mode), item.user.or(user))?;
        payload.insert(checked_path(&item.path)?, file);
    }
    Ok(payload)
}

/// One file, its mode and owner checked.
pub(super) fn file(bytes: Vec<u8>, mode: i32, user: Option<i64>) -> Result<FileContent, String> {
    let mode = u32::try_from(mode).ok().filter(|mode| *mode <= 0o777).ok_or_else(|| format!("invalid mode {mode}"))?;
    let user = user.map(u32::try_from).transpose().map_err(|_| format!("invalid user {user:?}"))?;
    Ok(FileContent { bytes, mode, user })
}

/// A path that stays inside the volume and clear of the writer's own names, which begin with two dots.
pub(super) fn checked_path(path: &str) -> Result<String, String> {
    if path.is_empty() || path.len() > LONGEST_PATH || path.contains('\0') {
        return Err(format!("invalid path {path:?}: it must have 1 to {LONGEST_PATH} bytes"));
    }
    if path.starts_with('/') {
        return Err(format!("invalid path {path:?}: it must be relative"));
    }
    if path.starts_with("..") || path.split('/').any(|part| part == "..") {
        return Err(format!("invalid path {path:?}: it must not contain or begin with \"..\""));
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.is_empty() {
        return Err(format!("invalid path {path:?}: it names no file"));
    }
    // "./..data" begins with a dot and a slash only.
    if parts[0].starts_with("..") {
        return Err(format!("invalid path {path:?}: it must not contain or begin with \"..\""));
    }
    Ok(parts.join("/"))
}

/// Whether every path can be a file: none is another's directory.
pub(super) fn check_conflicts(payload: &Payload) -> Result<(), String> {
    for path in payload.keys() {
        let mut ancestors = path.match_indices('/').map(|(end, _)| &path[..end]);
        if let Some(file) = ancestors.find(|directory| payload.contains_key(*directory)) {
            return Err(format!("path {path:?} lies below the file {file:?}"));
        }
    }
    Ok(())
}

/// The user that a token belongs to: the one that every container runs as, if there is one.
pub(super) fn token_user(pod: &Pod) -> Option<i64> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut users = containers
        .map(|container| container.security_context.as_ref().and_then(|context| context.run_as_user).or(of_pod));
    let first = users.next()??;
    users.all(|user| user == Some(first)).then_some(first)
}

fn missing(kind: &str, name: &str, selection: &Selection<'_>) -> Result<Payload, String> {
    if selection.optional { Ok(Payload::new()) } else { Err(format!("{kind} {name:?} not found")) }
}

fn select(absent: &str, data: &BTreeMap<&str, &[u8]>, selection: &Selection<'_>) -> Result<Payload, String> {
    let mut payload = Payload::new();
    let Some(items) = selection.items.filter(|items| !items.is_empty()) else {
        for (key, bytes) in data {
            payload.insert(checked_path(key)?, file(bytes.to_vec(), selection.mode, selection.user)?);
        }
        return Ok(payload);
    };
    for item in items {
        match data.get(item.key.as_str()) {
            Some(bytes) => {
                let file = file(bytes.to_vec(), item.mode.unwrap_or(selection.mode), selection.user)?;
                payload.insert(checked_path(&item.path)?, file);
            }
            None if selection.optional => {}
            None => return Err(format!("{absent}: {}", item.key)),
        }
    }
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn config_map() -> ConfigMap {
        serde_json::from_value(json!({"data": {"a": "1", "b": "2"}, "binaryData": {"c": "AP8="}})).unwrap()
    }

    fn selection(items: Option<&[KeyToPath]>, optional: bool) -> Selection<'_> {
        Selection { items, mode: 0o640, user: None, optional }
    }

    #[test]
    fn all_keys_without_items_and_only_the_named_ones_with() {
        let all = of_config_map("m", Some(&config_map()), &selection(None, false)).unwrap();
        assert_eq!(all.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(all["c"].bytes, [0, 255]);
        assert_eq!(all["a"].mode, 0o640);
        let items: Vec<KeyToPath> = serde_json::from_value(json!([{"key": "b", "path": "x/y", "mode": 256}])).unwrap();
        let some = of_config_map("m", Some(&config_map()), &selection(Some(&items), false)).unwrap();
        assert_eq!(some.keys().collect::<Vec<_>>(), ["x/y"]);
        assert_eq!(some["x/y"].mode, 0o400);
    }

    #[test]
    fn what_is_missing_is_named_unless_optional() {
        let items: Vec<KeyToPath> = serde_json::from_value(json!([{"key": "y", "path": "y"}])).unwrap();
        let error = of_config_map("m", Some(&config_map()), &selection(Some(&items), false)).unwrap_err();
        assert_eq!(error, "configmap references non-existent config key: y");
        assert!(of_config_map("m", Some(&config_map()), &selection(Some(&items), true)).unwrap().is_empty());
        assert_eq!(of_config_map("m", None, &selection(None, false)).unwrap_err(), "configmap \"m\" not found");
        assert_eq!(of_secret("s", None, &selection(None, false)).unwrap_err(), "secret \"s\" not found");
        assert!(of_secret("s", None, &selection(None, true)).unwrap().is_empty());
        let error = of_secret("s", Some(&Secret::default()), &selection(Some(&items), false)).unwrap_err();
        assert_eq!(error, "references non-existent secret key: y");
    }

    #[test]
    fn paths_that_leave_the_volume_are_refused() {
        for bad in ["", "/etc/passwd", "..", "../x", "a/../b", "a/..", "..data", "./..data", ".", "./", "a\0b"] {
            assert!(checked_path(bad).is_err(), "{bad:?}");
        }
        assert!(checked_path(&"a/".repeat(3000)).is_err());
        assert_eq!(checked_path("a//b/./c").unwrap(), "a/b/c");
        assert_eq!(checked_path("a..b/c..").unwrap(), "a..b/c..");
    }

    #[test]
    fn a_file_cannot_be_a_directory_too() {
        let file = file(vec![], 0o644, None).unwrap();
        let payload = Payload::from([("a".to_owned(), file.clone()), ("a/b".to_owned(), file.clone())]);
        assert!(check_conflicts(&payload).unwrap_err().contains("a/b"));
        let payload = Payload::from([("a-b".to_owned(), file.clone()), ("a/b".to_owned(), file)]);
        assert!(check_conflicts(&payload).is_ok());
    }

    #[test]
    fn a_token_belongs_to_the_one_user_of_all_containers() {
        let pod = |value| serde_json::from_value::<Pod>(json!({"spec": value})).unwrap();
        let user = |user| json!({"name": "c", "securityContext": {"runAsUser": user}});
        assert_eq!(token_user(&pod(json!({"containers": [user(7), user(7)]}))), Some(7));
        assert_eq!(token_user(&pod(json!({"containers": [user(7), user(8)]}))), None);
        assert_eq!(token_user(&pod(json!({"containers": [user(7), {"name": "d"}]}))), None);
        let inherited =
            json!({"securityContext": {"runAsUser": 9}, "containers": [{"name": "d"}], "initContainers": [user(9)]});
        assert_eq!(token_user(&pod(inherited)), Some(9));
    }

    proptest! {
        #[test]
        fn a_checked_path_never_leaves(path in "[a.~/ ]{0,12}") {
            if let Ok(checked) = checked_path(&path) {
                prop_assert!(!checked.starts_with('/') && !checked.starts_with(".."));
                prop_assert!(checked.split('/').all(|part| !part.is_empty() && part != "." && part != ".."));
            }
        }
    }
}
