//! The node's certificates by CertificateSigningRequest: the one it shows to the API server, and the one it serves with.
//!
//! ```text
//! bootstrap token --request (kube-apiserver-client-kubelet)--> pki/kubelet-client-current.pem, kubeconfig
//! keeper ---------request, at 70-90 % of its life------------> pki/kubelet-client-current.pem --> apiserver::reload
//!        '--------request by bootstrap token, once expired---> the same
//! keeper ---------request (kubelet-serving)------------------> pki/kubelet-server-current.pem --> kubelet_api::tls
//! ```
//! The files are the seam: whoever uses a certificate looks at its file. Signers, subjects and usages are those of the
//! Kubernetes documentation, "Certificates and Certificate Signing Requests"; file names are a kubelet's.

mod bootstrap;
mod keeper;
mod request;
mod store;

use std::path::PathBuf;

pub use bootstrap::{Bootstrap, names_file};
pub use keeper::Keeper;
pub use store::Store;

use super::NodeFacts;
use crate::apiserver::{ConnectError, RequestError};
use crate::certificate::{Names, PairError};

/// Which certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Shown to the API server.
    Client,
    /// Shown to those who call the node's API.
    Serving,
}

impl Kind {
    /// Who signs it.
    fn signer(self) -> &'static str {
        match self {
            Self::Client => "kubernetes.io/kube-apiserver-client-kubelet",
            Self::Serving => "kubernetes.io/kubelet-serving",
        }
    }

    /// What it is for. `key encipherment` is for RSA keys only.
    fn usages(self) -> [&'static str; 2] {
        match self {
            Self::Client => ["digital signature", "client auth"],
            Self::Serving => ["digital signature", "server auth"],
        }
    }

    /// The beginning of its files' names.
    fn stem(self) -> &'static str {
        match self {
            Self::Client => "kubelet-client",
            Self::Serving => "kubelet-server",
        }
    }

    /// For log lines.
    fn what(self) -> &'static str {
        match self {
            Self::Client => "client certificate",
            Self::Serving => "serving certificate",
        }
    }

    /// What it must be good for: the addresses in the Node's status, which is what an approver compares with.
    fn names(self, facts: &NodeFacts) -> Names {
        match self {
            Self::Client => Names::default(),
            Self::Serving => Names { dns: [facts.name.clone()].into(), ip: facts.addresses.iter().copied().collect() },
        }
    }
}

/// The user a node is.
fn user(node: &str) -> String {
    format!("system:node:{node}")
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The kubeconfig that is there is wrong in a way that a new certificate would not mend.
    #[error("failed to use the kubeconfig that is there; remove it to bootstrap anew")]
    Kubeconfig(#[source] ConnectError),
    /// The bootstrap kubeconfig is not usable.
    #[error("failed to use the bootstrap kubeconfig")]
    Bootstrap(#[source] ConnectError),
    /// A file cannot be written.
    #[error("failed to write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A key or request cannot be made.
    #[error("failed to make a key and a request for {user}")]
    Make {
        /// Whose.
        user: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// What was written cannot be read again.
    #[error("failed to use the new certificate")]
    Pair(#[source] PairError),
    /// The API server did not take the request.
    #[error("failed to create CertificateSigningRequest {name}")]
    Create {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: RequestError,
    },
    /// Somebody denied it, or the signer could not sign it.
    #[error("CertificateSigningRequest {name} was refused: {reason}")]
    Refused {
        /// Its name.
        name: String,
        /// In the words of who refused.
        reason: String,
    },
    /// It was deleted before there was a certificate.
    #[error("CertificateSigningRequest {0} was deleted before it was signed")]
    Gone(String),
    /// The client certificate has expired (or is gone), and nothing is left to ask for another by.
    #[error(
        "the client certificate {} is past its time and no longer accepted: put a new one there, or pass \
         --bootstrap-kubeconfig FILE so that this node may ask for one (and check this host's clock)",
        path.display()
    )]
    Over {
        /// Its file.
        path: PathBuf,
        /// What the API server answered.
        #[source]
        source: RequestError,
    },
    /// The certificate is not what was asked for.
    #[error("the certificate of CertificateSigningRequest {name} cannot be used: {reason}")]
    Foreign {
        /// The request's name.
        name: String,
        /// What is wrong.
        reason: &'static str,
    },
}
