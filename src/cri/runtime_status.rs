//! Whether sandboxes can be run, and what the runtime can do.

use std::collections::HashMap;

use lambdalet_proto::cri::v1;

use super::core::Core;
use crate::telemetry::chain;

/// Of which nothing is promised: no other users in a sandbox, no mount that is read-only all the way down.
const FEATURES: v1::RuntimeHandlerFeatures =
    v1::RuntimeHandlerFeatures { recursive_read_only_mounts: false, user_namespaces: false };

fn condition(kind: &str, trouble: Option<(&str, String)>) -> v1::RuntimeCondition {
    let status = trouble.is_none();
    let (reason, message) = trouble.unwrap_or_default();
    v1::RuntimeCondition { r#type: kind.to_owned(), status, reason: reason.to_owned(), message }
}

/// The answer of `Status`.
pub(super) async fn status(core: &Core, verbose: bool) -> v1::StatusResponse {
    let trouble = match core.adopted().await {
        Ok(()) => core.runtime.ready().await.err().map(|error| chain(&error)),
        Err(error) => Some(error.message().to_owned()),
    };
    let conditions = vec![
        condition("RuntimeReady", trouble.map(|text| ("EngineNotReady", text))),
        condition("NetworkReady", core.network.trouble().map(|text| ("BridgeNotReady", text))),
    ];
    // The one without a name stands for the first.
    let names = std::iter::once("").chain(core.about.handlers.iter().map(String::as_str));
    let handler = |name: &str| v1::RuntimeHandler { name: name.to_owned(), features: Some(FEATURES) };
    v1::StatusResponse {
        status: Some(v1::RuntimeStatus { conditions }),
        info: if verbose { info(core) } else { HashMap::new() },
        runtime_handlers: names.map(handler).collect(),
        features: Some(v1::RuntimeFeatures { supplemental_groups_policy: false, user_namespaces_host_network: false }),
    }
}

fn info(core: &Core) -> HashMap<String, String> {
    let config = serde_json::json!({
        "handlers": core.about.handlers,
        "cgroupRoot": core.about.cgroup_root,
        "podCIDR": core.network.range().to_string(),
        "streamServer": core.streams.to_string(),
    });
    HashMap::from([("config".to_owned(), config.to_string())])
}
