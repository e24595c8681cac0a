//! Image references as users write them, by the grammar of the distribution project
//! (`distribution/reference`, which Docker and containerd use):
//!
//! ```text
//! reference = [host "/"] component *("/" component) [":" tag] ["@" digest]
//! ```
//! The parser of [`Reference`] itself compiles a regular expression that stays in memory for good: 8 MB, a quarter of
//! what the whole node needs. It also takes what merely contains a reference.

use oci_client::Reference;

use super::{Kind, Result, RuntimeError};

/// Longest tag the distribution specification allows.
const LONGEST_TAG: usize = 128;
/// Longest repository, in bytes.
const LONGEST_REPOSITORY: usize = 255;
/// What an image is looked for in when no host is named.
const DOCKER_HUB: &str = "docker.io";
/// What Docker Hub was called.
const DOCKER_HUB_BEFORE: &str = "index.docker.io";

/// Parses a reference with Docker's defaults for what was left out (`busybox` is `docker.io/library/busybox:latest`).
///
/// # Errors
/// [`Kind::Invalid`] if it is none, with what is wrong with it.
pub(crate) fn parse(text: &str) -> Result<Reference> {
    let invalid = |why: &str| RuntimeError::new(Kind::Invalid, format!("{text:?} is not an image reference: {why}"));
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    // A colon before the last slash belongs to the host's port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    let (registry, repository) = split_host(name);
    check(&registry, &repository, tag, digest).map_err(invalid)?;
    let (tag, digest) = (tag.map(str::to_owned), digest.map(str::to_owned));
    Ok(match (tag, digest) {
        (Some(tag), Some(digest)) => Reference::with_tag_and_digest(registry, repository, tag, digest),
        (None, Some(digest)) => Reference::with_digest(registry, repository, digest),
        (tag, None) => Reference::with_tag(registry, repository, tag.unwrap_or_else(|| "latest".to_owned())),
    })
}

/// The registry and the repository a name stands for.
fn split_host(name: &str) -> (String, String) {
    let (registry, repository) = match name.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
        _ => (DOCKER_HUB, name),
    };
    let registry = if registry == DOCKER_HUB_BEFORE { DOCKER_HUB } else { registry };
    if registry == DOCKER_HUB && !repository.contains('/') {
        (registry.to_owned(), format!("library/{repository}"))
    } else {
        (registry.to_owned(), repository.to_owned())
    }
}

/// What is wrong, if anything is.
fn check(registry: &str, repository: &str, tag: Option<&str>, digest: Option<&str>) -> Result<(), &'static str> {
    if !is_host(registry) {
        return Err("the part before the first slash is no host name or address with a port");
    }
    if repository.len() > LONGEST_REPOSITORY {
        return Err("its name is longer than 255 characters");
    }
    if !repository.split('/').all(is_component) {
        return Err(
            "a name is made of lower-case letters, digits, and single separators ('.', '_', '__', '-') between",
        );
    }
    if !tag.is_none_or(is_tag) {
        return Err("a tag is up to 128 letters, digits, '_', '.' and '-', and does not begin with '.' or '-'");
    }
    if !digest.is_none_or(is_digest) {
        return Err("a digest is sha256, sha384 or sha512, a colon, and as many hexadecimal digits as it has");
    }
    Ok(())
}

/// A name or an address, and perhaps a port.
fn is_host(text: &str) -> bool {
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    if let Some(rest) = text.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        let is_address = !address.is_empty() && address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':');
        return is_address && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
    }
    let (name, port) = text.split_once(':').map_or((text, None), |(name, port)| (name, Some(port)));
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    name.split('.').all(is_label) && port.is_none_or(is_port)
}

/// One part of a repository's name.
fn is_component(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let is_separator = |run: &str| matches!(run, "" | "." | "_" | "__") || run.bytes().all(|b| b == b'-');
    let ends = |b: Option<u8>| b.is_some_and(is_word);
    ends(text.bytes().next())
        && ends(text.bytes().last())
        && text.split(|c| c < '\u{80}' && is_word(c as u8)).all(is_separator)
}

fn is_tag(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    text.bytes().next().is_some_and(is_word)
        && text.len() <= LONGEST_TAG
        && text.bytes().all(|b| is_word(b) || matches!(b, b'.' | b'-'))
}

fn is_digest(text: &str) -> bool {
    let Some((algorithm, hex)) = text.split_once(':') else { return false };
    let length = match algorithm {
        "sha256" => 64,
        "sha384" => 96,
        "sha512" => 128,
        _ => return false,
    };
    hex.len() == length && hex.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_reference_is_invalid() {
        let long = format!("a:{}", "t".repeat(129));
        for text in [
            "",
            "UPPER/case",
            "a:b:c",
            "two words",
            "a:",
            "a@sha256:12",
            " a",
            "a b:c",
            "a//b",
            ":tag",
            "/a",
            "a/",
            "a.",
            "-a",
            "a..b",
            "a___b",
            "a:.b",
            "a@",
            "a@md5:00",
            "h:x/a",
            "-h.com/a",
            "h..com/a",
            "[::1/a",
            "[]:5/a",
            "h:/a",
            "é",
            &long,
        ] {
            assert_eq!(parse(text).map_err(|error| error.kind()), Err(Kind::Invalid), "{text:?}");
        }
        let name = "a/".repeat(140);
        let error = parse(&format!("{name}b")).unwrap_err().to_string();
        assert!(error.contains("longer than 255"), "{error}");
    }

    #[test]
    fn what_is_one_gets_dockers_defaults() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        for (text, whole) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("user/app:1", "docker.io/user/app:1"),
            ("localhost:5000/a", "localhost:5000/a:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("[fd00::1]:5000/a", "[fd00::1]:5000/a:latest"),
            ("Host.example/a__b--c.d/e:T", "Host.example/a__b--c.d/e:T"),
            ("test.com:5000", "docker.io/library/test.com:5000"),
            (&format!("a@{digest}"), &format!("docker.io/library/a@{digest}")),
            (&format!("a:1@{digest}"), &format!("docker.io/library/a:1@{digest}")),
            ("registry.k8s.io/e2e-test-images/agnhost:2.63.0", "registry.k8s.io/e2e-test-images/agnhost:2.63.0"),
        ] {
            assert_eq!(parse(text).unwrap().whole(), whole);
        }
    }

    proptest! {
        /// The library's own parser says the same of what both take, and takes whatever we take.
        #[test]
        fn what_we_take_is_read_as_the_library_reads_it(
            text in "([a-z0-9]{1,3}[.:_-]{0,2}){0,3}(/([a-zA-Z0-9]{1,3}[._-]{0,3}){1,2}){0,2}(:[a-zA-Z0-9._-]{0,4}){0,2}(@sha256:[0-9a-f]{64})?"
        ) {
            if let Ok(ours) = parse(&text) {
                let theirs: Reference = text.parse().expect("what we take");
                prop_assert_eq!(ours, theirs);
            }
        }

        /// A whole reference, built from its parts, is taken as it is.
        #[test]
        fn what_is_whole_is_kept(
            host in "[a-z0-9]{1,5}(\\.[a-z0-9]{1,5}){1,2}(:[0-9]{1,5})?",
            path in "[a-z0-9]{1,3}((\\.|_|__|-{1,3})[a-z0-9]{1,3}){0,2}(/[a-z0-9]{1,3}){1,2}",
            tag in "[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,9}",
        ) {
            let text = format!("{host}/{path}:{tag}");
            prop_assert_eq!(parse(&text).unwrap().whole(), text);
        }
    }
}
