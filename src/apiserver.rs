//! The way to the API server: the kubeconfig, who it makes us, and what its failures mean.

mod client;
pub mod reload;

use std::error::Error as StdError;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::SelfSubjectReview;
use kube::api::PostParams;
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Api, Client, Config};

use crate::certificate::Certificate;

/// Requests that may wait for an answer at once. Each takes a connection of its own, with buffers of some hundred
/// kilobytes that idle for a minute and a half: a burst of Pods would leave dozens. A watch that was answered counts no
/// more.
const REQUESTS_AT_ONCE: usize = 12;

/// How long one request may take before it counts as failed. Watches are not requests in this sense.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no client. Each is final: the file has to change first.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The file is not there.
    #[error("there is no kubeconfig {path}: pass the right file with --kubeconfig", path = .0.display())]
    Missing(PathBuf),
    /// The file does not parse.
    #[error("the kubeconfig {path} is malformed: {message}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where and what is wrong; never the content, which is secret.
        message: String,
    },
    /// The file parses but names what is not there, or cannot be read.
    #[error("the kubeconfig {path} cannot be used", path = path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: KubeconfigError,
    },
    /// There is no ServiceAccount here.
    #[error("this is no Pod of a cluster: pass --kubeconfig FILE")]
    NoPod(#[source] kube::config::InClusterError),
    /// The CA is not one.
    #[error(
        "the certificate authority in the kubeconfig {path} holds no certificate: the API server could not be trusted",
        path = .0.display()
    )]
    NoAuthority(PathBuf),
    /// The client certificate is past its time.
    #[error(
        "the client certificate in the kubeconfig {path} expired at {at}: issue a new one (and check this host's \
         clock if that surprises you)",
        path = path.display()
    )]
    Expired {
        /// The kubeconfig.
        path: PathBuf,
        /// Its notAfter.
        at: Timestamp,
    },
    /// The certificate or key is not one.
    #[error("the credentials in the kubeconfig {path} cannot be used", path = path.display())]
    Credentials {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<kube::Error>,
    },
}

/// A client and where it leads, for messages.
#[derive(Clone)]
pub struct ApiServer {
    /// The client. Its requests have no timeout of their own; use [`ApiServer::request`].
    pub client: Client,
    /// The API server's URL.
    pub url: String,
    /// The kubeconfig the client was made from.
    pub kubeconfig: PathBuf,
}

/// What kind of failure a request met, on which callers decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// No connection, or no answer in time. A retry may help.
    Unreachable,
    /// The server's certificate is not signed by the kubeconfig's CA. A retry cannot help, since the CA is read once.
    UnknownAuthority,
    /// The server's certificate is wrong in another way (its time, its names). A retry may help once it is replaced.
    ServerCertificate,
    /// 401: the credentials are not accepted.
    Unauthorized,
    /// 403: they are, but may not do this.
    Forbidden,
    /// 404.
    NotFound,
    /// 409.
    Conflict,
    /// Anything else.
    Other,
}

/// A failed request in words.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// Its kind.
    pub trouble: Trouble,
    message: String,
    #[source]
    source: Option<Box<kube::Error>>,
}

