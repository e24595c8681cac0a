//! Keeps one certificate fresh: asks for the next one in time, and for another when the node's addresses change.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::store::Store;
use super::{IdentityError, Kind, request, user};
use crate::apiserver::ApiServer;
use crate::certificate::{Certificate, Names, PairError};
use crate::node::NodeFacts;
use crate::retry::Retry;
use crate::telemetry::chain;

/// How often the file and the clock are looked at; a host that slept is noticed, and so is a file somebody replaced.
const LOOK: Duration = Duration::from_secs(5);

/// After a refusal; a person has to change their mind first, and each try is a new request for them to see.
const REFUSED_PAUSE: Duration = Duration::from_secs(10 * 60);

/// The owner of one certificate's file.
pub struct Keeper {
    api: Arc<ApiServer>,
    store: Store,
    facts: watch::Receiver<NodeFacts>,
    look: Duration,
}

impl Keeper {
    /// A keeper of the certificate in `store`, asking `api` with the node's own identity.
    pub fn new(api: Arc<ApiServer>, store: Store, facts: watch::Receiver<NodeFacts>) -> Self {
        Self { api, store, facts, look: LOOK }
    }

    /// Runs until `closing`.
    pub async fn run(mut self, closing: CancellationToken) {
        let kind = self.store.kind();
        let mut retry = Retry::new(match kind {
            Kind::Client => "renew the client certificate",
            Kind::Serving => "get a serving certificate",
        });
        loop {
            let (node, names) = {
                let facts = self.facts.borrow_and_update();
                (facts.name.clone(), kind.names(&facts))
            };
            let mut wait = self.look;
            if let Some(reason) = due(&self.store.current(), &node, &names, Timestamp::now()) {
                info!(reason, "a new {} is needed", kind.what());
                let outcome = tokio::select! {
                    // Cancel-safe: the request is found again by the next start.
                    () = closing.cancelled() => return,
                    // Cancel-safe: the request for the old addresses is left to the API server's own clearing-up.
                    () = changed(&mut self.facts) => continue,
                    // Cancel-safe, see there.
                    outcome = request::obtain(&self.api, &self.store, &node, &names) => outcome,
                };
                match outcome {
                    Ok(()) => retry.succeeded(),
                    Err(error @ (IdentityError::Refused { .. } | IdentityError::Foreign { .. })) => {
                        warn!(error = chain(&error), "no new {}; asking again in {REFUSED_PAUSE:?}", kind.what());
                        wait = REFUSED_PAUSE;
                    }
                    Err(error) => wait = retry.failed(chain(&error)),
                }
            }
            tokio::select! {
                // Cancel-safe, all three: a token stays cancelled, a channel keeps its state, a sleep is begun anew.
                () = closing.cancelled() => return,
                () = changed(&mut self.facts) => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }
}

/// The next change of the node's facts; never, once nobody can change them any more.
async fn changed(facts: &mut watch::Receiver<NodeFacts>) {
    if facts.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Why another certificate is needed, if one is.
fn due(current: &Result<Certificate, PairError>, node: &str, names: &Names, now: Timestamp) -> Option<&'static str> {
    let certificate = match current {
        Ok(certificate) => certificate,
        Err(PairError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Some("there is none");
        }
        Err(_) => return Some("the one there is not usable"),
    };
    if certificate.common_name != user(node) {
        return Some("the one there is another node's");
    }
    // One that is good for more than the node's addresses would let it speak for somebody else's.
    if names.matter() && certificate.names != *names {
        return Some("the node's names or addresses changed");
    }
    (now >= certificate.renewal()).then_some("the one there is near its end")
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn certificate(names: &[&str]) -> Certificate {
        let mut params =
            CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "system:node:a");
        params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        params.not_after = rcgen::date_time_ymd(2026, 1, 11);
        Certificate::first(params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem().as_bytes()).unwrap()
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_certificate_is_kept_until_its_time_and_while_it_is_the_nodes() {
        let names = Names { dns: ["a".to_owned()].into(), ip: ["10.0.0.1".parse().unwrap()].into() };
        let current = Ok(certificate(&["a", "10.0.0.1"]));
        let (early, late) = (at("2026-01-07T12:00:00Z"), at("2026-01-10T12:00:00Z"));
        assert_eq!(due(&current, "a", &names, early), None);
        assert_eq!(due(&current, "a", &names, late), Some("the one there is near its end"));
        assert_eq!(due(&current, "b", &names, early), Some("the one there is another node's"));
        let mut moved = names.clone();
        moved.ip.insert("10.0.0.2".parse().unwrap());
        assert_eq!(due(&current, "a", &moved, early), Some("the node's names or addresses changed"));
        let wider = Ok(certificate(&["a", "10.0.0.1", "10.0.0.2"]));
        assert_eq!(due(&wider, "a", &names, early), Some("the node's names or addresses changed"));
        let none = Certificate::of_pair(std::path::Path::new("/nowhere/current.pem"));
        assert_eq!(due(&none, "a", &names, early), Some("there is none"));
    }
}
