//! The way to the API server: kubeconfig, connection, identity, clock.

use std::path::Path;

use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;

use super::Finding;
use crate::apiserver::{ApiServer, RequestError, Trouble};
use crate::telemetry::chain;

/// Beyond this many seconds tokens and certificates may count as not yet valid.
const SKEW_WARN: i64 = 5;

/// Beyond this many, leases and tokens break.
const SKEW_FAIL: i64 = 60;

/// Everything between this host and the API server.
pub(super) async fn examine(node_name: &str, kubeconfig: Option<&Path>) -> Vec<Finding> {
    let Some(path) = kubeconfig else {
        let found = "none was given: the node belongs to no cluster";
        return vec![Finding::fail("kubeconfig", found, "pass --kubeconfig FILE")];
    };
    let api = match ApiServer::from_kubeconfig(path).await {
        Ok(api) => api,
        Err(error) => {
            return vec![Finding::fail("kubeconfig", chain(&error), "then run this check again")];
        }
    };
    let mut findings = vec![Finding::ok("kubeconfig", format!("{} leads to {}", path.display(), api.url))];
    match version_and_date(&api).await {
        Ok((version, date)) => {
            findings.push(Finding::ok("API server", version));
            findings.push(clock(date, Timestamp::now()));
            findings.push(identity(&api, node_name).await);
        }
        Err(error) => findings.push(Finding::fail("API server", chain(&error), remedy(error.trouble))),
    }
    findings
}

fn remedy(trouble: Trouble) -> &'static str {
    match trouble {
        Trouble::Unreachable => "lambdalet run would keep trying; running Pods go on meanwhile",
        Trouble::UnknownAuthority => "lambdalet run would end with this message",
        _ => "lambdalet run would keep trying",
    }
}

/// The server's version and its own time, from the one request every identity may make.
async fn version_and_date(api: &ApiServer) -> Result<(String, Option<String>), RequestError> {
    let request = async {
        let request = http::Request::get("/version").body(kube::client::Body::empty());
        let answer = api.client.send(request.map_err(kube::Error::HttpError)?).await?;
        let date = answer.headers().get(http::header::DATE).and_then(|date| date.to_str().ok()).map(str::to_owned);
        let status = answer.status();
        // The version itself is asked for in the ordinary way, so that a refusal becomes an ordinary error.
        let version = api.client.apiserver_version().await?;
        tracing::debug!(%status, "asked for the version");
        Ok((version.git_version, date))
    };
    api.request(request).await
}

/// This host's clock against the server's `Date` header, which has whole seconds.
fn clock(date: Option<String>, now: Timestamp) -> Finding {
    let theirs = date.as_deref().and_then(|date| DateTimeParser::new().parse_timestamp(date).ok());
    let Some(theirs) = theirs else {
        return Finding::warn("clock", "the API server did not tell its time", "check this host's clock yourself");
    };
    let ahead = now.as_second() - theirs.as_second();
    let found = match ahead {
        1.. => format!("{ahead} s ahead of the API server's"),
        0 => "in step with the API server's".to_owned(),
        _ => format!("{} s behind the API server's", -ahead),
    };
    let remedy = "set the clock, and keep it with chrony or systemd-timesyncd";
    match ahead.abs() {
        0..=SKEW_WARN => Finding::ok("clock", found),
        ..=SKEW_FAIL => Finding::warn("clock", format!("{found}: tokens may be refused"), remedy),
        _ => Finding::fail("clock", format!("{found}: leases, tokens and certificates break"), remedy),
    }
}

async fn identity(api: &ApiServer, node_name: &str) -> Finding {
    match api.whoami().await {
        Ok(identity) if identity.starts_with("system:bootstrap:") => {
            Finding::ok("identity", format!("{identity}, with which the node asks for its own"))
        }
        Ok(identity) => match identity.strip_prefix("system:node:") {
            Some(theirs) if theirs != node_name => Finding::fail(
                "identity",
                format!("{identity} may only be the node {theirs:?}, but this node is called {node_name:?}"),
                format!("pass --node-name {theirs}, or take credentials for system:node:{node_name}"),
            ),
            Some(_) => Finding::ok("identity", identity),
            None => Finding::warn(
                "identity",
                format!("{identity} is no node identity: its rights depend on its roles"),
                "bind it to the roles in manifests/, or take credentials for a system:node identity",
            ),
        },
        Err(error) => Finding::fail("identity", chain(&error), remedy(error.trouble)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Level;

    #[test]
    fn the_clock_is_judged_by_its_distance() {
        let date = || Some("Sat, 21 Nov 2026 07:00:00 GMT".to_owned());
        let server: Timestamp = "2026-11-21T07:00:00Z".parse().unwrap();
        let at = |seconds: i64| Timestamp::from_second(server.as_second() + seconds).unwrap();
        assert_eq!(clock(date(), at(0)).level, Level::Ok);
        assert_eq!(clock(date(), at(-5)).level, Level::Ok);
        assert_eq!(clock(date(), at(30)).level, Level::Warn);
        let slow = clock(date(), at(-3600));
        assert_eq!(slow.level, Level::Fail);
        assert!(slow.found.starts_with("3600 s behind"), "{}", slow.found);
        assert_eq!(clock(None, at(0)).level, Level::Warn);
        assert_eq!(clock(Some("today".to_owned()), at(0)).level, Level::Warn);
    }
}
