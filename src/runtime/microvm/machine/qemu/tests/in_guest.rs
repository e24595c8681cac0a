//! Tests that need another kernel than this host's: this very program runs in a guest, and in it these tests.

use std::process::Command;

use super::*;

/// They skip themselves on hosts without cgroups of version 2.
const TESTS: [&str; 3] = [
    "runtime::usage::tests::version_2_of_a_kernel_is_read",
    "runtime::cgroup::tests::version_2_of_a_kernel_holds_a_pod_to_its_limits",
    "runtime::microvm::machine::cgroup::tests::version_2_of_a_kernel_holds_a_vmm_to_its_limits",
];

/// What the guest runs, with the names of the tests behind it.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec </dev/null >/dev/console 2>&1
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
export LAMBDALET_TEST_CGROUP_V2=1
/tests --exact --nocapture --test-threads 1 $TESTS
echo "ended with $?"
poweroff -f
"#;

/// Packs the program, and what it is linked to, beside the shell.
const PACK: &str = r#"set -eu
cd "$PLACE"
mkdir -p root/bin root/dev root/proc root/sys root/tmp
cp /bin/busybox root/bin/
strip -o root/tests "$PROGRAM"
for library in $(ldd "$PROGRAM" | grep -o '/[^ ]*'); do cp -L --parents "$library" root/; done
chmod +x root/init
cd root && find . | busybox cpio -o -H newc 2>/dev/null >../initramfs
"#;

#[test]
fn cgroups_of_version_2_are_read_and_limited_by_their_kernel() {
    let Some(guest) = env::var_os("LAMBDALET_TEST_TINY_GUEST").map(PathBuf::from) else {
        println!("skipped: LAMBDALET_TEST_TINY_GUEST names no kernel (hack/tiny-guest makes one)");
        return;
    };
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("root")).unwrap();
    fs::write(place.path().join("root/init"), INIT.replace("$TESTS", &TESTS.join(" "))).unwrap();
    let program = env::current_exe().unwrap();
    let mut pack = Command::new("sh");
    let packed = pack.args(["-c", PACK]).env("PLACE", place.path()).env("PROGRAM", program).status().unwrap();
    assert!(packed.success());
    let (accel, cpu) = if host::usable_kvm().is_ok() { ("kvm", "host") } else { ("tcg", "Nehalem") };
    let khz = host::tsc_khz().unwrap();
    let output = Command::new("timeout")
        .args(["300", "qemu-system-x86_64", "-M", "microvm,x-option-roms=off,acpi=on,rtc=on,isa-serial=on"])
        .args(["-accel", accel, "-cpu", cpu, "-m", "1024m", "-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .args(["-append", &format!("console=ttyS0 reboot=t panic=-1 quiet mitigations=off tsc_early_khz={khz}")])
        .arg("-kernel")
        .arg(guest.join("vmlinux"))
        .arg("-initrd")
        .arg(place.path().join("initramfs"))
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    println!("{said}");
    assert!(said.contains(&format!("test result: ok. {} passed; 0 failed; 0 ignored", TESTS.len())), "{said}");
    assert!(said.contains("ended with 0"), "{said}");
}
