//! Pure: whether a `kubernetes.io/kubelet-serving` request may be approved.
//!
//! The rules are those of the signer (Kubernetes documentation, "Certificates and Certificate Signing Requests", Kubernetes
//! signers), and those that only an approver can hold it to: whoever asks is the node, and the certificate is good for that
//! Node's own addresses and nothing else. A node writes these addresses itself, so they are not believed where they are
//! a Service's, another Node's or everybody's.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
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

/// What the cluster has that no certificate of a single node may be good for.
#[derive(Clone, Debug, Default)]
pub struct Others {
    /// The Nodes; the one that asks may be among them.
    pub nodes: Vec<Node>,
    /// The ranges of Services' addresses, as far as the cluster tells them.
    pub service_ranges: Vec<IpNet>,
}

/// What is to be done with a request, `node` being the Node named as its requester, if there is one.
pub fn verdict(request: &CertificateSigningRequest, node: Option<&Node>, others: &Others) -> Verdict {
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
    if !addresses(node).cover(&names) {
        return Verdict::NotYet("a name or address is not in the Node's status.addresses");
    }
    others.owner(&names, node).map_or(Verdict::Approve, Verdict::NotYet)
}

impl Others {
    /// Whose one of these is beside the Node's.
    fn owner(&self, names: &Names, node: &Node) -> Option<&'static str> {
        let is_service = |ip: &IpAddr| self.service_ranges.iter().any(|range| range.contains(&ip.to_canonical()));
        if names.ip.iter().any(is_service) {
            return Some("an address is in the range of Services");
        }
        for other in self.nodes.iter().filter(|other| other.metadata.name != node.metadata.name) {
            let theirs = addresses(other);
            let is_theirs = |name: &String| {
                theirs.dns.iter().chain(&other.metadata.name).any(|their| their.eq_ignore_ascii_case(name))
            };
            if names.dns.iter().any(is_theirs) {
                return Some("a name is another Node's");
            }
            // An IPv4 address is the same in the dress of IPv6.
            let is_address = |ip: &IpAddr| theirs.ip.iter().any(|their| their.to_canonical() == ip.to_canonical());
            if names.ip.iter().any(is_address) && !share_a_host(node, other) {
                return Some("an address is another Node's too");
            }
        }
        None
    }
}

/// Whether two Nodes are of one host, and so have one address: then they were booted at once. That is no proof:
/// a host with credentials that can read the other Node, as kube-proxy's, may say the same. Without it two nodes on one
/// host would have no certificates.
fn share_a_host(one: &Node, other: &Node) -> bool {
    let boot =
        |node: &Node| Some(node.status.as_ref()?.node_info.as_ref()?.boot_id.clone()).filter(|id| !id.is_empty());
    boot(one).is_some_and(|id| boot(other) == Some(id))
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
    let names = alternative_names(&asked.general_names)?;
    no_hosts(&names).map_or(Ok(names), Err)
}

/// Why no node may be called one of these, whatever it says of itself. The addresses are those a kubelet refuses as its
/// own, too.
fn no_hosts(names: &Names) -> Option<&'static str> {
    let of_no_host = |ip: &IpAddr| {
        let ip = ip.to_canonical();
        let is_link_local = match ip {
            IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || is_link_local
    };
    if names.ip.iter().any(of_no_host) {
        return Some("an address is no single host's (loopback, link-local, multicast or none)");
    }
    if !names.dns.iter().all(|name| is_host_name(name)) {
        return Some("a DNS name is no host's (RFC 1123)");
    }
    names
        .dns
        .iter()
        .any(|name| is_reserved(name))
        .then_some("a DNS name is localhost's, the API server's or a Service's")
}

fn is_host_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let plain = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        plain && (1..=63).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(is_label) && name.parse::<IpAddr>().is_err()
}

/// Names by which Pods find Services (`NAME.NAMESPACE.svc`, whatever domain follows) and the API server, and the names of
/// each host for itself.
fn is_reserved(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let labels: Vec<&str> = name.split('.').collect();
    matches!(
        labels[..],
        ["kubernetes"] | ["kubernetes", "default"] | [.., "localhost"] | [.., "pod", "cluster", "local"]
    ) || labels.iter().skip(2).any(|label| *label == "svc")
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
