//! Pure: what a fake process (a container's own, or one of an exec) does, read from its command.
//!
//! | words | meaning |
//! |---|---|
//! | `print TEXT`, `warn TEXT` | write a line to standard output, to standard error |
//! | `cat PATH` | write the file mounted at PATH |
//! | `copy` | write to standard output what comes on standard input, until that ends |
//! | `line` | read one line of standard input |
//! | `size` | write the terminal's size as `stty size` does (rows, columns), once it was set |
//! | `close` | close standard output and standard error |
//! | `listen PORT` | from here on accept connections to that port, and send back what comes |
//! | `sleep MS` | wait |
//! | `exit CODE` | end |
//! | `stubborn` | from here on ignore the stop signal (no use in an exec) |
//! | `missing`, `refused` (first) | cannot be started: not found, not allowed |
//!
//! After the last word, and at one that is not in the table, it runs until it is stopped.

use std::time::Duration;

use crate::runtime::types::LogSource;

/// One thing a fake process does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Write(LogSource, Vec<u8>),
    Cat(String),
    Copy,
    Line,
    Size,
    Close,
    Listen(u16),
    Sleep(Duration),
    Exit(i32),
    IgnoreStop,
}

/// What starting it leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Program {
    Runs(Vec<Step>),
    CannotStart { code: i32, message: String },
}

/// Reads a command and its arguments.
pub(super) fn read(words: &[String]) -> Program {
    let mut words = words.iter().map(String::as_str);
    let mut steps = Vec::new();
    loop {
        let step = match words.next() {
            Some("missing") if steps.is_empty() => return cannot_start(127, "executable file not found in $PATH"),
            Some("refused") if steps.is_empty() => return cannot_start(128, "permission denied"),
            Some("print") => words.next().map(|text| Step::Write(LogSource::Stdout, format!("{text}\n").into())),
            Some("warn") => words.next().map(|text| Step::Write(LogSource::Stderr, format!("{text}\n").into())),
            Some("cat") => words.next().map(|path| Step::Cat(path.to_owned())),
            Some("copy") => Some(Step::Copy),
            Some("line") => Some(Step::Line),
            Some("size") => Some(Step::Size),
            Some("close") => Some(Step::Close),
            Some("listen") => number(words.next()).map(Step::Listen),
            Some("sleep") => number(words.next()).map(|ms| Step::Sleep(Duration::from_millis(ms))),
            Some("exit") => number(words.next()).map(Step::Exit),
            Some("stubborn") => Some(Step::IgnoreStop),
            _ => None,
        };
        match step {
            Some(step) => steps.push(step),
            None => return Program::Runs(steps),
        }
    }
}

fn cannot_start(code: i32, message: &str) -> Program {
    Program::CannotStart { code, message: message.to_owned() }
}

fn number<T: std::str::FromStr>(word: Option<&str>) -> Option<T> {
    word?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(text: &str) -> Program {
        read(&text.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn a_command_is_read_word_by_word() {
        let steps = vec![Step::Write(LogSource::Stdout, b"hi\n".into()), Step::Exit(3)];
        assert_eq!(program("print hi exit 3"), Program::Runs(steps));
        assert_eq!(program("nginx -g daemon"), Program::Runs(vec![]));
        assert!(matches!(program("missing"), Program::CannotStart { code: 127, .. }));
        assert_eq!(program("exit soon"), Program::Runs(vec![]));
    }
}
