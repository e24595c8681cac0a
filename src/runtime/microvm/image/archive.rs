//! Reads tar archives as layers are: ustar headers, with what GNU and PAX add to them.
//!
//! The archive is hostile. Nothing it says makes this reader hold more than [`LONGEST_EXTENSION`] bytes (twice, while a
//! header is being put together) and [`MOST_EXTENTS`] extents. Where readers of tar disagree, this one reads as Go's
//! `archive/tar` does, since that is what Docker and containerd read layers with. What it cannot read whole, it refuses.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use super::error::LayerError;

/// Bytes of a block.
const BLOCK: u64 = 512;
/// Most bytes of an extended header or of a long name; Go's reader takes as many.
const LONGEST_EXTENSION: u64 = 1 << 20;
/// Most pieces of a sparse file.
const MOST_EXTENTS: usize = 1 << 16;
/// Where extended attributes are in a PAX header.
const XATTR: &[u8] = b"SCHILY.xattr.";
const NANOSECOND_DIGITS: usize = 9;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    Fifo,
    /// Of characters or of blocks.
    Device,
}

/// A time of modification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mtime {
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
}

/// A piece of a sparse file that is not a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// One entry; its content, if it is a file, is then read from the [`Archive`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// As the archive has it.
    pub(super) path: Vec<u8>,
    /// Target of a link, as the archive has it.
    pub(super) link: Vec<u8>,
    pub(super) kind: Kind,
    /// Permission bits, set-id bits and the sticky bit.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Mtime,
    /// Bytes of the file, holes included.
    pub(super) size: u64,
    /// Where the content goes in a sparse file, in order and without overlap.
    pub(super) extents: Option<Vec<Extent>>,
    /// Extended attributes by name.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An archive being read.
pub(super) struct Archive<R> {
    inner: R,
    /// Content of the current entry that was not read.
    left: u64,
    /// Bytes from there to the next header.
    padding: u64,
}

/// What stands before an entry and belongs to it.
#[derive(Default)]
struct Ahead {
    any: bool,
    gnu_path: Option<Vec<u8>>,
    gnu_link: Option<Vec<u8>>,
    pax: Option<Pax>,
}

