//! Layers, honest and hostile, made byte by byte.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::*;
use crate::runtime::microvm::image::layer::digest_of;

/// A layer, entry by entry, without a library's scruples.
#[derive(Clone, Default)]
pub(in crate::runtime::microvm::image) struct Layer(Vec<u8>);

impl Layer {
    fn raw(mut self, kind: EntryType, path: &str, link: &str, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        let old = header.as_old_mut();
        old.name[..path.len()].copy_from_slice(path.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(in crate::runtime::microvm::image) fn file(self, path: &str, content: &str) -> Self {
        self.raw(EntryType::Regular, path, "", content.as_bytes())
    }

    fn dir(self, path: &str) -> Self {
        self.raw(EntryType::Directory, path, "", b"")
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.raw(EntryType::Symlink, path, target, b"")
    }

    fn hard_link(self, path: &str, target: &str) -> Self {
        self.raw(EntryType::Link, path, target, b"")
    }

    fn whiteout(self, path: &str) -> Self {
        self.file(path, "")
    }

    pub(in crate::runtime::microvm::image) fn tar(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

struct Unpacked {
    folder: TempDir,
    result: Result<(), (usize, LayerError)>,
}

impl Unpacked {
    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    fn text(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root().join(path)).ok()
    }

    /// What is there, by path: content of files, targets of links.
    fn all(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        let mut open = vec![self.root()];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(self.root()).unwrap().display().to_string();
                let kind = fs::symlink_metadata(&path).unwrap().file_type();
                let what = match kind {
                    _ if kind.is_dir() => {
                        open.push(path);
                        "/".to_owned()
                    }
                    _ if kind.is_symlink() => format!("-> {}", fs::read_link(&path).unwrap().display()),
                    _ if kind.is_file() => fs::read_to_string(&path).unwrap(),
                    _ => format!("{kind:?}"),
                };
                all.insert(name, what);
            }
        }
        all
    }

    fn why(&self) -> String {
        let (_, error) = self.result.as_ref().unwrap_err();
        crate::telemetry::chain(error).to_string()
    }
}

/// Unpacks below a directory that holds something precious.
fn unpacked_from(files: &[Vec<u8>], digests: &[String], limits: &Limits) -> Unpacked {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("root")).unwrap();
    fs::write(folder.path().join("precious"), "untouched").unwrap();
    let blobs: Vec<_> = files
        .iter()
        .enumerate()
        .map(|(at, bytes)| {
            let path = folder.path().join(format!("layer-{at}"));
            fs::write(&path, bytes).unwrap();
            Blob { path, offset: 0, length: bytes.len() as u64 }
        })
        .collect();
    let root = folder.path().join("root");
    let result = unpack(&blobs, digests, &root, limits, &AtomicBool::new(false));
    assert_eq!(fs::read_to_string(folder.path().join("precious")).unwrap(), "untouched");
    Unpacked { folder, result }
}

fn unpacked(layers: Vec<Layer>) -> Unpacked {
    let layers: Vec<_> = layers.into_iter().map(Layer::tar).collect();
    let digests: Vec<_> = layers.iter().map(|bytes| digest_of(bytes)).collect();
    unpacked_from(&layers, &digests, &Limits::default())
}

fn layer() -> Layer {
    Layer::default()
}

/// Owners can be given by root only.
fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        println!("skipped: only root can give files away");
    }
    is_root
}

#[test]
fn layers_lie_upon_each_other_in_order() {
    if !is_root() {
        return;
    }
    let lower = layer().dir("./").dir("./etc/").file("./etc/name", "old").file("etc/kept", "kept").file("gone", "x");
    let upper =
        layer().file("etc/name", "new").whiteout(".wh.gone").file("made/on/the/way", "w").symlink("l", "/etc/name");
    let unpacked = unpacked(vec![lower, upper]);
    unpacked.result.as_ref().unwrap();
    let wanted = [
        ("etc", "/"),
        ("etc/kept", "kept"),
        ("etc/name", "new"),
        ("l", "-> /etc/name"),
        ("made", "/"),
        ("made/on", "/"),
        ("made/on/the", "/"),
        ("made/on/the/way", "w"),
    ];
    assert_eq!(unpacked.all(), wanted.map(|(path, what)| (path.to_owned(), what.to_owned())).into());
    assert_eq!(fs::metadata(unpacked.root()).unwrap().permissions().mode() & 0o7777, 0o644, "as its entry says");
}

