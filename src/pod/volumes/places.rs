//! Pure: where the volumes of a Pod are on the host.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;

use super::projection::files_of;
use super::{component, mounted_names, volumes};
use crate::kubelet_api::targets::PodVolume;

/// Below this is what Pods have on disk.
pub(super) fn pods(root: &Path) -> PathBuf {
    root.join("pods")
}

/// The tmpfs for what comes from the API.
pub(super) fn secrets(root: &Path) -> PathBuf {
    root.join("secrets")
}

/// An emptyDir.
pub(super) fn empty_dir(root: &Path, uid: &str, volume: &str) -> PathBuf {
    pods(root).join(uid).join("volumes/kubernetes.io~empty-dir").join(volume)
}

/// A volume made of files.
pub(super) fn files(root: &Path, uid: &str, kind: &str, volume: &str) -> PathBuf {
    secrets(root).join(uid).join(format!("kubernetes.io~{kind}")).join(volume)
}

/// Below a Pod's directory, the links to the images that its volumes show.
pub(super) const IMAGES: &str = "volumes/kubernetes.io~image";

/// The link to the image that a volume shows.
pub(super) fn image(root: &Path, uid: &str, volume: &str) -> PathBuf {
    pods(root).join(uid).join(IMAGES).join(volume)
}

/// A part of a volume, bound for the `at`-th mount of a container; `parts` are the names of volume and container.
pub(super) fn sub_path(root: &Path, uid: &str, [volume, container]: [&str; 2], at: usize) -> PathBuf {
    pods(root).join(uid).join("volume-subpaths").join(volume).join(container).join(at.to_string())
}

/// The volumes of a Pod whose use is told, as by a kubelet: all but host paths, which belong to the host. Nothing says
/// that a directory is there already.
pub fn measured(root: &Path, pod: &Pod) -> Vec<PodVolume> {
    let Some(uid) = pod.metadata.uid.as_deref().and_then(|uid| component(uid).ok()) else { return Vec::new() };
    let mounted = mounted_names(pod);
    let of_pod = volumes(pod).filter(|volume| mounted.contains(volume.name.as_str()) && volume.host_path.is_none());
    of_pod
        .filter_map(|volume| {
            let name = component(&volume.name).ok()?;
            let in_memory = volume.empty_dir.as_ref().is_none_or(|source| source.medium.as_deref() == Some("Memory"));
            let path = match files_of(volume).ok()? {
                Some(made) => files(root, uid, made.kind, name),
                None => empty_dir(root, uid, name),
            };
            Some(PodVolume { name: name.to_owned(), path, on_disk: !in_memory })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn volumes_are_where_the_manager_makes_them_and_host_paths_are_the_hosts() {
        let mount = |name: &str| json!({"name": name, "mountPath": "/m"});
        let mounts: Vec<_> = ["disk", "memory", "config", "host"].map(mount).into();
        let pod = json!({
            "metadata": {"uid": "u1"},
            "spec": {
                "containers": [{"name": "c", "volumeMounts": mounts}],
                "volumes": [
                    {"name": "disk", "emptyDir": {}},
                    {"name": "memory", "emptyDir": {"medium": "Memory"}},
                    {"name": "config", "configMap": {"name": "m"}},
                    {"name": "host", "hostPath": {"path": "/"}},
                    {"name": "unused", "emptyDir": {}},
                ],
            },
        });
        let told = measured(Path::new("/r"), &serde_json::from_value(pod).unwrap());
        let told: Vec<_> = told.iter().map(|v| (v.name.as_str(), v.path.to_str().unwrap(), v.on_disk)).collect();
        let wanted = [
            ("disk", "/r/pods/u1/volumes/kubernetes.io~empty-dir/disk", true),
            ("memory", "/r/pods/u1/volumes/kubernetes.io~empty-dir/memory", false),
            ("config", "/r/secrets/u1/kubernetes.io~configmap/config", false),
        ];
        assert_eq!(told, wanted);
    }
}