/// A PAX header (pax(1), "pax Extended Header").
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Mtime>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, left: 0, padding: 0 }
    }

    /// The next entry; what was left of the one before is skipped.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, LayerError> {
        let mut ahead = Ahead::default();
        loop {
            self.skip()?;
            let Some(header) = self.header()? else {
                let cut = Err(LayerError::Malformed("it ends after an extended header"));
                return if ahead.any { cut } else { Ok(None) };
            };
            let once = |free: bool| {
                free.then_some(()).ok_or(LayerError::Malformed("two extended headers of a kind for one entry"))
            };
            match header.entry_type() {
                EntryType::GNULongName => {
                    once(ahead.gnu_path.is_none())?;
                    ahead.gnu_path = Some(until_nul(self.extension(&header)?));
                }
                EntryType::GNULongLink => {
                    once(ahead.gnu_link.is_none())?;
                    ahead.gnu_link = Some(until_nul(self.extension(&header)?));
                }
                EntryType::XHeader => {
                    once(ahead.pax.is_none())?;
                    ahead.pax = Some(Pax::parse(&self.extension(&header)?)?);
                }
                // It describes the archive (a commit's id, by git), and no reader of layers heeds it.
                EntryType::XGlobalHeader => self.content(size_of(&header)?)?,
                _ => return self.entry(&header, ahead).map(Some),
            }
            ahead.any |= header.entry_type() != EntryType::XGlobalHeader;
        }
    }

    fn entry(&mut self, header: &Header, ahead: Ahead) -> Result<Entry, LayerError> {
        let pax = ahead.pax.unwrap_or_default();
        let path = ahead.gnu_path.or(pax.path).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = ahead.gnu_link.or(pax.link);
        let link = link.unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned());
        let kind = kind_of(header, &path)?;
        let old = header.as_old();
        let id = |extended: Option<u64>, field: &[u8]| {
            let id = extended.or_else(|| number(field)).and_then(|id| u32::try_from(id).ok());
            // All ones is the kernel's "leave it".
            id.filter(|id| *id != u32::MAX).ok_or_else(|| LayerError::refused(&path, "has no usable owner"))
        };
        let mode = number(&old.mode).ok_or_else(|| LayerError::refused(&path, "has no usable mode"))?;
        let mtime = pax.mtime.unwrap_or_else(|| {
            // Before 1970 is said in a way that is not worth reading.
            let seconds = number(&old.mtime).and_then(|seconds| i64::try_from(seconds).ok());
            Mtime { seconds: seconds.unwrap_or(0), nanoseconds: 0 }
        });
        let mut entry = Entry {
            link,
            kind,
            mode: (mode & 0o7777) as u32,
            uid: id(pax.uid, &old.uid)?,
            gid: id(pax.gid, &old.gid)?,
            mtime,
            size: 0,
            extents: None,
            xattrs: pax.xattrs,
            path,
        };
        if kind == Kind::File {
            let stored = match pax.size {
                Some(size) => size,
                None => size_of(header)?,
            };
            entry.size = stored;
            if header.entry_type() == EntryType::GNUSparse {
                (entry.size, entry.extents) = self.sparse(header, stored).map(|(size, all)| (size, Some(all)))?;
            }
            self.content(stored)?;
        }
        Ok(entry)
    }

    /// The next header, its sum checked; `None` at the end.
    fn header(&mut self) -> Result<Option<Header>, LayerError> {
        let mut header = Header::new_old();
        if !self.block(header.as_mut_bytes())? || header.as_bytes().iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let bytes = header.as_bytes();
        let sum: u64 = bytes[..148].iter().chain(&bytes[156..]).map(|byte| u64::from(*byte)).sum();
        // The sum is made with blanks in its own place.
        if number(&header.as_old().cksum) != Some(sum + 8 * u64::from(b' ')) {
            return Err(LayerError::Malformed("a header's sum is wrong"));
        }
        Ok(Some(header))
    }

    /// Fills a block; false if the archive ended before it.
    fn block(&mut self, block: &mut [u8]) -> Result<bool, LayerError> {
        let mut filled = 0;
        while filled < block.len() {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(LayerError::Malformed("it ends within a block")),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::Read(error)),
            }
        }
        Ok(true)
    }

    /// The whole content of an extended header.
    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, LayerError> {
        let size = size_of(header)?;
        if size > LONGEST_EXTENSION {
            return Err(LayerError::TooMuch { what: "bytes in an extended header", limit: LONGEST_EXTENSION });
        }
        self.content(size)?;
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes).map_err(LayerError::Read)?;
        Ok(bytes)
    }

    /// Size and extents of a sparse file of the old GNU format, whose map may go on in blocks of its own.
    fn sparse(&mut self, header: &Header, stored: u64) -> Result<(u64, Vec<Extent>), LayerError> {
        let broken = || LayerError::Malformed("the map of a sparse file makes no sense");
        let gnu = header.as_gnu().ok_or_else(broken)?;
        let size = number(&gnu.realsize).ok_or_else(broken)?;
        let mut extents = Vec::new();
        take_extents(&gnu.sparse, &mut extents).ok_or_else(broken)?;
        let mut goes_on = gnu.is_extended();
        while goes_on {
            let mut more = GnuExtSparseHeader::new();
            if !self.block(more.as_mut_bytes())? {
                return Err(broken());
            }
            take_extents(more.sparse(), &mut extents).ok_or_else(broken)?;
            goes_on = more.is_extended();
            if extents.len() > MOST_EXTENTS {
                return Err(LayerError::TooMuch { what: "pieces of a sparse file", limit: MOST_EXTENTS as u64 });
            }
        }
        let (mut end, mut sum) = (0, 0_u64);
        for extent in &extents {
            if extent.offset < end {
                return Err(broken());
            }
            end = extent.offset.checked_add(extent.length).ok_or_else(broken)?;
            sum = extent.length.checked_add(sum).ok_or_else(broken)?;
        }
        if end > size || sum != stored { Err(broken()) } else { Ok((size, extents)) }
    }

    /// Says how much content follows.
    fn content(&mut self, size: u64) -> Result<(), LayerError> {
        self.left = size;
        self.padding =
            size.checked_next_multiple_of(BLOCK).ok_or(LayerError::Malformed("a size is beyond all bounds"))? - size;
        Ok(())
    }

    fn skip(&mut self) -> Result<(), LayerError> {
        let all = self.left.saturating_add(self.padding);
        let skipped = io::copy(&mut (&mut self.inner).take(all), &mut io::sink()).map_err(LayerError::Read)?;
        // Some writers leave out what fills the last block.
        let cut = skipped < self.left;
        (self.left, self.padding) = (0, 0);
        if cut { Err(LayerError::Malformed("it ends within an entry")) } else { Ok(()) }
    }
}

