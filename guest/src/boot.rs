//! From the kernel's first process to an agent that answers.
//!
//! Whatever is done here is paid by every boot, so the way to the node comes first, and what only containers need is loaded
//! while the node says hello.

use std::fs::{self, File};
use std::io;
use std::sync::Arc;

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use crate::guest::{Guest, Paths};
use crate::wire::Way;

/// What is loaded, in order, a line each: `now NAME`, `vsock NAME` or `later NAME`; made by hack/guest.
const MODULES: &str = "/modules";
/// The number of that kind of device (Virtual I/O Device 1.2, section 5), as the kernel writes it.
const CONSOLE: &str = "0x0003";
/// Where the root file system is mounted a second time.
const ROOT: &str = "/root";

/// Runs the agent until the guest ends.
///
/// # Errors
/// What keeps it from answering the node; the kernel ends the guest then.
pub(crate) fn run(mut args: impl Iterator<Item = String>) -> io::Result<()> {
    let way = match (args.next().as_deref(), args.next()) {
        // In a namespace on somebody's host, where no kernel was booted: for tests.
        (Some("--stand-in"), Some(socket)) => Way::Socket(socket.into()),
        _ => {
            system()?;
            modules("now")?;
            let way = Way::of_kernel(&fs::read_to_string("/proc/cmdline").unwrap_or_default(), has_console());
            if way == Way::Vsock {
                modules("vsock")?;
            }
            way
        }
    };
    let stand_in = matches!(way, Way::Socket(_));
    if !stand_in {
        protect()?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Each costs a stack, and none of them computes.
        .max_blocking_threads(16)
        .build()?;
    runtime.block_on(async {
        let guest = Arc::new(Guest::new(Paths::default(), stand_in)?);
        let loading = Arc::clone(&guest);
        let load = tokio::task::spawn_blocking(move || {
            let loaded = if stand_in { Ok(()) } else { modules("later") };
            if !stand_in {
                // What is loaded, and what this machine has no use for, takes memory twice.
                let _ = fs::remove_dir_all(MODULES);
            }
            let loaded = loaded.and_then(|()| loading.prepare());
            loading.loaded(loaded.map_err(|error| error.to_string()));
        });
        // Neither ends before the guest does; a failure ends the guest.
        tokio::select! {
            ended = guest.reaper.run() => ended,
            ended = crate::wire::serve(&way, &guest) => ended,
            ended = async { guest.watch_memory().await } => ended,
            never = async { let _ = load.await; std::future::pending().await } => never,
        }
    })
}

/// The file systems that everything needs.
fn system() -> io::Result<()> {
    // A container changes its root by pivot_root, which the kernel refuses while the root is the one it unpacked the
    // initramfs into. So the same file system is mounted over itself once more.
    let none = None::<&str>;
    mount(Some("/"), ROOT, none, MsFlags::MS_BIND, none)?;
    chdir(ROOT)?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
    chroot(".")?;
    chdir("/")?;

    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("devtmpfs"), "/dev", Some("devtmpfs"), MsFlags::MS_NOSUID, none)?;
    mount(Some("proc"), "/proc", Some("proc"), quiet, none)?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), quiet, none)?;
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=755"))?;
    mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), quiet, none)?;
    Ok(())
}

/// Whether the machine has a virtio console device, whose ports the node may speak through.
fn has_console() -> bool {
    let devices = fs::read_dir("/sys/bus/virtio/devices").into_iter().flatten().flatten();
    let kinds = devices.filter_map(|device| fs::read_to_string(device.path().join("device")).ok());
    kinds.into_iter().any(|kind| kind.trim() == CONSOLE)
}

/// Nothing that runs out may take the agent with it.
fn protect() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000")
}

/// Loads the modules of one stage. Those that are there already are fine.
fn modules(stage: &str) -> io::Result<()> {
    let Ok(list) = fs::read_to_string(format!("{MODULES}/list")) else { return Ok(()) };
    for name in list.lines().filter_map(|line| line.strip_prefix(stage)?.strip_prefix(' ')) {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("failed to load module {name}: {error}"));
        let file = File::open(format!("{MODULES}/{name}.ko")).map_err(named)?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(error) => return Err(named(error.into())),
        }
    }
    Ok(())
}
