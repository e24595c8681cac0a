//! Builds the sandbox holder (`pause/pause.rs`), which the Docker driver embeds.

use std::env;
use std::error::Error;
use std::path::Path;
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=pause/pause.rs");
    println!("cargo::rerun-if-changed=build.rs");
    let rustc = env::var_os("RUSTC").ok_or("cargo sets RUSTC")?;
    let out = env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    let target = env::var("TARGET")?;
    let mut command = Command::new(rustc);
    command
        .args(["--crate-name", "pause", "--crate-type", "bin", "--edition", "2024", "--target", &target])
        .args(["-C", "panic=abort", "-C", "opt-level=s", "-C", "strip=symbols", "-C", "relocation-model=static"])
        .args(["-C", "link-arg=-nostartfiles", "-C", "link-arg=-nostdlib", "-C", "link-arg=-static"])
        // Without the page-aligned gaps between segments the file is a tenth of the size.
        .args(["-C", "link-arg=-Wl,-z,noseparate-code,--build-id=none", "-C", "target-feature=+crt-static"]);
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        command.arg("-C").arg(format!("linker={}", linker.to_string_lossy()));
    }
    command.arg("-o").arg(Path::new(&out).join("pause")).arg("pause/pause.rs");
    let status = command.status()?;
    if !status.success() {
        return Err(format!("failed to build pause/pause.rs for {target}: rustc ended with {status}").into());
    }
    Ok(())
}
