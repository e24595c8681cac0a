//! The image of the process that holds a sandbox: one small static file that this binary carries, so that no registry
//! is needed to run the first Pod.

use bollard::query_parameters::CreateImageOptionsBuilder;
use bytes::Bytes;
use futures::TryStreamExt;
use sha2::{Digest, Sha256};

use super::DockerRuntime;
use super::failure::{failed, is_absent};
use crate::runtime::{Kind, Result, RuntimeError};

/// `pause/pause.rs`, built by `build.rs`.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pause"));
/// Where it lies in the image.
const PATH: &str = "pause";
const REPOSITORY: &str = "lambdalet.dev/pause";

/// The image's reference; a change of the program changes it, so an upgrade never runs the old one.
pub(super) fn reference() -> String {
    format!("{REPOSITORY}:{}", tag())
}

/// The program as Docker's command.
pub(super) fn command() -> Vec<String> {
    vec![format!("/{PATH}")]
}

fn tag() -> String {
    Sha256::digest(PROGRAM).iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

fn archive() -> std::io::Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    header.set_size(PROGRAM.len() as u64);
    header.set_mode(0o555);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, PATH, PROGRAM)?;
    archive.into_inner()
}

impl DockerRuntime {
    /// Sees to it that Docker has the image. Asked before a sandbox is made for the first time and again when Docker
    /// says it is gone (an operator may prune).
    pub(super) async fn ensure_pause_image(&self) -> Result<()> {
        let tried = || format!("failed to import the sandbox image {}", reference());
        match self.docker.inspect_image(&reference()).await {
            Ok(_) => return Ok(()),
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(failed(tried(), error)),
        }
        let archive = archive().map_err(|error| RuntimeError::new(Kind::Internal, tried()).with_source(error))?;
        let options = CreateImageOptionsBuilder::new().from_src("-").repo(REPOSITORY).tag(&tag()).build();
        let body = bollard::body_full(Bytes::from(archive));
        self.docker
            .create_image(Some(options), Some(body), None)
            .try_for_each(|_| async { Ok(()) })
            .await
            .map_err(|error| failed(tried(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_a_small_static_executable() {
        assert_eq!(&PROGRAM[..4], b"\x7fELF");
        assert!(PROGRAM.len() < 16 * 1024, "{}", PROGRAM.len());
    }

    #[test]
    fn the_archive_holds_it_executable() {
        let bytes = archive().unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let entry = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(entry.header().mode().unwrap() & 0o111, 0o111);
        assert_eq!(entry.size(), PROGRAM.len() as u64);
    }
}
