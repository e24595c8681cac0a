//! Which header fields go through the front, and what becomes of a request's target. Pure.
//!
//! RFC 9110, 7.6.1: fields that concern one connection are not forwarded, nor those that `Connection` names. No `Via` is
//! added: to its clients the front is the function's server.

use http::header::{self, Entry, HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{Method, Request, StatusCode, Uri, Version};

/// Those that concern one connection, wherever they stand. `Trailer` is not among them: the recipient needs it.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];
/// What `Connection` cannot take away: without these a message would mean something else.
const KEPT: [HeaderName; 2] = [header::HOST, header::CONTENT_LENGTH];

pub(super) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Makes the request one that an environment can be sent: own fields dropped, the client's address added, in origin
/// form. An asked-for protocol change stays asked for.
///
/// # Errors
/// The status that the client is answered instead.
pub(super) fn to_environment<B>(
    request: &mut Request<B>,
    client: &HeaderValue,
    own_host: &str,
) -> Result<(), StatusCode> {
    if request.method() == Method::CONNECT {
        return Err(StatusCode::NOT_IMPLEMENTED);
    }
    let host = host(request, own_host)?;
    let upgrade = upgrade(request.headers()).filter(|_| request.version() == Version::HTTP_11);
    let trailers = has_token(request.headers(), &header::TE, "trailers");
    strip(request.headers_mut());
    let headers = request.headers_mut();
    if let Some(host) = host {
        headers.insert(header::HOST, host);
    }
    // The front's own server has answered it, or will when the body is wanted.
    headers.remove(header::EXPECT);
    match upgrade {
        Some(protocol) => {
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, protocol);
        }
        None if trailers => {
            headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
        None => {}
    }
    add_client(headers, client);
    if request.uri().authority().is_some() || request.uri().scheme().is_some() {
        let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from(path);
    }
    *request.version_mut() = Version::HTTP_11;
    Ok(())
}

/// Makes the environment's answer one for the client. `upgraded`: it is a 101 to one who asked.
pub(super) fn to_client(headers: &mut HeaderMap, upgraded: bool) {
    let protocol = if upgraded { headers.get(header::UPGRADE).cloned() } else { None };
    strip(headers);
    if upgraded {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        if let Some(protocol) = protocol {
            headers.insert(header::UPGRADE, protocol);
        }
    }
}

/// Whether the client waits to be told before it sends the body (RFC 9110, 10.1.1).
pub(super) fn waits_to_send(headers: &HeaderMap) -> bool {
    headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// The `Host` that replaces the request's, if one must. RFC 9112, 3.2: exactly one in HTTP/1.1, and the target's wins.
fn host<B>(request: &Request<B>, own_host: &str) -> Result<Option<HeaderValue>, StatusCode> {
    let mut given = request.headers().get_all(header::HOST).iter();
    let (first, second) = (given.next(), given.next());
    if second.is_some() || (first.is_none() && request.version() == Version::HTTP_11) {
        return Err(StatusCode::BAD_REQUEST);
    }
    let authority = request.uri().authority().map(|authority| {
        // Names and passwords in a target are not the environment's business.
        authority.as_str().rsplit_once('@').map_or(authority.as_str(), |(_, host)| host)
    });
    match authority.or(if first.is_none() { Some(own_host) } else { None }) {
        Some(host) => HeaderValue::from_str(host).map(Some).map_err(|_| StatusCode::BAD_REQUEST),
        None => Ok(None),
    }
}

fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let protocol = headers.get(header::UPGRADE)?;
    has_token(headers, &header::CONNECTION, "upgrade").then(|| protocol.clone())
}

/// Whether a comma-separated field holds the word, in any case.
fn has_token(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    tokens(headers, name).any(|token| {
        let token = token.split(';').next().unwrap_or_default();
        token.trim().eq_ignore_ascii_case(word)
    })
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','))
}

