//! Which driver runs a Pod: its RuntimeClass says it, or its annotation, or the node; the first that does. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::guest;
use super::status::Trouble;
use super::unsupported::REASON;
use crate::function::labels;
use crate::runtime::handler::{family, handler_of};
use crate::runtime::types::SandboxId;

/// Chooses a driver for a Pod without a RuntimeClass: `docker` or `microvm`.
pub const RUNTIME_ANNOTATION: &str = "lambdalet.dev/runtime";
/// Chooses what runs a Pod that is a microVM: `auto`, `qemu` or `firecracker`.
pub const VMM_ANNOTATION: &str = "lambdalet.dev/vmm";
/// The handler of the node's microVMs.
pub const MICROVM: &str = "microvm";

/// The drivers of this node.
#[derive(Clone, Debug, Default)]
pub struct Drivers {
    /// The handler of Pods that do not say.
    pub own: String,
    /// The handlers that RuntimeClasses may name.
    pub offered: Vec<String>,
    /// Handlers that this node could have and has not: why, and what to do about it.
    pub missing: BTreeMap<String, String>,
    /// The VMM behind the handler `microvm`.
    pub vmm: String,
    /// What guests can be given.
    pub guests: guest::Bounds,
}

/// A Pod that no driver of this node runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Perhaps later: what an event says about its sandbox.
    NotYet(String),
    /// Never: why.
    Refused(Trouble),
}

impl Drivers {
    /// A node with this one driver.
    pub fn only(handler: &str) -> Self {
        Self { own: handler.to_owned(), offered: vec![handler.to_owned()], ..Self::default() }
    }

    /// The handler of the Pod, where its RuntimeClass, if it has one, names the handler `class`.
    ///
    /// # Errors
    /// [`Unfit`]: the node does not have the handler, or the Pod asks for what the driver cannot give it.
    pub fn choose(&self, pod: &Pod, spec: &PodSpec, class: Option<&str>) -> Result<String, Unfit> {
        let noted = annotation(pod, RUNTIME_ANNOTATION);
        let asked = class.or(noted).unwrap_or(&self.own);
        let handler = match annotation(pod, VMM_ANNOTATION).filter(|_| asked == MICROVM) {
            None | Some("auto") => asked.to_owned(),
            Some(vmm) if vmm == self.vmm => asked.to_owned(),
            Some(vmm @ ("qemu" | "firecracker")) => format!("{MICROVM}-{vmm}"),
            Some(other) => {
                return Err(refused(&format!(
                    "annotation {VMM_ANNOTATION}: {other:?} is none of auto, qemu, firecracker"
                )));
            }
        };
        if !self.offered.contains(&handler) {
            return Err(self.without(&handler, spec, class.is_some()));
        }
        let is_guest = self.is_guest(&handler);
        if let Some(why) = guest::refusal(pod, spec, &self.guests).filter(|_| is_guest) {
            return Err(self.not_a_guest(pod, spec, class, &why));
        }
        if labels::is_function(pod) && self.front().is_none() {
            let text = "it is a function, whose front is a container, and this node has no Docker: start dockerd (Debian: \
                        apt-get install docker.io), then the node again";
            return Err(refused(text));
        }
        Ok(handler)
    }

    /// The same for a Pod that comes now, of which more is asked than of one that is here already.
    ///
    /// # Errors
    /// Those of [`choose`](Self::choose), and of a function what its variables ask of this node in vain.
    pub fn admit(&self, pod: &Pod, spec: &PodSpec, class: Option<&str>) -> Result<(), Unfit> {
        let handler = self.choose(pod, spec, class)?;
        let why = self.is_guest(&handler).then(|| guest::refusal_of_new(pod, spec)).flatten();
        why.map_or(Ok(()), |why| Err(self.not_a_guest(pod, spec, class, &why)))
    }

    fn not_a_guest(&self, pod: &Pod, spec: &PodSpec, class: Option<&str>, why: &str) -> Unfit {
        refused(&format!("it is to run as a microVM ({}), and {why}", self.by(pod, spec, class)))
    }