impl ApiServer {
    /// A client from a kubeconfig; nothing is sent yet. Needs a tokio runtime around it.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn from_kubeconfig(path: &Path) -> Result<Self, ConnectError> {
        Self::limited(path, REQUESTS_AT_ONCE).await
    }

    /// The same, with as many requests at once.
    async fn limited(path: &Path, requests: usize) -> Result<Self, ConnectError> {
        let config = load(path).await?;
        let url = config.cluster_url.to_string();
        let client = client::new(config, requests)
            .map_err(|source| ConnectError::Credentials { path: path.to_owned(), source: Box::new(source) })?;
        Ok(Self { client, url, kubeconfig: path.to_owned() })
    }

    /// What stands for an API server where there is none: each request is answered at once, with 503.
    pub fn nowhere() -> Self {
        let answer = |_: http::Request<kube::client::Body>| async {
            let text = r#"{"kind":"Status","apiVersion":"v1","status":"Failure","code":503,
                "reason":"ServiceUnavailable","message":"this node has no API server"}"#;
            let body = kube::client::Body::from(text.as_bytes().to_vec());
            http::Response::builder().status(http::StatusCode::SERVICE_UNAVAILABLE).body(body)
        };
        let client = Client::new(tower::service_fn(answer), "default");
        Self { client, url: "nowhere".to_owned(), kubeconfig: PathBuf::new() }
    }

    /// A client for a process in a Pod: the ServiceAccount's token, read again when it is renewed.
    ///
    /// # Errors
    /// [`ConnectError::NoPod`] outside of a Pod.
    pub fn in_cluster() -> Result<Self, ConnectError> {
        let config = Config::incluster().map_err(ConnectError::NoPod)?;
        let url = config.cluster_url.to_string();
        let kubeconfig = PathBuf::from("/var/run/secrets/kubernetes.io/serviceaccount");
        let failed = |source| ConnectError::Credentials { path: kubeconfig.clone(), source: Box::new(source) };
        let client = client::new(config, REQUESTS_AT_ONCE).map_err(failed)?;
        Ok(Self { client, url, kubeconfig })
    }

    /// Waits for a request, at most [`REQUEST_TIMEOUT`].
    ///
    /// # Errors
    /// What went wrong and what to do about it, naming the server or the file.
    pub async fn request<T>(&self, request: impl Future<Output = kube::Result<T>>) -> Result<T, RequestError> {
        match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
            Ok(answer) => answer.map_err(|error| self.explain(error)),
            Err(_) => Err(RequestError {
                trouble: Trouble::Unreachable,
                message: format!("the API server at {} did not answer within {REQUEST_TIMEOUT:?}", self.url),
                source: None,
            }),
        }
    }

    /// Who the API server takes us for (`system:node:NAME`, `system:serviceaccount:…`).
    ///
    /// # Errors
    /// As [`ApiServer::request`].
    pub async fn whoami(&self) -> Result<String, RequestError> {
        let reviews: Api<SelfSubjectReview> = Api::all(self.client.clone());
        let review = self.request(reviews.create(&PostParams::default(), &SelfSubjectReview::default())).await?;
        Ok(review.status.and_then(|status| status.user_info).and_then(|user| user.username).unwrap_or_default())
    }

    /// The error of a request in words.
    pub fn explain(&self, error: kube::Error) -> RequestError {
        let trouble = classify(&error);
        let (url, file) = (&self.url, self.kubeconfig.display());
        let message = match trouble {
            Trouble::Unreachable => format!(
                "the API server at {url} (from {file}) cannot be reached: check that it runs and that nothing blocks \
                 the way"
            ),
            Trouble::UnknownAuthority => format!(
                "the API server at {url} shows a certificate that the CA in {file} did not sign: take \
                 certificate-authority-data from that very cluster"
            ),
            Trouble::ServerCertificate => {
                format!("the certificate of the API server at {url} is not valid: check it, and this host's clock")
            }
            Trouble::Unauthorized => format!(
                "the API server at {url} does not accept the credentials in {file}: they expired or belong to another \
                 cluster, so issue new ones"
            ),
            Trouble::Forbidden => format!("the identity in {file} may not do this on {url}"),
            Trouble::NotFound | Trouble::Conflict | Trouble::Other => format!("request to {url} failed"),
        };
        RequestError { trouble, message, source: Some(Box::new(error)) }
    }
}

async fn load(path: &Path) -> Result<Config, ConnectError> {
    let unusable = |source| match source {
        KubeconfigError::ReadConfig(error, _) if error.kind() == std::io::ErrorKind::NotFound => {
            ConnectError::Missing(path.to_owned())
        }
        // Its Display quotes the file, keys included.
        KubeconfigError::Parse(error) => {
            ConnectError::Malformed { path: path.to_owned(), message: crate::config::document::yaml_error(&error) }
        }
        source => ConnectError::Unusable { path: path.to_owned(), source },
    };
    let kubeconfig = Kubeconfig::read_from(path).map_err(unusable)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(unusable)?;
    if config.root_cert.as_ref().is_some_and(Vec::is_empty) {
        return Err(ConnectError::NoAuthority(path.to_owned()));
    }
    match certificate_end(&config.auth_info) {
        Some(at) if at < Timestamp::now() => Err(ConnectError::Expired { path: path.to_owned(), at }),
        _ => Ok(config),
    }
}

