//! The annotations by which this node makes up for what fakecloud's functions lack (docs/fakecloud.md).

use super::*;

const ANNOTATIONS: &str = "FAKECLOUD_LAMBDA_K8S_ANNOTATIONS";

/// An image made of another one and some files, for as long as it lives.
struct Made(&'static str);

impl Made {
    fn of(name: &'static str, base: &str, files: &[(&str, &str)], changes: &[&str]) -> Self {
        let container = output("docker", &["create", base, "x"]);
        let container = container.trim();
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let file = dir.path().join("file");
            std::fs::write(&file, text).unwrap();
            output("docker", &["cp", file.to_str().unwrap(), &format!("{container}:{path}")]);
        }
        let changes: Vec<&str> = changes.iter().flat_map(|change| ["--change", change]).collect();
        output("docker", &[&["commit"], &changes[..], &[container, name]].concat());
        output("docker", &["rm", container]);
        Self(name)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        output("docker", &["rmi", "-f", self.0]);
    }
}

async fn layer(cloud: &Fakecloud<'_>, name: &str, files: &[(&str, &str)]) -> Value {
    let content = STANDARD.encode(zip(cloud.dir.path(), files));
    let path = format!("/2018-10-31/layers/{name}/versions");
    cloud.call("POST", &path, json!({"Content": {"ZipFile": content}})).await["LayerVersionArn"].clone()
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn layers_are_unpacked_in_their_order_and_downloads_go_if_switched_on() {
    let told = "lambdalet.dev/fakecloud-layers=true,lambdalet.dev/fakecloud-downloads=true";
    with_fakecloud_told(&[(ANNOTATIONS, told)], async |_, cloud| {
        let first =
            layer(cloud, "first", &[("python/helper.py", "WORD = 'first'"), ("python/only.py", "WORD = 1")]).await;
        let second = layer(cloud, "second", &[("python/helper.py", "WORD = 'second'")]).await;
        let source = "import os, helper, only\ndef handler(event, context):\n    return [helper.WORD, only.WORD, os.listdir('/opt'), os.listdir('/tmp')]\n";
        cloud.create("layered", source, json!({"Layers": [first, second]})).await;
        assert_eq!(cloud.invoke("layered", json!({})).await, json!(["second", 1, ["python"], []]));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn without_the_switches_a_pod_is_run_as_it_is_written() {
    with_fakecloud(async |_, cloud| {
        let made = layer(cloud, "plain", &[("python/helper.py", "WORD = 1")]).await;
        let source =
            "import os\ndef handler(event, context):\n    return [os.listdir('/opt'), sorted(os.listdir('/tmp'))]\n";
        cloud.create("plain", source, json!({"Layers": [made]})).await;
        let answer = cloud.invoke("plain", json!({})).await;
        assert_eq!(answer, json!([["layer-0.zip"], ["code.zip", "layers.tar"]]));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn an_image_functions_files_are_seen_if_switched_on() {
    let source = "def handler(event, context):\n    return open('/opt/word').read()\n";
    let files = [("/var/task/app.py", source), ("/opt/word", "from the image")];
    let base = "public.ecr.aws/lambda/python:3.12";
    let image = Made::of("lambdalet.test/task-function:1", base, &files, &["CMD [\"app.handler\"]"]);
    with_fakecloud(async |_, cloud| {
        let tags = json!({"fakecloud-k8s/annotations": "lambdalet.dev/fakecloud-image-files=true"});
        let function = json!({"FunctionName": "shown", "PackageType": "Image", "Code": {"ImageUri": image.0}});
        cloud.call("POST", "/2015-03-31/functions", with(function, json!({"Tags": tags}))).await;
        assert_eq!(cloud.invoke("shown", json!({})).await, json!("from the image"));
    });
}

/// A custom runtime in one file: asks for events and answers each with itself.
const BOOTSTRAP: &str = r#"#!/usr/bin/python3
import os
from urllib.request import Request, urlopen
api = "http://" + os.environ["AWS_LAMBDA_RUNTIME_API"] + "/2018-06-01/runtime/invocation/"
while True:
    event = urlopen(api + "next")
    urlopen(Request(api + event.headers["Lambda-Runtime-Aws-Request-Id"] + "/response", event.read(), method="POST"))
"#;

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_custom_runtime_is_found_if_switched_on() {
    // Stands in for AWS's image of that name, which a test machine cannot pull.
    let entrypoint = r#"ENTRYPOINT ["/usr/local/bin/aws-lambda-rie", "/var/runtime/bootstrap"]"#;
    let base = "public.ecr.aws/lambda/python:3.12";
    let _image = Made::of("public.ecr.aws/lambda/provided:al2023", base, &[], &[entrypoint, "CMD []"]);
    with_fakecloud_told(&[(ANNOTATIONS, "lambdalet.dev/fakecloud-custom-runtime=true")], async |_, cloud| {
        let code = STANDARD.encode(zip(cloud.dir.path(), &[("bootstrap", BOOTSTRAP)]));
        let function = json!({"FunctionName": "custom", "Runtime": "provided.al2023", "Handler": "x", "Timeout": 30, "Code": {"ZipFile": code}});
        cloud.call("POST", "/2015-03-31/functions", function).await;
        assert_eq!(cloud.invoke("custom", json!({"n": 3})).await, json!({"n": 3}));
    });
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_switch_on_another_pod_is_told_to_be_idle() {
    on_shared_node(async |t| {
        let metadata = json!({"annotations": {"lambdalet.dev/fakecloud-layers": "true"}});
        t.labelled_pod("plain", metadata, json!({"restartPolicy": "Never", "containers": [busybox("true")]})).await;
        let text = t.event("plain", "UnsupportedPodFeature").await;
        assert!(text.contains("lambdalet.dev/fakecloud-layers is ignored"), "{text}");
    });
}
