//! Image references as users write them.

use oci_client::Reference;

use super::{Kind, Result, RuntimeError};

/// Longest tag the distribution specification allows.
const LONGEST_TAG: usize = 128;

/// Parses a reference with Docker's defaults for what was left out (`busybox` is `docker.io/library/busybox:latest`).
///
/// # Errors
/// [`Kind::Invalid`] if it is none.
pub(crate) fn parse(text: &str) -> Result<Reference> {
    let invalid = || RuntimeError::new(Kind::Invalid, format!("{text:?} is not an image reference"));
    let reference: Reference = text.parse().map_err(|error: oci_client::ParseError| invalid().with_source(error))?;
    // The parser searches where it should match, so it takes what merely contains a reference.
    let name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-' | '/');
    let tag = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let sound = reference.repository().chars().all(name)
        && reference.tag().is_none_or(|text| text.chars().all(tag) && text.len() <= LONGEST_TAG)
        && reference.registry().chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']'));
    if sound && !text.contains(char::is_whitespace) { Ok(reference) } else { Err(invalid()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_reference_is_invalid() {
        for text in ["", "UPPER/case", "a:b:c", "two words", "a:", "a@sha256:12", " a", "a b:c", "a//b", ":tag"] {
            assert_eq!(parse(text).map_err(|error| error.kind()), Err(Kind::Invalid), "{text:?}");
        }
    }

    #[test]
    fn what_is_one_gets_dockers_defaults() {
        for (text, whole) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("user/app:1", "docker.io/user/app:1"),
            ("localhost:5000/a", "localhost:5000/a:latest"),
            ("registry.k8s.io/e2e-test-images/agnhost:2.63.0", "registry.k8s.io/e2e-test-images/agnhost:2.63.0"),
        ] {
            assert_eq!(parse(text).unwrap().whole(), whole);
        }
    }
}
