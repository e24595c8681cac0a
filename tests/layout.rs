//! The rules of the house that no compiler checks: which room may name which, how long a file may be, that every file
//! is part of the build and says what it is for. See CONTRIBUTING.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms by height: a room may name those of its own height and below, never above.
const HEIGHTS: [&[&str]; 4] = [
    &[
        "apiserver",
        "certificate",
        "config",
        "events",
        "failpoint",
        "file",
        "lib",
        "memory",
        "metrics",
        "quantity",
        "retry",
        "shutdown",
        "spdy",
        "telemetry",
        "thread",
        "turns",
    ],
    &["network", "runtime"],
    &["check", "controller", "cri", "function", "function_server", "kubelet_api", "node", "pod", "standalone"],
    &["args", "main"],
];
/// Rooms that only these may name.
const PRIVATE: [(&str, &[&str]); 1] = [("function", &["args", "pod"])];
/// Rooms that must not name each other, and what to do instead.
const APART: [(&str, &str, &str); 2] = [
    ("kubelet_api", "pod", "ask through the trait kubelet_api::targets::PodTargets, which pod implements"),
    ("network", "runtime", "drivers use the network; let the driver call down, or pass plain values"),
];
/// Most lines of a file before its tests.
const LONGEST: usize = 500;
/// Half of all files are no longer than this.
const MEDIAN: usize = 200;

/// A rule that is broken.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    file: PathBuf,
    line: usize,
    broken: String,
    remedy: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}\n    what to do: {}", self.file.display(), self.line, self.broken, self.remedy)
    }
}

/// Rust files by their path below the repository, so that a bad example needs no directory.
struct Tree(BTreeMap<PathBuf, String>);

impl Tree {
    /// Every `.rs` file of `src/` and `tests/`, and of the other crates.
    fn of_repository() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut files = BTreeMap::new();
        let mut folders = ["src", "tests", "guest/src", "proto/src"].map(|folder| root.join(folder)).to_vec();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).expect("a folder of the repository can be read") {
                let path = entry.expect("its entries can be read").path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let text = fs::read_to_string(&path).expect("source files are UTF-8");
                    files.insert(path.strip_prefix(root).expect("it is below the root").to_owned(), text);
                }
            }
        }
        Self(files)
    }

    /// The rooms.
    fn sources(&self) -> impl Iterator<Item = (&PathBuf, &String)> {
        self.0.iter().filter(|(path, _)| path.starts_with("src"))
    }

    /// The rooms, and what the other crates are made of.
    fn all_sources(&self) -> impl Iterator<Item = (&PathBuf, &String)> {
        self.0.iter().filter(|(path, _)| !path.starts_with("tests"))
    }

    /// Names of rooms where they must not be named.
    fn import_direction(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (path, text) in self.sources() {
            let from = room(path);
            let Some(height) = height(&from) else {
                let broken = format!("the room `{from}` has no place in the import direction");
                findings.push(finding(
                    path,
                    1,
                    broken,
                    "give it one in HEIGHTS of tests/layout.rs, and a line in src/lib.rs",
                ));
                continue;
            };
            for (line, to) in rooms_named(path, &code(text)) {
                if let Some((broken, remedy)) = forbidden(&from, height, &to) {
                    findings.push(finding(path, line, broken, remedy));
                }
            }
        }
        findings
    }

    /// Files that no `mod` leads to, so that the compiler never sees them.
    fn unreachable(&self) -> Vec<Finding> {
        let mut open: Vec<PathBuf> = self.0.keys().filter(|path| is_root(path)).cloned().collect();
        let mut seen = BTreeSet::new();
        while let Some(path) = open.pop() {
            if let Some(text) = self.0.get(&path)
                && seen.insert(path.clone())
            {
                open.extend(modules(text).flat_map(|name| candidates(&path, &name, is_root(&path))));
                open.extend(told_paths(text).map(|told| path.with_file_name(told)));
            }
        }
        let lost = self.0.keys().filter(|path| !seen.contains(*path));
        lost.map(|path| {
            finding(
                path,
                1,
                "no `mod` names this file, so it is not compiled",
                "declare it in its parent, or delete it",
            )
        })
        .collect()
    }

    /// Files longer than a reader holds in mind.
    fn too_long(&self) -> Vec<Finding> {
        let long =
            self.all_sources().map(|(path, text)| (path, length(path, text))).filter(|(_, lines)| *lines > LONGEST);
        long.map(|(path, lines)| {
            let broken = format!("{lines} lines before the tests, {LONGEST} are allowed");
            finding(path, LONGEST + 1, broken, "move what has a name of its own into a file of its own")
        })
        .collect()
    }

    /// The median length, if it is beyond the budget.
    fn too_long_by_median(&self) -> Option<usize> {
        let mut lengths: Vec<usize> = self.all_sources().map(|(path, text)| length(path, text)).collect();
        lengths.sort_unstable();
        lengths.get(lengths.len() / 2).copied().filter(|median| *median > MEDIAN)
    }

    /// Files that do not say what they are for.
    fn undocumented(&self) -> Vec<Finding> {
        let says = |text: &str| {
            let first = text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("#!["));
            first.is_some_and(|line| line.strip_prefix("//!").is_some_and(|doc| doc.trim().len() > 1))
        };
        let mute = self.0.iter().filter(|(_, text)| !says(text));
        mute.map(|(path, _)| {
            finding(path, 1, "the file does not begin with a `//!` text", "say in a line what it is for")
        })
        .collect()
    }
}

