//! Volumes that a PersistentVolumeClaim stands for, where the volume behind it is a directory of this host: types
//! `local` and `hostPath`. Everything else needs a driver that this node does not have, and is refused by its type.

use std::fmt::Debug;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::{HostPathVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod, Volume};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::projection::first_field;
use super::{MountedVolume, VolumeError, VolumeManager, blocking, group, host, host_error, refused};
use crate::pod::PodContext;

/// Longest wait for one answer of the API server.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// A directory of this host that a claim is bound to.
#[derive(Debug, PartialEq)]
enum Bound {
    /// A `local` volume: it is there, and belongs to the Pod's fsGroup.
    Local(PathBuf),
    /// A `hostPath` volume: checked and made as in a Pod.
    HostPath(HostPathVolumeSource),
}

impl VolumeManager {
    /// The volume that a claim is bound to; `None` for a volume that is no claim. Needs the right to `get` claims and
    /// volumes.
    ///
    /// # Errors
    /// The claim or its volume is missing, not bound to the other, or of a type that this node does not have.
    pub(super) async fn claimed(
        &self,
        ctx: PodContext<'_>,
        volume: &Volume,
    ) -> Result<Option<MountedVolume>, VolumeError> {
        let Some((name, read_only)) = claim_of(ctx.pod, volume) else { return Ok(None) };
        let namespace = ctx.pod.metadata.namespace.as_deref().unwrap_or("default");
        let claims = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), namespace);
        let claim = get(claims, &name, volume).await?;
        let refuse = |message| refused(volume, format!("error processing PVC {namespace}/{name}: {message}"));
        let on = volume_of(ctx.pod, volume, &claim).map_err(refuse)?;
        let found = get(Api::<PersistentVolume>::all(self.client.clone()), on, volume).await?;
        let host_path = match directory_of(&claim, &found).map_err(refuse)? {
            Ok(Bound::HostPath(source)) => {
                let path = PathBuf::from(&source.path);
                let checked = blocking(move || Ok(host::host_path(&source))).await?;
                checked.map_err(|message| refused(volume, message))?;
                path
            }
            Ok(Bound::Local(path)) => {
                if !path.is_dir() {
                    return Err(refused(
                        volume,
                        format!("local volume {} is no directory of this node", path.display()),
                    ));
                }
                let (group, directory) = (group(ctx.pod).filter(|_| !read_only), path.clone());
                blocking(move || {
                    let owned = group.map_or(Ok(()), |group| host::own_tree(&directory, group));
                    owned.map_err(|source| host_error("give to the Pod's group", &directory, source))
                })
                .await?;
                path
            }
            Err(kind) => {
                let kind = format!("persistentVolumeClaim, bound to {on:?} of type {kind}");
                return Err(VolumeError::Unsupported { volume: volume.name.clone(), kind });
            }
        };
        Ok(Some(MountedVolume { host_path, read_only }))
    }
}

/// The claim's name, and whether the Pod only reads.
fn claim_of(pod: &Pod, volume: &Volume) -> Option<(String, bool)> {
    if let Some(claim) = &volume.persistent_volume_claim {
        return Some((claim.claim_name.clone(), claim.read_only == Some(true)));
    }
    // A controller makes one of this name for the Pod.
    let pod = pod.metadata.name.as_deref().unwrap_or_default();
    volume.ephemeral.as_ref().map(|_| (format!("{pod}-{}", volume.name), false))
}

/// The name of the PersistentVolume.
fn volume_of<'a>(pod: &Pod, volume: &Volume, claim: &'a PersistentVolumeClaim) -> Result<&'a str, String> {
    if volume.ephemeral.is_some() {
        let owners = claim.metadata.owner_references.iter().flatten();
        let mut owners = owners.filter(|owner| owner.controller == Some(true));
        if !owners.any(|owner| Some(&owner.uid) == pod.metadata.uid.as_ref()) {
            return Err("it was not created for the pod".to_owned());
        }
    }
    if claim.metadata.deletion_timestamp.is_some() {
        return Err("PVC is being deleted".to_owned());
    }
    let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
    let on = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).filter(|name| !name.is_empty());
    on.filter(|_| phase == Some("Bound")).ok_or_else(|| "PVC is not bound".to_owned())
}

