//! Generates code from the `.proto` files, with a compiler that is a library: no protoc is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files = ["lambdalet/agent/v1/agent.proto", "functionserver/functionserver.proto", "resmngr/resmngr.proto"];
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    tonic_prost_build::configure().build_transport(false).bytes(".lambdalet.agent.v1").compile_fds(descriptors)?;
    Ok(())
}
