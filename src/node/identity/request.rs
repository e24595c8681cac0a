//! One CertificateSigningRequest: made, sent, waited for.

use std::pin::pin;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::api::{ObjectMeta, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData};
use sha2::{Digest, Sha256};
use tracing::{debug, info};

use super::store::Store;
use super::{IdentityError, Kind, user};
use crate::apiserver::{ApiServer, Trouble};
use crate::certificate::{Certificate, Names};
use crate::retry::{Delays, Retry};
use crate::telemetry::chain;

/// Asks for a certificate and waits until it is in its file, however long approval takes.
///
/// Dropping the future loses nothing: the key is on disk, and the request is found again under its name, which follows
/// from the key and what is asked for.
pub(super) async fn obtain(api: &ApiServer, store: &Store, node: &str, names: &Names) -> Result<(), IdentityError> {
    let (kind, user) = (store.kind(), user(node));
    let key = store.pending_key(&user)?;
    let request = object(kind, &user, names, &key)?;
    let name = request.name_any();
    let requests: Api<CertificateSigningRequest> = Api::all(api.client.clone());
    match api.request(requests.create(&PostParams::default(), &request)).await {
        Ok(_) => info!(request = %name, "asked for a {}", kind.what()),
        Err(error) if error.trouble == Trouble::Conflict => debug!(request = %name, "asked for it before"),
        Err(source) => return Err(IdentityError::Create { name, source }),
    }
    let granted = granted(api, requests, &name).await;
    if matches!(granted, Err(IdentityError::Refused { .. })) {
        store.forget_pending();
    }
    let granted = granted?;
    if let Err(reason) = fits(&granted, &key, &user, names) {
        store.forget_pending();
        return Err(IdentityError::Foreign { name, reason });
    }
    store.keep(&granted, &key)?;
    info!(request = %name, file = %store.path().display(), "took a new {} into use", kind.what());
    Ok(())
}

/// The request as an object. Its name is the same for the same key, signer and names.
fn object(kind: Kind, user: &str, names: &Names, key: &KeyPair) -> Result<CertificateSigningRequest, IdentityError> {
    let failed = |source| IdentityError::Make { user: user.to_owned(), source };
    let texts: Vec<String> = names.dns.iter().cloned().chain(names.ip.iter().map(ToString::to_string)).collect();
    let mut digest = Sha256::new();
    digest.update(key.der_bytes());
    for part in [kind.signer(), user].into_iter().chain(texts.iter().map(String::as_str)) {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    let digest: String = digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let prefix = match kind {
        Kind::Client => "node-csr-",
        Kind::Serving => "node-serving-csr-",
    };
    let mut params = CertificateParams::new(texts).map_err(failed)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, user);
    let pem = params.serialize_request(key).and_then(|request| request.pem()).map_err(failed)?;
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { name: Some(format!("{prefix}{digest}")), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: kind.signer().to_owned(),
            usages: Some(kind.usages().map(str::to_owned).to_vec()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    })
}

/// Waits for the certificate.
async fn granted(
    api: &ApiServer,
    requests: Api<CertificateSigningRequest>,
    name: &str,
) -> Result<Vec<u8>, IdentityError> {
    let mut changes = pin!(watcher::watch_object(requests, name).backoff(Delays::default()));
    // The stream waits by itself; this only says what is wrong.
    let mut retry = Retry::new("watch for the certificate");
    let mut told = false;
    while let Some(change) = changes.next().await {
        match change {
            Ok(Some(request)) => {
                retry.succeeded();
                if let Some(outcome) = outcome(&request) {
                    return outcome;
                }
                if !told {
                    info!(request = name, "waiting for approval (kubectl certificate approve {name})");
                    told = true;
                }
            }
            Ok(None) => break,
            Err(error) => {
                let server = &api.url;
                let _ = retry.failed(format!("{name} at {server}: {}", chain(&error)));
            }
        }
    }
    Err(IdentityError::Gone(name.to_owned()))
}

/// What became of a request; `None` if nothing did yet.
fn outcome(request: &CertificateSigningRequest) -> Option<Result<Vec<u8>, IdentityError>> {
    let status = request.status.as_ref()?;
    let refused = status.conditions.iter().flatten().find(|c| matches!(c.type_.as_str(), "Denied" | "Failed"));
    if let Some(refused) = refused {
        let words = [Some(&refused.type_), refused.reason.as_ref(), refused.message.as_ref()];
        let reason = words.into_iter().flatten().filter(|word| !word.is_empty()).cloned().collect::<Vec<_>>();
        return Some(Err(IdentityError::Refused { name: request.name_any(), reason: reason.join(": ") }));
    }
    let certificate = status.certificate.as_ref().filter(|certificate| !certificate.0.is_empty())?;
    Some(Ok(certificate.0.clone()))
}

