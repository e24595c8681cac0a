//! What fakecloud's Lambda Pods lack, put right where their annotations ask for it: pure, from a Pod to a Pod.
//!
//! fakecloud 0.51.0 leaves a function's layers zipped in `/opt`, hides what an image function's image has under
//! `/var/task` and `/opt` behind empty volumes, does not put the `bootstrap` of a custom runtime where AWS's image starts
//! it, and leaves its downloads in `/tmp`. Each switch is an annotation that is `true` on the Pod; without one the Pod is
//! run as it is written. docs/fakecloud.md is the user's side of this.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, VolumeMount};

/// Unpack the layers in `/opt`, in their order.
pub const LAYERS: &str = "lambdalet.dev/fakecloud-layers";
/// Leave `/var/task` and `/opt` of an image function as the image has them.
pub const IMAGE_FILES: &str = "lambdalet.dev/fakecloud-image-files";
/// Show the code of a custom runtime (`provided.*`) in `/var/runtime` too.
pub const CUSTOM_RUNTIME: &str = "lambdalet.dev/fakecloud-custom-runtime";
/// Remove the downloads from `/tmp`, whose size counts against the function's.
pub const DOWNLOADS: &str = "lambdalet.dev/fakecloud-downloads";
/// Every switch.
pub const SWITCHES: [&str; 4] = [LAYERS, IMAGE_FILES, CUSTOM_RUNTIME, DOWNLOADS];

/// The init container that fetches code and layers, and the one that is the function.
const INIT: &str = "fakecloud-init";
const MAIN: &str = "fakecloud-lambda";
/// The volumes that both have, besides `/tmp`: the code and the layers.
const TASK: &str = "fakecloud-task";
const OPT: &str = "fakecloud-opt";
/// Where AWS's image for custom runtimes looks for `bootstrap`.
const RUNTIME_DIR: &str = "/var/runtime";

/// Runs the script that is handed over and, if it succeeded, what is needed afterwards. A shell of its own, so that an
/// `exit` in the script ends only that.
const THEN: &str = r#"sh -c "$0" || exit"#;
/// A later layer wins over an earlier one, as on AWS; there are at most a hundred.
const UNPACK: &str = r#"for layer in /opt/layer-?.zip /opt/layer-??.zip; do
  [ -f "$layer" ] || continue
  unzip -q -o "$layer" -d /opt && rm "$layer" || exit
done"#;
const TIDY: &str = "rm -f /tmp/code.zip /tmp/layers.tar";

/// Changes the Pod as its annotations ask. Nothing happens to a Pod that is no Lambda function of fakecloud's.
pub fn adapt(pod: &mut Pod) {
    let [layers, image_files, custom_runtime, downloads] = SWITCHES.map(|switch| is_on(pod, switch));
    let Some(spec) = pod.spec.as_mut().filter(|spec| is_lambda(spec)) else { return };
    let steps: Vec<&str> = [(layers, UNPACK), (downloads, TIDY)].iter().filter(|s| s.0).map(|s| s.1).collect();
    if let Some(init) = spec.init_containers.iter_mut().flatten().find(|c| c.name == INIT) {
        append(init, &steps);
    }
    let Some(main) = spec.containers.iter_mut().find(|c| c.name == MAIN) else { return };
    if image_files && is_image_function(main) {
        main.volume_mounts.iter_mut().for_each(|mounts| mounts.retain(|mount| mount.name != TASK && mount.name != OPT));
    }
    if custom_runtime && is_custom_runtime(main) {
        let mount = VolumeMount { name: TASK.to_owned(), mount_path: RUNTIME_DIR.to_owned(), ..VolumeMount::default() };
        main.volume_mounts.get_or_insert_default().push(mount);
    }
}

/// The switches that do nothing, since the Pod is not one that fakecloud makes for a function; a sentence each.
pub fn idle_switches(pod: &Pod) -> Vec<String> {
    if pod.spec.as_ref().is_some_and(is_lambda) {
        return Vec::new();
    }
    let on = SWITCHES.into_iter().filter(|switch| is_on(pod, switch));
    on.map(|switch| format!("annotation {switch} is ignored: this is no Pod of a fakecloud Lambda function")).collect()
}

fn is_on(pod: &Pod, switch: &str) -> bool {
    pod.metadata.annotations.as_ref().and_then(|all| all.get(switch)).is_some_and(|value| value == "true")
}

fn is_lambda(spec: &PodSpec) -> bool {
    let init = spec.init_containers.iter().flatten().any(|c| c.name == INIT && script(c).is_some());
    init && spec.containers.iter().any(|c| c.name == MAIN)
}

/// The init container's script, if it is run as fakecloud runs it.
fn script(init: &Container) -> Option<&String> {
    match init.command.as_deref() {
        Some([shell, flag, script]) if shell == "sh" && flag == "-c" => Some(script),
        _ => None,
    }
}

fn append(init: &mut Container, steps: &[&str]) {
    if let Some(script) = script(init).filter(|_| !steps.is_empty()) {
        let all = [&[THEN], steps].concat().join("\n");
        init.command = Some(vec!["sh".to_owned(), "-c".to_owned(), all, script.clone()]);
    }
}

/// fakecloud hands the handler over as an argument; an image function's is in the image.
fn is_image_function(main: &Container) -> bool {
    main.args.as_ref().is_none_or(Vec::is_empty) && main.command.as_ref().is_none_or(Vec::is_empty)
}