    /// What the Pod is told where there is no such handler.
    fn without(&self, handler: &str, spec: &PodSpec, by_class: bool) -> Unfit {
        let class = spec.runtime_class_name.as_deref().unwrap_or_default();
        let asked = match by_class {
            true => format!("runtimeClassName {class:?} asks for handler {handler:?}"),
            false => format!("it asks for runtime {handler:?}"),
        };
        if let Some(why) = self.missing.get(handler) {
            return refused(&format!("{asked}, which this node does not have: {why}"));
        }
        let offered = self.offered.join(", ");
        match by_class {
            // As a kubelet passes on what its container runtime says.
            true => Unfit::NotYet(format!(
                "failed to get sandbox runtime: no runtime for {handler:?} is configured (this node has {offered})"
            )),
            false => refused(&format!("{asked}, and this node has {offered}")),
        }
    }

    /// What makes the Pod a microVM.
    fn by(&self, pod: &Pod, spec: &PodSpec, class: Option<&str>) -> String {
        match (class, annotation(pod, RUNTIME_ANNOTATION)) {
            (Some(_), _) => format!("runtimeClassName {}", spec.runtime_class_name.as_deref().unwrap_or_default()),
            (None, Some(noted)) => format!("annotation {RUNTIME_ANNOTATION}: {noted}"),
            (None, None) => "the node's default".to_owned(),
        }
    }

    /// The handler of the sandbox in which a function's front listens: it has to be a network namespace of this host.
    pub fn front(&self) -> Option<&str> {
        let offered = std::iter::once(&self.own).chain(&self.offered).filter(|handler| self.offered.contains(handler));
        offered.map(String::as_str).find(|handler| family(handler) != MICROVM)
    }

    /// Whether a sandbox of that handler is a microVM.
    pub fn is_guest(&self, handler: &str) -> bool {
        family(handler) == MICROVM
    }

    /// Whether this sandbox is one.
    pub fn has_in_guest(&self, sandbox: &SandboxId) -> bool {
        self.is_guest(handler_of(&self.own, sandbox.as_str()))
    }

    /// The handler as the runtime is told it: `None` for the node's own.
    pub fn told(&self, handler: &str) -> Option<String> {
        (handler != self.own).then(|| handler.to_owned())
    }
}

fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    let annotations = pod.metadata.annotations.as_ref()?;
    annotations.get(key).map(String::as_str).filter(|value| !value.is_empty())
}

