//! systemd's logind, which tells of shutdowns and lets itself be held back for a while (systemd.io, "Inhibitor Locks").
//!
//! It is spoken to by `busctl` and `systemd-inhibit`, which are wherever logind is: three calls and one signal are not
//! worth a D-Bus library with the thirty crates that the usual one brings. Both are children of this process that end
//! with it: the lock is held by a program that waits for its input to end.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader, Lines};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::{Host, HostError, Lock};

/// Where logind reads how patient it is.
const CONFIGURATION: &str = "/etc/systemd/logind.conf.d/99-lambdalet.conf";
/// Longest wait for an answer of either program.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long logind may take to read its configuration.
const RELOAD: Duration = Duration::from_secs(5);
/// Pace of looking whether it has.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// What logind is called on the bus.
const NAME: &str = "org.freedesktop.login1";
/// Its one object.
const OBJECT: &str = "/org/freedesktop/login1";
/// The interface of that.
const INTERFACE: &str = "org.freedesktop.login1.Manager";
/// The signal that comes before and after.
const SIGNAL: &str = "PrepareForShutdown";

/// The logind of this host.
#[derive(Clone, Debug)]
pub struct Logind {
    configuration: PathBuf,
}

impl Default for Logind {
    fn default() -> Self {
        Self { configuration: CONFIGURATION.into() }
    }
}

/// The program that holds the lock; its input is open as long as this is kept.
struct Held {
    _program: Child,
}

impl Lock for Held {}

/// A message on the bus, as `busctl --json` writes it.
#[derive(Deserialize)]
struct Message {
    member: String,
    payload: Payload,
}

#[derive(Deserialize)]
struct Payload {
    data: Vec<serde_json::Value>,
}

