//! The node's Lease in `kube-node-lease`: as long as it is renewed, the node lives.
//!
//! The node lifecycle controller marks a Node's conditions Unknown when its lease ran out. Timings are kubelet's: 40 s
//! (`nodeLeaseDurationSeconds`), renewed at a quarter of it, so three renewals may fail in a row.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease as LeaseObject, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::Api;
use kube::api::PostParams;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Registration;
use crate::apiserver::{ApiServer, RequestError, Trouble};
use crate::config::NodeSettings;
use crate::retry::Retry;
use crate::telemetry::chain;

/// Where kubelets keep their leases.
const NAMESPACE: &str = "kube-node-lease";

/// A lease is renewed when this part of its time has passed.
const RENEW_FRACTION: u32 = 4;

/// Keeps one node's lease.
pub(super) struct Lease {
    api: Arc<ApiServer>,
    leases: Api<LeaseObject>,
    name: String,
    duration: Duration,
    registration: watch::Receiver<Option<Registration>>,
    held: Option<LeaseObject>,
}

impl Lease {
    pub(super) fn new(
        api: Arc<ApiServer>,
        settings: &NodeSettings,
        registration: watch::Receiver<Option<Registration>>,
    ) -> Self {
        let leases = Api::namespaced(api.client.clone(), NAMESPACE);
        let (name, duration) = (settings.name.clone(), settings.lease_duration);
        Self { api, leases, name, duration, registration, held: None }
    }

    /// Renews until `closing`. Starts with the registration, since the lease belongs to the Node object.
    pub(super) async fn run(mut self, closing: CancellationToken) {
        let mut retry = Retry::new("renew the node's lease");
        let mut registration = self.registration.clone();
        loop {
            let node = uid(&registration.borrow_and_update());
            let pause = match &node {
                None => None,
                Some(uid) => {
                    // Cancel-safe: this is the end, and a renewal more or less does not matter.
                    let renewal = tokio::select! {
                        () = closing.cancelled() => return,
                        renewal = self.renew(uid) => renewal,
                    };
                    Some(match renewal {
                        Ok(()) => {
                            retry.succeeded();
                            self.duration / RENEW_FRACTION
                        }
                        Err(error) => retry.failed(chain(&error)),
                    })
                }
            };
            let sleep = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            // Cancel-safe: a dropped sleep renews early, and a watch channel keeps its value. Another UID is another Node,
            // whose lease must name it; what else changes of the Node is nothing to its lease.
            tokio::select! {
                () = closing.cancelled() => return,
                () = sleep => {}
                changed = registration.wait_for(|known| uid(known) != node) => if changed.is_err() { return },
            }
        }
    }

    /// One renewal: the object held is written back; if that is stale or gone it is read or made anew.
    async fn renew(&mut self, node_uid: &str) -> Result<(), RequestError> {
        if let Some(held) = self.held.take() {
            let renewed = self.renewed(held, node_uid);
            match self.api.request(self.leases.replace(&self.name, &PostParams::default(), &renewed)).await {
                Ok(lease) => {
                    self.held = Some(lease);
                    return Ok(());
                }
                Err(error) if matches!(error.trouble, Trouble::Conflict | Trouble::NotFound) => {}
                Err(error) => {
                    // The write may have arrived all the same; the object is read again next time.
                    return Err(error);
                }
            }
        }
        let lease = match self.api.request(self.leases.get_opt(&self.name)).await? {
            Some(found) => {
                let renewed = self.renewed(found, node_uid);
                self.api.request(self.leases.replace(&self.name, &PostParams::default(), &renewed)).await?
            }
            None => {
                let new = self.renewed(LeaseObject::default(), node_uid);
                self.api.request(self.leases.create(&PostParams::default(), &new)).await?
            }
        };
        self.held = Some(lease);
        Ok(())
    }

    /// The lease as it should be from now on, other fields as they are.
    fn renewed(&self, lease: LeaseObject, node_uid: &str) -> LeaseObject {
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: self.name.clone(),
            uid: node_uid.to_owned(),
            ..OwnerReference::default()
        };
        let metadata = ObjectMeta {
            name: Some(self.name.clone()),
            namespace: Some(NAMESPACE.to_owned()),
            owner_references: Some(vec![owner]),
            ..lease.metadata
        };
        let spec = LeaseSpec {
            holder_identity: Some(self.name.clone()),
            lease_duration_seconds: Some(i32::try_from(self.duration.as_secs().max(1)).unwrap_or(i32::MAX)),
            renew_time: Some(MicroTime(Timestamp::now())),
            ..lease.spec.unwrap_or_default()
        };
        LeaseObject { metadata, spec: Some(spec) }
    }
}

fn uid(known: &Option<Registration>) -> Option<String> {
    known.as_ref().map(|node| node.uid.clone())
}
