//! The certificate the API serves with until it is given another: made here, signed by itself, kept while it fits.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan, civil::Date};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use tracing::info;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::parse_x509_pem;
use x509_parser::prelude::X509Certificate;

use super::tls::TlsError;

/// Days a certificate is good for, as a kubelet's own.
const LIFETIME_DAYS: i64 = 365;
/// A certificate with fewer days left is replaced.
const RENEW_DAYS: i64 = 30;

/// What a self-signed certificate is for.
#[derive(Clone, Debug)]
pub struct SelfSigned {
    /// Where `kubelet.crt` and `kubelet.key` are kept: `<root-dir>/pki`.
    pub directory: PathBuf,
    /// Names it is good for: the node's first, then the host's.
    pub names: Vec<String>,
    /// Addresses it is good for: the node's.
    pub addresses: Vec<IpAddr>,
}

impl SelfSigned {
    pub(super) fn certificate(&self) -> PathBuf {
        self.directory.join("kubelet.crt")
    }

    pub(super) fn key(&self) -> PathBuf {
        self.directory.join("kubelet.key")
    }
}

/// Makes sure that a pair is there that fits: names and addresses covered, key and certificate belonging together, a
/// month of life left.
pub(super) fn ensure(own: &SelfSigned, now: Timestamp) -> Result<(), TlsError> {
    if let Some(reason) = unfit(own, now) {
        generate(own, now)?;
        let path = own.certificate();
        info!(path = %path.display(), reason, "made a self-signed serving certificate");
    }
    Ok(())
}

/// Why the pair on disk cannot be used, if it cannot.
fn unfit(own: &SelfSigned, now: Timestamp) -> Option<&'static str> {
    let (Ok(certificate), Ok(key)) = (fs::read(own.certificate()), fs::read_to_string(own.key())) else {
        return Some("there is none");
    };
    let Ok((_, pem)) = parse_x509_pem(&certificate) else { return Some("it is not PEM") };
    let Ok(parsed) = pem.parse_x509() else { return Some("it does not parse") };
    let Ok(key) = KeyPair::from_pem(&key) else { return Some("its key does not parse") };
    if *parsed.public_key().subject_public_key.data != *key.der_bytes() {
        return Some("its key is another's");
    }
    let (from, to) = (parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp());
    if now.as_second() < from || now.as_second() + RENEW_DAYS * 86_400 > to {
        return Some("its time is over");
    }
    if covers(&parsed, own) { None } else { Some("names or addresses changed") }
}

fn covers(certificate: &X509Certificate<'_>, own: &SelfSigned) -> bool {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return false };
    let all = &extension.value.general_names;
    let name = |wanted: &String| all.iter().any(|name| matches!(name, GeneralName::DNSName(name) if name == wanted));
    let address = |wanted: &IpAddr| {
        let octets = match wanted {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        all.iter().any(|name| matches!(name, GeneralName::IPAddress(bytes) if *bytes == octets.as_slice()))
    };
    own.names.iter().all(name) && own.addresses.iter().all(address)
}

fn generate(own: &SelfSigned, now: Timestamp) -> Result<(), TlsError> {
    let name = own.names.first().cloned().unwrap_or_default();
    let failed = |source| TlsError::Generate { name: name.clone(), source };
    let names = own.names.iter().cloned().chain(own.addresses.iter().map(IpAddr::to_string));
    let mut params = CertificateParams::new(names.collect::<Vec<_>>()).map_err(failed)?;
    params.distinguished_name = DistinguishedName::new();
    // The time in the name keeps two certificates of one node apart in a trust store.
    params.distinguished_name.push(DnType::CommonName, format!("{name}@{}", now.as_second()));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let day = |date: Date| {
        rcgen::date_time_ymd(i32::from(date.year()), date.month().unsigned_abs(), date.day().unsigned_abs())
    };
    let today = now.to_zoned(TimeZone::UTC).date();
    // From yesterday, for clients whose clock is behind.
    params.not_before = day(today.saturating_sub(1.day()));
    params.not_after = day(today.saturating_add(LIFETIME_DAYS.days()));
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    // A crash between the two leaves a pair that does not belong together; `unfit` finds that.
    write(&own.key(), key.serialize_pem().as_bytes(), 0o600)?;
    write(&own.certificate(), certificate.pem().as_bytes(), 0o644)
}

/// Writes beside, then renames.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), TlsError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let steps = || -> io::Result<()> {
        fs::create_dir_all(directory)?;
        let mut file = tempfile::Builder::new().permissions(Permissions::from_mode(mode)).tempfile_in(directory)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    steps().map_err(|source| TlsError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(directory: &Path) -> SelfSigned {
        SelfSigned {
            directory: directory.join("pki"),
            names: vec!["node-1".to_owned(), "host.example".to_owned()],
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        }
    }

    fn stored(own: &SelfSigned) -> (Vec<u8>, Vec<u8>) {
        (fs::read(own.certificate()).unwrap(), fs::read(own.key()).unwrap())
    }

    #[test]
    fn a_certificate_is_kept_while_it_fits() {
        let directory = tempfile::tempdir().unwrap();
        let (mut own, now) = (wanted(directory.path()), Timestamp::now());
        ensure(&own, now).unwrap();
        let first = stored(&own);
        ensure(&own, now + 300.hours()).unwrap();
        assert_eq!(stored(&own), first);
        // Fewer names than it has is fine, one more is not.
        own.names.pop();
        ensure(&own, now).unwrap();
        assert_eq!(stored(&own), first);
        own.addresses.push("10.0.0.2".parse().unwrap());
        ensure(&own, now).unwrap();
        assert_ne!(stored(&own), first);
    }

    #[test]
    fn one_that_runs_out_or_is_damaged_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (own, now) = (wanted(directory.path()), Timestamp::now());
        ensure(&own, now).unwrap();
        let first = stored(&own);
        ensure(&own, now + (340 * 24).hours()).unwrap();
        let second = stored(&own);
        assert_ne!(second, first);
        fs::write(own.key(), &first.1).unwrap();
        assert_eq!(unfit(&own, now + (340 * 24).hours()), Some("its key is another's"));
        fs::write(own.key(), "rubbish").unwrap();
        ensure(&own, now).unwrap();
        assert_eq!(unfit(&own, now), None);
    }

    #[test]
    fn only_the_owner_reads_the_key() {
        let directory = tempfile::tempdir().unwrap();
        let own = wanted(directory.path());
        ensure(&own, Timestamp::now()).unwrap();
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(own.key()), 0o600);
        assert_eq!(fs::read_dir(&own.directory).unwrap().count(), 2);
    }
}