#[test]
fn a_whiteout_hides_lower_layers_only_wherever_it_stands() {
    if !is_root() {
        return;
    }
    let lower = || layer().file("d/a", "low").file("d/b", "low").file("e/deep/er", "low").file("f", "low");
    // Before and after what the same layer brings.
    let first = layer().whiteout("d/.wh..wh..opq").file("d/a", "high").whiteout(".wh.e").dir("e").file("e/x", "high");
    let last = layer().file("d/a", "high").whiteout("d/.wh..wh..opq").dir("e").file("e/x", "high").whiteout(".wh.e");
    let wanted = [("d", "/"), ("d/a", "high"), ("e", "/"), ("e/x", "high"), ("f", "low")];
    for upper in [first, last] {
        let unpacked = unpacked(vec![lower(), upper]);
        unpacked.result.as_ref().unwrap();
        assert_eq!(unpacked.all(), wanted.map(|(path, what)| (path.to_owned(), what.to_owned())).into());
    }
    // Of what is not there, in directories that are not there, and AUFS's own.
    let odd = layer()
        .whiteout("no/such/.wh.dir")
        .whiteout("f/.wh.below-a-file")
        .whiteout(".wh..wh.plnk")
        .whiteout(".wh.none");
    let unpacked = unpacked(vec![layer().file("f", "low"), odd]);
    unpacked.result.as_ref().unwrap();
    assert_eq!(unpacked.all(), BTreeMap::from([("f".to_owned(), "low".to_owned())]));
}

#[test]
fn a_whiteout_does_not_follow_links() {
    if !is_root() {
        return;
    }
    let lower = layer().file("usr/lib/a", "a").symlink("lib", "usr/lib").symlink("l", "usr/lib/a");
    let upper = layer().whiteout("lib/.wh.a").whiteout("lib/.wh..wh..opq").whiteout(".wh.l");
    let unpacked = unpacked(vec![lower, upper]);
    unpacked.result.as_ref().unwrap();
    assert_eq!(unpacked.text("usr/lib/a").as_deref(), Some("a"));
    assert!(fs::symlink_metadata(unpacked.root().join("l")).is_err());
}

#[test]
fn owners_rights_times_attributes_and_links_are_kept() {
    if !is_root() {
        return;
    }
    let mut builder = Builder::new(Vec::new());
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    builder
        .append_pax_extensions([
            ("SCHILY.xattr.security.capability", capability.as_slice()),
            ("SCHILY.xattr.user.note", b"a\nb"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.user.overlay.redirect", b"/etc"),
            ("mtime", b"1000000000.25"),
            ("uid", b"3000000000"),
        ])
        .unwrap();
    let mut header = Header::new_ustar();
    header.set_mode(0o4755);
    header.set_gid(12);
    header.set_size(3);
    builder.append_data(&mut header, "bin/tool", b"abc".as_slice()).unwrap();
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Fifo);
    header.set_mode(0o622);
    header.set_size(0);
    builder.append_data(&mut header, "fifo", std::io::empty()).unwrap();
    let mut tar = builder.into_inner().unwrap();
    tar.truncate(tar.len() - 1024);
    let tar = Layer(tar).hard_link("bin/again", "bin/tool").hard_link("bin/again", "bin/tool").dir("var/").tar();
    let unpacked = unpacked_from(std::slice::from_ref(&tar), &[digest_of(&tar)], &Limits::default());
    unpacked.result.as_ref().unwrap();
    let (tool, again) = (unpacked.root().join("bin/tool"), unpacked.root().join("bin/again"));
    let found = fs::metadata(&tool).unwrap();
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (3_000_000_000, 12, 0o4755));
    assert_eq!((found.mtime(), found.mtime_nsec()), (1_000_000_000, 250_000_000));
    assert_eq!((found.ino(), found.nlink()), (fs::metadata(&again).unwrap().ino(), 2));
    let attribute = |name: &str| {
        let mut value = [0; 64];
        let length = rustix::fs::getxattr(&tool, name, &mut value).ok()?;
        Some(value[..length].to_vec())
    };
    assert_eq!(attribute("security.capability").as_deref(), Some(capability.as_slice()));
    assert_eq!(attribute("user.note").as_deref(), Some(b"a\nb".as_slice()));
    assert_eq!((attribute("trusted.overlay.opaque"), attribute("user.overlay.redirect")), (None, None));
    let fifo = fs::metadata(unpacked.root().join("fifo")).unwrap();
    assert!(fifo.file_type().is_fifo() && fifo.mode() & 0o7777 == 0o622);
    // Directories have their times though things were made in them later, and a fixed one if nothing was said.
    assert_eq!(fs::metadata(unpacked.root().join("var")).unwrap().mtime(), 1_000_000_000);
    assert_eq!(fs::metadata(unpacked.root().join("bin")).unwrap().mtime(), 0);
}

