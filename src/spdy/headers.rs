//! Header blocks: names and values, deflated with one window for the whole connection (SPDY/3.1, section 2.6.10).

use std::sync::LazyLock;

use bytes::{BufMut, BytesMut};
use flate2::{Decompress, FlushDecompress, Status};

use super::SpdyError;

/// Most bytes of one inflated block. A kubelet's clients send about a hundred.
pub const MAX_INFLATED: usize = 32 << 10;
/// Most headers in one block.
pub const MAX_HEADERS: usize = 64;
/// Room that inflating begins with.
const FIRST_ROOM: usize = 512;

/// The words of the dictionary that stand behind their length.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
    accept-ranges age allow authorization cache-control connection content-base content-encoding content-language \
    content-length content-location content-md5 content-range content-type date etag expect expires from host if-match \
    if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma \
    proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade \
    user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie \
    keep-alive origin";
/// The rest of it.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden\
    404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable\
    Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT\
    chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,\
    text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

/// What both sides know before the first block (section 2.6.10.1); its Adler-32 is `e3c6a7c2`.
pub static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = Vec::with_capacity(1423);
    for word in WORDS.split(' ') {
        let word = word.replace('_', " ");
        bytes.put_u32(u32::try_from(word.len()).unwrap_or_default());
        bytes.extend_from_slice(word.as_bytes());
    }
    bytes.extend_from_slice(TAIL.as_bytes());
    bytes
});

/// The headers of a stream, in the order in which they came, names in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first value of that name (given in lower case); `None` if it is missing or empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        let value = self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())?;
        // Several values of one name are joined by NUL.
        value.split('\0').next().filter(|value| !value.is_empty())
    }

    /// All of them.
    pub fn pairs(&self) -> &[(String, String)] {
        &self.0
    }

    /// Reads an inflated block: a count, then name and value, each behind its length.
    fn parse(mut block: &[u8]) -> Result<Self, SpdyError> {
        let count = length(&mut block)?;
        if count > MAX_HEADERS {
            return Err(SpdyError::HeadersTooLarge);
        }
        let mut pairs = Vec::with_capacity(count);
        for _ in 0..count {
            let name = text(&mut block)?.to_lowercase();
            pairs.push((name, text(&mut block)?.to_owned()));
        }
        if block.is_empty() { Ok(Self(pairs)) } else { Err(SpdyError::HeaderBlock) }
    }
}

impl FromIterator<(String, String)> for Headers {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(pairs: T) -> Self {
        Self(pairs.into_iter().collect())
    }
}

fn length(block: &mut &[u8]) -> Result<usize, SpdyError> {
    let (head, rest) = block.split_first_chunk::<4>().ok_or(SpdyError::HeaderBlock)?;
    *block = rest;
    usize::try_from(u32::from_be_bytes(*head)).map_err(|_| SpdyError::HeaderBlock)
}

fn text<'a>(block: &mut &'a [u8]) -> Result<&'a str, SpdyError> {
    let length = length(block)?;
    let (text, rest) = block.split_at_checked(length).ok_or(SpdyError::HeaderBlock)?;
    *block = rest;
    std::str::from_utf8(text).map_err(|_| SpdyError::HeaderBlock)
}

/// Inflates the blocks of one direction. After an error the window is lost, and with it the connection.
#[derive(Debug)]
pub struct HeaderReader(Decompress);

impl Default for HeaderReader {
    fn default() -> Self {
        Self(Decompress::new(true))
    }
}

