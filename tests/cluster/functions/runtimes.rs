//! Lambda functions in several languages, each under the runtime interface emulator: AWS's own clients for Python and
//! Node, and the crate `lambda_runtime`.

use std::time::Instant;

use super::*;
use crate::harness::on_shared_node;
use crate::harness::pods::is_ready;

/// What a function is written in. All of them do the same with an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Language {
    Python,
    Node,
    Rust,
}

/// As [`HANDLER`], in JavaScript.
const NODE_HANDLER: &str = r#"
import { randomUUID } from "node:crypto";
import { closeSync, existsSync, openSync, rmSync, writeFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
const id = randomUUID();
export async function handler(event) {
  let alone = true;
  try {
    closeSync(openSync("/tmp/running", "wx"));
  } catch {
    alone = false;
  }
  if ("exit" in event) process.exit(event.exit);
  if ("hold" in event) {
    writeFileSync(`/gate/begun.${event.hold}`, "");
    while (!existsSync("/gate/open") && !existsSync(`/gate/open.${event.hold}`)) await sleep(20);
  }
  if (alone) rmSync("/tmp/running");
  return { id, alone, size: (event.filler ?? "").length };
}
"#;

impl Language {
    /// A function Pod with these labels and annotations, and this much concurrency within an environment.
    async fn function<'a>(self, t: &'a Case, keys: Value, concurrency: Option<u32>) -> Function<'a> {
        let code = |mount: &str| json!([{"name": "code", "mountPath": mount}]);
        let mut container = match self {
            Self::Python => {
                t.config_map("f-code", json!({"held.py": HANDLER})).await;
                let env = json!([{"name": "PYTHONPATH", "value": "/code"}]);
                json!({"image": LAMBDA, "args": ["held.handler"], "env": env, "volumeMounts": code("/code")})
            }
            Self::Node => {
                t.config_map("f-code", json!({"held.mjs": NODE_HANDLER})).await;
                let image = "public.ecr.aws/lambda/nodejs:24";
                json!({"image": image, "args": ["held.handler"], "env": [], "volumeMounts": code("/var/task")})
            }
            Self::Rust => json!({"image": "lambdalet.test/rust-function:1", "env": []}),
        };
        container["name"] = json!("main");
        // Node takes what it can get to start; the others are small beside it.
        container["resources"] = json!({"limits": {"cpu": "400m", "memory": "256Mi"}});
        if let Some(calls) = concurrency {
            let variable = json!({"name": "AWS_LAMBDA_MAX_CONCURRENCY", "value": calls.to_string()});
            container["env"].as_array_mut().unwrap().push(variable);
        }
        Function::make(t, "f", keys, container).await.ready().await
    }
}

/// From zero to as many environments as there are calls, none of which serves two.
async fn serves_a_call_in_each_of_its_environments(t: &Case, language: Language) {
    let keys = json!({"com.openfaas.scale.max": "2", "execenvironment.count": "2"});
    let function = language.function(t, keys, None).await;
    assert!(function.environments().is_empty(), "ready with nothing running");
    let began = Instant::now();
    let cold = returned(function.invoke(&json!({"filler": "four"})).await);
    eprintln!("{language:?}: first answer from zero after {:?}", began.elapsed());
    assert_eq!((&cold["alone"], &cold["size"]), (&json!(true), &json!(4)));
    assert_eq!(function.environments().len(), 1);

    let names = ["a", "b", "c", "d"];
    let calls: Vec<_> = names.iter().map(|name| function.invoke(&json!({"hold": name}))).collect();
    // All four run at once, or this would wait for ever.
    function.begun(&names).await;
    assert_eq!(function.environments().len(), 4);
    let more: Vec<_> = (0..8).map(|_| function.invoke(&json!({}))).collect();
    function.open();
    let mut ids = BTreeSet::new();
    for call in calls {
        let answer = returned(call.await);
        assert_eq!(answer["alone"], json!(true));
        ids.insert(answer["id"].to_string());
    }
    assert_eq!(ids.len(), 4, "an environment for each call: {ids:?}");
    assert!(ids.contains(&cold["id"].to_string()));
    for call in more {
        let answer = returned(call.await);
        assert!(answer["alone"] == json!(true) && ids.contains(&answer["id"].to_string()), "{answer}");
    }
    // The emulator crashes on a second call at once; none did.
    let pod = t.api::<Pod>().get("f").await.unwrap();
    assert_eq!((crate::harness::pods::restarts(&pod, "main"), is_ready(&pod)), (0, true));

    let crashed = answered(function.invoke(&json!({"exit": 3})).await);
    assert!(crashed.text().contains("Runtime.ExitError"), "{} {}", crashed.status, crashed.text());
    returned(function.invoke(&json!({})).await);
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_in_node_serves_a_call_in_each_of_its_environments() {
    on_shared_node(async |t| serves_a_call_in_each_of_its_environments(t, Language::Node).await);
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_function_in_rust_serves_a_call_in_each_of_its_environments() {
    on_shared_node(async |t| serves_a_call_in_each_of_its_environments(t, Language::Rust).await);
}

/// With managed concurrency: three calls at once in one environment, and never a fourth.
async fn serves_three_calls_in_one_environment(t: &Case, language: Language) {
    let keys = json!({"com.openfaas.scale.max": "1", "execenvironment.count": "1"});
    let function = language.function(t, keys, Some(3)).await;
    let names = ["a", "b", "c"];
    let calls: Vec<_> = names.iter().map(|name| function.invoke(&json!({"hold": name}))).collect();
    function.begun(&names).await;
    assert_eq!(function.environments().len(), 1, "three calls in one environment");
    let pod = t.until("f", "counting its calls", |p| replicas(p).contains(" 0 queued")).await;
    assert!(replicas(&pod).starts_with("1/1 replicas, 1 environments, 1 busy"), "{}", replicas(&pod));
    let fourth = function.invoke(&json!({"hold": "d"}));
    function.let_go("a");
    // It waited for the first to end: with nowhere to go the emulator would have refused it.
    function.begun(&["d"]).await;
    function.open();
    let mut alone = 0;
    for call in calls {
        alone += usize::from(returned(call.await)["alone"] == json!(true));
    }
    returned(fourth.await);
    assert_eq!(alone, 1, "one of three that run at once was the first");

    // Right behind one another, when the runtime may not have asked for the next one yet.
    let callers: Vec<_> = (0..6)
        .map(|_| {
            let address = function.address.clone();
            tokio::spawn(async move {
                for _ in 0..30 {
                    let answer = send(&address, Request::post(INVOKE), "{}", CALL).await?;
                    if answer.status != StatusCode::OK {
                        return Err(format!("{}: {}", answer.status, answer.text()));
                    }
                }
                Ok(())
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap().unwrap();
    }
    assert_eq!(function.environments().len(), 1);
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn managed_concurrency_in_python_serves_several_calls_in_one_environment() {
    on_shared_node(async |t| serves_three_calls_in_one_environment(t, Language::Python).await);
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn managed_concurrency_in_node_serves_several_calls_in_one_environment() {
    on_shared_node(async |t| serves_three_calls_in_one_environment(t, Language::Node).await);
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn managed_concurrency_in_rust_serves_several_calls_in_one_environment() {
    on_shared_node(async |t| serves_three_calls_in_one_environment(t, Language::Rust).await);
}
