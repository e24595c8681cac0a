//! What becomes of requests.

use super::*;

fn sandbox_config() -> v1::PodSandboxConfig {
    let metadata = v1::PodSandboxMetadata { name: "web".into(), uid: "u/1".into(), namespace: "n".into(), attempt: 1 };
    v1::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }
}

fn place<'a>(address: Option<&str>) -> Place<'a> {
    let address = address.map(|text| text.parse().unwrap());
    Place { handler: None, address, cgroup_root: ("root", CgroupDriver::Cgroupfs), hostname: "host", selinux: true }
}

fn container_config() -> v1::ContainerConfig {
    let metadata = Some(v1::ContainerMetadata { name: "main".into(), attempt: 0 });
    let image =
        Some(v1::ImageSpec { image: "sha256:1".into(), user_specified_image: "app:1".into(), ..Default::default() });
    v1::ContainerConfig { metadata, image, ..Default::default() }
}

fn around() -> Surroundings {
    Surroundings {
        pod: PodRef { uid: "u".into(), namespace: "n".into(), name: "web".into() },
        cgroup_parent: "/c".into(),
        image: "sha256:1".into(),
        image_user: "www-data:33".into(),
        files: vec![("/host/hosts".into(), "/etc/hosts"), ("/host/resolv.conf".into(), "/etc/resolv.conf")],
        selinux: true,
    }
}

fn with_context(context: v1::LinuxContainerSecurityContext) -> v1::ContainerConfig {
    let linux = v1::LinuxContainerConfig { resources: None, security_context: Some(context) };
    v1::ContainerConfig { linux: Some(linux), ..container_config() }
}

fn refusal(config: &v1::ContainerConfig) -> Code {
    container(config, around()).expect_err("it is refused").code()
}

#[test]
fn a_sandbox_without_a_name_of_its_own_gets_the_pods_or_the_hosts() {
    let made = sandbox(&sandbox_config(), place(Some("10.0.0.2"))).unwrap();
    assert_eq!((made.hostname.as_str(), made.attempt), ("web", 1));
    assert_eq!(made.network, SandboxNetwork::Pod { address: "10.0.0.2".parse().unwrap() });
    let made = sandbox(&sandbox_config(), place(None)).unwrap();
    assert_eq!((made.hostname.as_str(), made.network), ("host", SandboxNetwork::Host));
    let long = v1::PodSandboxConfig { hostname: format!("{}-x", "a".repeat(62)), ..sandbox_config() };
    assert_eq!(sandbox(&long, place(None)).unwrap().hostname, "a".repeat(62));
}

#[test]
fn a_sandbox_is_held_to_its_containers_and_its_overhead() {
    let limits = |cpu_quota, cpu_period, memory_limit_in_bytes| v1::LinuxContainerResources {
        cpu_quota,
        cpu_period,
        memory_limit_in_bytes,
        ..Default::default()
    };
    let held = |containers: &v1::LinuxContainerResources, overhead: Option<&v1::LinuxContainerResources>| {
        let made = whole(Some(containers), overhead).unwrap();
        (made.cpu_quota, made.cpu_period, made.memory_limit)
    };
    let containers = limits(50_000, 100_000, 64 << 20);
    assert_eq!(held(&containers, None), (Some(50_000), Some(100_000), Some(64 << 20)));
    let overhead = limits(5_000, 50_000, 16 << 20);
    assert_eq!(held(&containers, Some(&overhead)), (Some(60_000), Some(100_000), Some(80 << 20)));
    // What has no limit has none with an overhead either.
    assert_eq!(held(&limits(0, 0, 0), Some(&overhead)), (None, None, None));
    assert_eq!(held(&limits(-1, 100_000, i64::MAX), Some(&overhead)), (Some(-1), Some(100_000), Some(i64::MAX)));
}

#[test]
fn a_cgroup_is_the_clients_or_one_that_cannot_leave_ours() {
    let with = |parent: &str| {
        let linux = v1::LinuxPodSandboxConfig { cgroup_parent: parent.into(), ..Default::default() };
        sandbox(&v1::PodSandboxConfig { linux: Some(linux), ..sandbox_config() }, place(None))
    };
    assert_eq!(with("/kubepods/podx").unwrap().cgroup_parent, "/kubepods/podx");
    assert_eq!(with("").unwrap().cgroup_parent, "/root/podu_1");
    assert_eq!(with("kubepods-podx.slice").unwrap_err().code(), Code::InvalidArgument);
}