impl HeaderReader {
    /// The headers of the next block.
    ///
    /// # Errors
    /// [`SpdyError::HeadersTooLarge`] beyond [`MAX_INFLATED`] or [`MAX_HEADERS`], [`SpdyError::HeaderBlock`] if it is
    /// not a block.
    pub fn read(&mut self, block: &[u8]) -> Result<Headers, SpdyError> {
        Headers::parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, mut block: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let mut inflated = vec![0; FIRST_ROOM];
        let mut filled = 0;
        loop {
            let (read, written) = (self.0.total_in(), self.0.total_out());
            let outcome = self.0.decompress(block, &mut inflated[filled..], FlushDecompress::Sync);
            let (read, written) = (self.0.total_in() - read, self.0.total_out() - written);
            block = usize::try_from(read).ok().and_then(|read| block.get(read..)).ok_or(SpdyError::HeaderBlock)?;
            filled += usize::try_from(written).map_err(|_| SpdyError::HeaderBlock)?;
            match outcome {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&DICTIONARY).map_err(|_| SpdyError::HeaderBlock)?;
                    continue;
                }
                // The stream of blocks never ends.
                Err(_) | Ok(Status::StreamEnd) => return Err(SpdyError::HeaderBlock),
                Ok(Status::Ok | Status::BufError) => {}
            }
            if filled == MAX_INFLATED {
                return Err(SpdyError::HeadersTooLarge);
            }
            if filled == inflated.len() {
                inflated.resize((2 * filled).min(MAX_INFLATED), 0);
            } else if block.is_empty() {
                inflated.truncate(filled);
                return Ok(inflated);
            } else if read == 0 && written == 0 {
                return Err(SpdyError::HeaderBlock);
            }
        }
    }
}

/// Writes the few headers that this side has to send: none at all as a server of streams, what a stream is for as a
/// client.
///
/// They are stored blocks of a zlib stream that begins with the first one, so there is nothing to compress and no window
/// of a quarter of a megabyte to keep.
#[derive(Debug, Default)]
pub struct HeaderWriter {
    begun: bool,
}

impl HeaderWriter {
    /// Header of a zlib stream without a preset dictionary (RFC 1950).
    const BEGIN: [u8; 2] = [0x78, 0x01];
    /// An empty stored block (RFC 1951, section 3.2.4), which ends a flush: Go hands nothing on before it.
    const FLUSH: [u8; 5] = [0, 0, 0, 0xff, 0xff];

    /// The next block. All of it is at most 65,535 bytes.
    pub fn block(&mut self, headers: &[(&str, &str)]) -> BytesMut {
        let mut plain = BytesMut::new();
        let length = |length: usize| u32::try_from(length).unwrap_or_default();
        plain.put_u32(length(headers.len()));
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.put_u32(length(text.len()));
            plain.put_slice(text.as_bytes());
        }
        let mut block = BytesMut::new();
        if !self.begun {
            self.begun = true;
            block.put_slice(&Self::BEGIN);
        }
        let stored = u16::try_from(plain.len()).unwrap_or_default();
        block.put_u8(0);
        block.put_u16_le(stored);
        block.put_u16_le(!stored);
        block.put_slice(&plain);
        block.put_slice(&Self::FLUSH);
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dictionary_is_the_one_of_the_document() {
        let (mut a, mut b) = (1_u32, 0_u32);
        for byte in DICTIONARY.iter() {
            a = (a + u32::from(*byte)) % 65521;
            b = (b + a) % 65521;
        }
        assert_eq!((DICTIONARY.len(), b << 16 | a), (1423, 0xe3c6_a7c2));
    }

    #[test]
    fn blocks_are_read_back_one_after_the_other() {
        let (mut writer, mut reader) = (HeaderWriter::default(), HeaderReader::default());
        for pairs in [&[][..], &[("streamtype", "stdin"), ("port", "")], &[], &[("streamtype", "error")]] {
            let wanted = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            assert_eq!(reader.read(&writer.block(pairs)).unwrap(), wanted);
        }
    }

    #[test]
    fn the_first_of_several_values_counts_and_an_empty_one_is_none() {
        let headers: Headers =
            [("a", "1\x002"), ("b", ""), ("a", "3")].map(|(k, v)| (k.to_owned(), v.to_owned())).into_iter().collect();
        assert_eq!((headers.get("a"), headers.get("b"), headers.get("c")), (Some("1"), None, None));
    }
}
