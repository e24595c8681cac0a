//! Who may call: client certificate or TokenReview, then SubjectAccessReview, as a kubelet does it.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use http::{Method, StatusCode, header};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::{Api, PostParams};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::attributes::{Attributes, attributes};
use super::cache::{Answer, Cache};
use super::identity::User;
use super::meters::{Meters, Review, Verdict};
use super::peer::Peer;
use super::tls::Tls;
use crate::telemetry::chain;

/// Answers kept per cache: a few dozen clients times a dozen rights, with room for a burst of strangers.
const CACHED: usize = 1024;
/// Reviews of each kind in flight at once. A flood of strangers' tokens must not become a flood on the API server, nor keep
/// those waiting who are known and only have their rights asked for.
const REVIEWS_IN_FLIGHT: usize = 8;
/// Requests that the reviews of both kinds may have in flight at once.
pub const REVIEWS_AT_ONCE: usize = 2 * REVIEWS_IN_FLIGHT;
/// How long one review may take, waiting for its turn included.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);

/// How rights are decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Authorization {
    /// By SubjectAccessReview (`--authorization-mode=Webhook`).
    #[default]
    Webhook,
    /// Whoever is known may do everything (`--authorization-mode=AlwaysAllow`).
    AlwaysAllow,
}

/// Who is let in. The fields are those of a KubeletConfiguration's `authentication` and `authorization`; the defaults
/// are those a KubeletConfiguration file gets, which are stricter than the kubelet's flags.
#[derive(Clone, Debug)]
pub struct Access {
    /// Let requests without credentials in as `system:anonymous`. Default false.
    pub anonymous: bool,
    /// SHA-256 of a bearer token that needs no review: whoever shows it is `system:local`, of `system:masters`. Default
    /// none; for a node without an API server.
    pub local_token: Option<[u8; 32]>,
    /// Ask TokenReview about bearer tokens. Default true.
    pub token_webhook: bool,
    /// How long a TokenReview answer is used. Default 2 minutes.
    pub token_ttl: Duration,
    /// How rights are decided. Default [`Authorization::Webhook`].
    pub authorization: Authorization,
    /// How long a granted right is used. Default 5 minutes.
    pub authorized_ttl: Duration,
    /// How long a refused right is used. Default 30 seconds.
    pub unauthorized_ttl: Duration,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            anonymous: false,
            local_token: None,
            token_webhook: true,
            token_ttl: Duration::from_secs(2 * 60),
            authorization: Authorization::Webhook,
            authorized_ttl: Duration::from_secs(5 * 60),
            unauthorized_ttl: Duration::from_secs(30),
        }
    }
}