/// The content of the current entry.
impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let read = self.inner.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ends within a file"));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

impl Pax {
    fn parse(bytes: &[u8]) -> Result<Self, LayerError> {
        let broken = || LayerError::Malformed("a PAX header makes no sense");
        let mut pax = Self::default();
        let mut rest = bytes;
        while !rest.is_empty() {
            // "LENGTH KEY=VALUE\n", where the value may hold anything, newlines too.
            let blank = rest.iter().position(|byte| *byte == b' ').ok_or_else(broken)?;
            let length = std::str::from_utf8(&rest[..blank]).ok().and_then(|digits| digits.parse::<usize>().ok());
            let length = length.filter(|length| (blank + 1..=rest.len()).contains(length)).ok_or_else(broken)?;
            let record = rest[blank + 1..length].strip_suffix(b"\n").ok_or_else(broken)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(broken)?;
            pax.take(&record[..equals], &record[equals + 1..])?;
            rest = &rest[length..];
        }
        Ok(pax)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), LayerError> {
        if let Some(name) = key.strip_prefix(XATTR) {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        if key.starts_with(b"GNU.sparse.") {
            return Err(LayerError::Malformed("sparse files in PAX headers are not understood"));
        }
        if value.is_empty() {
            // The header's own value holds.
            return Ok(());
        }
        let broken = || LayerError::Malformed("a number in a PAX header makes no sense");
        let text = || std::str::from_utf8(value).map_err(|_| broken());
        let number = || text()?.parse::<u64>().map_err(|_| broken());
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => self.mtime = Some(pax_time(text()?).ok_or_else(broken)?),
            _ => {}
        }
        Ok(())
    }
}

/// `SECONDS[.FRACTION]`, before 1970 with a minus.
fn pax_time(text: &str) -> Option<Mtime> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let negative = seconds.starts_with('-');
    let seconds: i64 = seconds.parse().ok()?;
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(NANOSECOND_DIGITS).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if negative && nanoseconds > 0 {
        return Some(Mtime { seconds: seconds.checked_sub(1)?, nanoseconds: 1_000_000_000 - nanoseconds });
    }
    Some(Mtime { seconds, nanoseconds })
}

fn kind_of(header: &Header, path: &[u8]) -> Result<Kind, LayerError> {
    Ok(match header.entry_type() {
        // The oldest archives have no type for directories.
        EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink,
        EntryType::Link => Kind::HardLink,
        EntryType::Fifo => Kind::Fifo,
        EntryType::Char | EntryType::Block => Kind::Device,
        _ => return Err(LayerError::refused(path, "is of a kind that no layer has")),
    })
}

fn size_of(header: &Header) -> Result<u64, LayerError> {
    number(&header.as_old().size).ok_or(LayerError::Malformed("an entry has no size"))
}