#[test]
fn compressed_layers_are_read_by_their_first_bytes() {
    if !is_root() {
        return;
    }
    let tar = layer().file("f", "text").tar();
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    // Some builders write one gzip member after another, and frames of zstd that are to be skipped.
    let members = [gzip(&tar[..700]), gzip(&tar[700..])].concat();
    let skipped =
        [&[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9], zstd::encode_all(&tar[..], 1).unwrap().as_slice()].concat();
    for bytes in [tar.clone(), gzip(&tar), members, zstd::encode_all(&tar[..], 1).unwrap(), skipped] {
        let unpacked = unpacked_from(&[bytes], &[digest_of(&tar)], &Limits::default());
        unpacked.result.as_ref().unwrap();
        assert_eq!(unpacked.text("f").as_deref(), Some("text"));
    }
    for bytes in [b"BZh91AY".to_vec(), gzip(&tar)[..40].to_vec(), b"no archive".to_vec()] {
        unpacked_from(&[bytes], &[digest_of(&tar)], &Limits::default()).result.unwrap_err();
    }
}

#[test]
fn another_content_than_the_config_names_is_refused() {
    let tar = layer().tar();
    let longer = [tar.as_slice(), &[1; 512]].concat();
    let unpacked = unpacked_from(&[longer], &[digest_of(&tar)], &Limits::default());
    assert!(unpacked.why().contains("config names"), "{}", unpacked.why());
}

#[test]
fn sparse_files_keep_their_holes() {
    if !is_root() {
        return;
    }
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(512);
    header.set_path("sparse").unwrap();
    let gnu = header.as_gnu_mut().unwrap();
    gnu.sparse[0].set_offset(1 << 20);
    gnu.sparse[0].set_length(512);
    gnu.set_real_size(8 << 20);
    header.set_cksum();
    let tar = Layer([header.as_bytes().as_slice(), &[7; 512]].concat()).file("after", "a").tar();
    let unpacked = unpacked_from(std::slice::from_ref(&tar), &[digest_of(&tar)], &Limits::default());
    unpacked.result.as_ref().unwrap();
    let bytes = fs::read(unpacked.root().join("sparse")).unwrap();
    assert_eq!((bytes.len(), bytes[(1 << 20) - 1], bytes[1 << 20], bytes[(1 << 20) + 512]), (8 << 20, 0, 7, 0));
    assert!(fs::metadata(unpacked.root().join("sparse")).unwrap().blocks() < 1000);
    assert_eq!(unpacked.text("after").as_deref(), Some("a"));
}

// === Malice ===

#[test]
fn no_path_leads_out() {
    if !is_root() {
        return;
    }
    for path in ["../precious", "a/../../precious", "/../precious", "..", "a/..", "./../precious"] {
        let why = unpacked(vec![layer().file(path, "owned")]).why();
        assert!(why.contains("leads out"), "{path}: {why}");
        let why = unpacked(vec![layer().file("x", ""), layer().whiteout(&format!("{path}/.wh.x"))]).why();
        assert!(why.contains("leads out"), "{path}: {why}");
        let why = unpacked(vec![layer().hard_link("x", path)]).why();
        assert!(why.contains("leads out"), "{path}: {why}");
    }
    for name in [".wh.", ".wh..", ".wh..."] {
        let why = unpacked(vec![layer(), layer().whiteout(name)]).why();
        assert!(why.contains("hides no name"), "{name}: {why}");
    }
    // An absolute path is one within the image.
    let unpacked = unpacked(vec![layer().file("/etc/passwd", "ours")]);
    assert_eq!(unpacked.text("etc/passwd").as_deref(), Some("ours"));
}

