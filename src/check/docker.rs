//! The Docker daemon.

use std::path::Path;

use bollard::{API_DEFAULT_VERSION, Docker};

use super::Finding;
use crate::telemetry::chain;

/// Seconds the daemon may take to answer.
const TIMEOUT_SECONDS: u64 = 5;

/// The oldest Docker Engine API the driver speaks (Docker 20.10).
const OLDEST_API: (u32, u32) = (1, 41);

/// Reachable, new enough, and how it limits resources.
pub(super) async fn examine(endpoint: &str) -> Vec<Finding> {
    let Some(socket) = endpoint.strip_prefix("unix://") else {
        let found = format!("{endpoint} is not a unix socket, and only those are supported");
        return vec![Finding::fail("docker", found, "pass --docker-endpoint unix:///var/run/docker.sock")];
    };
    if !Path::new(socket).exists() {
        let found = format!("there is no socket {socket}: no Pod can run");
        return vec![Finding::fail("docker", found, "install Docker 20.10 or newer and start dockerd")];
    }
    match ask(socket).await {
        Ok(findings) => findings,
        Err(error) => {
            let found = format!("{socket} does not answer ({}): no Pod can run", chain(&error));
            vec![Finding::fail("docker", found, "start dockerd, and check that this user may open the socket")]
        }
    }
}

/// Whether there is a daemon on a node whose Pods are microVMs unless they say otherwise.
pub(super) fn beside_microvms(endpoint: &str) -> Finding {
    let socket = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
    if Path::new(socket).exists() {
        return Finding::ok("docker", format!("{socket}: runs the fronts of functions, and Pods that ask for docker"));
    }
    let found = format!("there is no socket {socket}: functions, and Pods that ask for docker, are refused");
    Finding::warn("docker", found, "install Docker 20.10 or newer (Debian: docker.io), or live without")
}

async fn ask(socket: &str) -> Result<Vec<Finding>, bollard::errors::Error> {
    let docker = Docker::connect_with_unix(socket, TIMEOUT_SECONDS, API_DEFAULT_VERSION)?;
    let (version, info) = (docker.version().await?, docker.info().await?);
    let (release, api) = (version.version.unwrap_or_default(), version.api_version.unwrap_or_default());
    let mut findings = vec![match api_version(&api) {
        Some(found) if found < OLDEST_API => Finding::fail(
            "docker",
            format!("{release} (API {api}) is older than 20.10 (API {}.{})", OLDEST_API.0, OLDEST_API.1),
            "upgrade Docker",
        ),
        _ => Finding::ok("docker", format!("{release} (API {api})")),
    }];
    let driver = info.cgroup_driver.map(|driver| driver.to_string()).unwrap_or_default();
    let cgroups = info.cgroup_version.map(|version| version.to_string()).unwrap_or_default();
    let memory = info.memory_limit.unwrap_or_default();
    findings.push(match driver.as_str() {
        "" | "none" => Finding::warn(
            "cgroups",
            "the daemon manages none: limits of Pods are not enforced",
            "run dockerd as root, with cgroups mounted",
        ),
        _ if !memory => Finding::warn(
            "cgroups",
            format!("{driver}, version {cgroups}, without memory limits"),
            "enable the memory controller (cgroup_enable=memory)",
        ),
        _ => Finding::ok("cgroups", format!("{driver}, version {cgroups}")),
    });
    Ok(findings)
}

fn api_version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;

    #[tokio::test]
    async fn a_socket_that_is_not_there_or_does_not_answer_fails_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("docker.sock");
        let endpoint = format!("unix://{}", path.display());
        let findings = examine(&endpoint).await;
        assert!(findings[0].level == Level::Fail && findings[0].found.contains("there is no socket"));
        drop(tokio::net::UnixListener::bind(&path).unwrap());
        let findings = examine(&endpoint).await;
        assert!(findings[0].level == Level::Fail && findings[0].found.contains("does not answer"), "{findings:?}");
        let findings = examine("tcp://10.0.0.1:2375").await;
        assert!(findings[0].level == Level::Fail && findings[0].found.contains("not a unix socket"));
    }

    #[test]
    fn api_versions_compare_as_numbers() {
        assert!(api_version("1.9").unwrap() < OLDEST_API);
        assert!(api_version("1.141").unwrap() > OLDEST_API);
        assert_eq!(api_version("x"), None);
    }
}