/// Why a review has no answer. Shared by all who waited for it.
#[derive(Clone, Debug, thiserror::Error)]
enum ReviewError {
    #[error("the API server did not answer a {0} in time")]
    TimedOut(&'static str),
    #[error("failed to create a {0}")]
    Failed(&'static str, #[source] Arc<kube::Error>),
    #[error("the API server answered a {0} without a status")]
    NoStatus(&'static str),
}

impl ReviewError {
    /// 500 where an operator must act (no right to create reviews), 503 where waiting may help.
    fn status(&self) -> StatusCode {
        match self {
            Self::Failed(_, source) if refused(source) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NoStatus(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Failed(..) | Self::TimedOut(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// Whether the API server said no, and would say so again.
fn refused(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code < 500 && status.code != 429)
}

/// Why a request is not let in. `Display` is the body of the answer.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("Unauthorized")]
    Unauthorized,
    #[error("method not allowed")]
    Method,
    #[error(
        "Forbidden (user={user}, verb={}, resource=nodes, subresource(s)=[{}])",
        attributes.verb, attributes.subresources.join(" ")
    )]
    Forbidden { user: String, attributes: Attributes },
    #[error("cannot tell who is asking: {0}")]
    Authentication(ReviewError),
    #[error("Authorization error (user={user}, verb={}, resource=nodes, subresource={subresource}): {cause}", attributes.verb)]
    Authorization { user: String, attributes: Attributes, subresource: &'static str, cause: ReviewError },
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::Authentication(cause) | Self::Authorization { cause, .. } => cause.status(),
        };
        (status, format!("{self}\n")).into_response()
    }
}

/// What of a request decides.
struct Asked {
    method: Method,
    path: String,
    token: Option<String>,
    peer: Option<Arc<Peer>>,
}

impl Asked {
    fn of(request: &Request) -> Self {
        let token = request
            .headers()
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.trim().split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim().to_owned())
            .filter(|token| !token.is_empty());
        Self {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            token,
            peer: request.extensions().get::<Arc<Peer>>().cloned(),
        }
    }
}

/// Lets a request through to the routes, or answers it.
pub(super) async fn gate(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    let asked = Asked::of(&request);
    match gate.admit(&asked).await {
        Ok(user) => {
            debug!(user, method = %asked.method, path = asked.path, "request");
            if let Some(peer) = &asked.peer {
                peer.mark_proven();
            }
            next.run(request).await
        }
        Err(refusal) => {
            match &refusal {
                Refusal::Authentication(cause) | Refusal::Authorization { cause, .. } => {
                    warn!(path = asked.path, error = chain(cause), "failed to check the rights of a client");
                }
                _ => debug!(path = asked.path, %refusal, "request refused"),
            }
            refusal.into_response()
        }
    }
}

type TokenCache = Cache<[u8; 32], Option<Arc<User>>, ReviewError>;
type AccessCache = Cache<(Arc<User>, &'static str, &'static str), bool, ReviewError>;

/// Decides, and remembers for a while.
pub(super) struct Gate {
    node: String,
    access: Access,
    tls: Arc<Tls>,
    tokens: TokenCache,
    rights: AccessCache,
    reviewer: Reviewer,
}

impl Gate {
    pub(super) fn new(node: String, access: Access, client: kube::Client, tls: Arc<Tls>, meters: Meters) -> Self {
        let turns = || Arc::new(Semaphore::new(REVIEWS_IN_FLIGHT));
        let reviewer = Reviewer { client, token_turns: turns(), access_turns: turns(), meters };
        Self { node, access, tls, tokens: Cache::new(CACHED), rights: Cache::new(CACHED), reviewer }
    }

    /// The name of the user, who may do this.
    async fn admit(&self, asked: &Asked) -> Result<String, Refusal> {
        let user = self.authenticate(asked).await?;
        let attributes = attributes(&asked.method, &asked.path).ok_or(Refusal::Method)?;
        match self.access.authorization {
            Authorization::AlwaysAllow => {}
            Authorization::Webhook => self.authorize(&user, attributes).await?,
        }
        Ok(user.name.clone())
    }

    /// A certificate first, then a token; a token that is refused is not let in as anonymous.
    async fn authenticate(&self, asked: &Asked) -> Result<Arc<User>, Refusal> {
        if let Some(user) = asked.peer.as_deref().and_then(|peer| self.certified(peer)) {
            return Ok(user);
        }
        match &asked.token {
            // Digests, so that the time a comparison takes tells nothing of the token.
            Some(token) if self.access.local_token == Some(Sha256::digest(token).into()) => Ok(Arc::new(User::local())),
            Some(token) if self.access.token_webhook => self.review_token(token).await,
            None if self.access.anonymous => Ok(Arc::new(User::anonymous())),
            Some(_) | None => Err(Refusal::Unauthorized),
        }
    }

    /// The certificate was verified at the handshake; it may have expired since, or its authority been replaced.
    fn certified(&self, peer: &Peer) -> Option<Arc<User>> {
        let certified = peer.certified.as_ref()?;
        match self.tls.verify_client(&certified.chain) {
            Ok(()) => Some(certified.user.clone()),
            Err(error) => {
                let user = &certified.user.name;
                warn!(peer = %peer.address, user, error = chain(&error), "client certificate no longer valid");
                None
            }
        }
    }

    async fn review_token(&self, token: &str) -> Result<Arc<User>, Refusal> {
        // The cache must not be a store of tokens.
        let key = Sha256::digest(token.as_bytes()).into();
        let (reviewer, keep) = (self.reviewer.clone(), self.access.token_ttl);
        let fetch = || {
            let token = token.to_owned();
            async move { Ok(Answer { value: reviewer.token(token).await?.map(Arc::new), keep }) }.boxed()
        };
        self.tokens.get(key, fetch).await.map_err(Refusal::Authentication)?.ok_or(Refusal::Unauthorized)
    }

    async fn authorize(&self, user: &Arc<User>, attributes: Attributes) -> Result<(), Refusal> {
        for &subresource in attributes.subresources {
            let key = (user.clone(), attributes.verb, subresource);
            let (reviewer, user) = (self.reviewer.clone(), user.clone());
            let (yes, no) = (self.access.authorized_ttl, self.access.unauthorized_ttl);
            let review = access_review(&user, &self.node, attributes.verb, subresource);
            let fetch = || {
                async move {
                    let value = reviewer.access(review).await?;
                    Ok(Answer { value, keep: if value { yes } else { no } })
                }
                .boxed()
            };
            let allowed = self.rights.get(key, fetch).await.map_err(|cause| {
                let user = user.name.clone();
                Refusal::Authorization { user, attributes, subresource, cause }
            })?;
            if allowed {
                return Ok(());
            }
        }
        Err(Refusal::Forbidden { user: user.name.clone(), attributes })
    }
}

fn access_review(user: &User, node: &str, verb: &str, subresource: &str) -> SubjectAccessReview {
    SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(user.name.clone()),
            uid: user.uid.clone(),
            groups: Some(user.groups.clone()),
            extra: (!user.extra.is_empty()).then(|| user.extra.clone()),
            resource_attributes: Some(ResourceAttributes {
                verb: Some(verb.to_owned()),
                version: Some("v1".to_owned()),
                resource: Some("nodes".to_owned()),
                name: Some(node.to_owned()),
                subresource: Some(subresource.to_owned()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    }
}

/// Puts the questions to the API server, a bounded number of each kind at a time.
#[derive(Clone)]
struct Reviewer {
    client: kube::Client,
    token_turns: Arc<Semaphore>,
    access_turns: Arc<Semaphore>,
    meters: Meters,
}

impl Reviewer {
    /// Whose token this is; `None` if nobody's.
    async fn token(&self, token: String) -> Result<Option<User>, ReviewError> {
        let spec = TokenReviewSpec { token, ..TokenReviewSpec::default() };
        let review = TokenReview { spec, ..TokenReview::default() };
        let answer = self.ask(Review::Token, "TokenReview", &review).await?;
        let status = answer.status.ok_or(ReviewError::NoStatus("TokenReview"))?;
        let user = status.user.filter(|_| status.authenticated == Some(true)).and_then(User::of_review);
        self.meters.review(Review::Token, verdict(user.is_some()));
        Ok(user)
    }

    /// Whether the right is granted.
    async fn access(&self, review: SubjectAccessReview) -> Result<bool, ReviewError> {
        let answer = self.ask(Review::Access, "SubjectAccessReview", &review).await?;
        let status = answer.status.ok_or(ReviewError::NoStatus("SubjectAccessReview"))?;
        let allowed = status.allowed && status.denied != Some(true);
        self.meters.review(Review::Access, verdict(allowed));
        Ok(allowed)
    }

    async fn ask<T>(&self, kind: Review, name: &'static str, review: &T) -> Result<T, ReviewError>
    where
        T: kube::Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope>
            + serde::Serialize
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        let api = Api::<T>::all(self.client.clone());
        let params = PostParams::default();
        let turn = async {
            let _turn = match kind {
                Review::Token => self.token_turns.acquire().await,
                Review::Access => self.access_turns.acquire().await,
            };
            api.create(&params, review).await
        };
        let answer = match tokio::time::timeout(REVIEW_TIMEOUT, turn).await {
            Ok(answer) => answer.map_err(|source| ReviewError::Failed(name, Arc::new(source))),
            Err(_) => Err(ReviewError::TimedOut(name)),
        };
        answer.inspect_err(|_| self.meters.review(kind, Verdict::Failed))
    }
}

fn verdict(yes: bool) -> Verdict {
    if yes { Verdict::Allowed } else { Verdict::Denied }
}