fn finding(path: &Path, line: usize, broken: impl Into<String>, remedy: &str) -> Finding {
    Finding { file: path.to_owned(), line, broken: broken.into(), remedy: remedy.to_owned() }
}

/// `src/pod/worker/start.rs` is `["pod", "worker", "start"]`.
fn module_path(path: &Path) -> Vec<String> {
    let below = path.with_extension("");
    let mut names: Vec<_> = below.iter().skip(1).map(|part| part.to_string_lossy().into_owned()).collect();
    if names.last().is_some_and(|name| name == "mod") {
        names.pop();
    }
    names
}

fn room(path: &Path) -> String {
    module_path(path).first().cloned().unwrap_or_default()
}

fn height(room: &str) -> Option<usize> {
    HEIGHTS.iter().position(|rooms| rooms.contains(&room))
}

/// Why `from` must not name `to`, and what to do instead.
fn forbidden(from: &str, height_from: usize, to: &str) -> Option<(String, &'static str)> {
    // What is no room is an item of the crate's root.
    let height_to = height(to)?;
    let broken = format!("room `{from}` names room `{to}`");
    if from == to || from == "lib" {
        return None;
    }
    if let Some((_, _, remedy)) = APART.iter().find(|(a, b, _)| *a == from && *b == to) {
        return Some((broken, remedy));
    }
    if let Some((_, friends)) = PRIVATE.iter().find(|(room, _)| *room == to)
        && !friends.contains(&from)
    {
        return Some((format!("{broken}, which only {} may", friends.join(" and ")), "go through the room that may"));
    }
    let remedy = "imports point one way, from args down to runtime and network: move the shared type down, or \
                  define a trait here that the upper room implements";
    (height_to > height_from).then(|| (format!("{broken}, which is above it"), remedy))
}

