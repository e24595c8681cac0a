//! Who runs the Pod: what its class, its annotation and the node say, and what follows where nobody does.

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use super::Worker;
use crate::pod::drivers::Unfit;
use crate::pod::status::Trouble;
use crate::pod::{guest, qos, unsupported};
use crate::runtime::types::{Resources, SandboxConfig};

impl Worker {
    /// The handler of the Pod's containers.
    pub(super) async fn handler(&self, spec: &PodSpec) -> Result<String, Unfit> {
        let class = self.class(spec).await?;
        self.shared.drivers.choose(&self.pod, spec, class.as_deref())
    }

    /// The handler that the Pod's RuntimeClass names, if it has one.
    async fn class(&self, spec: &PodSpec) -> Result<Option<String>, Unfit> {
        Ok(match spec.runtime_class_name.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => Some(self.shared.classes.handler(name).await.map_err(Unfit::NotYet)?),
            None => None,
        })
    }

    async fn admitted(&self, spec: &PodSpec) -> Result<(), Unfit> {
        let class = self.class(spec).await?;
        self.shared.drivers.admit(&self.pod, spec, class.as_deref())
    }

    /// Whether the containers of the Pod run in microVMs.
    pub(super) async fn is_in_guests(&self, pod: &Pod) -> bool {
        let Some(spec) = &pod.spec else { return false };
        self.handler(spec).await.is_ok_and(|handler| self.shared.drivers.is_guest(&handler))
    }

    /// Why this node will never run the Pod, if so. A class that cannot be looked up now is no reason: that is told when
    /// the sandbox is to be made, and tried again.
    pub(super) async fn refusal(&self, spec: &PodSpec) -> Option<Trouble> {
        match unsupported::refusal(&self.pod, spec) {
            Some(trouble) => Some(trouble),
            None => match self.admitted(spec).await {
                Err(Unfit::Refused(trouble)) => Some(trouble),
                Ok(()) | Err(Unfit::NotYet(_)) => None,
            },
        }
    }

    /// Says in the sandbox's configuration who is to make it. The front of a function listens in a network namespace of
    /// this host; the function itself runs where the Pod says.
    pub(super) fn assign(&self, config: &mut SandboxConfig, spec: &PodSpec, handler: &str) {
        let drivers = &self.shared.drivers;
        let maker = if self.function.is_some() { drivers.front().unwrap_or(handler) } else { handler };
        config.handler = drivers.told(maker);
        if drivers.is_guest(maker) {
            // What could not be is refused by now.
            config.machine = guest::files(&self.pod).unwrap_or_default();
        }
        if drivers.is_guest(maker) && self.seat.is_none() {
            // The overhead of its class is for what is around the guest, which the driver adds.
            let bare = PodSpec { overhead: None, ..spec.clone() };
            let pids_limit = config.resources.pids_limit;
            config.resources = Resources { pids_limit, ..qos::pod_resources(&bare, self.shared.host.cpu_quota) };
        }
    }

    /// There is no driver for the Pod, now or ever.
    pub(super) fn without_driver(&mut self, unfit: Unfit) {
        match unfit {
            Unfit::NotYet(text) => {
                self.hold_pod("FailedCreatePodSandBox", format!("Failed to create pod sandbox: {text}"));
            }
            Unfit::Refused(trouble) => {
                let Trouble { reason, message } = trouble;
                self.shared.events.warning(&self.pod, None, &reason, message.clone());
                self.memory.ended = Some(Trouble::new(reason, format!("Pod was rejected: {message}")));
            }
        }
    }
}
