//! One call of a plugin: a program that reads its configuration, writes its answer, and is told the rest in its
//! environment (section 2 of the specification). It has a limited time and a limited voice.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use tracing::debug;

use super::INTERFACE;
use super::error::{CniError, Refusal};

/// Most bytes of an answer.
const LONGEST: usize = 1 << 20;
/// Most bytes that are kept of what a plugin says to people.
const MOST_SAID: usize = 4096;
/// How often a program is tried that is just being written, and how long each wait is.
const BUSY_TRIES: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// What a plugin is asked to do, and with which sandbox.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call<'a> {
    /// `CNI_COMMAND`.
    pub(super) command: &'static str,
    /// The sandbox; `None` where it is about none (VERSION, STATUS).
    pub(super) about: Option<About<'a>>,
}

/// A sandbox as plugins know it.
#[derive(Clone, Copy, Debug)]
pub(super) struct About<'a> {
    /// `CNI_CONTAINERID`.
    pub(super) sandbox: &'a str,
    /// `CNI_NETNS`; `None` once it is gone.
    pub(super) namespace: Option<&'a Path>,
    /// `CNI_ARGS`.
    pub(super) args: &'a str,
}

/// The directories plugins are in, and how long each call may take.
#[derive(Clone, Debug)]
pub(super) struct Plugins {
    pub(super) dirs: Vec<PathBuf>,
    pub(super) patience: Duration,
}

/// Kills whatever a plugin has started, unless it has ended.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // It may just have ended by itself.
            let _ = killpg(leader, Signal::SIGKILL);
        }
    }
}

impl Plugins {
    /// The program of a plugin.
    ///
    /// # Errors
    /// [`CniError::Missing`] or [`CniError::NotExecutable`].
    pub(super) fn find(&self, plugin: &str) -> Result<PathBuf, CniError> {
        let found =
            self.dirs.iter().map(|dir| dir.join(plugin)).find_map(|path| Some((fs::metadata(&path).ok()?, path)));
        match found {
            None => {
                let dirs: Vec<_> = self.dirs.iter().map(|dir| dir.display().to_string()).collect();
                Err(CniError::Missing { plugin: plugin.to_owned(), dirs: dirs.join(", ") })
            }
            Some((file, path)) if !file.is_file() || file.permissions().mode() & 0o111 == 0 => {
                Err(CniError::NotExecutable { path })
            }
            Some((_, path)) => Ok(path),
        }
    }

    /// Calls a plugin and returns what it wrote. Dropped, or out of time, it kills the plugin with all it has started.
    ///
    /// # Errors
    /// What the plugin said, or why it could not be asked.
    pub(super) async fn call(&self, plugin: &str, call: Call<'_>, told: &Value) -> Result<Vec<u8>, CniError> {
        let path = self.find(plugin)?;
        let command = call.command;
        let unusable = |source| CniError::Unusable { path: path.clone(), command, source };
        let mut child = self.start(&path, call).await.map_err(unusable)?;
        let mut group = Group(child.id().and_then(|id| id.try_into().ok()).map(Pid::from_raw));
        let talked = tokio::time::timeout(self.patience, talk(&mut child, told)).await;
        let Ok(talked) = talked else {
            return Err(CniError::Hangs { plugin: plugin.to_owned(), command, patience: self.patience });
        };
        let (status, answer, said) = talked.map_err(unusable)?;
        group.0 = None;
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        if !said.is_empty() {
            debug!(plugin, command, said, "a CNI plugin spoke");
        }
        let plugin = plugin.to_owned();
        if status.success() {
            return match answer.len() {
                0..=LONGEST => Ok(answer),
                _ => Err(CniError::Garbled { plugin, command, reason: format!("it is longer than {LONGEST} bytes") }),
            };
        }
        match serde_json::from_slice::<Refusal>(&answer) {
            Ok(told) => Err(CniError::Refused { plugin, command, told }),
            Err(_) => {
                let wrote = String::from_utf8_lossy(&answer[..answer.len().min(MOST_SAID)]).trim().to_owned();
                Err(CniError::Died { plugin, command, status, said: if said.is_empty() { wrote } else { said } })
            }
        }
    }

    async fn start(&self, path: &Path, call: Call<'_>) -> io::Result<Child> {
        let dirs = std::env::join_paths(&self.dirs).map_err(io::Error::other)?;
        let mut command = Command::new(path);
        command.env("CNI_COMMAND", call.command).env("CNI_PATH", dirs);
        if let Some(About { sandbox, namespace, args }) = call.about {
            command.env("CNI_CONTAINERID", sandbox).env("CNI_IFNAME", INTERFACE).env("CNI_ARGS", args);
            command.env("CNI_NETNS", namespace.unwrap_or(Path::new("")));
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        for _ in 1..BUSY_TRIES {
            match command.spawn() {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => tokio::time::sleep(BUSY_PAUSE).await,
                started => return started,
            }
        }
        command.spawn()
    }
}

/// Tells it its configuration and listens until it has ended.
async fn talk(child: &mut Child, told: &Value) -> io::Result<(std::process::ExitStatus, Vec<u8>, Vec<u8>)> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let tell = async {
        if let Some(mut stdin) = stdin {
            // One that does not read says why in its own words.
            let _ = stdin.write_all(told.to_string().as_bytes()).await;
        }
    };
    let ((), answer, said) = tokio::join!(tell, listen(stdout, LONGEST + 1), listen(stderr, MOST_SAID));
    Ok((child.wait().await?, answer?, said?))
}

/// The first bytes of what comes; the rest is let by, so that whoever writes it does not wait.
async fn listen(from: Option<impl AsyncRead + Unpin>, most: usize) -> io::Result<Vec<u8>> {
    let Some(mut from) = from else { return Ok(Vec::new()) };
    let mut heard = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let length = from.read(&mut piece).await?;
        if length == 0 {
            return Ok(heard);
        }
        heard.extend_from_slice(&piece[..length.min(most - heard.len())]);
    }
}