/// A field: octal digits between blanks and zeros, or (first bit set) a number in base 256. Nothing is zero.
fn number(field: &[u8]) -> Option<u64> {
    if let Some((first, rest)) = field.split_first()
        && first & 0x80 != 0
    {
        // 0xff begins a negative number.
        let mut value = u64::from(first & 0x7f);
        for byte in rest {
            value = value.checked_mul(256)? | u64::from(*byte);
        }
        return (*first != 0xff).then_some(value);
    }
    let is_blank = |byte: &u8| *byte == b' ' || *byte == 0;
    let digits = field.iter().skip_while(|byte| is_blank(byte)).take_while(|byte| !is_blank(byte));
    digits.copied().try_fold(0_u64, |value, digit| match digit {
        b'0'..=b'7' => Some(value.checked_mul(8)? | u64::from(digit - b'0')),
        _ => None,
    })
}

fn take_extents(map: &[GnuSparseHeader], extents: &mut Vec<Extent>) -> Option<()> {
    for piece in map.iter().filter(|piece| !piece.is_empty()) {
        extents.push(Extent { offset: number(&piece.offset)?, length: number(&piece.numbytes)? });
    }
    Some(())
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tar::Builder;

    use super::*;

    fn header(kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o640);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(9);
        header
    }

    fn entries(bytes: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, LayerError> {
        let mut archive = Archive::new(bytes);
        let mut entries = Vec::new();
        while let Some(entry) = archive.next()? {
            let mut content = Vec::new();
            archive.read_to_end(&mut content).map_err(LayerError::Read)?;
            entries.push((entry, content));
        }
        Ok(entries)
    }

    #[test]
    fn long_names_of_both_kinds_are_read() {
        let long = format!("{}/{}", "d".repeat(150), "f".repeat(150));
        let mut builder = Builder::new(Vec::new());
        builder.append_data(&mut header(EntryType::Regular, 3), &long, b"abc".as_slice()).unwrap();
        builder.append_link(&mut header(EntryType::Symlink, 0), "link", &long).unwrap();
        builder.append_pax_extensions([("path", b"from pax".as_slice()), ("mtime", b"-1.5")]).unwrap();
        builder.append_data(&mut header(EntryType::Regular, 0), "short", b"".as_slice()).unwrap();
        let read = entries(&builder.into_inner().unwrap()).unwrap();
        assert_eq!((read[0].0.path.as_slice(), read[0].1.as_slice()), (long.as_bytes(), b"abc".as_slice()));
        assert_eq!((read[1].0.kind, read[1].0.link.as_slice()), (Kind::Symlink, long.as_bytes()));
        assert_eq!(read[2].0.path, b"from pax");
        assert_eq!(read[2].0.mtime, Mtime { seconds: -2, nanoseconds: 500_000_000 });
        let facts = &read[0].0;
        assert_eq!((facts.mode, facts.uid, facts.gid, facts.mtime.seconds, facts.size), (0o640, 7, 8, 9, 3));
    }

    #[test]
    fn a_value_in_a_pax_header_may_hold_newlines() {
        let mut builder = Builder::new(Vec::new());
        let value = b"\x01\n\x02=\n 9 x".as_slice();
        let extensions = [("SCHILY.xattr.security.capability", value), ("size", b"2"), ("path", b"")];
        builder.append_pax_extensions(extensions).unwrap();
        builder.append_data(&mut header(EntryType::Regular, 2), "f", b"ab".as_slice()).unwrap();
        let read = entries(&builder.into_inner().unwrap()).unwrap();
        assert_eq!(read[0].0.xattrs, [(b"security.capability".to_vec(), value.to_vec())]);
        assert_eq!((read[0].0.path.as_slice(), read[0].1.as_slice()), (b"f".as_slice(), b"ab".as_slice()));
    }

    #[test]
    fn the_pieces_of_a_sparse_file_are_told() {
        let mut sparse = header(EntryType::GNUSparse, 1024);
        sparse.set_path("sparse").unwrap();
        let gnu = sparse.as_gnu_mut().unwrap();
        for (piece, offset) in gnu.sparse.iter_mut().zip([4096, 1 << 20]) {
            piece.set_offset(offset);
            piece.set_length(512);
        }
        gnu.set_real_size(2 << 20);
        sparse.set_cksum();
        let mut bytes = sparse.as_bytes().to_vec();
        bytes.extend([1; 1024]);
        bytes.extend([0; 1024]);
        let read = entries(&bytes).unwrap();
        let extents = [4096, 1 << 20].map(|offset| Extent { offset, length: 512 });
        assert_eq!((read[0].0.size, read[0].0.extents.as_deref()), (2 << 20, Some(extents.as_slice())));
        assert_eq!(read[0].1, [1; 1024]);
        // Out of order, or of another sum.
        for wrong in [(0, 512), (4096, 1024)] {
            let gnu = sparse.as_gnu_mut().unwrap();
            gnu.sparse[1].set_offset(wrong.0);
            gnu.sparse[1].set_length(wrong.1);
            sparse.set_cksum();
            let error = entries(sparse.as_bytes()).unwrap_err();
            assert!(error.to_string().contains("sparse"), "{error}");
        }
    }

    #[test]
    fn what_is_too_long_cut_or_senseless_is_refused() {
        let mut long = header(EntryType::GNULongName, LONGEST_EXTENSION + 1);
        long.set_cksum();
        let error = entries(long.as_bytes()).unwrap_err();
        assert!(error.to_string().contains("extended header"), "{error}");
        let mut cut = header(EntryType::Regular, 600);
        cut.set_cksum();
        let with_some = [cut.as_bytes().as_slice(), &[0; 512]].concat();
        assert!(matches!(entries(&with_some), Err(LayerError::Read(_))));
        let mut huge = header(EntryType::Regular, u64::MAX);
        huge.set_cksum();
        assert!(matches!(entries(huge.as_bytes()), Err(LayerError::Malformed(_))));
        let mut lone = header(EntryType::XHeader, 0);
        lone.set_cksum();
        assert!(matches!(entries(lone.as_bytes()), Err(LayerError::Malformed(_))));
        for pax in ["8 path=x\n", "x", "5 a=b", "0 \n", "99999999999999999999 a=b\n", "6 a=bc\nrest"] {
            assert!(Pax::parse(pax.as_bytes()).is_err(), "{pax:?}");
        }
        assert!(entries(&[1; 512]).is_err());
        assert!(entries(&[b'x'; 100]).is_err());
    }

    #[test]
    fn numbers_are_octal_or_in_base_256() {
        for (field, value) in [
            (b"0000644\0".as_slice(), Some(0o644)),
            (b"   12 \0", Some(0o12)),
            (b"\0\0\0\0", Some(0)),
            (b"12x", None),
            (b"8", None),
            (&[0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2], Some((1 << 32) + 2)),
            (&[0xff; 12], None),
            (&[0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], None),
        ] {
            assert_eq!(number(field), value, "{field:?}");
        }
    }

    proptest! {
        /// Whatever it is given, it ends, and says nothing of its own invention.
        #[test]
        fn anything_is_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..4096), fix in any::<bool>()) {
            // With right sums, so that more than the first check is reached.
            if fix {
                for block in bytes.chunks_exact_mut(512) {
                    let mut header = Header::new_old();
                    header.as_mut_bytes().copy_from_slice(block);
                    header.as_mut_bytes()[156] = b"0125LKxgS"[usize::from(block[156]) % 9];
                    header.set_size(u64::from(block[130]) * 4);
                    header.set_cksum();
                    block.copy_from_slice(header.as_bytes());
                }
            }
            if let Ok(read) = entries(&bytes) {
                prop_assert!(read.len() <= bytes.len() / 512);
            }
        }
    }
}
