//! Pure: whether a `kubernetes.io/kubelet-serving` request may be approved.
//!
//! The rules are those of the signer (Kubernetes documentation, "Certificates and Certificate Signing Requests", Kubernetes
//! signers), and one that only an approver can hold it to: whoever asks is the node, and the certificate is good for that
//! Node's own addresses and nothing else.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::core::v1::Node;
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{OID_X509_COMMON_NAME, OID_X509_ORGANIZATION_NAME};
use x509_parser::prelude::{FromDer, X509CertificationRequest};
use x509_parser::x509::X509Name;

use crate::certificate::{self, Names};

/// The only signer whose requests are looked at.
pub const SIGNER: &str = "kubernetes.io/kubelet-serving";

/// What users that are nodes are called.
const USER_PREFIX: &str = "system:node:";
/// The group of all nodes.
const GROUP: &str = "system:nodes";

/// What is to be done with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Approve it.
    Approve,
    /// It has been decided, or is not ours to decide.
    Nothing,
    /// The Node does not say this of itself; it may, a moment later.
    NotYet(&'static str),
    /// It can never be right. It is left to a person: denying is not ours.
    Never(&'static str),
}

/// The node that asks; `None` if it is no node.
pub fn requester(request: &CertificateSigningRequest) -> Option<&str> {
    let node = request.spec.username.as_deref()?.strip_prefix(USER_PREFIX)?;
    (!node.is_empty()).then_some(node)
}

/// What is to be done with a request, `node` being the Node named as its requester, if there is one.
pub fn verdict(request: &CertificateSigningRequest, node: Option<&Node>) -> Verdict {
    if request.spec.signer_name != SIGNER || settled(request) {
        return Verdict::Nothing;
    }
    let names = match intrinsic(request) {
        Ok(names) => names,
        Err(reason) => return Verdict::Never(reason),
    };
    let Some(node) = node.filter(|node| node.metadata.name.as_deref() == requester(request)) else {
        return Verdict::NotYet("there is no such Node");
    };
    if node.metadata.deletion_timestamp.is_some() {
        return Verdict::NotYet("the Node is being deleted");
    }
    if addresses(node).cover(&names) {
        Verdict::Approve
    } else {
        Verdict::NotYet("a name or address is not in the Node's status.addresses")
    }
}

/// Whether somebody decided it, or it is being removed.
fn settled(request: &CertificateSigningRequest) -> bool {
    let decided = request.status.as_ref().is_some_and(|status| {
        status.certificate.is_some()
            || status.conditions.iter().flatten().any(|c| matches!(c.type_.as_str(), "Approved" | "Denied" | "Failed"))
    });
    decided || request.metadata.deletion_timestamp.is_some()
}

/// What can be judged without the Node; the names asked for.
fn intrinsic(request: &CertificateSigningRequest) -> Result<Names, &'static str> {
    let spec = &request.spec;
    requester(request).ok_or("the requester is no node")?;
    if !spec.groups.iter().flatten().any(|group| group == GROUP) {
        return Err("the requester is not in the group system:nodes");
    }
    let usages: BTreeSet<&str> = spec.usages.iter().flatten().map(String::as_str).collect();
    if !usages.is_superset(&["digital signature", "server auth"].into()) {
        return Err("the usages lack digital signature or server auth");
    }
    if !usages.is_subset(&["digital signature", "key encipherment", "server auth"].into()) {
        return Err("the usages go beyond a server's");
    }
    let der = only_request(&spec.request.0).ok_or("it is not one PEM certificate request")?;
    let (rest, parsed) = X509CertificationRequest::from_der(&der).map_err(|_| "the request does not parse")?;
    if !rest.is_empty() {
        return Err("something follows the request");
    }
    let info = &parsed.certification_request_info;
    if !is_subject(&info.subject, spec.username.as_deref().unwrap_or_default()) {
        return Err("the subject is not exactly the requester in the organization system:nodes");
    }
    // One attribute, one extension: what this reader might overlook the signer's cannot find.
    let [attribute] = info.attributes() else { return Err("it asks for more, or less, than alternative names") };
    let ParsedCriAttribute::ExtensionRequest(asked) = attribute.parsed_attribute() else {
        return Err("it asks for something else than extensions");
    };
    let [extension] = &asked.extensions[..] else { return Err("it asks for more, or less, than alternative names") };
    let ParsedExtension::SubjectAlternativeName(asked) = extension.parsed_extension() else {
        return Err("it asks for an extension that is not alternative names");
    };
    alternative_names(&asked.general_names)
}

/// The request of a PEM text that holds nothing else.
fn only_request(pem: &[u8]) -> Option<CertificateSigningRequestDer<'static>> {
    let text = std::str::from_utf8(pem).ok()?.trim();
    let inner = text.strip_prefix("-----BEGIN CERTIFICATE REQUEST-----")?;
    let inner = inner.strip_suffix("-----END CERTIFICATE REQUEST-----")?;
    if inner.contains("-----") {
        return None;
    }
    CertificateSigningRequestDer::from_pem_slice(pem).ok()
}

fn is_subject(subject: &X509Name<'_>, user: &str) -> bool {
    let mut parts: Vec<_> =
        subject.iter_attributes().map(|part| (part.attr_type().clone(), part.as_str().ok())).collect();
    parts.sort_by_key(|(kind, _)| *kind != OID_X509_ORGANIZATION_NAME);
    parts == [(OID_X509_ORGANIZATION_NAME, Some(GROUP)), (OID_X509_COMMON_NAME, Some(user))]
}

fn alternative_names(all: &[GeneralName<'_>]) -> Result<Names, &'static str> {
    let names = certificate::names(all);
    if !all.iter().all(|name| matches!(name, GeneralName::DNSName(_) | GeneralName::IPAddress(_))) {
        return Err("an alternative name is neither a DNS name nor an address");
    }
    // An address of a strange length, or a name given twice, is not among what was read.
    if names.dns.len() + names.ip.len() != all.len() {
        return Err("an alternative name is malformed or given twice");
    }
    if all.is_empty() { Err("it names no address") } else { Ok(names) }
}

/// What a Node says it is reached by.
fn addresses(node: &Node) -> Names {
    let mut names = Names::default();
    for address in node.status.iter().filter_map(|status| status.addresses.as_ref()).flatten() {
        match address.type_.as_str() {
            "Hostname" | "InternalDNS" | "ExternalDNS" => {
                names.dns.insert(address.address.clone());
            }
            "InternalIP" | "ExternalIP" => names.ip.extend(address.address.parse::<IpAddr>().ok()),
            _ => {}
        }
    }
    names
}

#[cfg(test)]
mod tests;
