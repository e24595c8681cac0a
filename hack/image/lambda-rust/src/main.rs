//! A Lambda function that tells who it is and how many calls it serves at once. The event may hold the call until a
//! file is there, or end the process:
//!
//! ```json
//! {"hold": "NAME", "exit": 3, "filler": "..."}
//! ```

use std::path::Path;
use std::process::exit;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lambda_runtime::{Error, LambdaEvent, run_concurrent, service_fn};
use serde_json::{Value, json};

/// What tells this environment from others.
static ID: LazyLock<String> =
    LazyLock::new(|| std::fs::read_to_string("/proc/sys/kernel/random/uuid").expect("Linux").trim().to_owned());
/// Calls that run.
static RUNNING: AtomicUsize = AtomicUsize::new(0);
/// Directory that the caller shares with the function.
const GATE: &str = "/gate";

// Calls come one at a time unless AWS_LAMBDA_MAX_CONCURRENCY says how many there may be at once.
#[tokio::main]
async fn main() -> Result<(), Error> {
    run_concurrent(service_fn(handle)).await
}

async fn handle(event: LambdaEvent<Value>) -> Result<Value, Error> {
    let event = event.payload;
    let before = RUNNING.fetch_add(1, Ordering::SeqCst);
    if let Some(code) = event["exit"].as_i64() {
        exit(code.try_into()?);
    }
    if let Some(name) = event["hold"].as_str() {
        hold(name).await?;
    }
    RUNNING.fetch_sub(1, Ordering::SeqCst);
    let size = event["filler"].as_str().map_or(0, str::len);
    Ok(json!({"id": *ID, "alone": before == 0, "size": size}))
}

/// Says that the call runs, and waits until it may end.
async fn hold(name: &str) -> Result<(), Error> {
    let gate = Path::new(GATE);
    std::fs::write(gate.join(format!("begun.{name}")), "")?;
    while !gate.join("open").exists() && !gate.join(format!("open.{name}")).exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
