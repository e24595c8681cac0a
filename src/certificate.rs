//! Certificates on disk: what a PEM file holds, when it is to be renewed, and writing one so that a crash leaves the old
//! file or the new one.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::x509::X509Name;

/// The share of its life after which a certificate is renewed at the earliest, as a kubelet does it.
const RENEW_FROM: f64 = 0.7;
/// The width of the span in which the renewal falls: 70 % to 90 %, so that many nodes do not come at once.
const RENEW_WITHIN: f64 = 0.2;

/// Why a file is no certificate with its key.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// It cannot be read.
    #[error("failed to read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It holds no certificate.
    #[error("{} holds no certificate", .0.display())]
    Certificate(PathBuf),
    /// It holds no key.
    #[error("{} holds no private key", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// The two do not belong together.
    #[error("the certificate and the key in {} do not belong together", .0.display())]
    Apart(PathBuf),
}

/// Whom a certificate is good for beside its subject, or shall be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// DNS names.
    pub dns: BTreeSet<String>,
    /// IP addresses.
    pub ip: BTreeSet<IpAddr>,
}

impl Names {
    /// Whether all of `other` is among these.
    pub fn cover(&self, other: &Self) -> bool {
        self.dns.is_superset(&other.dns) && self.ip.is_superset(&other.ip)
    }

    /// Whether there are any. A client certificate is asked for without, and nobody looks at what it has of them.
    pub fn matter(&self) -> bool {
        !self.dns.is_empty() || !self.ip.is_empty()
    }
}

/// What a certificate says.
#[derive(Clone, Debug, PartialEq)]
pub struct Certificate {
    /// Good from here ...
    pub not_before: Timestamp,
    /// ... to here.
    pub not_after: Timestamp,
    /// The subject's common name; empty without one.
    pub common_name: String,
    /// The alternative names, those that are neither DNS names nor addresses left out.
    pub names: Names,
    /// The public key's bits.
    public_key: Vec<u8>,
    /// 0 to 1, different for each certificate and always the same for one.
    lot: f64,
}

impl Certificate {
    /// The first certificate of a PEM text; `None` if there is none that parses.
    pub fn first(pem: &[u8]) -> Option<Self> {
        let der = CertificateDer::from_pem_slice(pem).ok()?;
        let (_, parsed) = X509Certificate::from_der(&der).ok()?;
        let all = match parsed.subject_alternative_name() {
            Ok(Some(extension)) => extension.value.general_names.as_slice(),
            _ => &[],
        };
        let digest = Sha256::digest(&der);
        let lot = f64::from(u16::from_be_bytes([digest[0], digest[1]])) / f64::from(u16::MAX);
        Some(Self {
            not_before: Timestamp::from_second(parsed.validity().not_before.timestamp()).ok()?,
            not_after: Timestamp::from_second(parsed.validity().not_after.timestamp()).ok()?,
            common_name: common_name(parsed.subject()),
            names: names(all),
            public_key: parsed.public_key().subject_public_key.data.to_vec(),
            lot,
        })
    }

    /// The certificate of a file that holds it and its key, the two belonging together.
    ///
    /// # Errors
    /// See [`PairError`].
    pub fn of_pair(path: &Path) -> Result<Self, PairError> {
        let pem = fs::read_to_string(path).map_err(|source| PairError::Read { path: path.to_owned(), source })?;
        let certificate = Self::first(pem.as_bytes()).ok_or_else(|| PairError::Certificate(path.to_owned()))?;
        // The key's reader takes the first section it finds for a key.
        let key = pem.find("-----BEGIN PRIVATE KEY-----").map_or("", |at| &pem[at..]);
        let key = KeyPair::from_pem(key).map_err(|source| PairError::Key { path: path.to_owned(), source })?;
        if certificate.belongs_to(&key) { Ok(certificate) } else { Err(PairError::Apart(path.to_owned())) }
    }

    /// Whether it is this key's.
    pub fn belongs_to(&self, key: &KeyPair) -> bool {
        self.public_key == key.der_bytes()
    }

    /// When to ask for the next one: somewhere between 70 % and 90 % of its life, always the same for one certificate.
    pub fn renewal(&self) -> Timestamp {
        let life = self.not_after.duration_since(self.not_before);
        let share = life.as_secs_f64() * (RENEW_FROM + RENEW_WITHIN * self.lot);
        self.not_before.saturating_add(SignedDuration::from_secs_f64(share)).unwrap_or(self.not_after)
    }
}

/// The common name of a subject; empty without one.
pub fn common_name(subject: &X509Name<'_>) -> String {
    subject.iter_common_name().next().and_then(|name| name.as_str().ok()).unwrap_or_default().to_owned()
}

/// The DNS names and addresses among alternative names.
pub fn names(all: &[GeneralName<'_>]) -> Names {
    let dns = all.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    });
    let ip = all.iter().filter_map(|name| match name {
        GeneralName::IPAddress(octets) => address(octets),
        _ => None,
    });
    Names { dns: dns.collect(), ip: ip.collect() }
}

fn address(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok()
}

/// Writes beside, then renames; directories above are made.
///
/// # Errors
/// Which step failed.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let mut file = tempfile::Builder::new().permissions(Permissions::from_mode(mode)).tempfile_in(directory)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType};

    use super::*;

    /// A pair as PEM, good for `seconds` from 2026-01-01.
    fn pair(names: &[&str]) -> (String, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, "system:node:a");
        params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        params.not_after = rcgen::date_time_ymd(2026, 1, 11);
        (params.self_signed(&key).unwrap().pem(), key)
    }

    #[test]
    fn a_pair_is_read_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pki/current.pem");
        let (pem, key) = pair(&["a", "10.0.0.1", "fd00::1"]);
        write(&path, format!("{pem}{}", key.serialize_pem()).as_bytes(), 0o600).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let read = Certificate::of_pair(&path).unwrap();
        assert_eq!(read.common_name, "system:node:a");
        assert_eq!(read.names.dns, BTreeSet::from(["a".to_owned()]));
        assert_eq!(read.names.ip, BTreeSet::from(["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]));
        assert_eq!(read.not_after.to_string(), "2026-01-11T00:00:00Z");
    }

    #[test]
    fn what_is_missing_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("current.pem");
        let of = |text: &str| {
            fs::write(&path, text).unwrap();
            Certificate::of_pair(&path).unwrap_err()
        };
        let (pem, _) = pair(&["a"]);
        let other = KeyPair::generate().unwrap().serialize_pem();
        assert!(matches!(of("rubbish"), PairError::Certificate(_)));
        assert!(matches!(of(&pem), PairError::Key { .. }));
        assert!(matches!(of(&format!("{pem}{other}")), PairError::Apart(_)));
        fs::remove_file(&path).unwrap();
        assert!(matches!(Certificate::of_pair(&path), Err(PairError::Read { .. })));
    }

    proptest! {
        #[test]
        fn the_renewal_falls_between_70_and_90_percent_of_the_life(life in 1_i64..400_000_000, lot in 0.0..=1.0) {
            let (pem, _) = pair(&[]);
            let mut certificate = Certificate::first(pem.as_bytes()).unwrap();
            prop_assert!((0.0..=1.0).contains(&certificate.lot));
            certificate.not_after = certificate.not_before + SignedDuration::from_secs(life);
            certificate.lot = lot;
            let share = certificate.renewal().duration_since(certificate.not_before).as_secs_f64() / life as f64;
            prop_assert!((0.699..=0.901).contains(&share), "{}", share);
        }
    }
}