/// Every room that code names from the crate's root, with the line: `crate::room`, also in a group, `lambdalet::room`
/// in the binary, and `super::…::room` where that many `super` lead to the root.
fn rooms_named(path: &Path, code: &str) -> Vec<(usize, String)> {
    let depth = module_path(path).len();
    let words = words(code);
    let mut named = Vec::new();
    for (at, (_, word)) in words.iter().enumerate() {
        let after = |offset: usize| words.get(at + offset).map(|(_, word)| word.as_str());
        let starts = at == 0 || words[at - 1].1 != "::";
        let supers = (0..).step_by(2).take_while(|n| after(*n) == Some("super") && after(n + 1) == Some("::")).count();
        let separator = match word.as_str() {
            "crate" => 1,
            "lambdalet" if room(path) == "main" => 1,
            "super" if starts && supers >= depth => 2 * supers - 1,
            _ => continue,
        };
        if after(separator) == Some("::") {
            named.extend(group(&words[at + separator + 1..]));
        }
    }
    named
}

/// The first name of a path, or of each path of a `{…}` group.
fn group(words: &[(usize, String)]) -> Vec<(usize, String)> {
    let Some((line, first)) = words.first() else { return Vec::new() };
    if first != "{" {
        return vec![(*line, first.clone())];
    }
    let (mut level, mut named) = (0, Vec::new());
    for (at, (line, word)) in words.iter().enumerate() {
        match word.as_str() {
            "{" => level += 1,
            "}" => level -= 1,
            _ if level == 1 && matches!(words[at - 1].1.as_str(), "{" | ",") => named.push((*line, word.clone())),
            _ => {}
        }
        if level == 0 {
            break;
        }
    }
    named
}

/// Identifiers, `::` and single signs, each with its line.
fn words(code: &str) -> Vec<(usize, String)> {
    let mut words = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut rest = line.trim_start();
        while let Some(first) = rest.chars().next() {
            let end = match first {
                _ if rest.starts_with("::") => 2,
                _ if is_name(first) => rest.find(|c| !is_name(c)).unwrap_or(rest.len()),
                _ => first.len_utf8(),
            };
            words.push((number + 1, rest[..end].to_owned()));
            rest = rest[end..].trim_start();
        }
    }
    words
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where line numbers stay, but comments, strings and characters are gone.
fn code(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let after_name = code.chars().next_back().is_some_and(is_name);
        let skipped = match first {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => block_comment(rest),
            'r' | 'b' if !after_name => raw_string(rest),
            '"' => quoted(rest, '"'),
            '\'' if rest[1..].starts_with('\\') || rest.chars().nth(2) == Some('\'') => quoted(rest, '\''),
            _ => 0,
        };
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..skipped].chars().filter(|c| *c == '\n'));
            rest = &rest[skipped..];
        }
    }
    code
}

/// Length of the block comment at the start; they nest.
fn block_comment(text: &str) -> usize {
    let (mut level, mut at) = (0, 0);
    while at < text.len() {
        let step = if text[at..].starts_with("/*") {
            level += 1;
            2
        } else if text[at..].starts_with("*/") {
            level -= 1;
            2
        } else {
            text[at..].chars().next().map_or(1, char::len_utf8)
        };
        at += step;
        if level == 0 {
            return at;
        }
    }
    text.len()
}

/// Length of the raw string at the start; 0 if it is none.
fn raw_string(text: &str) -> usize {
    let Some(body) = text.strip_prefix("br").or_else(|| text.strip_prefix('r')) else { return 0 };
    let hashes = body.len() - body.trim_start_matches('#').len();
    if !body[hashes..].starts_with('"') {
        return 0;
    }
    let end = format!("\"{}", "#".repeat(hashes));
    let start = text.len() - body.len() + hashes + 1;
    text[start..].find(&end).map_or(text.len(), |at| start + at + end.len())
}

/// Length of the string or character at the start.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

/// Where the compiler starts: the library, the binary, and what cargo takes for an integration test.
fn is_root(path: &Path) -> bool {
    let parts: Vec<_> = path.iter().filter_map(|part| part.to_str()).collect();
    matches!(parts[..], [.., "src", "lib.rs" | "main.rs"] | ["tests", _] | ["tests", _, "main.rs"])
}

