//! `kubectl exec -it`: a terminal at both ends.

use std::process::{Command, Stdio};

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdout};

use super::{Kubectl, PROTOCOLS, kubectl};
use crate::harness::on_shared_node;
use crate::harness::pods::sleeper;
use crate::harness::wait::SOON;

/// kubectl on a terminal that util-linux' script gives it, of 33 rows and 99 columns.
struct OnTerminal {
    script: Child,
    lines: BufReader<ChildStdout>,
    /// The terminal's device.
    device: String,
    /// What was written so far.
    seen: String,
}

impl OnTerminal {
    async fn start(command: &Command) -> Self {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let line = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect::<Vec<_>>().join(" ");
        let mut script = Command::new("script");
        script.args(["-qec", &format!("tty; stty rows 33 cols 99; exec {line}"), "/dev/null"]);
        for (name, value) in command.get_envs() {
            script.env(name, value.unwrap_or_default());
        }
        script.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut script = tokio::process::Command::from(script).kill_on_drop(true).spawn().unwrap();
        let lines = BufReader::new(script.stdout.take().unwrap());
        let mut terminal = Self { script, lines, device: String::new(), seen: String::new() };
        terminal.device = terminal.shows("/dev/pts/").await;
        terminal
    }

    /// Waits for a line with these words.
    async fn shows(&mut self, wanted: &str) -> String {
        let reading = async {
            loop {
                let mut line = String::new();
                if self.lines.read_line(&mut line).await.unwrap() == 0 {
                    return None;
                }
                self.seen.push_str(&line);
                if line.contains(wanted) {
                    return Some(line.trim().to_owned());
                }
            }
        };
        let found = tokio::time::timeout(SOON, reading).await.ok().flatten();
        found.unwrap_or_else(|| panic!("{wanted:?} is missing in {}", self.seen))
    }

    async fn types(&mut self, text: &str) {
        self.script.stdin.as_mut().unwrap().write_all(text.as_bytes()).await.unwrap();
    }

    /// As a window does that is made higher or lower.
    fn has_rows(&self, rows: &str) {
        let resized = Command::new("stty").args(["-F", &self.device, "rows", rows]).status().unwrap();
        assert!(resized.success(), "{}", self.device);
    }
}

/// A command has a terminal, of the size that the client's has, also once that has changed, and reads what is typed.
pub(super) async fn is_a_terminal(kubectl: Kubectl<'_>, pod: &str, how: &str) {
    println!("a terminal: {how}");
    let script = "until [ \"$(stty size)\" = \"40 99\" ]; do stty size; sleep 0.1; done; \
                  echo followed; read line; tty; echo \"got $line\"";
    let mut terminal = OnTerminal::start(&kubectl(&["exec", "-it", pod, "--", "sh", "-c", script])).await;
    terminal.shows("33 99").await;
    terminal.has_rows("40");
    terminal.shows("followed").await;
    terminal.types("cheese\n").await;
    terminal.shows("/dev/pts/").await;
    terminal.shows("got cheese").await;
    let ended = tokio::time::timeout(SOON, terminal.script.wait()).await.unwrap().unwrap();
    assert!(ended.success(), "{how}: {ended}\n{}", terminal.seen);
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_terminal_has_the_clients_size_as_it_changes() {
    on_shared_node(async |t| {
        t.pod("p", sleeper()).await;
        t.running("p").await;
        for (protocol, websockets) in PROTOCOLS {
            is_a_terminal(&|args| kubectl(t, websockets, args), "p", protocol).await;
        }
    });
}