#[test]
fn a_slice_is_a_path_for_an_engine_that_uses_systemd() {
    let of = |parent: &str| {
        let linux = v1::LinuxPodSandboxConfig { cgroup_parent: parent.into(), ..Default::default() };
        let config = v1::PodSandboxConfig { linux: Some(linux), ..sandbox_config() };
        cgroup(&config, "u", ("root", CgroupDriver::Systemd)).unwrap()
    };
    let whole = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx_1.slice";
    assert_eq!(of(whole), "/kubepods/burstable/podx_1");
    assert_eq!(of("kubepods-podx.slice"), "/kubepods/podx");
    assert_eq!((of("/a/b"), of("")), ("/a/b".to_owned(), "/root/podu".to_owned()));
}

#[test]
fn a_sandbox_says_whose_it_is() {
    assert_eq!(pod(&v1::PodSandboxConfig::default()).unwrap_err().code(), Code::InvalidArgument);
    for missing in 0..3 {
        let mut config = sandbox_config();
        let metadata = config.metadata.as_mut().unwrap();
        [&mut metadata.name, &mut metadata.uid, &mut metadata.namespace][missing].clear();
        assert_eq!(pod(&config).unwrap_err().code(), Code::InvalidArgument, "{missing}");
    }
}

#[test]
fn ports_without_one_of_the_host_lead_nowhere() {
    let mapping = |host_port, host_ip: &str| v1::PortMapping {
        protocol: v1::Protocol::Udp.into(),
        container_port: 80,
        host_port,
        host_ip: host_ip.into(),
    };
    let with = |mappings: Vec<v1::PortMapping>| {
        host_ports(&v1::PodSandboxConfig { port_mappings: mappings, ..sandbox_config() })
    };
    let ports = with(vec![mapping(0, ""), mapping(8080, "127.0.0.1")]).unwrap();
    assert_eq!(ports.len(), 1);
    assert_eq!((ports[0].protocol, ports[0].host_port, ports[0].pod_port), (Protocol::Udp, 8080, 80));
    assert!(with(vec![mapping(70_000, "")]).is_err() && with(vec![mapping(1, "here")]).is_err());
}

#[test]
fn a_container_sees_the_sandboxs_files_unless_it_brings_its_own() {
    let own = v1::Mount { host_path: "/mine".into(), container_path: "/etc/hosts".into(), ..Default::default() };
    let made = container(&v1::ContainerConfig { mounts: vec![own], ..container_config() }, around()).unwrap();
    let mounts: Vec<_> =
        made.mounts.iter().map(|m| (m.host_path.to_str().unwrap(), m.container_path.as_str())).collect();
    assert_eq!(mounts, [("/mine", "/etc/hosts"), ("/host/resolv.conf", "/etc/resolv.conf")]);
    assert_eq!((made.image.as_str(), made.image_ref.as_str()), ("sha256:1", "app:1"));
}

