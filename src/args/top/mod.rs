//! `lambdalet top`: what Pods and functions use, as a table that stays up to date.
//!
//! ```text
//! API server: Nodes, Pods; node's API by its proxy: /stats/summary, /metrics --> Source --> View --> render --> Screen
//! ```

mod figures;
mod render;
mod screen;
mod source;

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::client::ClientArgs;
use crate::telemetry::chain;
use screen::{Key, Screen};
use source::{Scope, Source};

/// How often it is read anew.
const PERIOD: Duration = Duration::from_secs(2);
/// Between the two readings that a rate needs; a node takes rates over a second at least.
const SHORT: Duration = Duration::from_millis(1200);

/// Flags of `top`.
#[derive(Debug, Args)]
#[command(
    after_help = "Usage is read from each node through the API server, which takes the right to get nodes/proxy.\n\
    In a terminal it is refreshed every two seconds; q or Ctrl-C ends it. Elsewhere a table is printed every two \
    seconds."
)]
pub(super) struct TopArgs {
    #[command(flatten)]
    client: ClientArgs,
    /// Those of every namespace
    #[arg(long, short = 'A', conflicts_with = "namespace")]
    all_namespaces: bool,
    /// Those of one node [default: of every lambdalet node]
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
    /// Print once and end; takes a second, since CPU use and calls per second need two readings
    #[arg(long)]
    once: bool,
    /// How it is printed
    #[arg(long, short, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    #[default]
    Table,
    /// One JSON object per reading, on a line of its own.
    Json,
}

/// Prints, once or until it is told to end.
pub(super) async fn top(args: TopArgs) -> anyhow::Result<ExitCode> {
    let TopArgs { client, all_namespaces, node, once, output } = args;
    let (api, namespace) = client.connect().await?;
    let namespace = (!all_namespaces).then_some(namespace);
    let mut source = Source::new(api, Scope { namespace, node });
    let first = source.read().await?;
    if once {
        tokio::time::sleep(SHORT).await;
        let view = source.read().await?;
        return super::print(printed(&view, output)?.as_bytes());
    }
    match output == Output::Table && std::io::stdout().is_terminal() {
        true => on_screen(source, first).await,
        false => stream(source, output).await,
    }
}

fn printed(view: &render::View, output: Output) -> anyhow::Result<String> {
    match output {
        Output::Table => Ok(render::table(view, None)),
        Output::Json => Ok(serde_json::to_string(view).context("failed to write JSON")? + "\n"),
    }
}

/// Prints readings until nobody reads them any more.
async fn stream(mut source: Source, output: Output) -> anyhow::Result<ExitCode> {
    let mut between = "";
    loop {
        tokio::time::sleep(PERIOD).await;
        let text = match source.read().await {
            Ok(view) => printed(&view, output)?,
            Err(error) => {
                eprintln!("lambdalet: {}", chain(error.as_ref()));
                continue;
            }
        };
        let mut out = std::io::stdout().lock();
        if out.write_all(between.as_bytes()).and_then(|()| out.write_all(text.as_bytes())).is_err() {
            return Ok(ExitCode::SUCCESS);
        }
        between = if output == Output::Table { "\n" } else { "" };
    }
}

/// Keeps a table on the terminal until q, Ctrl-C or another signal that ends processes.
async fn on_screen(mut source: Source, mut view: render::View) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let mut screen = Screen::open()?;
    screen.draw(&render::table(&view, Some(screen.size())))?;
    loop {
        let reading = async {
            tokio::time::sleep(PERIOD).await;
            source.read().await
        };
        tokio::pin!(reading);
        loop {
            tokio::select! {
                // Not cancel-safe, and kept across the other arms until it is done.
                read = &mut reading => {
                    match read {
                        Ok(new) => view = new,
                        // What was known stays; that it is old is said.
                        Err(error) => view.notes = vec![chain(error.as_ref())],
                    }
                    screen.draw(&render::table(&view, Some(screen.size())))?;
                    break;
                }
                // Cancel-safe: what was read is kept for the next time.
                key = screen.key() => {
                    if key == Key::Quit {
                        return Ok(ExitCode::SUCCESS);
                    }
                }
                // Cancel-safe: a signal is taken or left.
                end = signals.next() => {
                    if end {
                        return Ok(ExitCode::SUCCESS);
                    }
                    screen.draw(&render::table(&view, Some(screen.size())))?;
                }
            }
        }
    }
}

/// Signals that end it, and the one of a window that has another size.
struct Signals {
    ends: [Signal; 3],
    resized: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let of = |kind| signal(kind).context("failed to listen for signals");
        let ends = [of(SignalKind::interrupt())?, of(SignalKind::terminate())?, of(SignalKind::hangup())?];
        Ok(Self { ends, resized: of(SignalKind::window_change())? })
    }

    /// Waits for one; whether it ends the program.
    async fn next(&mut self) -> bool {
        let [interrupt, terminate, hangup] = &mut self.ends;
        tokio::select! {
            // Cancel-safe, as all: a signal is taken or left.
            _ = interrupt.recv() => true,
            _ = terminate.recv() => true,
            _ = hangup.recv() => true,
            _ = self.resized.recv() => false,
        }
    }
}
