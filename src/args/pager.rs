//! `lambdalet pager`: what a node starts beside a VMM. Nobody else has a use for it, so the help does not list it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use crate::runtime::microvm::machine::VmmUser;
use crate::runtime::microvm::machine::firecracker::pager::Arguments;

/// What it is told; its standard input is the socket that the VMM connects to.
#[derive(Debug, Args)]
pub(super) struct PagerArgs {
    /// Memory of the template
    #[arg(long, value_name = "FILE")]
    memory: PathBuf,
    /// The VMM
    #[arg(long, value_name = "PID")]
    vmm: i32,
    /// When that was started, in clock ticks after the boot
    #[arg(long, value_name = "TICKS")]
    vmm_started: u64,
    /// User it goes on as
    #[arg(long)]
    uid: u32,
    /// Group it goes on as
    #[arg(long)]
    gid: u32,
}

pub(super) fn pager(args: PagerArgs) -> anyhow::Result<ExitCode> {
    let PagerArgs { memory, vmm, vmm_started, uid, gid } = args;
    let tried = format!("failed to bring the memory of VMM {vmm} from {}", memory.display());
    Arguments { memory, vmm, vmm_started, user: VmmUser { uid, gid } }.serve().context(tried)?;
    Ok(ExitCode::SUCCESS)
}
