//! Which credentials of a pull secret are for which image. Pure.
//!
//! The rules are those of "Interpretation of config.json" in the Kubernetes documentation: a host must match part by
//! part (`*.example.com` matches one level), a port must be equal, and a path is a prefix.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;

use crate::runtime::types::RegistryAuth;

/// The one host that Docker Hub's names stand for.
const DOCKER_HUB: &str = "docker.io";

/// Standard base64, padded or not: both occur in the wild.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    username: String,
    password: String,
    auth: String,
}

/// Credentials by the place they are for.
pub type Keys = Vec<(String, RegistryAuth)>;

/// The credentials in a Secret of type `kubernetes.io/dockerconfigjson` or `kubernetes.io/dockercfg`.
///
/// # Errors
/// What is wrong with it; never any of its content.
pub fn keys(secret: &Secret) -> Result<Keys, String> {
    let data = |key| secret.data.as_ref().and_then(|data| data.get(key)).map(|bytes| bytes.0.as_slice());
    let entries = if let Some(bytes) = data(".dockerconfigjson") {
        serde_json::from_slice::<DockerConfig>(bytes).map_err(|error| malformed(&error))?.auths
    } else if let Some(bytes) = data(".dockercfg") {
        serde_json::from_slice(bytes).map_err(|error| malformed(&error))?
    } else {
        return Err("it has neither .dockerconfigjson nor .dockercfg".to_owned());
    };
    entries.into_iter().filter_map(|(place, entry)| entry.auth(&place).transpose()).collect()
}

/// The credentials for an image, the most specific place first; equal ones once.
pub fn select(keys: &Keys, image: &str) -> Vec<RegistryAuth> {
    let target = Place::of_image(image);
    let mut matching: Vec<(Place, &RegistryAuth)> = keys
        .iter()
        .map(|(place, auth)| (Place::of_key(place), auth))
        .filter(|(place, _)| place.matches(&target))
        .collect();
    // Stable, so that among equals the order of the secrets decides.
    matching.sort_by_key(|(place, _)| Reverse((place.path.len(), !place.host.contains('*'))));
    let mut auths: Vec<RegistryAuth> = Vec::new();
    for (_, auth) in matching {
        if !auths.contains(auth) {
            auths.push(auth.clone());
        }
    }
    auths
}

impl Entry {
    fn auth(self, place: &str) -> Result<Option<(String, RegistryAuth)>, String> {
        let (username, password) = if self.auth.is_empty() {
            (self.username, self.password)
        } else {
            let decoded = BASE64.decode(self.auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
            let pair = decoded.as_deref().and_then(|text| text.trim_end_matches('\0').split_once(':'));
            let (username, password) =
                pair.ok_or_else(|| format!("the auth for {place:?} is not base64 of user:password"))?;
            (username.to_owned(), password.to_owned())
        };
        if username.is_empty() && password.is_empty() {
            return Ok(None);
        }
        Ok(Some((place.to_owned(), RegistryAuth { username, password })))
    }
}

/// The position only: the text of such an error can repeat what it stumbled over.
fn malformed(error: &serde_json::Error) -> String {
    format!("it is not valid JSON at line {}, column {}", error.line(), error.column())
}

/// A host, maybe with a port, and a path without slashes at its ends.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    host: String,
    port: Option<String>,
    path: String,
}

impl Place {
    fn of_key(key: &str) -> Self {
        let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
        let (authority, path) = key.split_once('/').unwrap_or((key, ""));
        // Docker writes the address of the registry's API, which stands for the whole host.
        let path = match path {
            "v1" | "v2" => "",
            path => path.strip_prefix("v1/").or_else(|| path.strip_prefix("v2/")).unwrap_or(path),
        };
        Self::new(authority, path)
    }

    fn of_image(image: &str) -> Self {
        let image = image.split_once('@').map_or(image, |(name, _)| name);
        match image.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => Self::new(first, path),
            _ => Self::new(DOCKER_HUB, image),
        }
    }

    fn new(authority: &str, path: &str) -> Self {
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, Some(port.to_owned())),
            _ => (authority, None),
        };
        let host = match host.to_lowercase() {
            hub if matches!(hub.as_str(), "index.docker.io" | "registry-1.docker.io") => DOCKER_HUB.to_owned(),
            host => host,
        };
        Self { host, port, path: path.trim_matches('/').to_owned() }
    }

    fn matches(&self, image: &Self) -> bool {
        let (parts, image_parts): (Vec<&str>, Vec<&str>) =
            (self.host.split('.').collect(), image.host.split('.').collect());
        parts.len() == image_parts.len()
            && parts.iter().zip(&image_parts).all(|(pattern, part)| glob(pattern.as_bytes(), part.as_bytes()))
            && self.port == image.port
            && image.path.starts_with(&self.path)
    }
}

