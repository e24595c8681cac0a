//! What a host can do for machines: its hardware virtualization, the rate of its clock.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use super::Why;

/// How long a program may take to say its version; some 50 ms on an idle host.
const VERSION_PATIENCE: Duration = Duration::from_secs(20);

/// What a VMM's program says that its version is, asked by `flag`: what stands behind `name` in its first line.
///
/// # Errors
/// Why it cannot be had, in words.
pub(super) async fn version_of(program: &Path, flag: &str, name: &str) -> Result<String, Why> {
    let shown = program.display();
    let asked = tokio::process::Command::new(program).arg(flag).kill_on_drop(true).output();
    let output = tokio::time::timeout(VERSION_PATIENCE, asked).await;
    let output = output.map_err(|_| Why(format!("{shown} {flag} does not end")))?;
    let output = output.map_err(|error| Why(format!("{shown} cannot be run: {error}")))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.lines().next().and_then(|line| line.strip_prefix(name));
    let (vmm, _) = name.split_once(' ').unwrap_or((name, ""));
    version.map(str::to_owned).ok_or_else(|| Why(format!("{shown} is not {vmm}")))
}

/// Whether guests can run on the host's own processor.
///
/// # Errors
/// Why not, in words.
pub(super) fn usable_kvm() -> Result<(), String> {
    let device = Path::new("/dev/kvm");
    OpenOptions::new().read(true).write(true).open(device).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "there is no /dev/kvm".to_owned(),
        _ => format!("/dev/kvm cannot be opened: {error}"),
    })?;
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if cfg!(target_arch = "x86_64") && !has_virtualization(&flags) {
        // Such a device (PVM, for one) runs no kernel that was not made for it.
        return Err(
            "/dev/kvm is there, but the processor shows neither vmx nor svm: an ordinary guest kernel does not \
                    run on it"
                .to_owned(),
        );
    }
    Ok(())
}

fn has_virtualization(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    flags.split_ascii_whitespace().any(|flag| matches!(flag, "vmx" | "svm"))
}

/// Thousands of ticks of the host's time stamp counter a second, which a translated guest is given as its own.
pub(super) fn tsc_khz() -> Option<u64> {
    let told = fs::read_to_string("/sys/devices/system/cpu/cpu0/tsc_freq_khz").ok();
    let told = told.and_then(|text| text.trim().parse().ok());
    let cpuinfo = || fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    told.or_else(|| calibrated(&kernel_log())).or_else(|| from_cpuinfo(&cpuinfo()))
}

/// What the kernel said when it measured, or was told; the last word counts.
fn calibrated(log: &str) -> Option<u64> {
    let mhz = |line: &str| {
        let text = line.split_once("tsc: ")?.1;
        let (_, after) =
            text.split_once("Detected ").or_else(|| text.split_once("Refined TSC clocksource calibration: "))?;
        megahertz(after.split_once(" MHz")?.0.strip_suffix(" processor").unwrap_or(after.split_once(" MHz")?.0))
    };
    log.lines().filter_map(mhz).next_back()
}

/// The rate of the processor, which is that of the counter where it is constant and nothing saves power.
fn from_cpuinfo(cpuinfo: &str) -> Option<u64> {
    let line = cpuinfo.lines().find_map(|line| line.strip_prefix("cpu MHz"))?;
    megahertz(line.split_once(':')?.1.trim())
}

/// `2596.122` as thousands a second.
fn megahertz(text: &str) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let thousandths: u64 = format!("{part:0<3}").get(..3)?.parse().ok()?;
    Some(whole.parse::<u64>().ok()? * 1000 + thousandths)
}

/// The kernel's messages that are still there; needs root.
fn kernel_log() -> String {
    let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let mut options = OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::custom_flags(options.read(true), flags);
    let Ok(mut log) = options.open("/dev/kmsg") else { return String::new() };
    all_messages(&mut log)
}

fn all_messages(log: &mut File) -> String {
    let mut text = String::new();
    // One message a read, of 8 KiB at the most; the kernel keeps some thousands.
    let mut message = [0; 8192];
    for _ in 0..100_000 {
        match log.read(&mut message) {
            Ok(0) => break,
            Ok(read) => text.push_str(&String::from_utf8_lossy(&message[..read])),
            // Overwritten while it was read: the next one is there.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            Err(_) => break,
        }
    }
    text
}

/// Whether a process without rights may have its page faults served by another (userfaultfd(2)).
pub(super) fn has_userfaultfd() -> bool {
    let allowed = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    Path::new("/dev/userfaultfd").exists() || allowed.is_ok_and(|allowed| allowed.trim() == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_read_from_what_the_kernel_says_last() {
        let log = "6,1,0,-;tsc: Detected 2600.000 MHz processor\n6,2,0,-;tsc: Refined TSC clocksource calibration: \
                   2599.998 MHz\n6,3,0,-;other: 1.0 MHz\n";
        assert_eq!(calibrated(log), Some(2_599_998));
        assert_eq!(calibrated("6,1,0,-;tsc: Detected 2596.1 MHz processor\n"), Some(2_596_100));
        assert_eq!(calibrated("tsc: Fast TSC calibration failed"), None);
        assert_eq!(from_cpuinfo("model name\t: X\ncpu MHz\t\t: 2596.122\n"), Some(2_596_122));
        assert_eq!(from_cpuinfo(""), None);
    }

    #[test]
    fn only_these_flags_are_virtualization() {
        assert!(has_virtualization("flags\t\t: fpu vmx sse\n"));
        assert!(has_virtualization("flags\t\t: svm\n"));
        assert!(!has_virtualization("flags\t\t: fpu vmmcall svm_lock\nbugs: vmx\n"));
    }

    #[test]
    fn this_host_has_a_rate() {
        let khz = tsc_khz();
        println!("{khz:?}, KVM: {:?}", usable_kvm());
        assert!(cfg!(not(target_arch = "x86_64")) || khz.is_some_and(|khz| khz > 100_000), "{khz:?}");
    }
}