/// The names of `mod name;` declarations.
fn modules(text: &str) -> impl Iterator<Item = String> {
    let words: Vec<String> = words(&code(text)).into_iter().map(|(_, word)| word).collect();
    let declared: Vec<String> =
        words.windows(3).filter(|three| three[0] == "mod" && three[2] == ";").map(|three| three[1].clone()).collect();
    declared.into_iter()
}

/// What `#[path = "…"]` says, counted from the file's own folder.
fn told_paths(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.trim().strip_prefix("#[path = \"")?.strip_suffix("\"]"))
}

/// Where the file of a module declared in `parent` may be.
fn candidates(parent: &Path, name: &str, parent_is_root: bool) -> [PathBuf; 2] {
    let folder = if parent_is_root || parent.ends_with("mod.rs") {
        parent.parent().map(Path::to_owned).unwrap_or_default()
    } else {
        parent.with_extension("")
    };
    [folder.join(format!("{name}.rs")), folder.join(name).join("mod.rs")]
}

/// Lines before the inline tests; a file of tests alone has none.
fn length(path: &Path, text: &str) -> usize {
    if module_path(path).iter().any(|name| name == "tests") {
        return 0;
    }
    let lines: Vec<&str> = text.lines().collect();
    // `mod tests;` ends a file; one further up does not hide what follows it.
    let are_tests = |two: &[&str]| two[0] == "#[cfg(test)]" && two[1].starts_with("mod ");
    let tests = lines
        .windows(2)
        .enumerate()
        .find(|(at, two)| are_tests(two) && (two[1].ends_with('{') || at + 2 == lines.len()));
    tests.map_or(lines.len(), |(at, _)| at)
}

fn assert_none(findings: &[Finding]) {
    let text: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert!(text.is_empty(), "{} broken rules of the house\n{}", text.len(), text.join("\n"));
}

#[test]
fn imports_point_one_way() {
    assert_none(&Tree::of_repository().import_direction());
}

#[test]
fn every_file_is_part_of_the_build() {
    assert_none(&Tree::of_repository().unreachable());
}

#[test]
fn no_file_is_too_long() {
    assert_none(&Tree::of_repository().too_long());
}

#[test]
fn most_files_are_short() {
    let median = Tree::of_repository().too_long_by_median();
    assert_eq!(
        median, None,
        "half of the files in src are longer than this, {MEDIAN} is the budget: split the long ones"
    );
}

#[test]
fn every_file_says_what_it_is_for() {
    assert_none(&Tree::of_repository().undocumented());
}

/// The checker itself, on trees that break the rules.
mod bad_examples {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> Tree {
        Tree(files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect())
    }

    /// `line: room` of each finding.
    fn names(path: &str, text: &str) -> Vec<(usize, String)> {
        let findings = tree(&[(path, text)]).import_direction();
        findings.into_iter().map(|finding| (finding.line, finding.broken)).collect()
    }

    #[test]
    fn naming_a_room_above_is_found_with_file_line_and_remedy() {
        let findings =
            tree(&[("src/runtime/docker/mod.rs", "//! Doc.\n\nuse crate::pod::Shared;\n")]).import_direction();
        let text = findings[0].to_string();
        assert!(
            text.starts_with("src/runtime/docker/mod.rs:3: room `runtime` names room `pod`, which is above it"),
            "{text}"
        );
        assert!(text.contains("what to do: "), "{text}");
    }

    #[test]
    fn no_way_of_writing_hides_a_name() {
        for text in [
            "use crate::{config::Settings, pod::Shared};",
            "use crate::{\n    pod,\n};",
            "fn f() { crate::pod::f() }",
            "use super::super::pod::Shared;",
            "pub(in crate::pod) struct S;",
            "use crate :: pod;",
        ] {
            assert_eq!(names("src/runtime/fake.rs", text).len(), 1, "{text}");
        }
        assert_eq!(names("src/telemetry.rs", "use super::node::f;").len(), 1);
    }

