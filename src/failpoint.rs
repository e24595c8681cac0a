//! Named places at which a test may kill the process, to show that a restart finds and cleans up what was half done.

/// Steps of a Pod's life, in order, at which [`hit`] is called.
pub const NAMES: [&str; 12] = [
    "address",
    "mount",
    "sandbox",
    "plug",
    "cni-record",
    "cni",
    "create",
    "start",
    "stop",
    "cni-del",
    "status",
    "remove",
];

/// Ends the process as `kill -9` would if `LAMBDALET_FAILPOINT` names this place. Does nothing in a release build.
pub fn hit(name: &'static str) {
    debug_assert!(NAMES.contains(&name), "unknown failpoint {name}");
    #[cfg(debug_assertions)]
    {
        static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| std::env::var("LAMBDALET_FAILPOINT").ok());
        if chosen.as_deref() == Some(name) {
            eprintln!("failpoint {name}: killing this process");
            let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
            // The signal is delivered before kill returns to a single thread; others may still run, so stop here.
            loop {
                std::thread::park();
            }
        }
    }
}
