//! What only a real engine can answer.

use std::path::Path;
use std::sync::Arc;

use bollard::query_parameters::{KillContainerOptions, RemoveContainerOptionsBuilder};
use lambdalet::runtime::docker::{DockerOptions, DockerRuntime, NoCable};
use lambdalet::runtime::types::{
    ContainerConfig, ContainerId, ContainerState, ImageId, LogOptions, Profile, RegistryAuth, Resources, SandboxState,
    Security,
};
use lambdalet::runtime::{ImageStore, Kind};

use crate::bench::{Bench, text};
use crate::registry::Registry;

async fn output(bench: &Bench, config: ContainerConfig) -> String {
    let sandbox = bench.sandbox("p").await;
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    bench.exited(&id).await;
    String::from_utf8(text(&bench.log(&id, LogOptions::default()).await)).unwrap()
}

pub(crate) async fn a_sandbox_whose_holder_was_killed_is_not_ready_and_is_replaced(bench: &Bench) {
    let id = bench.sandbox("p").await;
    let docker = bench.docker.as_ref().unwrap();
    docker.kill_container(id.as_str(), None::<KillContainerOptions>).await.unwrap();
    let mut tries = 0;
    while bench.runtime.pod_sandbox_status(&id).await.unwrap().state == SandboxState::Ready {
        tries += 1;
        assert!(tries < 100);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_ne!(bench.sandbox("p").await, id);
}

pub(crate) async fn the_image_of_the_holders_is_pinned_and_no_other(bench: &Bench) {
    bench.sandbox("p").await;
    let images = bench.runtime.list_images().await.unwrap();
    let pinned: Vec<_> = images.iter().filter(|image| image.pinned).collect();
    assert!(matches!(&pinned[..], [image] if image.tags[0].starts_with("lambdalet.dev/pause:")), "{pinned:?}");
}

pub(crate) async fn a_sandbox_without_its_holder_can_still_be_removed(bench: &Bench) {
    let container = bench.started("c", bench.stubborn()).await;
    let id = bench.sandbox("p").await;
    let options = RemoveContainerOptionsBuilder::new().force(true).build();
    bench.docker.as_ref().unwrap().remove_container(id.as_str(), Some(options)).await.unwrap();
    assert_eq!(bench.runtime.container_status(&container).await.unwrap().state, ContainerState::Running);
    bench.runtime.remove_pod_sandbox(&id).await.unwrap();
    assert!(bench.runtime.list_containers(None).await.unwrap().is_empty());
}

pub(crate) async fn members_share_the_sandboxs_host_name_and_network(bench: &Bench) {
    let namespaces = "hostname; echo $HOSTNAME; ls -l /proc/self/ns/net /proc/self/ns/ipc | cut -d'>' -f2";
    let namespaces = namespaces.replace("cut", "busybox cut");
    let one = output(bench, bench.container_config("p", "one", bench.script(&namespaces))).await;
    let other = output(bench, bench.container_config("p", "other", bench.script(&namespaces))).await;
    assert!(one.starts_with("host-p\nhost-p\n"), "{one}");
    assert_eq!(one, other);
    let host = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert!(!one.contains(host.to_str().unwrap()));
}

pub(crate) async fn a_container_sees_the_processes_of_its_target(bench: &Bench) {
    let target = bench.started("target", bench.says("", "exec busybox sleep 1234567")).await;
    let script = "busybox ps -o pid,args; ls -l /proc/1/ns/net /proc/self/ns/net | busybox cut -d'>' -f2";
    let alone = output(bench, bench.container_config("p", "alone", bench.script(script))).await;
    assert!(!alone.contains("sleep 1234567"), "{alone}");
    let config = bench.container_config("p", "debugger", bench.script(script));
    let seen = output(bench, ContainerConfig { pid_target: Some(target), ..config }).await;
    assert!(seen.lines().any(|line| line.trim() == "1 busybox sleep 1234567"), "{seen}");
    let networks: Vec<_> = seen.lines().filter(|line| line.contains("net:[")).collect();
    assert!(networks.len() == 2 && networks[0] == networks[1], "{seen}");
}

pub(crate) async fn the_pods_cgroup_has_its_limits_and_goes_with_the_sandbox(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let limits = Resources {
        cpu_shares: Some(64),
        cpu_quota: Some(50_000),
        cpu_period: Some(100_000),
        memory_limit: Some(64 << 20),
        oom_score_adj: Some(-500),
        pids_limit: Some(99),
    };
    let config = ContainerConfig { resources: limits, ..bench.container_config("p", "c", bench.idles()) };
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        bench.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
        return;
    }
    let pod = |tree: &str| format!("/sys/fs/cgroup/{tree}/{}/pod-p", bench.owner);
    let read = |path: String| std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    assert_eq!(read(format!("{}/cpu.shares", pod("cpu"))).trim(), "128");
    assert_eq!(read(format!("{}/memory.limit_in_bytes", pod("memory"))).trim(), (256 << 20).to_string());
    assert_eq!(read(format!("{}/{id}/cpu.cfs_quota_us", pod("cpu"))).trim(), "50000");
    assert_eq!(read(format!("{}/{id}/memory.limit_in_bytes", pod("memory"))).trim(), (64 << 20).to_string());
    assert_eq!(read(format!("{}/{id}/pids.max", pod("pids"))).trim(), "99");
    bench.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    for tree in std::fs::read_dir("/sys/fs/cgroup").unwrap() {
        let left = tree.unwrap().path().join(&bench.owner).join("pod-p");
        assert!(!left.exists(), "{}", left.display());
    }
}

