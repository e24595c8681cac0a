//! Makes a file system image of a directory tree: erofs, read-only, without compression, so that what a guest reads
//! lies in the host's page cache as it is, once for all VMs.
//!
//! The same tree gives the same bytes. `mkfs.erofs` writes the time of making into the superblock, and can only be told
//! another one together with that of every file; so this is put right afterwards. The layout of the superblock is that of
//! the kernel's `fs/erofs/erofs_fs.h`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use super::layer::digest_of;
use crate::runtime::{Kind, Result, RuntimeError};

/// One UUID for all: an image is known by its digest.
const UUID: &str = "6c616d62-6461-6c65-7400-000000000001";
/// Longer than any image takes.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
/// Where the superblock is, in bytes from the beginning.
const SUPERBLOCK: u64 = 1024;
const MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
/// Fields of the superblock, in bytes from its beginning.
const CHECKSUM: std::ops::Range<usize> = 4..8;
const FEATURES: usize = 8;
const BUILD_TIME: std::ops::Range<usize> = 24..36;
/// The feature that says that the checksum counts.
const FEATURE_CHECKSUM: u8 = 1;
/// Bytes at the beginning by which a damaged image is told: the superblock's block.
const HEAD: usize = 4096;
/// Most of its complaints that are told.
const LONGEST_WORDS: usize = 2000;

/// `mkfs.erofs` of erofs-utils (1.5 and later are known to do).
#[derive(Clone, Debug)]
pub(super) struct Mkfs {
    program: PathBuf,
}

impl Mkfs {
    /// Looks for the program: at its path, or along `PATH`.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if it is not there, with what to install.
    pub(super) fn find(program: &Path) -> Result<Self> {
        let is_program = |path: &Path| {
            fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
        };
        let places = std::env::var_os("PATH").unwrap_or_default();
        let named = program.components().count() > 1;
        let found = match named {
            true => Some(program.to_owned()).filter(|path| is_program(path)),
            false => std::env::split_paths(&places).map(|place| place.join(program)).find(|path| is_program(path)),
        };
        found.map(|program| Self { program }).ok_or_else(|| {
            let text = format!(
                "{} is not installed, and microVMs take their images as erofs: install erofs-utils \
                 (on Debian: apt-get install erofs-utils)",
                program.display()
            );
            RuntimeError::new(Kind::Unsupported, text)
        })
    }

    /// Writes the image of `tree` to the new file `image`, and everything of it to the disk. Dropping the future ends the
    /// program.
    pub(super) async fn make(&self, tree: &Path, image: &Path) -> Result<()> {
        let tried = || format!("failed to make a file system of {}", tree.display());
        let internal = |error: io::Error| RuntimeError::new(Kind::Internal, tried()).with_source(error);
        let mut command = Command::new(&self.program);
        // With a fixed size of inodes each has its own time.
        command.args(["-d1", "-Eforce-inode-extended", "-U", UUID]).arg(image).arg(tree);
        // Nothing of the node's environment is to change what comes out.
        command.env_clear().env("LC_ALL", "C").kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let ended = timeout(PATIENCE, command.output()).await;
        let ended = ended.map_err(|elapsed| RuntimeError::new(Kind::Internal, tried()).with_source(elapsed))?;
        let ended = ended.map_err(internal)?;
        if !ended.status.success() {
            let words = String::from_utf8_lossy(&ended.stderr);
            let words: String = words.trim().chars().take(LONGEST_WORDS).collect();
            return Err(RuntimeError::new(Kind::Internal, format!("{}: {}: {words}", tried(), ended.status)));
        }
        let (image, tried) = (image.to_owned(), tried());
        crate::runtime::blocking(tried, move || finish(&image)).await
    }
}

/// Takes the time of making out of the superblock, lets anyone read it and nobody write, and waits for the disk.
fn finish(image: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(image)?;
    let mut superblock = [0; 128];
    file.read_exact_at(&mut superblock, SUPERBLOCK)?;
    if !superblock.starts_with(&MAGIC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it has no superblock of erofs"));
    }
    superblock[CHECKSUM].fill(0);
    superblock[FEATURES] &= !FEATURE_CHECKSUM;
    superblock[BUILD_TIME].fill(0);
    file.write_all_at(&superblock, SUPERBLOCK)?;
    file.set_permissions(fs::Permissions::from_mode(0o444))?;
    file.sync_all()
}

/// The digest of an image's beginning, by which a file that was cut, or overwritten, is told.
///
/// # Errors
/// It cannot be read, or is no erofs.
pub(super) fn head(image: &Path) -> io::Result<String> {
    let mut head = Vec::new();
    File::open(image)?.take(HEAD as u64).read_to_end(&mut head)?;
    if head.len() < HEAD || !head[SUPERBLOCK as usize..].starts_with(&MAGIC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it has no superblock of erofs"));
    }
    Ok(digest_of(&head))
}
