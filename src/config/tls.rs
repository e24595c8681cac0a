//! `tlsMinVersion` and `tlsCipherSuites`, by the names of Go's crypto/tls, which are a kubelet's.

use std::fmt;
use std::str::FromStr;

use super::values::ValueError;

/// The lowest TLS version a client may speak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsVersion {
    /// TLS 1.2; also what the older versions' names mean here, since nothing below is offered.
    #[default]
    Tls12,
    /// TLS 1.3.
    Tls13,
}

impl FromStr for TlsVersion {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "VersionTLS10" | "VersionTLS11" | "VersionTLS12" => Ok(Self::Tls12),
            "VersionTLS13" => Ok(Self::Tls13),
            _ => Err(ValueError::new(format!(
                "{text:?} is no TLS version: write VersionTLS12 or VersionTLS13 (VersionTLS10 and VersionTLS11 mean 1.2)"
            ))),
        }
    }
}

/// A cipher suite this node can offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherSuite(rustls::CipherSuite);

/// Every suite by Go's name. Those of TLS 1.3 are offered whatever is chosen, as in Go.
const SUITES: [(&str, rustls::CipherSuite); 11] = [
    ("TLS_AES_128_GCM_SHA256", rustls::CipherSuite::TLS13_AES_128_GCM_SHA256),
    ("TLS_AES_256_GCM_SHA384", rustls::CipherSuite::TLS13_AES_256_GCM_SHA384),
    ("TLS_CHACHA20_POLY1305_SHA256", rustls::CipherSuite::TLS13_CHACHA20_POLY1305_SHA256),
    ("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
    ("TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
    (
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
        rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    ("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305", rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
    ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", rustls::CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
    ("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", rustls::CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
    ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", rustls::CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
    ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305", rustls::CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
];

impl CipherSuite {
    /// The suite's registered number, as rustls has it.
    pub fn id(self) -> rustls::CipherSuite {
        self.0
    }
}

impl FromStr for CipherSuite {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some((_, suite)) = SUITES.iter().find(|(name, _)| *name == text) {
            return Ok(Self(*suite));
        }
        let names: Vec<&str> = SUITES.iter().map(|(name, _)| *name).collect();
        let why = if text.contains("_CBC_") || text.contains("_RC4_") || text.starts_with("TLS_RSA_") {
            "is too weak to be offered"
        } else {
            "is no cipher suite"
        };
        Err(ValueError::new(format!("{text:?} {why}: choose among {}", names.join(", "))))
    }
}

impl fmt::Display for CipherSuite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = SUITES.iter().find(|(_, suite)| *suite == self.0).map_or("unknown", |(name, _)| *name);
        f.write_str(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suite_the_tls_library_has_can_be_chosen_by_name() {
        for suite in rustls::crypto::ring::ALL_CIPHER_SUITES {
            let (name, _) = SUITES.iter().find(|(_, known)| *known == suite.suite()).unwrap();
            assert_eq!(name.parse::<CipherSuite>().unwrap().id(), suite.suite());
            assert_eq!(name.parse::<CipherSuite>().unwrap().to_string(), *name);
        }
    }

    #[test]
    fn a_bad_name_is_refused_with_the_good_ones() {
        for (name, why) in [
            ("TLS_RSA_WITH_AES_128_CBC_SHA", "too weak"),
            ("TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256", "too weak"),
            ("AES128", "no cipher suite"),
            ("tls_aes_128_gcm_sha256", "no cipher suite"),
        ] {
            let error = name.parse::<CipherSuite>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("TLS_AES_128_GCM_SHA256"), "{error}");
        }
        assert_eq!("VersionTLS13".parse(), Ok(TlsVersion::Tls13));
        assert_eq!("VersionTLS11".parse(), Ok(TlsVersion::Tls12));
        assert!("1.3".parse::<TlsVersion>().unwrap_err().to_string().contains("VersionTLS13"));
    }
}
