//! Generates code from the `.proto` files, with a compiler that is a library: no protoc is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    for part in ["lambdalet", "functionserver", "resmngr", "runtime"] {
        println!("cargo::rerun-if-changed={part}");
    }
    let descriptors = protox::compile(["lambdalet/agent/v1/agent.proto"], ["."])?;
    tonic_prost_build::configure()
        .build_transport(false)
        .bytes(".lambdalet.agent.v1")
        .codec_path("crate::bounded::BoundedCodec")
        .compile_fds(descriptors)?;
    let files = ["functionserver/functionserver.proto", "resmngr/resmngr.proto"];
    let descriptors = protox::compile(files, ["."])?;
    tonic_prost_build::configure().build_transport(false).compile_fds(descriptors)?;
    if std::env::var_os("CARGO_FEATURE_CRI").is_some() {
        let descriptors = protox::compile(["runtime/v1/cri.proto"], ["."])?;
        tonic_prost_build::configure().build_transport(false).compile_fds(descriptors)?;
    }
    Ok(())
}
