//! One certificate's files: the pair in use, and the key of the request on its way.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};

use super::{IdentityError, Kind};
use crate::certificate::{self, Certificate, PairError};

/// Keys are nobody else's.
const MODE: u32 = 0o600;

/// Where a certificate and its key are kept: `<cert-dir>/kubelet-client-current.pem` and `kubelet-server-current.pem`,
/// each in one file so that both change at once.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
    kind: Kind,
}

impl Store {
    /// The files of a kind in `--cert-dir`.
    pub fn new(directory: &Path, kind: Kind) -> Self {
        Self { directory: directory.to_owned(), kind }
    }

    /// The pair's file.
    pub fn path(&self) -> PathBuf {
        self.directory.join(format!("{}-current.pem", self.kind.stem()))
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// The pair in use.
    ///
    /// # Errors
    /// As [`Certificate::of_pair`]; also if there is none yet.
    pub fn current(&self) -> Result<Certificate, PairError> {
        Certificate::of_pair(&self.path())
    }

    pub(super) fn pending(&self) -> PathBuf {
        self.directory.join(format!("{}.key.tmp", self.kind.stem()))
    }

    /// The key of the next certificate: on disk before it is asked for, so that a restart finds the request again
    /// instead of making another one.
    pub(super) fn pending_key(&self, user: &str) -> Result<KeyPair, IdentityError> {
        let path = self.pending();
        if let Some(key) = fs::read_to_string(&path).ok().and_then(|pem| KeyPair::from_pem(&pem).ok()) {
            return Ok(key);
        }
        let made = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256);
        let key = made.map_err(|source| IdentityError::Make { user: user.to_owned(), source })?;
        write(&path, key.serialize_pem().as_bytes())?;
        Ok(key)
    }

    /// After a refusal the same key would find the same request.
    pub(super) fn forget_pending(&self) {
        // Without the file there is nothing to forget.
        let _ = fs::remove_file(self.pending());
    }

    /// Puts a granted certificate and its key in use.
    pub(super) fn keep(&self, chain: &[u8], key: &KeyPair) -> Result<(), IdentityError> {
        let pem = [chain.trim_ascii_end(), b"\n", key.serialize_pem().as_bytes()].concat();
        write(&self.path(), &pem)?;
        self.current().map_err(IdentityError::Pair)?;
        self.forget_pending();
        Ok(())
    }
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), IdentityError> {
    certificate::write(path, bytes, MODE).map_err(|source| IdentityError::Write { path: path.to_owned(), source })
}
