//! The serving certificate and the client authority: loaded, and loaded again when their files change.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use sha2::{Digest, Sha256};

use super::self_signed::{self, SelfSigned};
use crate::certificate::Certificate;
use crate::config::tls::{CipherSuite, TlsVersion};

/// A file larger than this is not a certificate bundle.
const MAX_FILE: u64 = 4 << 20;

/// Where the serving certificate comes from.
#[derive(Clone, Debug)]
pub enum Serving {
    /// `--tls-cert-file` (the certificate, then any intermediates) and `--tls-private-key-file`, both PEM.
    Files {
        /// The chain.
        certificate: PathBuf,
        /// The key (PKCS#8, PKCS#1 or SEC1).
        key: PathBuf,
    },
    /// Made here and signed by itself.
    SelfSigned(SelfSigned),
    /// Asked for by `kubernetes.io/kubelet-serving` requests (`serverTLSBootstrap`).
    Requested {
        /// The certificate and its key in one PEM file, once it was granted.
        file: PathBuf,
        /// What is shown while there is none, or it has expired.
        meanwhile: SelfSigned,
    },
}

/// What a TLS set-up is made from.
#[derive(Clone, Debug)]
pub struct TlsParams {
    /// The serving certificate.
    pub serving: Serving,
    /// `--client-ca-file`: PEM authorities whose client certificates are believed. Without it no client certificate is
    /// asked for, and only tokens count.
    pub client_ca_file: Option<PathBuf>,
    /// `tlsMinVersion`.
    pub min_version: TlsVersion,
    /// `tlsCipherSuites`: those offered for TLS 1.2; empty offers all. Those of TLS 1.3 are always offered.
    pub cipher_suites: Vec<CipherSuite>,
}

impl TlsParams {
    /// A set-up that offers every version and cipher suite there is and asks for no client certificate.
    pub fn new(serving: Serving) -> Self {
        Self { serving, client_ca_file: None, min_version: TlsVersion::default(), cipher_suites: Vec::new() }
    }
}

