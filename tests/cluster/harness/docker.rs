//! A second Docker daemon.

use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::node::{mounts_below, output};
use super::wait::{SOON, poll};

/// A Docker daemon of the test's own, so that it can be stopped.
pub(crate) struct Docker {
    flags: Vec<&'static str>,
    process: Option<Child>,
    dir: tempfile::TempDir,
}

impl Docker {
    /// One that answers, started with these flags besides the usual ones.
    pub(crate) async fn start(flags: &[&'static str]) -> Self {
        let mut docker = Self::stopped(flags);
        docker.run().await;
        docker
    }

    /// One that is yet to be started.
    pub(crate) fn stopped(flags: &[&'static str]) -> Self {
        Self { flags: flags.to_vec(), process: None, dir: tempfile::tempdir().unwrap() }
    }

    /// Starts it, and waits until it answers.
    pub(crate) async fn run(&mut self) {
        let place = |name: &str| self.dir.path().join(name).display().to_string();
        let log = std::fs::File::options().create(true).append(true).open(place("log")).unwrap();
        let child = Command::new("dockerd")
            .args(["--data-root", &place("data"), "--exec-root", &place("exec"), "--pidfile", &place("pid")])
            .args(["-H", &self.endpoint(), "--bridge", "none", "--iptables=false", "--ip-masq=false"])
            .args(&self.flags)
            .stdout(log.try_clone().unwrap())
            .stderr(Stdio::from(log))
            .spawn()
            .unwrap();
        self.process = Some(child);
        poll("a second Docker daemon", SOON, async || {
            let answer = output("docker", &["-H", &self.endpoint(), "version", "-f", "{{.Server.Version}}"]);
            let log = || std::fs::read_to_string(place("log")).unwrap_or_default();
            if answer.trim().is_empty() { Err(log()) } else { Ok(()) }
        })
        .await;
    }

    /// As `--docker-endpoint` wants it.
    pub(crate) fn endpoint(&self) -> String {
        format!("unix://{}/sock", self.dir.path().display())
    }

    /// Gives it an image of the usual daemon.
    pub(crate) fn load(&self, image: &str) {
        let pipe = format!("docker save {image} | docker -H {} load", self.endpoint());
        output("sh", &["-c", &pipe]);
    }

    /// Ends it, and with it its containers, unless it was told to leave them running.
    pub(crate) fn stop(&mut self) {
        let Some(mut child) = self.process.take() else { return };
        let _ = kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM);
        let _ = child.wait();
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let ids = output("docker", &["-H", &self.endpoint(), "ps", "-aq"]);
        for id in ids.split_whitespace() {
            output("docker", &["-H", &self.endpoint(), "rm", "-f", id]);
        }
        self.stop();
        for mount in mounts_below(self.dir.path()).iter().rev() {
            output("umount", &["--lazy", mount]);
        }
    }
}