/// Where the volume is; or its type, if that is not for this node.
fn directory_of(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Result<Result<Bound, String>, String> {
    let name = volume.metadata.name.as_deref().unwrap_or_default();
    let spec = volume.spec.as_ref().ok_or_else(|| format!("PV {name:?} has no spec"))?;
    let bound_to = spec.claim_ref.as_ref().and_then(|claim| claim.uid.as_ref());
    if bound_to.is_none() || bound_to != claim.metadata.uid.as_ref() {
        return Err(format!("PV {name:?} is bound to another claim"));
    }
    if spec.volume_mode.as_deref() == Some("Block") {
        return Ok(Err("block device".to_owned()));
    }
    if let Some(local) = &spec.local {
        return Ok(Ok(Bound::Local(PathBuf::from(&local.path))));
    }
    if let Some(source) = &spec.host_path {
        return Ok(Ok(Bound::HostPath(source.clone())));
    }
    if let Some(csi) = &spec.csi {
        return Ok(Err(format!("csi with driver {}", csi.driver)));
    }
    let described = [
        "accessModes",
        "capacity",
        "claimRef",
        "mountOptions",
        "nodeAffinity",
        "persistentVolumeReclaimPolicy",
        "storageClassName",
        "volumeAttributesClassName",
        "volumeMode",
    ];
    Ok(Err(first_field(spec, &described)))
}

async fn get<K>(api: Api<K>, name: &str, volume: &Volume) -> Result<K, VolumeError>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
{
    let answer = timeout(REQUEST_TIMEOUT, api.get(name)).await;
    answer.unwrap_or_else(|elapsed| Err(kube::Error::Service(elapsed.into()))).map_err(|source| VolumeError::Claim {
        volume: volume.name.clone(),
        what: format!("{} {name:?}", K::kind(&())),
        source: Box::new(source),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claim(phase: &str) -> PersistentVolumeClaim {
        serde_json::from_value(json!({
            "metadata": {"name": "c", "uid": "claim-1"},
            "spec": {"volumeName": "pv-1"}, "status": {"phase": phase},
        }))
        .unwrap()
    }

    fn on(source: serde_json::Value) -> PersistentVolume {
        let mut volume = json!({"metadata": {"name": "pv-1"}, "spec": {
            "claimRef": {"uid": "claim-1"}, "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}}});
        volume["spec"].as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
        serde_json::from_value(volume).unwrap()
    }

    #[test]
    fn a_claim_leads_to_its_directory_or_names_the_type_that_is_missing() {
        let of = |source| directory_of(&claim("Bound"), &on(source)).unwrap();
        assert_eq!(of(json!({"local": {"path": "/a"}})), Ok(Bound::Local("/a".into())));
        assert!(matches!(of(json!({"hostPath": {"path": "/b"}})), Ok(Bound::HostPath(found)) if found.path == "/b"));
        let csi = of(json!({"csi": {"driver": "ebs.csi.aws.com", "volumeHandle": "v"}})).unwrap_err();
        assert_eq!(csi, "csi with driver ebs.csi.aws.com");
        assert_eq!(of(json!({"nfs": {"server": "s", "path": "/"}})).unwrap_err(), "nfs");
        assert_eq!(of(json!({"volumeMode": "Block", "local": {"path": "/dev/x"}})).unwrap_err(), "block device");
        let mut other = claim("Bound");
        other.metadata.uid = Some("claim-2".to_owned());
        assert!(directory_of(&other, &on(json!({"local": {"path": "/a"}}))).unwrap_err().contains("another claim"));
    }

    #[test]
    fn only_a_bound_claim_counts_and_an_ephemeral_one_must_be_the_pods() {
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "uid": "pod-1"}})).unwrap();
        let volume = |source| serde_json::from_value::<Volume>(source).unwrap();
        let plain = volume(json!({"name": "v", "persistentVolumeClaim": {"claimName": "c", "readOnly": true}}));
        assert_eq!(claim_of(&pod, &plain), Some(("c".to_owned(), true)));
        assert_eq!(volume_of(&pod, &plain, &claim("Bound")), Ok("pv-1"));
        assert_eq!(volume_of(&pod, &plain, &claim("Pending")).unwrap_err(), "PVC is not bound");
        let ephemeral = volume(json!({"name": "v", "ephemeral": {}}));
        assert_eq!(claim_of(&pod, &ephemeral), Some(("p-v".to_owned(), false)));
        assert!(volume_of(&pod, &ephemeral, &claim("Bound")).is_err());
        let owner = json!([{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "pod-1", "controller": true}]);
        let mut own = claim("Bound");
        own.metadata.owner_references = serde_json::from_value(owner).unwrap();
        assert_eq!(volume_of(&pod, &ephemeral, &own), Ok("pv-1"));
    }
}
