//! Generates code from the `.proto` files, with a compiler that is a library: no protoc is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=lambdalet");
    let descriptors = protox::compile(["lambdalet/agent/v1/agent.proto"], ["."])?;
    tonic_prost_build::configure().build_transport(false).bytes(".lambdalet.agent.v1").compile_fds(descriptors)?;
    Ok(())
}
