//! Labels as users write them, well and badly.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::function::settings::{DEFAULT_ENVIRONMENTS_HTTP, DEFAULT_ENVIRONMENTS_RIE};

fn pod(labels: Value, annotations: Value, container: Value) -> Pod {
    let mut container = container;
    container["name"] = json!("main");
    let metadata = json!({ "labels": labels, "annotations": annotations });
    serde_json::from_value(json!({ "metadata": metadata, "spec": { "containers": [container] } })).unwrap()
}

fn labelled(labels: Value) -> Pod {
    pod(labels, json!({}), json!({ "image": "x" }))
}

fn annotated(annotations: Value) -> Pod {
    pod(json!({ "com.openfaas.scale.min": "0" }), annotations, json!({ "image": "x" }))
}

fn reading(pod: &Pod) -> Reading {
    read(pod, Some(&ImageConfig::default())).unwrap()
}

fn complaints(reading: &Reading) -> Vec<(&str, &str, &str)> {
    reading.complaints.iter().map(|c| (c.label.as_str(), c.value.as_str(), c.used.as_str())).collect()
}

#[test]
fn a_replica_of_microvms_is_one_unless_it_is_told() {
    let environments = |pod: &Pod| {
        let mut settings = Settings::of(Protocol::Rie);
        settings.environments = read(pod, None).unwrap().settings.environments;
        settle_in_guests(pod, &mut settings);
        settings.environments
    };
    assert_eq!(environments(&annotated(json!({ PROTOCOL: "rie" }))), 1);
    assert_eq!(environments(&annotated(json!({ PROTOCOL: "rie", ENVIRONMENTS: "2" }))), 2);
    assert_eq!(environments(&labelled(json!({ ENVIRONMENTS: "3" }))), 3);
}

#[test]
fn any_scale_label_or_annotation_makes_a_function_and_nothing_else_does() {
    for key in ["com.openfaas.scale.min", "com.openfaas.scale.max", "execenvironment.count"] {
        assert!(is_function(&labelled(json!({ key: "1" }))), "{key}");
        assert!(is_function(&pod(json!({}), json!({ key: "1" }), json!({}))), "{key}");
    }
    for labels in [json!({}), json!({ "com.openfaas.cpu": "1", "com.openfaas.memory": "64" })] {
        assert_eq!(read(&labelled(labels), None), None);
    }
    let fakecloud = labelled(json!({ "fakecloud-service": "lambda" }));
    assert_eq!(read(&fakecloud, None), None);
    assert_eq!(read(&Pod::default(), None), None);
}

#[test]
fn what_is_not_said_has_the_documented_default() {
    let plain = reading(&labelled(json!({ "com.openfaas.scale.min": "0" })));
    assert_eq!(plain, Reading { settings: Settings::of(Protocol::Http), complaints: Vec::new() });
    let s = plain.settings;
    assert_eq!((s.min, s.max, s.environments, s.calls, s.port), (0, 20, 1, 1, 8080));
    assert_eq!((s.queue_length, s.queue_timeout.as_secs(), s.idle_timeout.as_secs()), (1000, 30, 300));
    assert_eq!((s.freeze_after, s.warm_up), (None, false));
    assert_eq!(s.size, Size { cpu_millis: 1000, memory_bytes: 512 << 20 });
    let rie = read(&labelled(json!({ "com.openfaas.scale.min": "0" })), None).unwrap();
    assert_eq!(rie.settings, Settings::of(Protocol::Rie));
    assert_eq!(rie.settings.environments, 5);
}

#[test]
fn good_values_are_taken_from_labels_and_annotations_and_a_label_wins() {
    let labels = json!({ "com.openfaas.scale.min": "2", "com.openfaas.scale.max": "3" });
    let annotations = json!({
        "com.openfaas.scale.max": "9", "execenvironment.count": "4", "com.openfaas.cpu": "2", "com.openfaas.memory": "128",
        "lambdalet.dev/invocation-port": "9000", "lambdalet.dev/requests-per-environment": "8",
        "lambdalet.dev/idle-timeout": "1m30s", "lambdalet.dev/freeze-after": "50ms", "lambdalet.dev/queue-length": "7",
        "lambdalet.dev/queue-timeout": "2s", "lambdalet.dev/listen-timeout": "1m", "lambdalet.dev/warm-up": "true", "lambdalet.dev/protocol": "http",
        "lambdalet.dev/reserve": "3",
    });
    let reading = read(&pod(labels, annotations, json!({})), None).unwrap();
    assert_eq!(reading.complaints, []);
    let expected = Settings {
        protocol: Protocol::Http,
        min: 2,
        max: 3,
        environments: 4,
        calls: 8,
        port: 9000,
        idle_timeout: Duration::from_secs(90),
        freeze_after: Some(Duration::from_millis(50)),
        queue_length: 7,
        queue_timeout: Duration::from_secs(2),
        listen_timeout: Duration::from_secs(60),
        warm_up: true,
        reserve: 3,
        size: Size { cpu_millis: 2000, memory_bytes: 128 << 20 },
    };
    assert_eq!(reading.settings, expected);
    let never = read(&annotated(json!({ "lambdalet.dev/freeze-after": "never" })), None).unwrap();
    assert_eq!((never.settings.freeze_after, never.complaints), (None, Vec::new()));
}

