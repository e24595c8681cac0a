//! The certificate the API serves with until it is given another: made here, signed by itself, kept while it fits.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan, civil::Date};
use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose};
use tokio::sync::watch;
use tracing::info;

use super::tls::TlsError;
use crate::certificate::{self, Certificate, Names};
use crate::node::NodeFacts;

/// Days a certificate is good for, as a kubelet's own.
const LIFETIME_DAYS: i64 = 365;
/// A certificate with fewer days left is replaced.
const RENEW_DAYS: i64 = 30;

/// What a self-signed certificate is for.
#[derive(Clone, Debug)]
pub struct SelfSigned {
    /// Where `kubelet.crt` and `kubelet.key` are kept: `<root-dir>/pki`.
    pub directory: PathBuf,
    /// Name and addresses it is good for; a look at the files after they changed makes another one.
    pub node: watch::Receiver<NodeFacts>,
}

impl SelfSigned {
    pub(super) fn certificate(&self) -> PathBuf {
        self.directory.join("kubelet.crt")
    }

    pub(super) fn key(&self) -> PathBuf {
        self.directory.join("kubelet.key")
    }

    fn names(&self) -> Names {
        let node = self.node.borrow();
        Names { dns: [node.name.clone()].into(), ip: node.addresses.iter().copied().collect() }
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
    let Some(parsed) = Certificate::first(&certificate) else { return Some("it does not parse") };
    let Ok(key) = KeyPair::from_pem(&key) else { return Some("its key does not parse") };
    if !parsed.belongs_to(&key) {
        return Some("its key is another's");
    }
    if now < parsed.not_before || now.as_second() + RENEW_DAYS * 86_400 > parsed.not_after.as_second() {
        return Some("its time is over");
    }
    if parsed.names.cover(&own.names()) { None } else { Some("names or addresses changed") }
}

fn generate(own: &SelfSigned, now: Timestamp) -> Result<(), TlsError> {
    let name = own.node.borrow().name.clone();
    let names = own.names();
    let failed = |source| TlsError::Generate { name: name.clone(), source };
    let names = names.dns.into_iter().chain(names.ip.iter().map(IpAddr::to_string));
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

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), TlsError> {
    certificate::write(path, bytes, mode).map_err(|source| TlsError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn wanted(directory: &Path) -> (watch::Sender<NodeFacts>, SelfSigned) {
        let (sender, node) = watch::channel(NodeFacts {
            name: "node-1".to_owned(),
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            capacity: Default::default(),
            allocatable: Default::default(),
        });
        (sender, SelfSigned { directory: directory.join("pki"), node })
    }

    fn stored(own: &SelfSigned) -> (Vec<u8>, Vec<u8>) {
        (fs::read(own.certificate()).unwrap(), fs::read(own.key()).unwrap())
    }

    #[test]
    fn a_certificate_is_kept_while_it_fits() {
        let directory = tempfile::tempdir().unwrap();
        let ((node, own), now) = (wanted(directory.path()), Timestamp::now());
        ensure(&own, now).unwrap();
        let first = stored(&own);
        ensure(&own, now + 300.hours()).unwrap();
        assert_eq!(stored(&own), first);
        // Fewer addresses than it has is fine, another is not.
        node.send_modify(|facts| facts.addresses.truncate(1));
        ensure(&own, now).unwrap();
        assert_eq!(stored(&own), first);
        node.send_modify(|facts| facts.addresses = vec!["10.0.0.2".parse().unwrap()]);
        ensure(&own, now).unwrap();
        let names = Certificate::first(&stored(&own).0).unwrap().names;
        assert_eq!(names, Names { dns: ["node-1".to_owned()].into(), ip: ["10.0.0.2".parse().unwrap()].into() });
    }

    #[test]
    fn one_that_runs_out_or_is_damaged_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let ((_node, own), now) = (wanted(directory.path()), Timestamp::now());
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
        let (_node, own) = wanted(directory.path());
        ensure(&own, Timestamp::now()).unwrap();
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(own.key()), 0o600);
        assert_eq!(fs::read_dir(&own.directory).unwrap().count(), 2);
    }
}
