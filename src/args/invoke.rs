//! `lambdalet invoke`: one call of a function, by way of the API server's proxy.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use http::{Method, Request, StatusCode, header};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::client::Body;

use super::client::ClientArgs;
use super::print;
use crate::apiserver::{ApiServer, Trouble};
use crate::function::front::LAMBDA_PATH;
use crate::function::settings::DEFAULT_PORT;

/// The function was reached and refused the call: a status from 400 on.
const REFUSED: u8 = 4;
/// It was reached and failed: a status from 500 on.
const FAILED: u8 = 5;

/// Flags of `invoke`.
#[derive(Debug, Args)]
#[command(after_help = "The answer goes to standard output, its status to standard error unless it is 2xx.\n\n\
    Exit code: 0 for a status of 2xx or 3xx, 4 for 4xx, 5 for 5xx, 1 if the function could not be asked.")]
pub(super) struct InvokeArgs {
    /// The function's Pod
    pod: String,
    #[command(flatten)]
    client: ClientArgs,
    /// What is sent: JSON, or any text; @FILE is what the file holds, - is standard input [default: {} to a Lambda
    /// runtime, nothing elsewhere]
    #[arg(long, short, value_name = "JSON|@FILE|-")]
    data: Option<Data>,
    /// Path that is asked for; with --data it is sent to by POST, else asked by GET [default: that of Lambda runtimes]
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Data {
    Text(String),
    File(PathBuf),
    Stdin,
}

impl From<&str> for Data {
    fn from(text: &str) -> Self {
        match (text, text.strip_prefix('@')) {
            ("-", _) => Self::Stdin,
            (_, Some(path)) => Self::File(path.into()),
            (text, None) => Self::Text(text.to_owned()),
        }
    }
}

impl Data {
    fn read(self) -> anyhow::Result<Vec<u8>> {
        match self {
            Self::Text(text) => Ok(text.into_bytes()),
            Self::File(path) => {
                std::fs::read(&path).with_context(|| format!("failed to read the data from {}", path.display()))
            }
            Self::Stdin => {
                let mut data = Vec::new();
                std::io::stdin().read_to_end(&mut data).context("failed to read the data from standard input")?;
                Ok(data)
            }
        }
    }
}

/// Calls the function and prints its answer.
pub(super) async fn invoke(args: InvokeArgs) -> anyhow::Result<ExitCode> {
    let InvokeArgs { pod: name, client, data, path } = args;
    let (method, data) = match (data, &path) {
        (Some(data), _) => (Method::POST, data.read()?),
        (None, None) => (Method::POST, b"{}".to_vec()),
        (None, Some(_)) => (Method::GET, Vec::new()),
    };
    let (api, namespace) = client.connect().await?;
    let pods: Api<Pod> = Api::namespaced(api.client.clone(), &namespace);
    let pod = match api.request(pods.get(&name)).await {
        Err(error) if error.trouble == Trouble::NotFound => bail!("there is no Pod {name} in namespace {namespace}"),
        pod => pod?,
    };
    let path = path.as_deref().unwrap_or(LAMBDA_PATH);
    let uri = format!(
        "/api/v1/namespaces/{namespace}/pods/{name}:{}/proxy/{}",
        port(&pod),
        path.strip_prefix('/').unwrap_or(path)
    );
    let request = Request::builder().method(method).uri(uri).header(header::CONTENT_TYPE, "application/json");
    let request = request.body(Body::from(data)).with_context(|| format!("{path:?} is not a path"))?;
    ask(&api, request).await
}

async fn ask(api: &ApiServer, request: Request<Body>) -> anyhow::Result<ExitCode> {
    // No limit of our own: a call may take as long as the function takes.
    let answer = api.client.send(request).await.map_err(|error| api.explain(error))?;
    let (head, body) = answer.into_parts();
    let body = body.collect_bytes().await.context("the answer broke off")?;
    if let Some(message) = refusal(head.status, &body) {
        bail!("the API server did not pass the call on: {message}");
    }
    let code = match head.status.as_u16() {
        500.. => FAILED,
        400.. => REFUSED,
        _ => 0,
    };
    if code != 0 {
        let again = head.headers.get(header::RETRY_AFTER).and_then(|seconds| seconds.to_str().ok());
        let again = again.map_or(String::new(), |seconds| format!(" (try again after {seconds} s)"));
        eprintln!("lambdalet: the function answered {}{again}", head.status);
    }
    print(&body)?;
    if !body.is_empty() && !body.ends_with(b"\n") {
        print(b"\n")?;
    }
    Ok(ExitCode::from(code))
}

/// What the API server says for itself: it answers with a `Status` where it does not pass a call on.
fn refusal(status: StatusCode, body: &[u8]) -> Option<String> {
    if status.is_success() {
        return None;
    }
    let object: serde_json::Value = serde_json::from_slice(body).ok()?;
    if object["kind"] != "Status" || object["apiVersion"] != "v1" {
        return None;
    }
    Some(object["message"].as_str().unwrap_or("it does not say why").to_owned())
}

/// The first port that the function's front listens on.
fn port(pod: &Pod) -> u16 {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    let tcp = ports.find(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"));
    tcp.and_then(|port| u16::try_from(port.container_port).ok()).unwrap_or(DEFAULT_PORT)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn data_is_text_a_file_or_standard_input() {
        assert_eq!(Data::from("{}"), Data::Text("{}".to_owned()));
        assert_eq!(Data::from("@a/b"), Data::File("a/b".into()));
        assert_eq!(Data::from("-"), Data::Stdin);
        let error = Data::from("@/nowhere/x").read().unwrap_err();
        assert!(error.to_string().contains("/nowhere/x"), "{error}");
    }

    #[test]
    fn what_the_api_server_says_is_told_from_what_the_function_says() {
        let status = json!({"kind": "Status", "apiVersion": "v1", "message": "no route"}).to_string();
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        assert_eq!(refusal(unavailable, status.as_bytes()).as_deref(), Some("no route"));
        assert_eq!(refusal(unavailable, b"{\"message\":\"busy\"}"), None);
        assert_eq!(refusal(unavailable, b"busy"), None);
        assert_eq!(refusal(StatusCode::OK, status.as_bytes()), None, "a function may answer anything");
    }

    #[test]
    fn the_port_is_the_first_that_is_declared() {
        let pod = |ports: serde_json::Value| -> Pod {
            serde_json::from_value(json!({"spec": {"containers": [{"name": "c", "ports": ports}]}})).unwrap()
        };
        assert_eq!(port(&pod(json!([{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 9000}]))), 9000);
        assert_eq!(port(&pod(json!([]))), 8080);
    }
}