/// `*` is any run of characters, `?` any one.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut seen) = (0, 0);
    // Where to go on after one more character has been given to the last star.
    let mut star: Option<(usize, usize)> = None;
    while seen < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, seen));
                at += 1;
            }
            Some(byte) if *byte == b'?' || *byte == text[seen] => {
                at += 1;
                seen += 1;
            }
            _ => match star {
                Some((starred, from)) => {
                    star = Some((starred, from + 1));
                    at = starred + 1;
                    seen = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn secret(key: &str, content: &serde_json::Value) -> Secret {
        let encoded = BASE64.encode(content.to_string());
        serde_json::from_value(json!({"data": {key: encoded}})).unwrap()
    }

    fn matches(key: &str, image: &str) -> bool {
        Place::of_key(key).matches(&Place::of_image(image))
    }

    #[test]
    fn both_formats_and_every_form_of_credentials_are_read() {
        let entries = json!({
            "a.io": {"username": "u", "password": "p"},
            "b.io": {"auth": BASE64.encode("u2:p:2")},
            "c.io": {"auth": BASE64.encode("u3:p3").trim_end_matches('='), "username": "ignored", "email": "x"},
            "d.io": {},
        });
        for secret in [secret(".dockerconfigjson", &json!({"auths": entries})), secret(".dockercfg", &entries)] {
            let keys = keys(&secret).unwrap();
            let read: Vec<_> = keys
                .iter()
                .map(|(place, auth)| (place.as_str(), auth.username.as_str(), auth.password.as_str()))
                .collect();
            assert_eq!(read, [("a.io", "u", "p"), ("b.io", "u2", "p:2"), ("c.io", "u3", "p3")]);
        }
    }

    #[test]
    fn a_malformed_secret_is_refused_without_its_content() {
        assert!(keys(&Secret::default()).unwrap_err().contains(".dockerconfigjson"));
        let error = keys(&secret(".dockercfg", &json!({"h.io": {"auth": "!!hunter2"}}))).unwrap_err();
        assert!(error.contains("h.io") && !error.contains("hunter2"), "{error}");
        let error = keys(&secret(".dockerconfigjson", &json!({"auths": {"h.io": "hunter2"}}))).unwrap_err();
        assert!(error.contains("line 1") && !error.contains("hunter2"), "{error}");
    }

    #[test]
    fn places_match_by_host_port_and_path() {
        for (key, image) in [
            ("https://index.docker.io/v1/", "nginx"),
            ("docker.io", "library/nginx:1"),
            ("index.docker.io", "docker.io/me/app"),
            ("registry-1.docker.io", "me/app@sha256:00"),
            ("gcr.io", "gcr.io/p/app"),
            ("https://gcr.io/v2/", "gcr.io/p/app"),
            ("gcr.io/p", "gcr.io/p/app:tag"),
            ("http://reg.local:5000", "reg.local:5000/app"),
            ("*.example.com", "reg.example.com/app"),
            ("r?g.*.com", "reg.example.com/app"),
            ("pre*suf.io", "pre-x-suf.io/app"),
            ("localhost:5000", "localhost:5000/app"),
            ("GCR.io", "gcr.io/p"),
        ] {
            assert!(matches(key, image), "{key} {image}");
        }
        for (key, image) in [
            ("gcr.io", "nginx"),
            ("gcr.io/q", "gcr.io/p/app"),
            ("reg.local:5000", "reg.local:5001/app"),
            ("reg.local", "reg.local:5000/app"),
            ("*.example.com", "example.com/app"),
            ("*.example.com", "a.b.example.com/app"),
            ("*", "gcr.io/p"),
            ("docker.io", "localhost/app"),
        ] {
            assert!(!matches(key, image), "{key} {image}");
        }
    }

    #[test]
    fn the_most_specific_credentials_come_first_and_once() {
        let auth = |name: &str| RegistryAuth { username: name.into(), password: "p".into() };
        let keys: Keys = vec![
            ("*.io".into(), auth("wild")),
            ("gcr.io".into(), auth("host")),
            ("gcr.io/p".into(), auth("path")),
            ("https://gcr.io".into(), auth("host")),
            ("quay.io".into(), auth("other")),
        ];
        let names: Vec<_> = select(&keys, "gcr.io/p/app").into_iter().map(|auth| auth.username).collect();
        assert_eq!(names, ["path", "host", "wild"]);
    }

    proptest! {
        #[test]
        fn no_name_panics(key in ".*", image in ".*") {
            matches(&key, &image);
        }

        #[test]
        fn a_glob_of_stars_matches_all(text in "[a-c]{0,8}", cut in 0_usize..9) {
            let cut = cut.min(text.len());
            prop_assert!(glob(b"*", text.as_bytes()));
            let pattern = format!("{}*{}", &text[..cut], &text[cut..]);
            prop_assert!(glob(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
