//! One client connection as the request handlers see it.

use std::net::SocketAddr;
use std::sync::Arc;

use rustls_pki_types::CertificateDer;

use super::identity::User;
use super::slots::Proof;

/// The other end of a connection; every request of the connection carries it as an extension.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    /// Present if the client showed a certificate that was verified and names a user.
    pub(super) certified: Option<Certified>,
    proof: Proof,
}

/// A verified client certificate.
#[derive(Debug)]
pub(super) struct Certified {
    /// The client's own certificate first.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) user: Arc<User>,
}

impl Peer {
    /// `chain` is what the TLS handshake verified.
    pub(super) fn new(address: SocketAddr, chain: Option<&[CertificateDer<'static>]>, proof: Proof) -> Self {
        let certified = chain.and_then(|chain| {
            let user = Arc::new(User::of_certificate(chain.first()?)?);
            Some(Certified { chain: chain.to_vec(), user })
        });
        Self { address, certified, proof }
    }

    /// This client had a request let through: its connection is given up for another's only when it idles.
    pub(super) fn mark_proven(&self) {
        self.proof.mark();
    }
}
