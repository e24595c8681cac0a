//! Who is asking.

use std::collections::BTreeMap;

use k8s_openapi::api::authentication::v1::UserInfo;
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{AttributeTypeAndValue, FromDer, X509Certificate};

/// Group of everyone who proved an identity.
const AUTHENTICATED: &str = "system:authenticated";

/// A user as the authorizer knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) uid: Option<String>,
    pub(super) groups: Vec<String>,
    pub(super) extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// Whoever proves nothing; only where anonymous requests are let in.
    pub(super) fn anonymous() -> Self {
        Self {
            name: "system:anonymous".to_owned(),
            uid: None,
            groups: vec!["system:unauthenticated".to_owned()],
            extra: BTreeMap::new(),
        }
    }

    /// Who has the token of this very host.
    pub(super) fn local() -> Self {
        let groups = vec!["system:masters".to_owned(), AUTHENTICATED.to_owned()];
        Self { name: "system:local".to_owned(), uid: None, groups, extra: BTreeMap::new() }
    }

    /// The user a verified certificate speaks for: common name, and each organization a group (Kubernetes
    /// documentation, "Authenticating: X509 client certificates"). `None` without a common name.
    pub(super) fn of_certificate(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        // The API server's parser lets the last of several common names win; so do we, or the two would disagree.
        let name = parsed.subject().iter_common_name().last().and_then(text).filter(|name| !name.is_empty())?;
        let mut groups = parsed.subject().iter_organization().map(text).collect::<Option<Vec<_>>>()?;
        groups.push(AUTHENTICATED.to_owned());
        Some(Self { name, uid: None, groups, extra: BTreeMap::new() })
    }

    /// The user a TokenReview found; `None` if it has no name.
    pub(super) fn of_review(info: UserInfo) -> Option<Self> {
        let name = info.username.filter(|name| !name.is_empty())?;
        let mut groups = info.groups.unwrap_or_default();
        if !groups.iter().any(|group| group == AUTHENTICATED) {
            groups.push(AUTHENTICATED.to_owned());
        }
        Some(Self { name, uid: info.uid, groups, extra: info.extra.unwrap_or_default() })
    }
}

fn text(attribute: &AttributeTypeAndValue<'_>) -> Option<String> {
    attribute.as_str().ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    fn certificate(subject: &[(DnType, &str)]) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in subject {
            params.distinguished_name.push(kind.clone(), *value);
        }
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn common_name_is_the_user_and_organization_a_group() {
        let user = User::of_certificate(&certificate(&[
            (DnType::OrganizationName, "kubeadm:cluster-admins"),
            (DnType::CommonName, "kube-apiserver-kubelet-client"),
        ]))
        .unwrap();
        assert_eq!(user.name, "kube-apiserver-kubelet-client");
        assert_eq!(user.groups, ["kubeadm:cluster-admins", AUTHENTICATED]);
    }

    #[test]
    fn a_certificate_without_a_name_is_nobody() {
        assert_eq!(User::of_certificate(&certificate(&[(DnType::OrganizationName, "system:masters")])), None);
        assert_eq!(User::of_certificate(&certificate(&[(DnType::CommonName, "")])), None);
        assert_eq!(User::of_certificate(&CertificateDer::from(vec![1, 2, 3])), None);
    }

    #[test]
    fn a_review_keeps_uid_groups_and_extra() {
        let extra = BTreeMap::from([("scopes".to_owned(), vec!["a".to_owned(), "b".to_owned()])]);
        let user = User::of_review(UserInfo {
            username: Some("system:serviceaccount:ns:sa".to_owned()),
            uid: Some("u".to_owned()),
            groups: Some(vec!["system:authenticated".to_owned()]),
            extra: Some(extra.clone()),
        })
        .unwrap();
        assert_eq!((user.uid.as_deref(), user.groups.len(), user.extra), (Some("u"), 1, extra));
        assert_eq!(User::of_review(UserInfo::default()), None);
    }
}
