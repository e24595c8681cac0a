//! Service account tokens: asked for in the Pod's name, renewed before they run out.
//!
//! The token on disk tells by its own claims when that is, so nothing else has to be remembered.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount, ServiceAccountTokenProjection};
use kube::api::PostParams;
use kube::{Api, Client};
use serde::Deserialize;

/// How long a token is good for if the Pod does not say; the API's default.
const DEFAULT_LIFE: i64 = 3600;
/// Renewed at the latest after this, however long it is good for.
const OLDEST: i64 = 24 * 3600;
/// Longest wait for the API server.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// When a token was made and when it ends, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Claims {
    iat: i64,
    exp: i64,
}

impl Claims {
    /// Those of a JSON web token. Only the kubelet's own bookkeeping depends on them, so the signature is not checked.
    pub(super) fn of(token: &[u8]) -> Option<Self> {
        let payload = token.split(|byte| *byte == b'.').nth(1)?;
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
    }

    /// How long the token may stay: until 80 % of its life are over, a day at most; zero if that has passed.
    pub(super) fn fresh_for(self, now: Timestamp) -> Duration {
        let life = self.exp.saturating_sub(self.iat).max(0);
        let renewal = self.iat.saturating_add((life / 5 * 4).min(OLDEST));
        Duration::from_secs(u64::try_from(renewal.saturating_sub(now.as_second())).unwrap_or(0))
    }
}

/// A new token for the Pod's service account, bound to the Pod.
pub(super) async fn request(
    client: &Client,
    pod: &Pod,
    projection: &ServiceAccountTokenProjection,
) -> Result<String, kube::Error> {
    let meta = &pod.metadata;
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref()).unwrap_or("default");
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), meta.namespace.as_deref().unwrap_or("default"));
    let spec = TokenRequestSpec {
        // Without one, the API server puts in its own.
        audiences: projection.audience.clone().filter(|audience| !audience.is_empty()).map(|audience| vec![audience]),
        expiration_seconds: Some(projection.expiration_seconds.unwrap_or(DEFAULT_LIFE)),
        bound_object_ref: Some(BoundObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: meta.name.clone(),
            uid: meta.uid.clone(),
        }),
        ..TokenRequestSpec::default()
    };
    let request = TokenRequest { spec: Some(spec), ..TokenRequest::default() };
    let parameters = PostParams::default();
    let answer = tokio::time::timeout(REQUEST_TIMEOUT, api.create_token_request(account, &parameters, &request));
    let answer = answer.await.unwrap_or_else(|elapsed| Err(kube::Error::Service(elapsed.into())))?;
    let token = answer.status.and_then(|status| status.token).filter(|token| !token.is_empty());
    token.ok_or_else(|| kube::Error::Service("the answer carries no token".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(iat: i64, exp: i64) -> Claims {
        Claims { iat, exp }
    }

    #[test]
    fn claims_are_read_from_the_token() {
        let payload = URL_SAFE_NO_PAD.encode(r#"{"iss":"x","iat":100,"exp":3700}"#);
        assert_eq!(Claims::of(format!("h.{payload}.s").as_bytes()), Some(claims(100, 3700)));
        for broken in ["", "a", "a.b", "a.!!.c", "a..c"] {
            assert_eq!(Claims::of(broken.as_bytes()), None, "{broken}");
        }
    }

    #[test]
    fn a_token_is_renewed_at_four_fifths_of_its_life_or_after_a_day() {
        let at = |second| Timestamp::from_second(second).unwrap();
        assert_eq!(claims(0, 1000).fresh_for(at(0)), Duration::from_secs(800));
        assert_eq!(claims(0, 1000).fresh_for(at(799)), Duration::from_secs(1));
        assert_eq!(claims(0, 1000).fresh_for(at(800)), Duration::ZERO);
        assert_eq!(claims(0, 1000).fresh_for(at(5000)), Duration::ZERO);
        assert_eq!(claims(0, 30 * 86400).fresh_for(at(0)), Duration::from_secs(86400));
        assert_eq!(claims(10, 0).fresh_for(at(10)), Duration::ZERO);
    }
}
