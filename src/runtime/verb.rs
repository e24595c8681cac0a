//! The verbs of the seam by name: for metrics, logs and the fake's fault knobs.

use prometheus_client::encoding::{EncodeLabelValue, LabelValueEncoder};

macro_rules! verbs {
    ($($variant:ident => $name:literal,)*) => {
        /// One verb of [`SandboxRuntime`](super::SandboxRuntime) or [`ImageStore`](super::ImageStore).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Verb {
            $(#[doc = concat!("`", $name, "`")] $variant,)*
        }

        impl Verb {
            /// Every verb.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The method's name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

verbs! {
    Version => "version",
    Ready => "ready",
    RunPodSandbox => "run_pod_sandbox",
    StopPodSandbox => "stop_pod_sandbox",
    RemovePodSandbox => "remove_pod_sandbox",
    PodSandboxStatus => "pod_sandbox_status",
    ListPodSandboxes => "list_pod_sandboxes",
    CreateContainer => "create_container",
    StartContainer => "start_container",
    StopContainer => "stop_container",
    RemoveContainer => "remove_container",
    ListContainers => "list_containers",
    ContainerStatus => "container_status",
    Logs => "logs",
    Exec => "exec",
    Attach => "attach",
    PortForward => "port_forward",
    PauseContainer => "pause_container",
    UnpauseContainer => "unpause_container",
    UpdateContainerResources => "update_container_resources",
    UpdatePodSandboxResources => "update_pod_sandbox_resources",
    ListPodSandboxStats => "list_pod_sandbox_stats",
    Events => "events",
    PullImage => "pull_image",
    ImageStatus => "image_status",
    ListImages => "list_images",
    ImageFsInfo => "image_fs_info",
    UnpackImage => "unpack_image",
    RemoveImage => "remove_image",
}

impl EncodeLabelValue for Verb {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        self.name().encode(encoder)
    }
}
