//! `lambdalet controller`: approves the requests of nodes for their serving certificates, which no controller of
//! Kubernetes does.
//!
//! ```text
//! Lease --leader--> watch of kubelet-serving requests --apply---> GET Nodes --> verdict --> PATCH .../approval
//!                                                     '-cleanup-> says so if it went undecided
//! ```
//! Of several replicas one works at a time. Each request carries [`FINALIZER`] from the first look on, so none goes
//! unseen: a node that deletes what was never decided is a node without a certificate. A request that is deleted while
//! no replica runs goes when the next one does; `manifests/controller-rbac.yaml` says how to remove the mark by hand.

pub mod verdict;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_controller::{Context, Controller, LeaderElection, TraceMetadata};
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::{ListParams, Patch, PatchParams};
use kube::runtime::controller::Action;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use verdict::{Others, SIGNER, Verdict, requester, verdict};

/// The mark on each request that is looked after.
pub const FINALIZER: &str = "lambdalet.dev/kubelet-serving";

/// Which replica works.
#[derive(Clone, Debug)]
pub struct Election {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Its name.
    pub lease: String,
    /// What this replica is called in it; no other may be called the same.
    pub identity: String,
}

/// Approves until `draining`; then the lease is given back.
pub async fn run(client: Client, election: &Election, draining: CancellationToken) {
    let Election { namespace, lease, identity } = election;
    let leader = LeaderElection::new(client.clone(), namespace, lease, identity);
    loop {
        let requests = watcher::Config::default().fields(&format!("spec.signerName={SIGNER}"));
        let approver = Controller::cluster(client.clone(), Approver, requests).with_name("kubelet-serving");
        let work = async {
            info!(lease, identity, "approving serving certificates of nodes");
            approver.run().await;
        };
        tokio::select! {
            // Cancel-safe: a token stays cancelled.
            () = draining.cancelled() => break,
            // Cancel-safe: an approval that was sent is done, one that was not is found again by the next leader.
            ended = leader.with_lease(work) => {
                if ended.is_none() {
                    warn!(lease, identity, "lost the lease; standing for election again");
                }
            }
        }
    }
    leader.release().await;
}

/// Why a request was not approved yet. The library asks again after 2, 4, ... 256 seconds.
#[derive(Debug, thiserror::Error)]
pub enum ApproveError {
    /// The Node cannot be read.
    #[error("failed to get Node {name}")]
    Node {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: kube::Error,
    },
    /// What else there is cannot be read.
    #[error("failed to list {what}")]
    Others {
        /// Of which kind.
        what: &'static str,
        /// Why.
        #[source]
        source: kube::Error,
    },
    /// The Node does not say what the request says.
    #[error("request {name} is not approved: {reason}")]
    NotYet {
        /// The request.
        name: String,
        /// What differs.
        reason: &'static str,
    },
    /// The approval was not taken.
    #[error("failed to approve request {name}")]
    Approve {
        /// The request.
        name: String,
        /// Why.
        #[source]
        source: kube::Error,
    },
}

/// Approves one request at a time.
struct Approver;

#[async_trait]
impl Context for Approver {
    type Resource = CertificateSigningRequest;
    type Error = ApproveError;

    const FINALIZER_NAME: Option<&'static str> = Some(FINALIZER);

    async fn apply(
        &self,
        client: Client,
        request: &CertificateSigningRequest,
        _: &mut TraceMetadata,
    ) -> Result<Option<Action>, ApproveError> {
        let name = request.name_any();
        let node = match requester(request) {
            Some(node) => {
                let nodes: Api<Node> = Api::all(client.clone());
                nodes.get_opt(node).await.map_err(|source| ApproveError::Node { name: node.to_owned(), source })?
            }
            None => None,
        };
        // The others are many, and most requests are decided already.
        let judged = match verdict(request, node.as_ref(), &Others::default()) {
            Verdict::Approve => verdict(request, node.as_ref(), &others(client.clone()).await?),
            other => other,
        };
        match judged {
            Verdict::Approve => approve(client, request).await?,
            Verdict::Nothing => return Ok(Some(Action::await_change())),
            Verdict::NotYet(reason) => return Err(ApproveError::NotYet { name, reason }),
            Verdict::Never(reason) => warn!(request = %name, reason, "a request is left to a person"),
        }
        Ok(None)
    }