fn strip(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = tokens(headers, &header::CONNECTION)
            .filter_map(|token| HeaderName::from_bytes(token.trim().as_bytes()).ok())
            .filter(|name| !KEPT.contains(name))
            .collect();
        for name in named {
            headers.remove(name);
        }
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Appends to what proxies before us said.
fn add_client(headers: &mut HeaderMap, client: &HeaderValue) {
    let mut occupied = match headers.entry(X_FORWARDED_FOR) {
        Entry::Vacant(vacant) => {
            vacant.insert(client.clone());
            return;
        }
        Entry::Occupied(occupied) => occupied,
    };
    let mut all: Vec<u8> = Vec::new();
    for value in occupied.iter() {
        all.extend_from_slice(value.as_bytes());
        all.extend_from_slice(b", ");
    }
    all.extend_from_slice(client.as_bytes());
    // Made of valid values, so it is one.
    if let Ok(value) = HeaderValue::from_bytes(&all) {
        occupied.insert(value);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CLIENT: HeaderValue = HeaderValue::from_static("10.0.0.7");

    fn request(fields: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder().uri("/a?b").header("host", "f");
        for (name, value) in fields {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap()
    }

    fn sent(fields: &[(&str, &str)]) -> HeaderMap {
        let mut request = request(fields);
        to_environment(&mut request, &CLIENT, "10.0.0.2:8080").unwrap();
        request.headers().clone()
    }

    #[test]
    fn what_concerns_one_connection_stays_behind() {
        let headers = sent(&[
            ("connection", "close, x-mine"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=1"),
            ("proxy-connection", "keep-alive"),
            ("te", "gzip"),
            ("transfer-encoding", "chunked"),
            ("trailer", "x-sum"),
            ("expect", "100-continue"),
            ("upgrade", "h2c"),
            ("x-theirs", "2"),
        ]);
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["host", "trailer", "x-forwarded-for", "x-theirs"]);
    }

    #[test]
    fn connection_cannot_take_host_or_length_away() {
        let headers = sent(&[("connection", "host, content-length, x-forwarded-for"), ("content-length", "5")]);
        assert_eq!(headers["host"], "f");
        assert_eq!(headers["content-length"], "5");
        assert_eq!(headers["x-forwarded-for"], "10.0.0.7");
    }

    #[test]
    fn clients_are_appended_to_what_proxies_said() {
        assert_eq!(sent(&[])["x-forwarded-for"], "10.0.0.7");
        let headers = sent(&[("x-forwarded-for", "1.1.1.1"), ("x-forwarded-for", "2.2.2.2, 3.3.3.3")]);
        assert_eq!(headers.get_all("x-forwarded-for").iter().count(), 1);
        assert_eq!(headers["x-forwarded-for"], "1.1.1.1, 2.2.2.2, 3.3.3.3, 10.0.0.7");
    }

    #[test]
    fn a_protocol_change_is_asked_for_only_by_those_who_may() {
        let headers = sent(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert_eq!(
            (&headers["connection"], &headers["upgrade"]),
            (&"upgrade".parse().unwrap(), &"websocket".parse().unwrap())
        );
        assert!(!sent(&[("upgrade", "websocket")]).contains_key("upgrade"));
        let mut old = request(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        *old.version_mut() = Version::HTTP_10;
        to_environment(&mut old, &CLIENT, "h").unwrap();
        assert!(!old.headers().contains_key("upgrade"));
    }

    #[test]
    fn trailers_are_asked_for_anew() {
        let headers = sent(&[("te", "trailers;q=0.5, deflate"), ("connection", "te")]);
        assert_eq!((&headers["te"], &headers["connection"]), (&"trailers".parse().unwrap(), &"te".parse().unwrap()));
    }

    #[test]
    fn the_target_decides_on_the_host() {
        let mut absolute = Request::get("http://user:word@other:81/x?y").header("host", "f").body(()).unwrap();
        to_environment(&mut absolute, &CLIENT, "h").unwrap();
        assert_eq!(absolute.uri(), "/x?y");
        assert_eq!(absolute.headers()["host"], "other:81");
        let mut old = Request::get("/").version(Version::HTTP_10).body(()).unwrap();
        to_environment(&mut old, &CLIENT, "10.0.0.2:8080").unwrap();
        assert_eq!((old.version(), &old.headers()["host"]), (Version::HTTP_11, &"10.0.0.2:8080".parse().unwrap()));
    }

    #[test]
    fn no_host_two_hosts_and_tunnels_are_refused() {
        let status = |mut request: Request<()>| to_environment(&mut request, &CLIENT, "h").unwrap_err();
        assert_eq!(status(Request::get("/").body(()).unwrap()), StatusCode::BAD_REQUEST);
        assert_eq!(status(request(&[("host", "g")])), StatusCode::BAD_REQUEST);
        assert_eq!(
            status(Request::connect("a:1").header("host", "a:1").body(()).unwrap()),
            StatusCode::NOT_IMPLEMENTED
        );
    }

    #[test]
    fn an_answer_keeps_its_upgrade_only_if_it_is_one() {
        let answer = || {
            HeaderMap::from_iter(
                [(header::UPGRADE, "websocket"), (header::CONNECTION, "Upgrade")]
                    .map(|(n, v)| (n, HeaderValue::from_static(v))),
            )
        };
        let mut headers = answer();
        to_client(&mut headers, true);
        assert_eq!(
            headers,
            HeaderMap::from_iter([
                (header::CONNECTION, HeaderValue::from_static("upgrade")),
                (header::UPGRADE, HeaderValue::from_static("websocket"))
            ])
        );
        let mut headers = answer();
        to_client(&mut headers, false);
        assert!(headers.is_empty());
    }

    proptest! {
        /// Whatever is sent: nothing that concerns the connection passes, what was not named does, and in order.
        #[test]
        fn only_end_to_end_fields_pass(
            fields in prop::collection::vec(("[a-e]|te|keep-alive|upgrade|transfer-encoding|proxy-connection", "[ -~]{0,8}"), 0..12),
            named in prop::collection::vec("[a-g]|host|close| |;", 0..4),
        ) {
            let connection = named.join(",");
            let mut given: Vec<(&str, &str)> = fields.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
            given.push(("connection", &connection));
            let headers = sent(&given);
            let asks = |word: &str| named.iter().any(|name| name.trim() == word);
            for (name, _) in &given {
                let own = HOP_BY_HOP.iter().any(|hop| hop == name);
                if own {
                    // `te: trailers` is the one thing that is said anew.
                    let anew = headers.contains_key("te") && matches!(*name, "te" | "connection");
                    prop_assert!(anew || !headers.contains_key(*name), "{name}");
                } else {
                    let values: Vec<_> = given.iter().filter(|(n, _)| n == name).map(|(_, v)| v.trim().as_bytes().to_vec()).collect();
                    let passed: Vec<_> = headers.get_all(*name).iter().map(|v| v.as_bytes().trim_ascii().to_vec()).collect();
                    prop_assert_eq!(passed, if asks(name) { Vec::new() } else { values });
                }
            }
            prop_assert_eq!(&headers["host"], "f");
            prop_assert_eq!(&headers["x-forwarded-for"], "10.0.0.7");
        }
    }
}
