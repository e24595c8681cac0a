//! The CRI runtime of a node that was told to use one.

use std::time::Duration;

use tokio::time::timeout;

use super::Finding;
use crate::runtime::cri::{CriClient, explained};
use crate::telemetry::chain;

/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reachable, of the right version, and ready to run Pods.
pub(super) async fn examine(endpoint: &str) -> Vec<Finding> {
    let remedy = "start the runtime, and pass its socket as --container-runtime-endpoint";
    let (client, version) = match timeout(PATIENCE, CriClient::connect(endpoint)).await {
        Ok(Ok(connected)) => connected,
        Ok(Err(error)) => return vec![Finding::fail("runtime", chain(&error), remedy)],
        Err(_late) => return vec![Finding::fail("runtime", format!("{endpoint} does not answer"), remedy)],
    };
    let found = format!("{} {}", version.runtime_name, version.runtime_version);
    let mut findings = vec![Finding::ok("runtime", found)];
    match timeout(PATIENCE, client.unmet()).await {
        Ok(Ok(unmet)) => {
            let remedy = "docs/cri-driver.md says how the runtime is set up";
            findings.extend(unmet.iter().map(|condition| Finding::fail("runtime", explained(condition), remedy)));
        }
        Ok(Err(error)) => findings.push(Finding::fail("runtime", chain(&error), remedy)),
        Err(_late) => findings.push(Finding::fail("runtime", "it does not tell its status", remedy)),
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;

    #[tokio::test]
    async fn an_endpoint_that_is_not_there_fails_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let endpoint = format!("unix://{}", folder.path().join("containerd.sock").display());
        let findings = examine(&endpoint).await;
        assert!(
            findings[0].level == Level::Fail && findings[0].found.contains("there is no such socket"),
            "{findings:?}"
        );
    }
}