/// What is wrong with the TLS files.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("failed to read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("failed to write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file does not hold the PEM it should.
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
    #[error("failed to use certificate {} with key {}", certificate.display(), key.display())]
    Unusable {
        /// The chain's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// A certificate in the client authority bundle cannot be used.
    #[error("failed to use certificate {number} of client CA file {}", path.display())]
    ClientCa {
        /// The bundle.
        path: PathBuf,
        /// Which of its certificates, from 1.
        number: usize,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// No verifier could be made from the client authorities.
    #[error("failed to verify clients by {}", path.display())]
    Verifier {
        /// The bundle.
        path: PathBuf,
        /// Why.
        #[source]
        source: VerifierBuilderError,
    },
    /// No version is left with these cipher suites.
    #[error("failed to offer TLS from {0:?} on with the cipher suites chosen")]
    Versions(TlsVersion, #[source] rustls::Error),
    /// A self-signed certificate could not be made.
    #[error("failed to make a self-signed certificate for {name}")]
    Generate {
        /// The node.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
}

/// What is in use now.
struct Loaded {
    config: Arc<ServerConfig>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
}

/// The files' contents, unparsed.
struct Contents {
    /// Where certificate and key are.
    paths: (PathBuf, PathBuf),
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Contents {
    fn read(params: &TlsParams) -> Result<Self, TlsError> {
        let paths = params.serving.choose(Timestamp::now())?;
        let client_ca = params.client_ca_file.as_deref().map(read).transpose()?;
        Ok(Self { certificate: read(&paths.0)?, key: read(&paths.1)?, client_ca, paths })
    }

    /// Contents are compared and not times: a file replaced within the clock's grain, or through a symbolic link as a
    /// mounted Secret is, is seen all the same.
    fn digest(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        for part in [Some(&self.certificate), Some(&self.key), self.client_ca.as_ref()] {
            let part = part.map_or(&[][..], Vec::as_slice);
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        digest.finalize().into()
    }
}

impl Serving {
    /// The files to use now; a self-signed pair is made where one is wanted and none fits.
    fn choose(&self, now: Timestamp) -> Result<(PathBuf, PathBuf), TlsError> {
        let own = match self {
            Self::Files { certificate, key } => return Ok((certificate.clone(), key.clone())),
            Self::Requested { file, .. } if Certificate::of_pair(file).is_ok_and(|pair| pair.not_after > now) => {
                return Ok((file.clone(), file.clone()));
            }
            Self::SelfSigned(own) | Self::Requested { meanwhile: own, .. } => own,
        };
        self_signed::ensure(own, now)?;
        Ok((own.certificate(), own.key()))
    }
}

/// The TLS set-up, renewed by [`Tls::refresh`].
pub(super) struct Tls {
    params: TlsParams,
    loaded: ArcSwap<Loaded>,
    /// Of the contents last tried, good or bad, so that each is tried and complained about once.
    tried: Mutex<Result<[u8; 32], String>>,
}

impl Tls {
    /// Reads the files, having made a self-signed certificate first where one is wanted and none fits.
    pub(super) fn load(params: TlsParams) -> Result<Self, TlsError> {
        let contents = Contents::read(&params)?;
        let loaded = parse(&params, &contents)?;
        let tried = Mutex::new(Ok(contents.digest()));
        Ok(Self { params, loaded: ArcSwap::from_pointee(loaded), tried })
    }

    /// The set-up for a new connection.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        self.loaded.load().config.clone()
    }

    /// Whether this chain would be believed now.
    ///
    /// # Errors
    /// Why not; also if no client authority is configured.
    pub(super) fn verify_client(&self, chain: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
        let loaded = self.loaded.load();
        let (Some(verifier), Some((first, rest))) = (&loaded.clients, chain.split_first()) else {
            return Err(rustls::Error::NoCertificatesPresented);
        };
        verifier.verify_client_cert(first, rest, UnixTime::now()).map(drop)
    }

    /// Takes over files that changed since they were last tried; what is in use stays in use if they are broken. Reads
    /// files, so it blocks. Says whether something changed.
    ///
    /// # Errors
    /// What is wrong with the new files, once per change.
    pub(super) fn refresh(&self) -> Result<bool, TlsError> {
        match self.try_refresh() {
            Ok(changed) => Ok(changed),
            Err(error) => {
                // A file that cannot be read has no contents to remember, so its complaint is remembered.
                let complaint = crate::telemetry::chain(&error);
                let mut tried = self.tried.lock().unwrap_or_else(PoisonError::into_inner);
                if !matches!(error, TlsError::Read { .. } | TlsError::Write { .. } | TlsError::Generate { .. }) {
                    return Err(error);
                }
                if matches!(&*tried, Err(before) if *before == complaint) {
                    return Ok(false);
                }
                *tried = Err(complaint);
                Err(error)
            }
        }
    }

    fn try_refresh(&self) -> Result<bool, TlsError> {
        let contents = Contents::read(&self.params)?;
        let digest = contents.digest();
        {
            let mut tried = self.tried.lock().unwrap_or_else(PoisonError::into_inner);
            if matches!(&*tried, Ok(before) if *before == digest) {
                return Ok(false);
            }
            *tried = Ok(digest);
        }
        self.loaded.store(Arc::new(parse(&self.params, &contents)?));
        Ok(true)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > MAX_FILE {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, format!("{size} bytes"))));
    }
    fs::read(path).map_err(failed)
}

fn parse(params: &TlsParams, contents: &Contents) -> Result<Loaded, TlsError> {
    let provider = Arc::new(provider(&params.cipher_suites));
    let (certificate, key) = contents.paths.clone();
    let chain = certificates(&contents.certificate, &certificate)?;
    let private = PrivateKeyDer::from_pem_slice(&contents.key).map_err(|source| TlsError::Pem {
        what: "private key",
        path: key.clone(),
        source,
    })?;
    let clients = match (&params.client_ca_file, &contents.client_ca) {
        (Some(path), Some(pem)) => Some(client_verifier(&provider, pem, path)?),
        _ => None,
    };
    let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
    let builder = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(match params.min_version {
            TlsVersion::Tls12 => &versions,
            TlsVersion::Tls13 => &versions[..1],
        })
        .map_err(|source| TlsError::Versions(params.min_version, source))?;
    let builder = match &clients {
        Some(verifier) => builder.with_client_cert_verifier(verifier.clone()),
        None => builder.with_no_client_auth(),
    };
    let mut config =
        builder.with_single_cert(chain, private).map_err(|source| TlsError::Unusable { certificate, key, source })?;
    // Upgrades to SPDY and WebSocket exist in HTTP/1.1 only.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A resumed session would skip the check of the client's certificate.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Loaded { config: Arc::new(config), clients })
}

/// The cipher suites chosen, those of TLS 1.3 always among them.
fn provider(chosen: &[CipherSuite]) -> CryptoProvider {
    let mut provider = ring::default_provider();
    if !chosen.is_empty() {
        provider
            .cipher_suites
            .retain(|suite| suite.tls13().is_some() || chosen.iter().any(|chosen| chosen.id() == suite.suite()));
    }
    provider
}

fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::Pem { what: "certificate", path: path.to_owned(), source };
    let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if all.is_empty() { Err(failed(pem::Error::NoItemsFound)) } else { Ok(all) }
}

fn client_verifier(
    provider: &Arc<CryptoProvider>,
    pem: &[u8],
    path: &Path,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    for (index, authority) in certificates(pem, path)?.into_iter().enumerate() {
        roots.add(authority).map_err(|source| TlsError::ClientCa {
            path: path.to_owned(),
            number: index + 1,
            source,
        })?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|source| TlsError::Verifier { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use rustls::crypto::ring::cipher_suite::{
        TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 as AES_128, TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 as AES_256,
        TLS13_AES_128_GCM_SHA256 as NEW,
    };
    use rustls::version::{TLS12, TLS13};
    use rustls::{ClientConfig, ClientConnection, ServerConnection, SupportedCipherSuite};
    use tokio::sync::watch;

    use super::*;
    use crate::node::NodeFacts;

    fn own(directory: &Path, name: &str) -> SelfSigned {
        SelfSigned { directory: directory.to_owned(), node: node(name).1 }
    }

    fn node(name: &str) -> (watch::Sender<NodeFacts>, watch::Receiver<NodeFacts>) {
        let (capacity, allocatable) = Default::default();
        let addresses = vec![IpAddr::from([127, 0, 0, 1])];
        watch::channel(NodeFacts { name: name.to_owned(), addresses, capacity, allocatable })
    }

    fn files(directory: &Path, name: &str) -> TlsParams {
        let own = own(directory, name);
        self_signed::ensure(&own, Timestamp::now()).unwrap();
        let serving = Serving::Files { certificate: own.certificate(), key: own.key() };
        TlsParams::new(serving)
    }

    #[test]
    fn a_broken_file_keeps_the_old_certificate_and_complains_once() {
        let directory = tempfile::tempdir().unwrap();
        let params = files(directory.path(), "one");
        let Serving::Files { certificate, .. } = params.serving.clone() else { panic!() };
        let tls = Tls::load(params).unwrap();
        let before = tls.config();
        assert!(!tls.refresh().unwrap());

        let good = fs::read(&certificate).unwrap();
        fs::write(&certificate, "rubbish").unwrap();
        assert!(matches!(tls.refresh(), Err(TlsError::Pem { what: "certificate", .. })));
        assert!(!tls.refresh().unwrap());
        fs::remove_file(&certificate).unwrap();
        assert!(matches!(tls.refresh(), Err(TlsError::Read { .. })));
        assert!(!tls.refresh().unwrap());
        assert!(Arc::ptr_eq(&before, &tls.config()));

        fs::write(&certificate, good).unwrap();
        assert!(tls.refresh().unwrap());
        assert!(!tls.refresh().unwrap());
    }

    #[test]
    fn a_key_that_does_not_belong_is_refused() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        files(one.path(), "one");
        files(two.path(), "two");
        let serving =
            Serving::Files { certificate: one.path().join("kubelet.crt"), key: two.path().join("kubelet.key") };
        let refused = Tls::load(TlsParams::new(serving));
        assert!(matches!(refused, Err(TlsError::Unusable { .. })));
    }

    #[test]
    fn a_client_ca_file_without_certificates_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let mut params = files(directory.path(), "one");
        let empty = directory.path().join("ca.crt");
        fs::write(&empty, "# nothing\n").unwrap();
        params.client_ca_file = Some(empty);
        let error = Tls::load(params).err().unwrap();
        assert!(error.to_string().contains("ca.crt"), "{error}");
    }

    #[test]
    fn a_requested_certificate_takes_over_once_it_is_there_and_while_it_holds() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("kubelet-server-current.pem");
        let serving = Serving::Requested { file: file.clone(), meanwhile: own(directory.path(), "a") };
        let shown = |tls: &Tls| tls.params.serving.choose(Timestamp::now()).unwrap().0;
        let tls = Tls::load(TlsParams::new(serving.clone())).unwrap();
        assert_eq!(shown(&tls), directory.path().join("kubelet.crt"));

        let grant = |until: i32| {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut params = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap();
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(until, 1, 1);
            let pem = params.self_signed(&key).unwrap().pem();
            fs::write(&file, format!("{pem}{}", key.serialize_pem())).unwrap();
        };
        grant(2500);
        assert!(tls.refresh().unwrap());
        assert_eq!(shown(&tls), file);
        // A start finds it too.
        assert_eq!(shown(&Tls::load(TlsParams::new(serving)).unwrap()), file);
        for broken in [true, false] {
            if broken {
                fs::write(&file, "rubbish").unwrap()
            } else {
                grant(2021)
            }
            tls.refresh().unwrap();
            assert_eq!(shown(&tls), directory.path().join("kubelet.crt"));
        }
    }

    #[test]
    fn an_address_that_changes_is_in_the_certificate_of_its_own_from_the_next_look_on() {
        let directory = tempfile::tempdir().unwrap();
        let (sender, node) = node("a");
        let own = SelfSigned { directory: directory.path().to_owned(), node };
        let shown = || Certificate::first(&fs::read(own.certificate()).unwrap()).unwrap().names.ip;
        let tls = Tls::load(TlsParams::new(Serving::SelfSigned(own.clone()))).unwrap();
        assert_eq!(shown(), ["127.0.0.1".parse().unwrap()].into());
        sender.send_modify(|facts| facts.addresses = vec!["10.0.0.2".parse().unwrap()]);
        assert!(tls.refresh().unwrap());
        assert_eq!(shown(), ["10.0.0.2".parse().unwrap()].into());
        assert!(!tls.refresh().unwrap());
    }

    #[test]
    fn only_the_suites_and_versions_chosen_are_offered() {
        let suites = |chosen: &[&str]| {
            let chosen: Vec<CipherSuite> = chosen.iter().map(|name| name.parse().unwrap()).collect();
            let (new, old): (Vec<_>, Vec<_>) =
                provider(&chosen).cipher_suites.into_iter().partition(|suite| suite.tls13().is_some());
            (new.len(), old.len())
        };
        assert_eq!(suites(&[]), (3, 6));
        assert_eq!(suites(&["TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"]), (3, 1));
        assert_eq!(suites(&["TLS_AES_128_GCM_SHA256"]), (3, 0));
    }

    /// The suite that a client with this one alone agrees on with the node, or why the node refuses it.
    fn handshake(params: &TlsParams, suite: SupportedCipherSuite) -> Result<SupportedCipherSuite, rustls::Error> {
        let Serving::Files { certificate, .. } = &params.serving else { panic!() };
        let mut roots = RootCertStore::empty();
        roots.add(certificates(&fs::read(certificate).unwrap(), certificate).unwrap().remove(0)).unwrap();
        let provider = CryptoProvider { cipher_suites: vec![suite], ..ring::default_provider() };
        let version = if suite.tls13().is_some() { &TLS13 } else { &TLS12 };
        let client =
            ClientConfig::builder_with_provider(Arc::new(provider)).with_protocol_versions(&[version]).unwrap();
        let client = client.with_root_certificates(roots).with_no_client_auth();
        let mut client = ClientConnection::new(Arc::new(client), "one".try_into().unwrap()).unwrap();
        let mut server = ServerConnection::new(Tls::load(params.clone()).unwrap().config()).unwrap();
        while client.is_handshaking() || server.is_handshaking() {
            let mut sent = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut sent).unwrap();
            }
            let mut sent = &sent[..];
            while !sent.is_empty() {
                server.read_tls(&mut sent).unwrap();
                server.process_new_packets()?;
            }
            let mut sent = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut sent).unwrap();
            }
            let mut sent = &sent[..];
            while !sent.is_empty() {
                client.read_tls(&mut sent).unwrap();
                client.process_new_packets().unwrap();
            }
        }
        Ok(server.negotiated_cipher_suite().unwrap())
    }

    #[test]
    fn a_client_of_an_older_version_or_with_other_suites_gets_no_connection() {
        let directory = tempfile::tempdir().unwrap();
        let any = files(directory.path(), "one");
        let newest = TlsParams { min_version: TlsVersion::Tls13, ..any.clone() };
        let chosen = ["TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384".parse().unwrap()];
        let one = TlsParams { cipher_suites: chosen.to_vec(), ..any.clone() };
        for (params, welcome, refused) in [
            (any, &[AES_128, AES_256, NEW][..], &[][..]),
            (newest, &[NEW], &[AES_128, AES_256]),
            (one, &[AES_256, NEW], &[AES_128]),
        ] {
            for suite in welcome {
                assert_eq!(handshake(&params, *suite), Ok(*suite), "{params:?}");
            }
            for suite in refused {
                assert!(handshake(&params, *suite).is_err(), "{suite:?} with {params:?}");
            }
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let serving = Serving::Files { certificate: "/nowhere/tls.crt".into(), key: "/nowhere/tls.key".into() };
        let error = Tls::load(TlsParams::new(serving)).err().unwrap();
        assert_eq!(error.to_string(), "failed to read /nowhere/tls.crt");
    }
}
