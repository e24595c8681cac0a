//! The content of a layer: decompressed, counted, and hashed while it is read.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::PathBuf;

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

use super::error::LayerError;

/// Bytes of a compressed layer read at once.
const BUFFER: usize = 128 << 10;
/// Largest window of a zstd frame, as a power of two: 128 MiB is what `zstd` itself decompresses without being asked.
const LARGEST_WINDOW: u32 = 27;

/// Where the bytes of a layer are, whole and checked as the manifest wants them.
#[derive(Clone, Debug)]
pub(super) struct Blob {
    /// A file that holds them.
    pub(super) path: PathBuf,
    /// Where in it they begin.
    pub(super) offset: u64,
    /// How many there are.
    pub(super) length: u64,
}

/// A layer's content, which is a tar archive.
pub(super) struct Content {
    inner: Box<dyn Read>,
    hash: Sha256,
    left: u64,
    limit: u64,
}

/// How a layer is compressed, by its first bytes: media types are wrong often enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
    Foreign,
}

impl Compression {
    fn of(first: &[u8]) -> Self {
        match first {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [b'B', b'Z', b'h', ..] | [0xfd, b'7', b'z', b'X', b'Z', ..] => Self::Foreign,
            _ => Self::None,
        }
    }
}

/// Opens a layer; no more than `limit` bytes come out of it.
pub(super) fn open(blob: &Blob, limit: u64) -> Result<Content, LayerError> {
    let read = LayerError::Read;
    let mut file = File::open(&blob.path).map_err(read)?;
    file.seek(SeekFrom::Start(blob.offset)).map_err(read)?;
    let mut bytes = BufReader::with_capacity(BUFFER, file.take(blob.length));
    let compression = Compression::of(bytes.fill_buf().map_err(read)?);
    let inner: Box<dyn Read> = match compression {
        Compression::None => Box::new(bytes),
        Compression::Gzip => Box::new(MultiGzDecoder::new(bytes)),
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(bytes).map_err(read)?;
            decoder.window_log_max(LARGEST_WINDOW).map_err(read)?;
            Box::new(decoder)
        }
        Compression::Foreign => return Err(LayerError::Malformed("it is compressed in a way no image of today is")),
    };
    Ok(Content { inner, hash: Sha256::new(), left: limit, limit })
}

impl Content {
    /// Reads to the end, and compares what was read from the beginning with its digest (`sha256:…`); what is left of the
    /// limit.
    pub(super) fn verify(mut self, wanted: &str) -> Result<u64, LayerError> {
        io::copy(&mut self, &mut io::sink()).map_err(LayerError::Read)?;
        let found = digest(self.hash);
        if found == wanted { Ok(self.left) } else { Err(LayerError::Digest { wanted: wanted.to_owned(), found }) }
    }
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(read as u64)
            .ok_or_else(|| io::Error::other(LayerError::TooMuch { what: "bytes, uncompressed", limit: self.limit }))?;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}

/// A hash as images write it.
pub(super) fn digest(hash: Sha256) -> String {
    hash.finalize().iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

/// The digest of some bytes.
pub(in crate::runtime::microvm) fn digest_of(bytes: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(bytes);
    digest(hash)
}