#[test]
fn links_that_point_out_are_followed_within() {
    if !is_root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("host"), "host").unwrap();
    let out = outside.path().display().to_string();
    // An absolute link, one by "..", and links to links.
    let tricks = [
        layer().symlink("l", &out),
        layer().symlink("l", "../../../../../../../../../../tmp"),
        layer().symlink("l", "/"),
        layer().symlink("m", &out).symlink("l", "m"),
        layer().symlink("l", "l/l"),
        layer().symlink("l", "/proc/self/root"),
        layer().symlink("l", "."),
    ];
    for trick in tricks {
        let attacks = trick.file("l/host", "owned").dir("l/dir").symlink("l/link", "/").whiteout("l/.wh.host");
        let unpacked = unpacked(vec![attacks, layer().whiteout("l/.wh.host").file("l/new", "owned")]);
        // Whether or not it succeeds, it does so inside.
        assert_eq!(fs::read_to_string(outside.path().join("host")).unwrap(), "host");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        assert!(!PathBuf::from("/new").exists() && !PathBuf::from("/tmp/new").exists());
        drop(unpacked);
    }
    // The last name is replaced and not followed.
    let host = outside.path().join("host").display().to_string();
    let replaced = unpacked(vec![layer().symlink("f", &host).symlink("d", &out), layer().file("f", "ours").dir("d")]);
    replaced.result.as_ref().unwrap();
    assert_eq!(replaced.text("f").as_deref(), Some("ours"));
    assert!(fs::symlink_metadata(replaced.root().join("d")).unwrap().is_dir());
    assert_eq!(fs::read_to_string(outside.path().join("host")).unwrap(), "host");
    // A hard link gives no name to a file of the host.
    let why = unpacked(vec![layer().symlink("l", &out).hard_link("h", "l/host")]).why();
    assert!(why.contains("not there"), "{why}");
    let why = unpacked(vec![layer().hard_link("h", &host)]).why();
    assert!(why.contains("not there"), "{why}");
}

#[test]
fn writing_through_a_hard_link_to_a_symlink_changes_nothing_outside() {
    if !is_root() {
        return;
    }
    let outside = tempfile::NamedTempFile::new().unwrap();
    let target = outside.path().display().to_string();
    let unpacked = unpacked(vec![layer().symlink("s", &target).hard_link("h", "s"), layer().file("h", "ours")]);
    unpacked.result.as_ref().unwrap();
    assert_eq!(fs::metadata(outside.path()).unwrap().len(), 0);
    assert_eq!(unpacked.text("h").as_deref(), Some("ours"));
}

#[test]
fn devices_are_left_out_below_dev_and_refused_elsewhere() {
    if !is_root() {
        return;
    }
    for kind in [EntryType::Char, EntryType::Block] {
        let unpacked = unpacked(vec![layer().raw(kind, "dev/sda", "", b"").file("f", "x")]);
        unpacked.result.as_ref().unwrap();
        assert!(!unpacked.root().join("dev/sda").exists());
        let why = self::unpacked(vec![layer().raw(kind, "etc/sda", "", b"")]).why();
        assert!(why.contains("is a device"), "{why}");
    }
    let why = unpacked(vec![layer().raw(EntryType::new(b'V'), "volume", "", b"")]).why();
    assert!(why.contains("of a kind"), "{why}");
}