fn refused(text: &str) -> Unfit {
    Unfit::Refused(Trouble::new(REASON, text))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn both() -> Drivers {
        Drivers {
            own: "docker".into(),
            offered: vec!["docker".into(), "microvm".into()],
            missing: [("microvm-firecracker".to_owned(), "it needs KVM".to_owned())].into(),
            vmm: "qemu".into(),
            guests: guest::Bounds { images: 8, ..guest::Bounds::default() },
        }
    }

    fn choice(drivers: &Drivers, class: Option<&str>, annotations: Value, spec: Value) -> Result<String, Unfit> {
        let mut spec = spec;
        spec["runtimeClassName"] = json!(class.map(|handler| format!("class-{handler}")));
        let pod = json!({"metadata": {"annotations": annotations}, "spec": spec});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        drivers.choose(&pod, pod.spec.as_ref().unwrap(), class)
    }

    fn plain() -> Value {
        json!({"containers": []})
    }

    #[test]
    fn the_class_wins_over_the_annotation_and_that_over_the_node() {
        let noted = |runtime: &str| json!({RUNTIME_ANNOTATION: runtime});
        let microvm = Drivers { own: "microvm".into(), ..both() };
        for (drivers, class, annotations, handler) in [
            (both(), None, json!({}), "docker"),
            (both(), None, noted("microvm"), "microvm"),
            (both(), Some("microvm"), json!({}), "microvm"),
            (both(), Some("docker"), noted("microvm"), "docker"),
            (microvm.clone(), None, json!({}), "microvm"),
            (microvm, None, noted("docker"), "docker"),
        ] {
            let chosen = choice(&drivers, class, annotations.clone(), plain());
            assert_eq!(chosen.as_deref(), Ok(handler), "{class:?} {annotations}");
        }
    }

    #[test]
    fn a_vmm_is_the_nodes_or_a_handler_of_its_own() {
        let vmm = |vmm: &str| choice(&both(), Some("microvm"), json!({VMM_ANNOTATION: vmm}), plain());
        assert_eq!(vmm("auto").as_deref(), Ok("microvm"));
        assert_eq!(vmm("qemu").as_deref(), Ok("microvm"));
        let Err(Unfit::Refused(trouble)) = vmm("firecracker") else { panic!("there is none") };
        assert!(trouble.message.ends_with("which this node does not have: it needs KVM"), "{}", trouble.message);
        assert!(matches!(vmm("xen"), Err(Unfit::Refused(trouble)) if trouble.message.contains("none of auto")));
        let docker = choice(&both(), None, json!({VMM_ANNOTATION: "firecracker"}), plain());
        assert_eq!(docker.as_deref(), Ok("docker"), "it is no microVM");
    }

    #[test]
    fn an_unknown_handler_of_a_class_is_tried_again_and_one_that_is_missing_is_refused() {
        let Err(Unfit::NotYet(text)) = choice(&both(), Some("kata"), json!({}), plain()) else {
            panic!("not tried again")
        };
        assert_eq!(
            text,
            "failed to get sandbox runtime: no runtime for \"kata\" is configured (this node has docker, microvm)"
        );
        let without = Drivers {
            missing: [("microvm".to_owned(), "no guest: get one".to_owned())].into(),
            ..Drivers::only("docker")
        };
        for (class, annotations) in [(Some("microvm"), json!({})), (None, json!({RUNTIME_ANNOTATION: "microvm"}))] {
            let Err(Unfit::Refused(trouble)) = choice(&without, class, annotations, plain()) else { panic!("taken") };
            assert!(trouble.message.ends_with("does not have: no guest: get one"), "{}", trouble.message);
        }
        let noted = choice(&both(), None, json!({RUNTIME_ANNOTATION: "kata"}), plain());
        assert!(matches!(noted, Err(Unfit::Refused(trouble)) if trouble.message.ends_with("has docker, microvm")));
    }

    #[test]
    fn what_only_a_guest_cannot_have_is_refused_for_guests() {
        let on_host = json!({"containers": [], "hostPID": true});
        assert_eq!(choice(&both(), None, json!({}), on_host.clone()).as_deref(), Ok("docker"));
        let Err(Unfit::Refused(trouble)) = choice(&both(), Some("microvm"), json!({}), on_host) else {
            panic!("taken")
        };
        assert!(trouble.message.contains("(runtimeClassName class-microvm)"), "{}", trouble.message);
        assert!(trouble.message.contains("hostPID: true"), "{}", trouble.message);
    }

    #[test]
    fn a_functions_surroundings_count_only_when_it_comes() {
        let env = json!([{"name": "IMAGE_STORAGE", "value": "/srv/images"}]);
        let spec = json!({"containers": [{"name": "c", "image": "i", "env": env}]});
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"annotations": {labels::MIN: "0"}}, "spec": spec})).unwrap();
        let spec = pod.spec.as_ref().unwrap();
        let Err(Unfit::Refused(trouble)) = both().admit(&pod, spec, Some(MICROVM)) else { panic!("taken") };
        assert!(trouble.message.contains("IMAGE_STORAGE"), "{}", trouble.message);
        assert_eq!(both().choose(&pod, spec, Some(MICROVM)).as_deref(), Ok(MICROVM), "its next sandbox is made");
        assert_eq!(both().admit(&pod, spec, None), Ok(()), "it is no microVM");
    }

    #[test]
    fn a_functions_front_needs_a_network_namespace_of_the_host() {
        let function = json!({labels::MIN: "0"});
        assert_eq!(both().front(), Some("docker"));
        assert_eq!(choice(&both(), Some("microvm"), function.clone(), plain()).as_deref(), Ok("microvm"));
        let alone = Drivers { own: "microvm".into(), offered: vec!["microvm".into()], ..both() };
        assert_eq!(alone.front(), None);
        assert!(
            matches!(choice(&alone, None, function, plain()), Err(Unfit::Refused(trouble)) if trouble.message.contains("docker.io"))
        );
    }

    #[test]
    fn sandboxes_are_known_by_their_ids() {
        let microvm = Drivers { own: "microvm".into(), ..both() };
        assert!(both().has_in_guest(&"microvm.a".into()) && !both().has_in_guest(&"a".into()));
        assert!(microvm.has_in_guest(&"a".into()) && !microvm.has_in_guest(&"docker.a".into()));
        assert_eq!((both().told("docker"), both().told("microvm")), (None, Some("microvm".to_owned())));
    }
}
