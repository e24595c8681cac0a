//! The agent in a microVM: process 1 of the guest, and the only thing in it that the node speaks to.
//!
//! ```text
//! node ==port|vsock==> wire -> session frames -> HTTP/2 -> service --> guest --> container, image, volume, network
//!                                                                        |            '--> stage (a process of its own)
//!                                                                        '--> reaper, cgroup, log, events
//! ```
//!
//! * [`boot`] makes a system of a kernel and an initramfs: mounts, modules.
//! * [`wire`] finds the way to the node; [`service`] answers what it asks.
//! * [`guest`] holds what there is: images, volumes, containers.
//! * [`container`] is one container's life; [`stage`] is what its process does before it becomes the workload.
//! * [`exec`] runs commands in containers; [`streams`] joins processes and ports to the node.
//!
//! The node is the only client. The workload is hostile: it shares the kernel with the agent, but neither its processes
//! (another PID namespace), nor its files (another mount namespace), nor the port's device node. What it still can do to
//! its own guest ends at the virtual machine.
//!
//! One binary plays all parts, told apart by the name it is started with.

mod boot;
mod cgroup;
mod clock;
mod container;
mod error;
mod events;
mod exec;
mod fd;
mod files;
mod guest;
mod image;
mod log;
mod netlink;
mod network;
mod port;
mod reaper;
mod service;
mod shutdown;
mod stage;
mod stats;
mod streams;
mod sys;
mod tree;
mod volume;
mod wire;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args();
    match args.next().as_deref() {
        Some(stage::CONTAINER) => stage::run(),
        Some(stage::PAUSE) => stage::pause(),
        _ => match boot::run(args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                // The console is all there is.
                eprintln!("lambdalet-agent: {error}");
                ExitCode::FAILURE
            }
        },
    }
}