#[test]
fn each_bad_value_takes_the_default_and_says_so() {
    for (key, value, used) in [
        ("com.openfaas.scale.min", "-1", "0"),
        ("com.openfaas.scale.min", "many", "0"),
        ("com.openfaas.scale.max", "0", "20"),
        ("com.openfaas.scale.max", "1.5", "20"),
        ("execenvironment.count", "0", "1"),
        ("com.openfaas.cpu", "500m", "1"),
        ("com.openfaas.memory", "512Mi", "512"),
        ("lambdalet.dev/protocol", "grpc", "http"),
        ("lambdalet.dev/invocation-port", "0", "8080"),
        ("lambdalet.dev/invocation-port", "65536", "8080"),
        ("lambdalet.dev/requests-per-environment", "0", "1"),
        ("lambdalet.dev/idle-timeout", "30", "5m0s"),
        ("lambdalet.dev/idle-timeout", "999ms", "5m0s"),
        ("lambdalet.dev/freeze-after", "1ms", "never"),
        ("lambdalet.dev/freeze-after", "soon", "never"),
        ("lambdalet.dev/queue-length", "0", "1000"),
        ("lambdalet.dev/queue-length", "10001", "1000"),
        ("lambdalet.dev/queue-timeout", "1h", "30s"),
        ("lambdalet.dev/listen-timeout", "1ms", "30s"),
        ("lambdalet.dev/warm-up", "yes", "false"),
    ] {
        let bad = reading(&annotated(json!({ "execenvironment.count": "1", key: value })));
        let bad = if key == MIN { reading(&labelled(json!({ key: value }))) } else { bad };
        assert_eq!(complaints(&bad), [(key, value, used)]);
        assert_eq!(bad.settings, Settings::of(Protocol::Http), "{key}={value}");
    }
    let complaint = &reading(&labelled(json!({ "com.openfaas.scale.max": "0" }))).complaints[0];
    assert_eq!(complaint.to_string(), "com.openfaas.scale.max is \"0\", not a whole number >= 1; using 20");
}

#[test]
fn a_maximum_below_the_minimum_is_raised_and_said() {
    let low = reading(&labelled(json!({ "com.openfaas.scale.min": "5", "com.openfaas.scale.max": "2" })));
    assert_eq!((low.settings.min, low.settings.max), (5, 5));
    assert_eq!(complaints(&low), [("com.openfaas.scale.max", "2", "5")]);
    // Nothing was written wrong here.
    let unset = reading(&labelled(json!({ "com.openfaas.scale.min": "30" })));
    assert_eq!((unset.settings.max, unset.complaints), (30, Vec::new()));
}

#[test]
fn the_default_number_of_environments_follows_the_protocol() {
    for (name, count) in [("rie", DEFAULT_ENVIRONMENTS_RIE), ("http", DEFAULT_ENVIRONMENTS_HTTP)] {
        let pod = annotated(json!({ "lambdalet.dev/protocol": name }));
        assert_eq!(reading(&pod).settings.environments, count);
    }
}

#[test]
fn rie_takes_one_call_unless_its_own_variable_says_more() {
    let rie = |env: Value, image: &ImageConfig| {
        let labels = json!({ "com.openfaas.scale.min": "0" });
        let pod = pod(labels, json!({ "lambdalet.dev/protocol": "rie" }), json!({ "env": env }));
        read(&pod, Some(image)).unwrap()
    };
    let plain = ImageConfig::default();
    let variable = |value: &str| json!([{ "name": "AWS_LAMBDA_MAX_CONCURRENCY", "value": value }]);
    assert_eq!(rie(json!([]), &plain).settings.calls, 1);
    assert_eq!(rie(variable("16"), &plain).settings.calls, 16);
    for bad in ["0", "lots", ""] {
        let reading = rie(variable(bad), &plain);
        assert_eq!(reading.settings.calls, 1);
        assert_eq!(complaints(&reading), [("AWS_LAMBDA_MAX_CONCURRENCY", bad, "1")]);
    }
    let mut image = plain.clone();
    image.environment.insert(MAX_CONCURRENCY.to_owned(), "4".to_owned());
    assert_eq!(rie(json!([]), &image).settings.calls, 4);
    assert_eq!(rie(variable("2"), &image).settings.calls, 2);

    let annotations = json!({ "lambdalet.dev/protocol": "rie", "lambdalet.dev/requests-per-environment": "8" });
    let crashing = reading(&annotated(annotations));
    assert_eq!(crashing.settings.calls, 1);
    assert_eq!(complaints(&crashing), [("lambdalet.dev/requests-per-environment", "8", "1")]);
}

