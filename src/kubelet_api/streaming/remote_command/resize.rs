//! Pure: sizes of a terminal, as JSON objects one after the other, cut anywhere.

use bytes::BytesMut;
use serde::Deserialize;

use crate::runtime::session::TerminalSize;

/// An object is about thirty bytes; one that is longer than this never ends.
const LONGEST: usize = 4 << 10;

/// As Go's clients write it; Go reads names in any case, and so do clients in other languages expect it.
#[derive(Deserialize)]
struct Size {
    #[serde(rename = "Width", alias = "width", default)]
    width: u16,
    #[serde(rename = "Height", alias = "height", default)]
    height: u16,
}

/// Reads sizes from pieces.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    rest: BytesMut,
    broken: bool,
}

impl Sizes {
    /// The last size that is complete with these bytes. After the first that is not one, nothing is read any more.
    pub(super) fn read(&mut self, bytes: &[u8]) -> Option<TerminalSize> {
        if self.broken {
            return None;
        }
        self.rest.extend_from_slice(bytes);
        let mut objects = serde_json::Deserializer::from_slice(&self.rest).into_iter::<Size>();
        let (mut last, mut read) = (None, 0);
        for object in objects.by_ref() {
            match object {
                Ok(size) => last = Some(size),
                Err(error) => {
                    self.broken = !error.is_eof();
                    break;
                }
            }
        }
        read += objects.byte_offset();
        let _ = self.rest.split_to(read.min(self.rest.len()));
        self.broken |= self.rest.len() > LONGEST;
        last.filter(|size| size.width > 0 && size.height > 0)
            .map(|size| TerminalSize { width: size.width, height: size.height })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn size(width: u16, height: u16) -> Option<TerminalSize> {
        Some(TerminalSize { width, height })
    }

    #[test]
    fn the_last_complete_size_counts() {
        let mut sizes = Sizes::default();
        assert_eq!(sizes.read(br#"{"Width":80,"Height":24}{"Width":100,"Height":30} {"Wid"#), size(100, 30));
        assert_eq!(sizes.read(br#"th":5,"Height":6}"#), size(5, 6));
        assert_eq!(sizes.read(br#"{"Width":0,"Height":6}"#), None);
        assert_eq!(sizes.read(b"}"), None);
        assert_eq!(sizes.read(br#"{"Width":5,"Height":6}"#), None);
    }

    #[test]
    fn an_object_without_end_is_not_kept() {
        let mut sizes = Sizes::default();
        for _ in 0..1000 {
            sizes.read(&[b' '; 100]);
            sizes.read(br#"{"a":[[["#);
        }
        assert!(sizes.rest.len() <= LONGEST + 100);
    }

    proptest! {
        #[test]
        fn pieces_of_any_length_give_the_same_last_size(cuts in prop::collection::vec(1_usize..9, 1..40)) {
            let text = br#"{"Width":80,"Height":24}{"Width":1,"Height":2}{"Height":50,"Width":132}"#;
            let (mut sizes, mut last, mut at) = (Sizes::default(), None, 0);
            for cut in cuts.iter().chain(std::iter::repeat(&7)) {
                let end = (at + cut).min(text.len());
                last = sizes.read(&text[at..end]).or(last);
                at = end;
                if at == text.len() {
                    break;
                }
            }
            prop_assert_eq!(last, size(132, 50));
        }
    }
}
