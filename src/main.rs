//! The `lambdalet` binary.

use std::process::ExitCode;

use clap::Parser;
use lambdalet::args::{Args, cni};

// The node lives for months with many short-lived buffers; jemalloc keeps its memory from fragmenting.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    if cni::is_asked() {
        return cni::answer();
    }
    // One provider for every TLS connection; an error only says that one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match Args::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lambdalet: {}", lambdalet::telemetry::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