    #[test]
    fn comments_strings_and_own_names_are_no_imports() {
        for text in [
            "// use crate::pod;",
            "/* use crate::pod; /* nested */ crate::pod */",
            "//! [`crate::pod`]",
            "const A: &str = \"crate::pod \\\" crate::pod\";",
            "const A: &str = r#\"crate::pod \" crate::pod\"#;",
            "const A: char = '\"'; const B: &str = \"crate::pod\";",
            "fn f<'a>(x: &'a str) {} // crate::pod",
            "use super::types::pod;",
            "use crate::runtime::pod;",
            "use crate::telemetry::chain;",
        ] {
            assert_eq!(names("src/runtime/docker/io.rs", text), [], "{text}");
        }
    }

    #[test]
    fn rooms_that_are_apart_or_private_stay_so() {
        assert_eq!(names("src/kubelet_api/logs.rs", "use crate::pod::directory::Directory;").len(), 1);
        assert_eq!(names("src/pod/directory.rs", "use crate::kubelet_api::targets::PodTargets;"), []);
        assert_eq!(names("src/network/bridge.rs", "use crate::runtime::Kind;").len(), 1);
        assert_eq!(names("src/kubelet_api/logs.rs", "use crate::function::pool;").len(), 1);
        assert_eq!(names("src/pod/worker.rs", "use crate::function::pool;"), []);
        assert_eq!(names("src/cellar/mod.rs", "").len(), 1, "a new room needs its place");
    }

    #[test]
    fn a_file_without_mod_is_found() {
        let tree = tree(&[
            ("src/lib.rs", "pub mod a;\nmod b { fn f() {} }"),
            ("src/a.rs", "mod c;\n// mod lost;"),
            ("src/a/c.rs", ""),
            ("src/a/lost.rs", ""),
            ("src/b.rs", ""),
            ("tests/t.rs", "mod support;\n#[path = \"t/own.rs\"]\nmod own;"),
            ("tests/t/own.rs", ""),
            ("tests/support/mod.rs", "mod deep;"),
            ("tests/support/deep.rs", ""),
            ("tests/other/mod.rs", ""),
            ("tests/big/main.rs", "mod part;"),
            ("tests/big/part.rs", ""),
        ]);
        let lost: Vec<_> = tree.unreachable().into_iter().map(|finding| finding.file).collect();
        assert_eq!(lost, ["src/a/lost.rs", "src/b.rs", "tests/other/mod.rs"].map(PathBuf::from));
    }

    #[test]
    fn length_counts_what_stands_before_the_tests() {
        let code = "fn f() {}\n".repeat(LONGEST);
        let tests = format!("{code}#[cfg(test)]\nmod tests {{\n{code}}}\n");
        let apart = format!("#[cfg(test)]\nmod tests;\n{code}");
        assert_eq!(tree(&[("src/a.rs", &code)]).too_long(), []);
        assert_eq!(tree(&[("src/a.rs", &tests)]).too_long(), []);
        assert_eq!(tree(&[("src/a.rs", &format!("{code}#[cfg(test)]\nmod tests;\n"))]).too_long(), []);
        assert_eq!(tree(&[("src/a/tests.rs", &apart)]).too_long(), []);
        assert_eq!(tree(&[("src/a.rs", &apart)]).too_long().len(), 1);
        assert_eq!(
            tree(&[("src/a.rs", &code), ("src/b.rs", ""), ("src/c.rs", &code)]).too_long_by_median(),
            Some(LONGEST)
        );
    }

    #[test]
    fn a_file_without_a_text_of_its_own_is_found() {
        let tree = tree(&[
            ("src/a.rs", "use std::fs;\n//! Late."),
            ("src/b.rs", ""),
            ("src/c.rs", "//!\n"),
            ("src/d.rs", "#![allow(dead_code)]\n//! What it is for.\n"),
        ]);
        assert_eq!(tree.undocumented().len(), 3);
    }
}