#[test]
fn a_plain_server_listens_where_it_declares() {
    let ports = json!([{ "containerPort": 53, "protocol": "UDP" }, { "containerPort": 3000 }, { "containerPort": 1 }]);
    let server = pod(json!({ "execenvironment.count": "1" }), json!({}), json!({ "ports": ports }));
    assert_eq!(reading(&server).settings.port, 3000);
    assert_eq!(read(&server, None).unwrap().settings.port, 8080, "RIE insists on 8080");
}

#[test]
fn limits_of_the_pod_go_before_labels() {
    let sized = |containers: Value| {
        let labels = json!({ "com.openfaas.cpu": "3", "com.openfaas.memory": "64", "execenvironment.count": "1" });
        let pod = json!({ "metadata": { "labels": labels }, "spec": { "containers": containers } });
        reading(&serde_json::from_value(pod).unwrap()).settings.size
    };
    let limits =
        |cpu: &str, memory: &str| json!({ "name": "c", "resources": { "limits": { "cpu": cpu, "memory": memory } } });
    let both = sized(json!([limits("250m", "100Mi"), limits("1", "28Mi")]));
    assert_eq!(both, Size { cpu_millis: 1250, memory_bytes: 128 << 20 });
    // A container without a limit may use anything, so the Pod has none.
    let one = sized(json!([limits("250m", "100Mi"), { "name": "d", "resources": { "limits": { "cpu": "1" } } }]));
    assert_eq!(one, Size { cpu_millis: 1250, memory_bytes: 64 << 20 });
    assert_eq!(sized(json!([{ "name": "c" }])), Size { cpu_millis: 3000, memory_bytes: 64 << 20 });
}

#[test]
fn the_annotated_container_is_the_function() {
    let mut pod = labelled(json!({ "execenvironment.count": "1" }));
    let containers = json!([{ "name": "proxy" }, { "name": "app", "command": ["server"] }]);
    pod.spec.as_mut().unwrap().containers = serde_json::from_value(containers).unwrap();
    assert_eq!(container(&pod).unwrap().name, "proxy");
    let named = |name: &str| [(DEFAULT_CONTAINER.to_owned(), name.to_owned())].into();
    pod.metadata.annotations = Some(named("app"));
    assert_eq!(container(&pod).unwrap().name, "app");
    assert_eq!(read(&pod, None).unwrap().settings.protocol, Protocol::Http);
    pod.metadata.annotations = Some(named("gone"));
    assert_eq!(container(&pod).unwrap().name, "proxy");
}

proptest! {
    #[test]
    fn whatever_is_written_the_settings_are_sound(
        values in prop::collection::btree_map(
            prop::sample::select(vec![
                MIN, MAX, ENVIRONMENTS, CPU, MEMORY, PROTOCOL, PORT, REQUESTS, IDLE_TIMEOUT, FREEZE_AFTER, QUEUE_LENGTH,
                QUEUE_TIMEOUT, WARM_UP,
            ]),
            prop_oneof!["-?[0-9]{1,12}", "[0-9]{1,5}(ms|s|m|h)", ".{0,80}", "rie|http|true|never"],
            0..13,
        ),
        concurrency in prop::option::of("-?[0-9]{0,12}"),
    ) {
        let env: Vec<_> = concurrency.iter().map(|v| json!({ "name": MAX_CONCURRENCY, "value": v })).collect();
        let pod = pod(json!({ "execenvironment.count": "2" }), json!(values), json!({ "env": env }));
        let Reading { settings: s, complaints } = read(&pod, None).unwrap();
        prop_assert!(s.max >= s.min && s.max > 0 && s.environments > 0 && s.calls > 0 && s.port > 0);
        prop_assert!((1..=10_000).contains(&s.queue_length));
        prop_assert!(s.queue_timeout >= Duration::from_millis(100) && s.queue_timeout <= Duration::from_secs(900));
        prop_assert!(s.idle_timeout >= Duration::from_secs(1) && s.idle_timeout <= Duration::from_secs(86_400));
        prop_assert!(s.freeze_after.is_none_or(|after| after >= Duration::from_millis(10)));
        prop_assert!(s.size.cpu_millis > 0 && s.size.memory_bytes > 0);
        if s.protocol == Protocol::Rie && concurrency.is_none() {
            prop_assert_eq!(s.calls, 1, "a second call crashes RIE");
        }
        for complaint in complaints {
            prop_assert!(complaint.to_string().len() < 1024, "an event takes no longer note");
        }
    }
}