#[test]
fn sizes_and_counts_are_bounded() {
    if !is_root() {
        return;
    }
    let limits = Limits { unpacked: 4096, entries: 3, ..Limits::default() };
    let refused = |layers: Vec<Layer>| {
        let layers: Vec<_> = layers.into_iter().map(Layer::tar).collect();
        let digests: Vec<_> = layers.iter().map(|bytes| digest_of(bytes)).collect();
        unpacked_from(&layers, &digests, &limits).why()
    };
    let many = refused(vec![layer().file("a", "").file("b", ""), layer().file("c", "").file("d", "")]);
    assert!(many.contains("more than 3 files"), "{many}");
    let kilobytes = "x".repeat(3000);
    let large = refused(vec![layer().file("a", &kilobytes), layer().file("a", &kilobytes)]);
    assert!(large.contains("more than 4096 bytes"), "{large}");
    // A compressed nothing, after the archive's end.
    let mut bomb = layer().tar();
    bomb.resize(1 << 20, 0);
    let unpacked = unpacked_from(&[zstd::encode_all(&bomb[..], 1).unwrap()], &[digest_of(&bomb)], &limits);
    assert!(unpacked.why().contains("uncompressed"), "{}", unpacked.why());
    // So is what all layers together hold.
    let padded = || {
        let mut tar = layer().tar();
        tar.resize(8 << 10, 0);
        tar
    };
    let digests = [digest_of(&padded()), digest_of(&padded()), digest_of(&padded())];
    let unpacked = unpacked_from(&[padded(), padded(), padded()], &digests, &limits);
    assert!(unpacked.why().contains("uncompressed"), "{}", unpacked.why());
    assert!(matches!(unpacked.result, Err((2, _))));
    // A path makes its directories too.
    let nested = refused(vec![layer().file("1/2/3/4/f", "")]);
    assert!(nested.contains("more than 3 directories"), "{nested}");
    // A sparse file takes no space, and counts as what it will take in the image.
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header.as_gnu_mut().unwrap().set_real_size(1 << 40);
    header.set_cksum();
    let sparse = refused(vec![Layer(header.as_bytes().to_vec())]);
    assert!(sparse.contains("more than 4096 bytes"), "{sparse}");
}

#[test]
fn depth_is_bounded_also_by_way_of_links() {
    if !is_root() {
        return;
    }
    let beyond = "d/".repeat(45);
    let chained =
        layer().dir(&beyond).symlink("a", &beyond).dir(&format!("a/{beyond}")).symlink("b", &format!("a/{beyond}"));
    let chained = chained.dir(&format!("b/{beyond}")).symlink("c", &format!("b/{beyond}")).dir(&format!("c/{beyond}"));
    let chained = chained.symlink("e", &format!("c/{beyond}")).dir(&format!("e/{beyond}"));
    let why = unpacked(vec![chained]).why();
    assert!(why.contains("directories deep"), "{why}");
}

#[test]
fn unpacking_stops_when_nobody_waits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layer");
    let tar = layer().file("f", "x").tar();
    fs::write(&path, &tar).unwrap();
    fs::create_dir(folder.path().join("root")).unwrap();
    let blob = Blob { path, offset: 0, length: tar.len() as u64 };
    let cancelled = AtomicBool::new(true);
    let root = folder.path().join("root");
    let result = unpack(&[blob], &[digest_of(&tar)], &root, &Limits::default(), &cancelled);
    assert!(matches!(result, Err((0, LayerError::Cancelled))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Any sequence of entries over a few names and links leaves what is outside as it was, and never fails to be removed.
    #[test]
    fn nothing_outside_is_ever_touched(
        entries in proptest::collection::vec(
            (0..6_usize, "[ab](/[ab.l]{1,2}){0,3}", "(/?(\\.\\./){0,4}|/proc/self/)[abl](/[abl]){0,2}"), 1..24
        ),
        split in 0..24_usize,
    ) {
        if !rustix::process::geteuid().is_root() {
            return Ok(());
        }
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("a"), "host").unwrap();
        let mut layers = [layer(), layer().symlink("l", &outside.path().display().to_string())];
        symlink(outside.path(), outside.path().join("l")).unwrap();
        for (at, (kind, path, link)) in entries.iter().enumerate() {
            let one = std::mem::take(&mut layers[usize::from(at > split)]);
            layers[usize::from(at > split)] = match kind {
                0 => one.file(path, "x"),
                1 => one.dir(path),
                2 => one.symlink(path, link),
                3 => one.hard_link(path, link.trim_start_matches(['/', '.'])),
                4 => one.whiteout(&format!("{path}/.wh.a")),
                _ => one.symlink(path, &outside.path().display().to_string()),
            };
        }
        let unpacked = unpacked(layers.into());
        prop_assert_eq!(fs::read_to_string(outside.path().join("a")).unwrap(), "host");
        prop_assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 2);
        unpacked.folder.close().unwrap();
    }
}
