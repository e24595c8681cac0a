//! Certificates for both directions: what callers of the server must show, and what this node shows a resource manager.
//!
//! The files are read for each connection. There are few of those, and so a certificate that was renewed counts at once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::ring;
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// A larger file holds no certificates.
const MAX_FILE: u64 = 4 << 20;
/// The protocol of gRPC, as TLS names it.
const HTTP2: &[u8] = b"h2";

/// PEM files. The certificate is shown to callers and to the resource manager; the authorities are those of both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, then any intermediates.
    pub certificate: PathBuf,
    /// Its key (PKCS#8, PKCS#1 or SEC1).
    pub key: PathBuf,
    /// Authorities whose certificates are believed.
    pub client_ca: PathBuf,
}

/// What is wrong with the files.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One cannot be read.
    #[error("failed to read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// One does not hold the PEM it should.
    #[error("failed to find a {what} in {}", path.display())]
    Pem {
        /// `certificate` or `private key`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// Certificate and key cannot be used, or do not belong together.
    #[error("failed to use certificate {} with its key", path.display())]
    Pair {
        /// The certificate's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// Nobody can be verified by these authorities.
    #[error("failed to verify others by {}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: VerifierBuilderError,
    },
}

impl TlsFiles {
    /// For the server: who calls must show a certificate of an authority. Reads files, so it blocks.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn server(&self) -> Result<ServerConfig, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(self.authorities()?, Arc::clone(&provider)).build();
        let verifier = verifier.map_err(|source| self.authority(source))?;
        let (chain, key) = self.pair()?;
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(|source| self.unusable(source))?.with_client_cert_verifier(verifier);
        let mut config = config.with_single_cert(chain, key).map_err(|source| self.unusable(source))?;
        config.alpn_protocols = vec![HTTP2.to_vec()];
        Ok(config)
    }

    /// For the client of a resource manager, which has to show one too. Reads files, so it blocks.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn client(&self) -> Result<ClientConfig, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(self.authorities()?, Arc::clone(&provider)).build();
        let verifier = verifier.map_err(|source| self.authority(source))?;
        let (chain, key) = self.pair()?;
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(|source| self.unusable(source))?.with_webpki_verifier(verifier);
        let mut config = config.with_client_auth_cert(chain, key).map_err(|source| self.unusable(source))?;
        config.alpn_protocols = vec![HTTP2.to_vec()];
        Ok(config)
    }

    fn unusable(&self, source: rustls::Error) -> TlsError {
        TlsError::Pair { path: self.certificate.clone(), source }
    }

    fn authority(&self, source: VerifierBuilderError) -> TlsError {
        TlsError::Authority { path: self.client_ca.clone(), source }
    }

    fn pair(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let key = read(&self.key)?;
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(not_found("private key", &self.key))?;
        Ok((certificates(&self.certificate)?, key))
    }

    fn authorities(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.client_ca)? {
            let unusable = |source| TlsError::Pair { path: self.client_ca.clone(), source };
            roots.add(certificate).map_err(unusable)?;
        }
        Ok(Arc::new(roots))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(path)?;
    let all = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
    let all = all.map_err(not_found("certificate", path))?;
    if all.is_empty() {
        return Err(not_found("certificate", path)(pem::Error::NoItemsFound));
    }
    Ok(all)
}

fn not_found(what: &'static str, path: &Path) -> impl FnOnce(pem::Error) -> TlsError {
    move |source| TlsError::Pem { what, path: path.to_owned(), source }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let read = || {
        if fs::metadata(path)?.len() > MAX_FILE {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is too large to hold certificates"));
        }
        fs::read(path)
    };
    read().map_err(|source| TlsError::Read { path: path.to_owned(), source })
}