#[test]
fn what_cannot_be_done_is_refused() {
    let devices = v1::ContainerConfig { devices: vec![v1::Device::default()], ..container_config() };
    let volume =
        v1::Mount { image: Some(v1::ImageSpec { image: "i".into(), ..Default::default() }), ..Default::default() };
    let images = v1::ContainerConfig { mounts: vec![volume], ..container_config() };
    let user = with_context(v1::LinuxContainerSecurityContext { run_as_username: "root".into(), ..Default::default() });
    let groups = v1::SupplementalGroupsPolicy::Strict.into();
    let strict =
        with_context(v1::LinuxContainerSecurityContext { supplemental_groups_policy: groups, ..Default::default() });
    let limits = v1::LinuxContainerResources { cpuset_cpus: "0-1".into(), ..Default::default() };
    let linux = v1::LinuxContainerConfig { resources: Some(limits), security_context: None };
    let cpus = v1::ContainerConfig { linux: Some(linux), ..container_config() };
    let label = v1::SeLinuxOption { level: "s0:c1".into(), ..Default::default() };
    let context = |options| v1::LinuxContainerSecurityContext { selinux_options: Some(options), ..Default::default() };
    assert!(container(&with_context(context(v1::SeLinuxOption::default())), around()).is_ok(), "nothing is asked for");
    let labelled = with_context(context(label.clone()));
    let context = v1::LinuxSandboxSecurityContext { selinux_options: Some(label), ..Default::default() };
    let linux = v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    let whole = v1::PodSandboxConfig { linux: Some(linux), ..sandbox_config() };
    assert!(container(&labelled, Surroundings { selinux: false, ..around() }).is_ok(), "it means nothing there");
    assert!(sandbox(&whole, Place { selinux: false, ..place(None) }).is_ok(), "it means nothing there");
    let refused = sandbox(&whole, place(None)).unwrap_err();
    assert!(refused.code() == Code::Unimplemented && refused.message().contains("SELinux"), "{refused:?}");
    for config in [devices, images, user, strict, cpus, labelled] {
        assert_eq!(refusal(&config), Code::Unimplemented, "{config:?}");
    }
    assert_eq!(refusal(&v1::ContainerConfig { metadata: None, ..container_config() }), Code::InvalidArgument);
    let bad = v1::KeyValue { key: "K".into(), value: vec![0xff] };
    assert_eq!(refusal(&v1::ContainerConfig { envs: vec![bad], ..container_config() }), Code::InvalidArgument);
}

#[test]
fn the_images_own_user_may_be_repeated() {
    let context = v1::LinuxContainerSecurityContext { run_as_username: "www-data".into(), ..Default::default() };
    let made = container(&with_context(context), around()).unwrap();
    assert_eq!((made.security.run_as_user, made.security.run_as_group), (None, None));
}

#[test]
#[allow(deprecated)]
fn profiles_come_in_the_new_form_and_in_the_old_one() {
    use v1::security_profile::ProfileType;
    let new =
        |kind: ProfileType, name: &str| v1::SecurityProfile { profile_type: kind.into(), localhost_ref: name.into() };
    let context = |seccomp, path: &str| v1::LinuxContainerSecurityContext {
        seccomp,
        seccomp_profile_path: path.into(),
        ..Default::default()
    };
    let table = [
        (context(None, ""), Profile::RuntimeDefault),
        (context(None, "unconfined"), Profile::Unconfined),
        (context(None, "localhost//p.json"), Profile::Localhost("/p.json".into())),
        (context(Some(new(ProfileType::Unconfined, "")), "localhost/x"), Profile::Unconfined),
        (context(Some(new(ProfileType::Localhost, "/p.json")), ""), Profile::Localhost("/p.json".into())),
    ];
    for (context, wanted) in table {
        assert_eq!(seccomp(&context).unwrap(), wanted, "{context:?}");
    }
    assert!(seccomp(&context(Some(new(ProfileType::Localhost, "")), "")).is_err());
}

#[test]
fn signals_are_written_as_engines_read_them() {
    let table = [
        (v1::Signal::RuntimeDefault, None),
        (v1::Signal::Sigterm, Some("SIGTERM")),
        (v1::Signal::Sigrtmin, Some("SIGRTMIN")),
        (v1::Signal::Sigrtminplus3, Some("SIGRTMIN+3")),
        (v1::Signal::Sigrtmaxminus14, Some("SIGRTMAX-14")),
    ];
    for (signal, wanted) in table {
        assert_eq!(stop_signal(signal).as_deref(), wanted);
    }
}

#[test]
fn processes_are_shared_as_asked() {
    let with = |mode: v1::NamespaceMode| {
        let options = v1::NamespaceOption { pid: mode.into(), target_id: "t".into(), ..Default::default() };
        let context = v1::LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() };
        let made = container(&with_context(context), around()).unwrap();
        (made.pid, made.pid_target.map(|id| id.to_string()))
    };
    assert_eq!(with(v1::NamespaceMode::Pod), (NamespaceMode::Pod, None));
    assert_eq!(with(v1::NamespaceMode::Node), (NamespaceMode::Node, None));
    assert_eq!(with(v1::NamespaceMode::Target), (NamespaceMode::Container, Some("t".to_owned())));
}
