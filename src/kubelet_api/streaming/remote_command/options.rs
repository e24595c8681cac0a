//! Pure: what a query asks of exec, attach and run.

/// Which streams a client wants, by the names that API servers send (`input`, `output`, `error`, `tty`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::kubelet_api) struct Options {
    pub(in crate::kubelet_api) stdin: bool,
    pub(in crate::kubelet_api) stdout: bool,
    /// Never with a terminal: there is only one output then.
    pub(in crate::kubelet_api) stderr: bool,
    pub(in crate::kubelet_api) tty: bool,
}

/// What is wrong with a query (HTTP 400). `Display` is what kubectl prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::kubelet_api) enum OptionsError {
    #[error("you must specify at least 1 of stdin, stdout, stderr")]
    NoStream,
    #[error("you must specify a command")]
    NoCommand,
}

impl Options {
    /// Reads the pairs of a query; what it does not know is ignored.
    pub(in crate::kubelet_api) fn parse(pairs: &[(String, String)]) -> Result<Self, OptionsError> {
        let flag = |name: &str| {
            let first = pairs.iter().find(|(known, _)| known == name);
            first.is_some_and(|(_, value)| value == "1" || value == "true")
        };
        let tty = flag("tty");
        let options = Self { stdin: flag("input"), stdout: flag("output"), stderr: flag("error") && !tty, tty };
        if options.stdin || options.stdout || options.stderr { Ok(options) } else { Err(OptionsError::NoStream) }
    }

    /// Streams that a SPDY client opens for this: one for errors, one each, and one for the terminal's size.
    pub(super) fn streams(self, resizes: bool) -> usize {
        1 + usize::from(self.stdin)
            + usize::from(self.stdout)
            + usize::from(self.stderr)
            + usize::from(self.tty && resizes)
    }
}

/// The command of an exec: each `command` is one word of it.
pub(in crate::kubelet_api) fn command(pairs: &[(String, String)]) -> Result<Vec<String>, OptionsError> {
    let words: Vec<_> = pairs.iter().filter(|(name, _)| name == "command").map(|(_, word)| word.clone()).collect();
    if words.is_empty() { Err(OptionsError::NoCommand) } else { Ok(words) }
}

/// The command of a run: one `cmd`, cut at its blanks.
pub(in crate::kubelet_api) fn run_command(pairs: &[(String, String)]) -> Result<Vec<String>, OptionsError> {
    let line = pairs.iter().find(|(name, _)| name == "cmd").map(|(_, line)| line.as_str()).unwrap_or_default();
    let words: Vec<_> = line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect();
    if words.is_empty() { Err(OptionsError::NoCommand) } else { Ok(words) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(text: &str) -> Vec<(String, String)> {
        let cut = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap();
            (name.to_owned(), value.to_owned())
        };
        text.split('&').filter(|pair| !pair.is_empty()).map(cut).collect()
    }

    #[test]
    fn streams_are_asked_for_by_the_names_of_the_kubelet() {
        let (no, yes) = (Options::default(), true);
        let table = [
            ("input=1&output=1&error=1", Ok(Options { stdin: yes, stdout: yes, stderr: yes, ..no })),
            ("output=1&error=1&tty=1", Ok(Options { stdout: yes, tty: yes, ..no })),
            ("input=true&error=0", Ok(Options { stdin: yes, ..no })),
            ("stdout=1", Err(OptionsError::NoStream)),
            ("error=1&tty=1", Err(OptionsError::NoStream)),
            ("", Err(OptionsError::NoStream)),
        ];
        for (query, wanted) in table {
            assert_eq!(Options::parse(&pairs(query)), wanted, "{query}");
        }
    }

    #[test]
    fn a_terminal_brings_a_stream_for_its_size_where_the_protocol_has_one() {
        let options = Options { stdin: true, stdout: true, stderr: false, tty: true };
        assert_eq!((options.streams(true), options.streams(false)), (4, 3));
    }

    #[test]
    fn a_command_is_its_words() {
        assert_eq!(command(&pairs("command=sh&tty=1&command=-c&command=a b")).unwrap(), ["sh", "-c", "a b"]);
        assert_eq!(command(&pairs("tty=1")), Err(OptionsError::NoCommand));
        assert_eq!(run_command(&pairs("cmd=ls  -l /")).unwrap(), ["ls", "-l", "/"]);
        assert_eq!(run_command(&pairs("cmd=")), Err(OptionsError::NoCommand));
    }
}