#[async_trait]
impl Host for Logind {
    async fn be_patient(&self, wanted: Duration) -> Result<(), HostError> {
        if patience().await? >= wanted {
            return Ok(());
        }
        let tried = || format!("write {}", self.configuration.display());
        write(&self.configuration, wanted).map_err(|source| HostError::Failed { tried: tried(), source })?;
        // logind reads its configuration again when it is told so.
        run("systemctl", &["kill", "--signal=HUP", "systemd-logind.service"]).await?;
        let grown = async {
            loop {
                let has = patience().await?;
                if has >= wanted {
                    return Ok(());
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        match timeout(RELOAD, grown).await {
            Ok(done) => done,
            Err(_) => Err(HostError::Impatient { wanted, has: patience().await? }),
        }
    }

    async fn hold_back(&self) -> Result<Box<dyn Lock>, HostError> {
        let words = ["--what=shutdown", "--mode=delay", "--who=lambdalet", "--why=Pods need time to end"];
        // It says a line once it has the lock: until then its command does not run.
        let holder = ["/bin/sh", "-c", "echo held && exec cat >/dev/null"];
        let mut program = command("systemd-inhibit", &[&words[..], &holder[..]].concat());
        let mut program = spawned(program.stdin(Stdio::piped()), "systemd-inhibit")?;
        let mut lines = lines(program.stdout.take());
        match timeout(PATIENCE, next(&mut lines)).await {
            Ok(Some(line)) if line == "held" => Ok(Box::new(Held { _program: program })),
            _ => Err(refused("hold the host's shutdown back", program).await),
        }
    }

    async fn signals(&self) -> Result<BoxStream<'static, bool>, HostError> {
        let matching = format!("type='signal',path='{OBJECT}',interface='{INTERFACE}',member='{SIGNAL}'");
        let words = ["--system", "--json=short", "monitor", "--match", &matching];
        let mut program = spawned(&mut command("busctl", &words), "busctl")?;
        let (messages, mut said) = (lines(program.stdout.take()), lines(program.stderr.take()));
        // It says so once it listens.
        match timeout(PATIENCE, next(&mut said)).await {
            Ok(Some(line)) if line.starts_with("Monitoring") => {}
            Ok(Some(said)) => {
                return Err(HostError::Refused { tried: "listen for the host's shutdown".to_owned(), said });
            }
            _ => return Err(refused("listen for the host's shutdown", program).await),
        }
        // The program ends with the stream.
        let state = (messages, program, said);
        let signals = stream::unfold(state, |(mut messages, program, said)| async {
            loop {
                let line = next(&mut messages).await?;
                if let Some(goes_down) = signal(&line) {
                    return Some((goes_down, (messages, program, said)));
                }
            }
        });
        Ok(signals.boxed())
    }
}

/// What a line of the monitor says, if it is the signal.
fn signal(line: &str) -> Option<bool> {
    let message: Message = serde_json::from_str(line).ok()?;
    message.payload.data.first()?.as_bool().filter(|_| message.member == SIGNAL)
}

/// How long logind waits for locks.
async fn patience() -> Result<Duration, HostError> {
    let property = "InhibitDelayMaxUSec";
    let said = run("busctl", &["--system", "get-property", NAME, OBJECT, INTERFACE, property]).await?;
    // A type, a blank, the value.
    let microseconds = said.trim().strip_prefix("t ").and_then(|number| number.parse().ok());
    let tried = || format!("read {property} of logind");
    microseconds.map(Duration::from_micros).ok_or_else(|| HostError::Refused { tried: tried(), said })
}

fn write(path: &Path, patience: Duration) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    // Whole seconds, and not less than was asked for.
    let seconds = patience.as_secs() + u64::from(patience.subsec_nanos() > 0);
    let text = format!("# Written by lambdalet, for shutdownGracePeriod.\n[Login]\nInhibitDelayMaxSec={seconds}\n");
    std::fs::write(path, text)
}

fn command(program: &str, words: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

fn spawned(command: &mut Command, program: &str) -> Result<Child, HostError> {
    command.spawn().map_err(|source| HostError::Failed { tried: format!("run {program}"), source })
}

/// Runs a program to its end; what it writes.
async fn run(program: &str, words: &[&str]) -> Result<String, HostError> {
    let tried = || format!("run {program} {}", words.join(" "));
    let child = spawned(&mut command(program, words), program)?;
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let ended = timeout(PATIENCE, child.wait_with_output()).await.map_err(late).flatten();
    let output = ended.map_err(|source| HostError::Failed { tried: tried(), source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(HostError::Refused { tried: tried(), said: last_words(output.status, &output.stderr) })
}

/// Why a program that should go on does not.
async fn refused(tried: &str, mut program: Child) -> HostError {
    let _ = program.start_kill();
    match program.wait_with_output().await {
        Ok(output) => HostError::Refused { tried: tried.to_owned(), said: last_words(output.status, &output.stderr) },
        Err(source) => HostError::Failed { tried: tried.to_owned(), source },
    }
}

fn last_words(status: ExitStatus, said: &[u8]) -> String {
    match String::from_utf8_lossy(said).trim() {
        "" => status.to_string(),
        words => words.to_owned(),
    }
}

type LinesOf<R> = Option<Lines<BufReader<R>>>;

fn lines<R: AsyncRead>(output: Option<R>) -> LinesOf<R> {
    output.map(|output| BufReader::new(output).lines())
}

/// The next line; `None` at the end.
async fn next<R: AsyncRead + Unpin>(lines: &mut LinesOf<R>) -> Option<String> {
    lines.as_mut()?.next_line().await.ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_signal_counts() {
        let line = |member: &str, data: &str| {
            format!(
                r#"{{"type":"signal","sender":":1.1","path":"{OBJECT}","interface":"{INTERFACE}","member":"{member}","payload":{{"type":"b","data":[{data}]}}}}"#
            )
        };
        assert_eq!(signal(&line(SIGNAL, "true")), Some(true));
        assert_eq!(signal(&line(SIGNAL, "false")), Some(false));
        for other in
            [line("PrepareForSleep", "true"), line(SIGNAL, "\"true\""), line(SIGNAL, ""), "nonsense".to_owned()]
        {
            assert_eq!(signal(&other), None, "{other}");
        }
    }

    #[test]
    fn logind_is_asked_for_whole_seconds_and_not_too_few() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("conf.d/x.conf");
        write(&path, Duration::from_millis(30_500)).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains("[Login]\nInhibitDelayMaxSec=31\n"), "{text}");
    }

    /// `LAMBDALET_TEST_LOGIND` says that `DBUS_SYSTEM_BUS_ADDRESS` leads to a bus on which a systemd-logind answers, and
    /// that anybody may send its signals.
    #[tokio::test]
    async fn a_real_logind_is_held_back_and_heard() {
        if std::env::var_os("LAMBDALET_TEST_LOGIND").is_none() {
            eprintln!("skipped: LAMBDALET_TEST_LOGIND is not set");
            return;
        }
        let logind = Logind::default();
        logind.be_patient(Duration::from_secs(5)).await.unwrap();
        let mut signals = logind.signals().await.unwrap();
        let lock = logind.hold_back().await.unwrap();
        let locks = async || run("systemd-inhibit", &["--list", "--no-pager"]).await.unwrap();
        assert!(locks().await.contains("lambdalet"));
        for (goes_down, word) in [(true, "true"), (false, "false")] {
            run("busctl", &["--system", "emit", OBJECT, INTERFACE, SIGNAL, "b", word]).await.unwrap();
            assert_eq!(timeout(PATIENCE, signals.next()).await.unwrap(), Some(goes_down));
        }
        drop(lock);
        let released = async {
            while locks().await.contains("lambdalet") {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        timeout(PATIENCE, released).await.expect("the lock goes with what holds it");
    }

    #[tokio::test]
    async fn a_program_that_fails_is_quoted() {
        let error = run("ls", &["/no/such/place"]).await.unwrap_err().to_string();
        assert!(error.contains("run ls /no/such/place") && error.contains("No such file"), "{error}");
        let error = run("no-such-program", &[]).await.unwrap_err();
        assert!(matches!(error, HostError::Failed { .. }), "{error:?}");
    }
}
