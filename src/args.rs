//! The command line, and the one place that names concrete types and wires the rooms together.

mod client;
pub mod cni;
mod controller;
mod cri;
mod flags;
mod function_server;
mod functions;
mod identity;
mod invoke;
mod pager;
mod start;
mod top;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::check;
use crate::telemetry;
use controller::ControllerArgs;
use cri::CriArgs;
use flags::RunArgs;

/// A Kubernetes node in one binary.
#[derive(Debug, Parser)]
#[command(name = "lambdalet", version, about, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Join a cluster and run the Pods its scheduler places here
    Run(Box<RunArgs>),
    /// Say what is missing on this host for `run` with the same flags; changes nothing
    Check(Box<RunArgs>),
    /// List the functions of a cluster: their replicas, environments and calls
    Functions(functions::FunctionsArgs),
    /// Call a function once, through the API server, and print its answer
    Invoke(invoke::InvokeArgs),
    /// Show what Pods and functions use, as a table that stays up to date
    Top(top::TopArgs),
    /// Approve the serving certificates that nodes ask for, one replica at a time
    Controller(ControllerArgs),
    /// Serve the runtime to crictl, or to another kubelet, as CRI v1
    Cri(Box<CriArgs>),
    /// Bring the memory of a microVM, for a node
    #[command(hide = true)]
    Pager(pager::PagerArgs),
    /// Print the version
    Version {
        /// How it is printed
        #[arg(long, short, value_enum, default_value_t)]
        output: VersionOutput,
    },
    /// Print a script that completes flags and values in a shell
    Completion {
        /// The shell it is for
        shell: Shell,
    },
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum VersionOutput {
    /// One line.
    #[default]
    Text,
    /// One JSON object.
    Json,
}

impl Args {
    /// Does what was asked and says how the process should end.
    ///
    /// # Errors
    /// What kept it from being done; the caller prints the chain.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Run(args) => run(*args),
            Command::Check(args) => check(*args),
            Command::Functions(args) => ask(functions::functions(args)),
            Command::Invoke(args) => ask(invoke::invoke(args)),
            Command::Top(args) => ask(top::top(args)),
            Command::Controller(args) => controller(args),
            Command::Cri(args) => cri(*args),
            Command::Pager(args) => pager::pager(args),
            Command::Version { output } => print_version(output),
            Command::Completion { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Args::command(), "lambdalet", &mut script);
                print(&script)
            }
        }
    }
}

fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    telemetry::init(args.logging.format(), args.logging.verbosity())?;
    let plan = args.resolve()?;
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    let runtime = async_runtime()?;
    let ended = runtime.block_on(start::node(plan));
    // A stuck DNS lookup or file system must not hold the exit up.
    runtime.shutdown_background();
    ended.map(|()| ExitCode::SUCCESS)
}

fn controller(args: ControllerArgs) -> anyhow::Result<ExitCode> {
    telemetry::init(args.logging.format(), args.logging.verbosity())?;
    let runtime = async_runtime()?;
    let ended = runtime.block_on(args.run());
    runtime.shutdown_background();
    ended.map(|()| ExitCode::SUCCESS)
}

fn cri(args: CriArgs) -> anyhow::Result<ExitCode> {
    telemetry::init(args.logging.format(), args.logging.verbosity())?;
    let runtime = async_runtime()?;
    let ended = runtime.block_on(args.run());
    runtime.shutdown_background();
    ended.map(|()| ExitCode::SUCCESS)
}

fn check(args: RunArgs) -> anyhow::Result<ExitCode> {
    let plan = args.resolve()?;
    let runtime = async_runtime()?;
    // Before the first start there is only the way to an identity.
    let bootstrap = plan.settings.identity.bootstrap_kubeconfig.as_deref();
    let kubeconfig = plan.kubeconfig.as_deref().filter(|path| bootstrap.is_none() || path.exists()).or(bootstrap);
    let report = runtime.block_on(check::examine(&plan.settings, kubeconfig));
    runtime.shutdown_background();
    let mut text = report.to_string();
    for warning in &plan.warnings {
        text.push_str(&format!("note: {warning}\n"));
    }
    print(text.as_bytes())?;
    Ok(if report.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A command that asks the API server.
fn ask(command: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let runtime = async_runtime()?;
    let code = runtime.block_on(command);
    runtime.shutdown_background();
    code
}

fn async_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(worker_threads())
        .enable_all()
        .build()
        .context("failed to start the async runtime")
}

/// Threads that run the node's tasks: one for two processors, at least one.
///
/// The node hands on what others made and are waiting for, so a second thread that is woken for each piece costs more than
/// it helps: on two processors one thread carries half as much again out of a container as two do.
pub fn worker_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| (processors.get() / 2).max(1))
}

fn print_version(output: VersionOutput) -> anyhow::Result<ExitCode> {
    let (version, kubelet) = (env!("CARGO_PKG_VERSION"), crate::node::object::KUBELET_VERSION);
    let text = match output {
        VersionOutput::Text => format!("lambdalet {version} (node version {kubelet})\n"),
        VersionOutput::Json => {
            let platform = format!("{}/{}", std::env::consts::OS, crate::node::machine::architecture());
            let object = serde_json::json!({
                "lambdaletVersion": version, "kubeletVersion": kubelet, "platform": platform,
            });
            format!("{object:#}\n")
        }
    };
    print(text.as_bytes())
}

/// Writes to stdout; a reader that went away (`| head`) is no failure.
fn print(bytes: &[u8]) -> anyhow::Result<ExitCode> {
    match std::io::stdout().write_all(bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("failed to write to standard output")
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