pub(crate) async fn rights_reach_the_process(bench: &Bench) {
    let security = Security {
        run_as_user: Some(1234),
        run_as_group: Some(5678),
        supplemental_groups: vec![42],
        drop_capabilities: vec!["ALL".into()],
        add_capabilities: vec!["CAP_NET_BIND_SERVICE".into()],
        read_only_rootfs: true,
        no_new_privileges: true,
        seccomp: Profile::Unconfined,
        ..Security::default()
    };
    let script = "exec 2>&1; id -u; id -g; id -G; busybox grep -E 'CapBnd|NoNewPrivs|Seccomp:' /proc/self/status; \
                  busybox touch /x || echo read-only";
    let config = ContainerConfig { security, ..bench.container_config("p", "c", bench.script(script)) };
    let seen = output(bench, config).await;
    assert!(seen.starts_with("1234\n5678\n5678 42\n"), "{seen}");
    for line in ["CapBnd:\t0000000000000400", "NoNewPrivs:\t1", "Seccomp:\t0", "read-only"] {
        assert!(seen.contains(line), "{line} is not in\n{seen}");
    }
    let group = Security { run_as_group: Some(9), unmasked_proc: true, ..Security::default() };
    let config = ContainerConfig { security: group, ..bench.container_config("p", "g", bench.script("id -u; id -g")) };
    assert_eq!(output(bench, config).await, "0\n9\n");
    let wrong = Security { add_capabilities: vec!["NO_SUCH".into()], ..Security::default() };
    let config = ContainerConfig { security: wrong, ..bench.container_config("p", "w", bench.idles()) };
    let sandbox = bench.sandbox("p").await;
    let error = bench.runtime.create_container(&sandbox, &config).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
}

pub(crate) async fn mounts_are_as_asked(bench: &Bench) {
    let mut mount = bench.file("mounted", b"content");
    let script = "exec 2>&1; cat /data; echo more >> /data || echo read-only";
    let config =
        ContainerConfig { mounts: vec![mount.clone()], ..bench.container_config("p", "ro", bench.script(script)) };
    let seen = output(bench, config).await;
    assert!(seen.starts_with("content") && seen.contains("read-only"), "{seen}");
    mount.read_only = false;
    let host_path = mount.host_path.clone();
    let config =
        ContainerConfig { mounts: vec![mount.clone()], ..bench.container_config("p", "rw", bench.script(script)) };
    output(bench, config).await;
    assert_eq!(std::fs::read_to_string(host_path).unwrap(), "contentmore\n");
    mount.host_path = "/no/such/path".into();
    let config = ContainerConfig { mounts: vec![mount], ..bench.container_config("p", "none", bench.script("true")) };
    let sandbox = bench.sandbox("p").await;
    let error = bench.runtime.create_container(&sandbox, &config).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");
}

pub(crate) async fn the_last_value_of_a_variable_wins(bench: &Bench) {
    let env = [("A", "first"), ("B", "x=y"), ("A", "last")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    let config = ContainerConfig {
        env: env.to_vec(),
        working_dir: Some("/bin".into()),
        ..bench.container_config("p", "c", bench.script("echo $A $B $PWD"))
    };
    assert_eq!(output(bench, config).await, "last x=y /bin\n");
}

pub(crate) async fn too_much_memory_is_told_as_such(bench: &Bench) {
    let sandbox = bench.sandbox("p").await;
    let config = ContainerConfig {
        resources: Resources { memory_limit: Some(16 << 20), ..Resources::default() },
        ..bench.container_config("p", "c", vec!["/bin/tail".into(), "/dev/zero".into()])
    };
    let id = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    let status = bench.exited(&id).await;
    assert_eq!((status.exit_code, status.oom_killed), (137, true));
}

pub(crate) async fn a_terminals_log_reads_as_lines(bench: &Bench) {
    let long = "x".repeat(20_000);
    let mount = bench.file("tty", format!("{long}\nshort\n").as_bytes());
    let config = ContainerConfig {
        tty: true,
        mounts: vec![mount],
        ..bench.container_config("p", "c", bench.script("cat /data; echo end"))
    };
    let sandbox = bench.sandbox("p").await;
    let id: ContainerId = bench.runtime.create_container(&sandbox, &config).await.unwrap();
    bench.runtime.start_container(&id).await.unwrap();
    bench.exited(&id).await;
    let seen = text(&bench.log(&id, LogOptions::default()).await);
    assert_eq!(String::from_utf8(seen).unwrap(), format!("{long}\r\nshort\r\nend\r\n"));
    let tail = LogOptions { tail: Some(2), ..LogOptions::default() };
    assert_eq!(text(&bench.log(&id, tail).await), b"short\r\nend\r\n");
}

pub(crate) async fn a_driver_that_starts_anew_finds_everything(bench: &Bench) {
    let container = bench.started("c", bench.idles()).await;
    let sandbox = bench.sandbox("p").await;
    let before = bench.runtime.container_status(&container).await.unwrap();
    let anew = bench.again().await;
    let sandboxes = anew.list_pod_sandboxes(None).await.unwrap();
    assert_eq!((sandboxes.len(), &sandboxes[0].id, sandboxes[0].state), (1, &sandbox, SandboxState::Ready));
    let containers = anew.list_containers(Some("uid-p")).await.unwrap();
    assert_eq!((containers.len(), &containers[0].id), (1, &container));
    assert_eq!((containers[0].pid, containers[0].started_at), (before.pid, before.started_at));
    assert_eq!(anew.run_pod_sandbox(&bench.sandbox_config("p")).await.unwrap(), sandbox);
}

pub(crate) async fn a_daemon_that_is_not_there_is_unavailable(_bench: &Bench) {
    let options = DockerOptions { socket: "/no/such/socket".into(), ..DockerOptions::new("nobody") };
    let error = DockerRuntime::connect(options, Arc::new(NoCable)).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains("/no/such/socket"));
}

