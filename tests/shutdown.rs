//! Signals, sent to a process of its own: this test binary again, running the ignored test below.

// Helpers of tests may unwrap as tests do.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lambdalet::shutdown::Tasks;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longer than any test waits.
const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
#[ignore = "run by the other tests as a process of its own"]
async fn child() {
    let (tasks, supervisor) = Tasks::new();
    let draining = tasks.draining();
    let stuck = std::env::var_os("STUCK").is_some();
    tasks.spawn("pods", async move {
        println!("up");
        draining.cancelled().await;
        println!("draining");
        if stuck {
            tokio::time::sleep(LONG).await;
        }
        Ok(())
    });
    supervisor.run(LONG).await.unwrap();
    std::process::exit(0);
}

struct Process {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Process {
    fn start(stuck: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child", "--ignored", "--nocapture"]).stdout(Stdio::piped());
        if stuck {
            command.env("STUCK", "1");
        }
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut process = Self { child, lines };
        process.wait_for("up");
        // The handlers are installed by the future that runs beside the task.
        std::thread::sleep(Duration::from_millis(200));
        process
    }

    fn wait_for(&mut self, line: &str) {
        assert!(self.lines.by_ref().map_while(Result::ok).any(|found| found.ends_with(line)), "never said {line}");
    }

    fn send(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    fn exit_code(mut self) -> i32 {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or_else(|| panic!("killed by {:?}", status.signal()));
            }
            assert!(begin.elapsed() < Duration::from_secs(10), "it did not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn the_first_signal_drains_and_ends_well() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut process = Process::start(false);
        process.send(signal);
        process.wait_for("draining");
        assert_eq!(process.exit_code(), 0);
    }
}

#[test]
fn the_second_signal_ends_at_once() {
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let mut process = Process::start(true);
        process.send(Signal::SIGTERM);
        process.wait_for("draining");
        process.send(signal);
        assert_eq!(process.exit_code(), code);
    }
}
