//! Header blocks, one after the other, as they are and deflated first.
#![no_main]

use flate2::{Compress, Compression, FlushCompress};
use lambdalet_fuzz::spdy::headers::{DICTIONARY, HeaderReader, MAX_HEADERS, MAX_INFLATED};
use libfuzzer_sys::fuzz_target;

/// The first byte says whether the blocks are deflated, and how long each is.
fuzz_target!(|data: &[u8]| {
    let [mode, rest @ ..] = data else { return };
    let (mut reader, mut deflate) = (HeaderReader::default(), Compress::new(Compression::fast(), true));
    deflate.set_dictionary(&DICTIONARY).expect("the dictionary is set before anything else");
    for block in rest.chunks(8 * usize::from(mode >> 1) + 16) {
        let block = if mode & 1 == 0 { block.to_vec() } else { deflated(&mut deflate, block) };
        let Ok(headers) = reader.read(&block) else { return };
        assert!(headers.pairs().len() <= MAX_HEADERS);
        let bytes: usize = headers.pairs().iter().map(|(name, value)| name.len() + value.len()).sum();
        // Some letters are longer in lower case.
        assert!(bytes <= 4 * MAX_INFLATED);
        for (name, _) in headers.pairs() {
            let _ = headers.get(name);
        }
    }
});

fn deflated(deflate: &mut Compress, plain: &[u8]) -> Vec<u8> {
    let (mut block, before) = (vec![0; plain.len() + 256], deflate.total_out());
    deflate.compress(plain, &mut block, FlushCompress::Sync).expect("there is room");
    block.truncate(usize::try_from(deflate.total_out() - before).expect("it is short"));
    block
}