pub(crate) async fn a_pull_from_nowhere_is_unavailable(bench: &Bench) {
    let error = bench.runtime.pull_image("127.0.0.1:1/nothing:1", &[]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
}

/// A driver of the same owner that speaks plain HTTP to `host`.
async fn trusting(bench: &Bench, host: &str) -> DockerRuntime {
    // As main does; another case may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let options = DockerOptions { insecure_registries: vec![host.to_owned()], ..DockerOptions::new(&bench.owner) };
    DockerRuntime::connect(options, Arc::new(NoCable)).await.unwrap()
}

pub(crate) async fn a_plain_registry_is_pulled_from_if_the_operator_listed_it(bench: &Bench) {
    let registry = Registry::start(&bench.owner, None).await;
    let runtime = trusting(bench, &registry.host).await;
    let reference = format!("{}/team/app:1", registry.host);
    assert_eq!(runtime.image_status(&reference).await.unwrap(), None);
    let id = runtime.pull_image(&reference, &[]).await.unwrap();
    assert_eq!(id.as_str(), registry.image_id);
    let image = runtime.image_status(&reference).await.unwrap().unwrap();
    assert_eq!((&image.id, image.user.as_str(), image.tags), (&id, "1000", vec![reference]));
    let absent = runtime.pull_image(&format!("{}/team/app:2", registry.host), &[]).await.unwrap_err();
    assert_eq!(absent.kind(), Kind::NotFound, "{absent:?}");
    let elsewhere = runtime.pull_image(&format!("{}/other/app:1", registry.host), &[]).await.unwrap_err();
    assert_eq!(elsewhere.kind(), Kind::NotFound, "{elsewhere:?}");
    runtime.remove_image(&id).await.unwrap();
}

pub(crate) async fn the_right_credentials_are_found_among_several(bench: &Bench) {
    let registry = Registry::start(&bench.owner, Some(("ann", "a~b?c>d\u{e9}"))).await;
    let auth = |name: &str, password: &str| RegistryAuth { username: name.into(), password: password.into() };
    let (wrong, right) = (auth("bob", "b"), auth("ann", "a~b?c>d\u{e9}"));
    let reference = format!("{}/team/app:1", registry.host);
    // The daemon itself takes 127.0.0.1 for a registry in plain HTTP, so both ways can be tried.
    let ours: Arc<dyn ImageStore> = Arc::new(trusting(bench, &registry.host).await);
    let daemon: Arc<dyn ImageStore> = Arc::new(trusting(bench, "elsewhere:1").await);
    for runtime in [ours, daemon] {
        for auths in [&[][..], std::slice::from_ref(&wrong)] {
            let refused = runtime.pull_image(&reference, auths).await.unwrap_err();
            assert_eq!(refused.kind(), Kind::Unauthorized, "{refused:?}");
        }
        let id = runtime.pull_image(&reference, &[wrong.clone(), right.clone()]).await.unwrap();
        assert_eq!(id.as_str(), registry.image_id);
        runtime.remove_image(&id).await.unwrap();
    }
}

pub(crate) async fn an_image_can_be_pulled_by_its_digest(bench: &Bench) {
    let registry = Registry::start(&bench.owner, None).await;
    let reference = format!("{}/team/app:1@{}", registry.host, registry.manifest_digest);
    for trusted in [registry.host.as_str(), "elsewhere:1"] {
        let runtime = trusting(bench, trusted).await;
        let id: ImageId = runtime.pull_image(&reference, &[]).await.unwrap();
        assert_eq!(id.as_str(), registry.image_id);
        assert_eq!(runtime.image_status(&reference).await.unwrap().map(|image| image.id), Some(id.clone()));
        runtime.remove_image(&id).await.unwrap();
        assert_eq!(runtime.image_status(&reference).await.unwrap(), None);
    }
}
