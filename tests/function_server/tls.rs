//! Who is let in from other hosts: who shows a certificate of the authority, and nobody else.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use lambdalet::function_server::{FunctionServer, Limits, Params, ServerError, Supply, TlsError};
use lambdalet_proto::functionserver::function_client::FunctionClient;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tonic::transport::Endpoint;

use crate::support::{Client, Node, Remembered, files};

/// A certificate authority.
pub(crate) struct Authority {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// Certificate and key, for 127.0.0.1 and both usages.
    pub(crate) fn pair(&self, name: &str) -> (String, String) {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// The files of a server.
    pub(crate) fn install(&self, directory: &Path) {
        let (certificate, key) = self.pair("server");
        fs::write(directory.join("server.crt"), certificate).unwrap();
        fs::write(directory.join("server.key"), key).unwrap();
        fs::write(directory.join("ca.crt"), &self.pem).unwrap();
    }
}

/// A client that believes `authority` and shows `identity`.
async fn client(
    address: SocketAddr,
    authority: &Authority,
    identity: Option<(String, String)>,
) -> Result<Client, String> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
    let mut config = match identity {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
            config.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map_err(|error| error.to_string())?;
    let mut io = Some(TokioIo::new(tls));
    let gone = || std::io::Error::from(std::io::ErrorKind::NotConnected);
    let connector = tower::service_fn(move |_| std::future::ready(io.take().ok_or_else(gone)));
    let channel = Endpoint::from_static("http://node").connect_with_connector(connector).await;
    Ok(Client(FunctionClient::new(channel.map_err(|error| error.to_string())?)))
}

/// Whether such a client gets a replica.
async fn served(node: &Node, authority: &Authority, identity: Option<(String, String)>) -> bool {
    match client(node.address, authority, identity).await {
        Ok(mut client) => client.create().await.is_ok(),
        Err(_) => false,
    }
}

#[tokio::test]
async fn a_certificate_of_the_authority_lets_in_and_nothing_else_does() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, others) = (Authority::new("ours"), Authority::new("others"));
    ours.install(directory.path());
    let replicas = Remembered::new(8);
    let node = Node::with(Some(&replicas), |params| {
        params.listen = SocketAddr::from(([0, 0, 0, 0], 0));
        params.tls = Some(files(directory.path()));
    });
    let mut node = node.await;
    node.address.set_ip([127, 0, 0, 1].into());
    assert!(served(&node, &ours, Some(ours.pair("manager"))).await);
    assert!(!served(&node, &ours, None).await, "no certificate");
    assert!(!served(&node, &ours, Some(others.pair("manager"))).await, "of another authority");
    let plain = Endpoint::from_shared(format!("http://{}", node.address)).unwrap().connect().await;
    let plain = match plain {
        Ok(channel) => Client(FunctionClient::new(channel)).create().await.is_ok(),
        Err(_) => false,
    };
    assert!(!plain, "without TLS");
    assert_eq!(replicas.count(), 1);

    // A renewed set counts at once, and the one before no more.
    others.install(directory.path());
    assert!(served(&node, &others, Some(others.pair("manager"))).await);
    assert!(!served(&node, &ours, Some(ours.pair("manager"))).await);
    // One that is broken lets nobody in, and is no end of the server.
    fs::write(directory.path().join("server.crt"), "rubbish").unwrap();
    assert!(!served(&node, &others, Some(others.pair("manager"))).await);
    others.install(directory.path());
    assert!(served(&node, &others, Some(others.pair("manager"))).await);
}

#[tokio::test]
async fn a_server_that_anybody_could_call_is_not_started() {
    let params = |tls| {
        let supply = watch::channel(Supply::Missing(String::new())).1;
        let listen = SocketAddr::from(([0, 0, 0, 0], 0));
        Params { listen, tls, manager: None, supply, limits: Limits::default() }
    };
    let open = FunctionServer::bind(params(None)).await.err().unwrap();
    assert!(matches!(open, ServerError::Open(_)), "{open}");
    let directory = tempfile::tempdir().unwrap();
    let missing = FunctionServer::bind(params(Some(files(directory.path())))).await.err().unwrap();
    assert!(matches!(missing, ServerError::Tls(TlsError::Read { .. })), "{missing}");
    Authority::new("ours").install(directory.path());
    fs::write(directory.path().join("ca.crt"), "").unwrap();
    let empty = FunctionServer::bind(params(Some(files(directory.path())))).await.err().unwrap();
    assert!(matches!(empty, ServerError::Tls(TlsError::Pem { what: "certificate", .. })), "{empty}");
    Authority::new("ours").install(directory.path());
    fs::write(directory.path().join("server.key"), Authority::new("x").pair("x").1).unwrap();
    let apart = FunctionServer::bind(params(Some(files(directory.path())))).await.err().unwrap();
    assert!(matches!(apart, ServerError::Tls(TlsError::Pair { .. })), "{apart}");
}