/// When the client certificate ends; `None` without one, or if it cannot be read (the TLS set-up then says why).
fn certificate_end(auth: &AuthInfo) -> Option<Timestamp> {
    let pem = match (&auth.client_certificate_data, &auth.client_certificate) {
        (Some(data), _) => base64::engine::general_purpose::STANDARD.decode(data.trim()).ok()?,
        (None, Some(file)) => std::fs::read(file).ok()?,
        (None, None) => return None,
    };
    Certificate::first(&pem).map(|certificate| certificate.not_after)
}

fn classify(error: &kube::Error) -> Trouble {
    if let kube::Error::Api(status) = error {
        return match status.code {
            401 => Trouble::Unauthorized,
            403 => Trouble::Forbidden,
            404 => Trouble::NotFound,
            409 => Trouble::Conflict,
            _ => Trouble::Other,
        };
    }
    let mut transport = matches!(error, kube::Error::HyperError(_));
    let mut source: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(tls) = tls_error(cause) {
            return match tls {
                rustls::Error::InvalidCertificate(
                    rustls::CertificateError::UnknownIssuer | rustls::CertificateError::BadSignature,
                ) => Trouble::UnknownAuthority,
                rustls::Error::InvalidCertificate(_) => Trouble::ServerCertificate,
                _ => Trouble::Other,
            };
        }
        transport |= cause.is::<std::io::Error>() || cause.is::<hyper::Error>();
        transport |= cause.is::<hyper_util::client::legacy::Error>();
        source = cause.source();
    }
    if transport { Trouble::Unreachable } else { Trouble::Other }
}

/// A TLS error, also where it hides inside an I/O error (whose `source` skips it).
fn tls_error<'a>(cause: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let mut inner = cause;
    loop {
        if let Some(tls) = inner.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        let wrapped: &'a (dyn StdError + 'static) = inner.downcast_ref::<std::io::Error>()?.get_ref()?;
        inner = wrapped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn where_there_is_no_api_server_every_request_says_so_at_once() {
        let nowhere = ApiServer::nowhere();
        let asked = Api::<k8s_openapi::api::core::v1::Pod>::default_namespaced(nowhere.client.clone()).get("a").await;
        let kube::Error::Api(answer) = asked.unwrap_err() else { panic!("an answer") };
        assert_eq!((answer.code, answer.message.as_str()), (503, "this node has no API server"));
    }
    use crate::telemetry::chain;

    fn server() -> ApiServer {
        let service = tower::service_fn(|_: http::Request<kube::client::Body>| async {
            std::future::pending::<Result<http::Response<kube::client::Body>, std::io::Error>>().await
        });
        let client = Client::new(service, "default");
        ApiServer { client, url: "https://api.test:6443/".to_owned(), kubeconfig: PathBuf::from("/etc/kc") }
    }

    fn api_error(code: u16, message: &str) -> kube::Error {
        let status = kube::core::Status { code, message: message.to_owned(), ..kube::core::Status::default() };
        kube::Error::Api(Box::new(status))
    }

    fn tls(error: rustls::Error) -> kube::Error {
        // As hyper's connector wraps it.
        kube::Error::Service(Box::new(std::io::Error::other(std::io::Error::other(error))))
    }

    #[tokio::test]
    async fn each_failure_names_the_server_or_the_file_and_what_to_do() {
        let server = server();
        let unknown = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let expired = rustls::Error::InvalidCertificate(rustls::CertificateError::Expired);
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        for (error, trouble, named) in [
            (tls(unknown), Trouble::UnknownAuthority, "the CA in /etc/kc did not sign"),
            (tls(expired), Trouble::ServerCertificate, "https://api.test:6443/"),
            (kube::Error::Service(Box::new(refused)), Trouble::Unreachable, "https://api.test:6443/"),
            (api_error(401, "Unauthorized"), Trouble::Unauthorized, "the credentials in /etc/kc"),
            (api_error(403, "nodes is forbidden"), Trouble::Forbidden, "nodes is forbidden"),
            (api_error(404, "gone"), Trouble::NotFound, "gone"),
            (api_error(409, "exists"), Trouble::Conflict, "exists"),
            (api_error(500, "etcd is full"), Trouble::Other, "etcd is full"),
        ] {
            let explained = server.explain(error);
            assert_eq!(explained.trouble, trouble, "{explained}");
            assert!(chain(&explained).contains(named), "{}", chain(&explained));
        }
    }
}
