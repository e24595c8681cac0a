//! `/logs/`: the files of the host's log directory.
//!
//! The kernel resolves the path and refuses what leads out of the directory, by `..`, by a link or by a mount's magic
//! (`openat2`, RESOLVE_BENEATH), so no spelling of a path has to be understood here.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat, openat2};
use tokio::io::AsyncReadExt;
use tokio_util::io::ReaderStream;

use super::App;

/// Bytes read at once.
const PIECE: usize = 64 << 10;
/// Most entries of a directory that are listed.
const MOST_ENTRIES: usize = 10_000;

/// What is there.
enum Found {
    File(File, u64),
    /// Names, those of directories with a slash.
    Directory(Vec<String>),
}

/// GET `/logs/`.
pub(super) async fn root(State(app): State<App>, RawQuery(query): RawQuery) -> Response {
    answer(&app, "./".to_owned(), query).await
}

/// GET `/logs/{path}`.
pub(super) async fn below(State(app): State<App>, Path(path): Path<String>, RawQuery(query): RawQuery) -> Response {
    answer(&app, path, query).await
}

async fn answer(app: &App, path: String, query: Option<String>) -> Response {
    if query.is_some_and(|query| query.split('&').any(|pair| pair.starts_with("query="))) {
        // A service's log is not a file; to answer with some file instead would mislead.
        return (StatusCode::NOT_IMPLEMENTED, "this node does not serve logs of services\n").into_response();
    }
    let (directory, wanted) = (app.about.log_dir.clone(), path.clone());
    let found = tokio::task::spawn_blocking(move || find(&directory, &wanted)).await;
    match found.unwrap_or_else(|error| Err(io::Error::other(error))) {
        Ok(Found::File(file, length)) => {
            // As long as it is now: a log that grows meanwhile must not outgrow the length that was told.
            let content = ReaderStream::with_capacity(tokio::fs::File::from_std(file).take(length), PIECE);
            let headers = [
                (header::CONTENT_TYPE, "text/plain; charset=utf-8".to_owned()),
                (header::CONTENT_LENGTH, length.to_string()),
                (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
            ];
            (headers, Body::from_stream(content)).into_response()
        }
        Ok(Found::Directory(_)) if !path.ends_with('/') => {
            // So that the links in the list lead below it. Relative: the caller may be behind a proxy.
            let last = path.rsplit('/').next().unwrap_or_default();
            (StatusCode::MOVED_PERMANENTLY, [(header::LOCATION, format!("{}/", link(last)))]).into_response()
        }
        Ok(Found::Directory(names)) => {
            let line = |name: &String| format!("<a href=\"{}\">{}</a>\n", link(name), plain(name));
            let list = names.iter().map(line).collect::<String>();
            let headers = [(header::CONTENT_TYPE, "text/html; charset=utf-8")];
            (headers, format!("<!doctype html>\n<pre>\n{list}</pre>\n")).into_response()
        }
        Err(error) => refusal(&error),
    }
}

fn refusal(error: &io::Error) -> Response {
    use io::ErrorKind::{CrossesDevices, InvalidFilename, InvalidInput, NotADirectory, NotFound, PermissionDenied};
    match error.kind() {
        // What is outside is not said to exist. EXDEV is how the kernel says "outside".
        NotFound | NotADirectory | CrossesDevices | InvalidFilename | InvalidInput => {
            (StatusCode::NOT_FOUND, "no such log file\n").into_response()
        }
        // A link to itself, or one of the kernel's own.
        _ if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            (StatusCode::NOT_FOUND, "no such log file\n").into_response()
        }
        PermissionDenied => (StatusCode::FORBIDDEN, "this file is not for reading\n").into_response(),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, format!("failed to read a log file: {error}\n")).into_response(),
    }
}

fn find(directory: &std::path::Path, path: &str) -> io::Result<Found> {
    let root = openat(CWD, directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // Nonblocking: a FIFO must not hold the open up.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let path = if path.is_empty() { "." } else { path };
    let file = File::from(openat2(&root, path, flags, Mode::empty(), resolve)?);
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Ok(Found::Directory(names(&file)?));
    }
    if !metadata.is_file() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let length = metadata.size();
    Ok(Found::File(file, length))
}

fn names(directory: &File) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        // A name that is not UTF-8 could not be asked for.
        let Ok(name) = entry.file_name().to_str() else { continue };
        if !matches!(name, "." | "..") && names.len() < MOST_ENTRIES {
            let slash = if entry.file_type() == FileType::Directory { "/" } else { "" };
            names.push(format!("{name}{slash}"));
        }
    }
    names.sort();
    Ok(names)
}

/// A name as a relative link.
fn link(name: &str) -> String {
    name.bytes().fold(String::from("./"), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
        encoded
    })
}

/// A name as text in HTML.
fn plain(name: &str) -> String {
    name.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn nothing_leads_out_of_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let logs = directory.path().join("log");
        std::fs::create_dir_all(logs.join("below")).unwrap();
        std::fs::write(directory.path().join("secret"), "secret").unwrap();
        std::fs::write(logs.join("below/file"), "content").unwrap();
        symlink("../secret", logs.join("up")).unwrap();
        symlink("/etc/passwd", logs.join("away")).unwrap();
        symlink("/proc/self/root/etc/passwd", logs.join("magic")).unwrap();
        symlink("below/file", logs.join("inside")).unwrap();
        nix::unistd::mkfifo(&logs.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let outside =
            ["../secret", "below/../../secret", "/etc/passwd", "up", "away", "magic", "none", "inside/x", ".."];
        for path in outside {
            let error = find(&logs, path).err().unwrap_or_else(|| panic!("{path} was opened"));
            assert_eq!(refusal(&error).status(), StatusCode::NOT_FOUND, "{path}: {error:?}");
        }
        assert_eq!(refusal(&find(&logs, "fifo").err().unwrap()).status(), StatusCode::FORBIDDEN);
        for path in ["below/file", "inside", "below/../inside"] {
            assert!(matches!(find(&logs, path), Ok(Found::File(_, 7))), "{path}");
        }
        let Ok(Found::Directory(names)) = find(&logs, "") else { panic!("no list") };
        assert_eq!(names, ["away", "below/", "fifo", "inside", "magic", "up"]);
    }

    #[test]
    fn a_name_is_encoded_for_where_it_stands() {
        assert_eq!((link("a b/").as_str(), plain("<a&b>").as_str()), ("./a%20b/", "&lt;a&amp;b&gt;"));
    }
}