    async fn cleanup(
        &self,
        _: Client,
        request: &CertificateSigningRequest,
        _: &mut TraceMetadata,
    ) -> Result<Option<Action>, ApproveError> {
        if !decided(request) {
            warn!(request = %request.name_any(), user = request.spec.username, "a request was deleted undecided");
        }
        Ok(None)
    }
}

/// What the cluster has beside the node that asks.
async fn others(client: Client) -> Result<Others, ApproveError> {
    let failed = |what| move |source| ApproveError::Others { what, source };
    let all = ListParams::default();
    let nodes = Api::<Node>::all(client.clone()).list(&all).await.map_err(failed("Nodes"))?.items;
    let ranges = match Api::<ServiceCIDR>::all(client).list(&all).await {
        Ok(ranges) => ranges.items,
        // Older than Kubernetes 1.33, which does not tell them.
        Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
        Err(source) => return Err(failed("ServiceCIDRs")(source)),
    };
    let cidrs = ranges.into_iter().filter_map(|range| range.spec?.cidrs).flatten();
    Ok(Others { nodes, service_ranges: cidrs.filter_map(|cidr| cidr.parse().ok()).collect() })
}

/// Whether somebody has approved or denied it.
fn decided(request: &CertificateSigningRequest) -> bool {
    let mut conditions = request.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.any(|condition| ["Approved", "Denied"].contains(&condition.type_.as_str()))
}

async fn approve(client: Client, request: &CertificateSigningRequest) -> Result<(), ApproveError> {
    let name = request.name_any();
    let now = Timestamp::now();
    let mut conditions =
        request.status.iter().flat_map(|s| s.conditions.iter().flatten()).map(|c| json!(c)).collect::<Vec<_>>();
    conditions.push(json!({
        "type": "Approved",
        "status": "True",
        "reason": "AutoApproved",
        "message": "names and addresses are those of the Node that asks",
        "lastUpdateTime": now,
    }));
    // With the version, so that a denial in the meantime is not talked over.
    let patch = Patch::Merge(json!({
        "metadata": { "resourceVersion": request.resource_version() },
        "status": { "conditions": conditions },
    }));
    let requests: Api<CertificateSigningRequest> = Api::all(client);
    let sent = requests.patch_approval(&name, &PatchParams::default(), &patch).await;
    sent.map_err(|source| ApproveError::Approve { name: name.clone(), source })?;
    info!(request = %name, user = request.spec.username, "approved a serving certificate");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use k8s_controller::Error;

    use super::*;

    /// The seconds of an action, which shows them only to a debugger.
    fn seconds(action: &Action) -> f64 {
        let text = format!("{action:?}");
        let inner = text.split_once("Some(").and_then(|(_, rest)| rest.split_once(')')).map(|(inner, _)| inner);
        let inner = inner.unwrap_or_else(|| panic!("{text}"));
        match inner.strip_suffix("ms") {
            Some(number) => number.parse::<f64>().unwrap() / 1000.0,
            None => inner.strip_suffix('s').unwrap().parse().unwrap(),
        }
    }

    #[test]
    fn a_failure_is_tried_again_after_up_to_2_4_8_256_seconds_and_a_success_after_40_to_60_minutes() {
        let request = Arc::new(CertificateSigningRequest::default());
        for (failures, longest) in [(0, 2.0), (1, 4.0), (2, 8.0), (7, 256.0), (100, 256.0)] {
            let error = Error::ControllerError(ApproveError::NotYet { name: "r".into(), reason: "x" });
            let pause = seconds(&Arc::new(Approver).error_action(Arc::clone(&request), &error, failures));
            assert!((longest / 2.0..=longest).contains(&pause), "{failures}: {pause}");
        }
        assert_eq!(seconds(&Action::requeue(Duration::from_millis(1500))), 1.5);
        let again = seconds(&Approver.success_action(&request));
        assert!((2400.0..=3600.0).contains(&again), "{again}");
    }

    #[test]
    fn what_was_approved_or_denied_is_decided() {
        let request = |condition: &str| -> CertificateSigningRequest {
            let status = json!({ "conditions": [{ "type": condition, "status": "True" }] });
            serde_json::from_value(json!({
                "metadata": {},
                "spec": { "request": "", "signerName": SIGNER },
                "status": status,
            }))
            .unwrap()
        };
        assert!(decided(&request("Approved")) && decided(&request("Denied")));
        assert!(!decided(&request("Failed")) && !decided(&CertificateSigningRequest::default()));
    }
}