/// Whether a granted certificate is what was asked for.
fn fits(pem: &[u8], key: &KeyPair, user: &str, names: &Names) -> Result<(), &'static str> {
    let certificate = Certificate::first(pem).ok_or("it does not parse")?;
    if !certificate.belongs_to(key) {
        return Err("its key is another's");
    }
    if certificate.common_name != user {
        return Err("its subject is another's");
    }
    if !certificate.names.cover(names) {
        return Err("it lacks names or addresses");
    }
    // The keeper would take it for one of before, and ask for the next at once.
    if names.matter() && certificate.names != *names {
        return Err("it has names or addresses that were not asked for");
    }
    if certificate.not_after <= Timestamp::now() {
        return Err("it has expired (check this host's clock)");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::certificates::v1::{CertificateSigningRequestCondition, CertificateSigningRequestStatus};
    use x509_parser::prelude::{FromDer, ParsedExtension, X509CertificationRequest};

    use super::*;
    use crate::certificate;

    fn names() -> Names {
        Names { dns: ["a".to_owned()].into(), ip: ["10.0.0.1".parse().unwrap()].into() }
    }

    #[test]
    fn a_request_says_who_and_for_what() {
        let key = KeyPair::generate().unwrap();
        let made = object(Kind::Serving, "system:node:a", &names(), &key).unwrap();
        assert_eq!(made.spec.signer_name, "kubernetes.io/kubelet-serving");
        assert_eq!(made.spec.usages.unwrap(), ["digital signature", "server auth"]);
        let (_, pem) = x509_parser::pem::parse_x509_pem(&made.spec.request.0).unwrap();
        assert_eq!(pem.label, "CERTIFICATE REQUEST");
        let (_, request) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let subject = &request.certification_request_info.subject;
        assert_eq!(certificate::common_name(subject), "system:node:a");
        assert_eq!(subject.iter_organization().map(|o| o.as_str().unwrap()).collect::<Vec<_>>(), ["system:nodes"]);
        let extensions: Vec<_> = request.requested_extensions().unwrap().collect();
        let [ParsedExtension::SubjectAlternativeName(asked)] = extensions[..] else { panic!("{extensions:?}") };
        assert_eq!(certificate::names(&asked.general_names), names());
    }

    #[test]
    fn the_name_stays_while_key_and_names_do() {
        let (one, two) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let name = |kind, names: &Names, key| object(kind, "system:node:a", names, key).unwrap().name_any();
        let first = name(Kind::Serving, &names(), &one);
        assert_eq!(name(Kind::Serving, &names(), &one), first);
        assert_ne!(name(Kind::Serving, &names(), &two), first);
        assert_ne!(name(Kind::Serving, &Names::default(), &one), first);
        assert!(name(Kind::Client, &Names::default(), &one).starts_with("node-csr-"));
    }

    #[test]
    fn a_refusal_beats_a_certificate_and_silence_is_no_outcome() {
        let told = |type_: &str, certificate: &[u8]| {
            let condition = CertificateSigningRequestCondition {
                type_: type_.to_owned(),
                reason: Some("Because".to_owned()),
                message: Some("no".to_owned()),
                ..CertificateSigningRequestCondition::default()
            };
            let status = CertificateSigningRequestStatus {
                conditions: Some(vec![condition]),
                certificate: Some(ByteString(certificate.to_vec())),
            };
            outcome(&CertificateSigningRequest { status: Some(status), ..CertificateSigningRequest::default() })
        };
        assert!(outcome(&CertificateSigningRequest::default()).is_none());
        assert!(told("Approved", b"").is_none());
        assert_eq!(told("Approved", b"pem").unwrap().unwrap(), b"pem");
        let denied = told("Denied", b"pem").unwrap().unwrap_err();
        assert!(denied.to_string().ends_with("was refused: Denied: Because: no"), "{denied}");
        assert!(matches!(told("Failed", b""), Some(Err(IdentityError::Refused { .. }))));
    }

    #[test]
    fn a_certificate_that_was_not_asked_for_is_not_used() {
        let key = KeyPair::generate().unwrap();
        let of_names = |user: &str, names: &[&str], key: &KeyPair| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let mut params = CertificateParams::new(names).unwrap();
            params.distinguished_name.push(DnType::CommonName, user);
            params.self_signed(key).unwrap().pem().into_bytes()
        };
        let of = |user: &str, dns: &str, key: &KeyPair| of_names(user, &[dns, "10.0.0.1"], key);
        let check = |pem: &[u8]| fits(pem, &key, "system:node:a", &names());
        assert_eq!(check(&of("system:node:a", "a", &key)), Ok(()));
        assert_eq!(check(&of("system:node:b", "a", &key)), Err("its subject is another's"));
        assert_eq!(check(&of("system:node:a", "b", &key)), Err("it lacks names or addresses"));
        assert_eq!(check(&of("system:node:a", "a", &KeyPair::generate().unwrap())), Err("its key is another's"));
        assert_eq!(check(b"rubbish"), Err("it does not parse"));
        for more in ["b", "10.0.0.2"] {
            let wider = of_names("system:node:a", &["a", "10.0.0.1", more], &key);
            assert_eq!(check(&wider), Err("it has names or addresses that were not asked for"), "{more}");
        }
        // That of a client has none, and what a signer adds means nothing.
        let named = of("system:node:a", "a", &key);
        assert_eq!(fits(&named, &key, "system:node:a", &Names::default()), Ok(()));
    }
}