/// Whether the image is AWS's for custom runtimes, whichever registry it comes from.
fn is_custom_runtime(main: &Container) -> bool {
    let image = main.image.as_deref().unwrap_or_default();
    let last = image.rsplit('/').next().unwrap_or_default();
    last.split([':', '@']).next() == Some("provided") && !is_image_function(main)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use serde_json::{Value, json};

    use super::*;

    fn pod(image: &str, args: Value, switches: &[&str]) -> Pod {
        let mounts = json!([
            { "name": TASK, "mountPath": "/var/task" },
            { "name": OPT, "mountPath": "/opt" },
            { "name": "fakecloud-tmp", "mountPath": "/tmp" },
        ]);
        let annotations: Value = switches.iter().map(|switch| ((*switch).to_owned(), json!("true"))).collect();
        serde_json::from_value(json!({
            "metadata": { "annotations": annotations },
            "spec": {
                "initContainers": [{ "name": INIT, "command": ["sh", "-c", "fetch"], "volumeMounts": mounts }],
                "containers": [{ "name": MAIN, "image": image, "args": args, "volumeMounts": mounts }],
            },
        }))
        .unwrap()
    }

    fn adapted(pod: &Pod) -> Pod {
        let mut adapted = pod.clone();
        adapt(&mut adapted);
        adapted
    }

    fn command(pod: &Pod) -> Vec<String> {
        pod.spec.as_ref().unwrap().init_containers.as_ref().unwrap()[0].command.clone().unwrap()
    }

    fn mount_paths(pod: &Pod) -> Vec<String> {
        let mounts = pod.spec.as_ref().unwrap().containers[0].volume_mounts.clone().unwrap();
        mounts.into_iter().map(|mount| mount.mount_path).collect()
    }

    const PYTHON: &str = "public.ecr.aws/lambda/python:3.12";
    const PROVIDED: &str = "public.ecr.aws/lambda/provided:al2023";

    #[test]
    fn without_a_switch_a_pod_stays_as_it_is() {
        let mut off = pod(PROVIDED, json!(["handler"]), &[]);
        assert_eq!(adapted(&off), off);
        let values = SWITCHES.map(|switch| (switch.to_owned(), "false".to_owned()));
        off.metadata.annotations = Some(values.into());
        assert_eq!(adapted(&off), off);
    }

    #[test]
    fn a_pod_of_another_kind_stays_as_it_is_and_is_told() {
        let mut other = pod(PROVIDED, json!(["handler"]), &SWITCHES);
        other.spec.as_mut().unwrap().init_containers.as_mut().unwrap()[0].command = Some(vec!["fetch".to_owned()]);
        assert_eq!(adapted(&other), other);
        let told = idle_switches(&other);
        assert_eq!(told.len(), 4);
        assert!(told[0].contains(LAYERS) && told[0].contains("is ignored"), "{told:?}");
        assert!(idle_switches(&pod(PYTHON, json!(["handler"]), &SWITCHES)).is_empty());
    }

    #[test]
    fn the_script_is_followed_by_what_the_switches_ask() {
        let only = command(&adapted(&pod(PYTHON, json!(["handler"]), &[LAYERS])));
        assert_eq!((&only[..2], only[3].as_str()), (["sh", "-c"].map(str::to_owned).as_slice(), "fetch"));
        assert!(only[2].contains("unzip") && !only[2].contains("code.zip"), "{}", only[2]);
        let both = command(&adapted(&pod(PYTHON, json!(["handler"]), &[LAYERS, DOWNLOADS])));
        assert!(both[2].contains("unzip") && both[2].ends_with(TIDY), "{}", both[2]);
        let none = adapted(&pod(PYTHON, json!(["handler"]), &[IMAGE_FILES, CUSTOM_RUNTIME]));
        assert_eq!(command(&none), ["sh", "-c", "fetch"]);
    }

    #[test]
    fn what_follows_the_script_runs_only_if_it_succeeded() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display().to_string();
        for (script, code, lines) in [("exit 7", 7, ""), ("set -e; false", 1, ""), ("exit 0", 0, "after\n")] {
            let mut init =
                Container { command: Some(["sh", "-c", script].map(str::to_owned).into()), ..Default::default() };
            append(&mut init, &[&format!("echo after >>{path}")]);
            let words = init.command.unwrap();
            let status = Command::new(&words[0]).args(&words[1..]).status().unwrap();
            assert_eq!(
                (status.code(), std::fs::read_to_string(&path).unwrap().as_str()),
                (Some(code), lines),
                "{script}"
            );
        }
    }

    #[test]
    fn an_image_functions_files_are_seen() {
        let shown = adapted(&pod("registry.example/fn:1", json!([]), &[IMAGE_FILES]));
        assert_eq!(mount_paths(&shown), ["/tmp"]);
        let zip = adapted(&pod(PYTHON, json!(["handler"]), &[IMAGE_FILES]));
        assert_eq!(mount_paths(&zip), ["/var/task", "/opt", "/tmp"]);
    }

    #[test]
    fn a_custom_runtimes_code_is_where_its_image_looks() {
        let custom = adapted(&pod(PROVIDED, json!(["handler"]), &[CUSTOM_RUNTIME]));
        assert_eq!(mount_paths(&custom), ["/var/task", "/opt", "/tmp", "/var/runtime"]);
        for (image, args) in [(PYTHON, json!(["handler"])), (PROVIDED, json!([])), ("x/provided-by-us:1", json!(["h"]))]
        {
            let other = pod(image, args, &[CUSTOM_RUNTIME]);
            assert_eq!(adapted(&other), other, "{image}");
        }
    }
}
