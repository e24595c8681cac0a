//! What is promised of the rights of containers.

use lambdalet_proto::cri::v1;
use lambdalet_proto::cri::v1::security_profile::ProfileType;

use super::real::{prints, real, shell, with};
use crate::support::World;

type Rights = v1::LinuxContainerSecurityContext;

/// What a container with these rights prints, once for each test: all of this name write to one log.
async fn found(world: &mut World, rights: Rights, script: &str) -> Vec<String> {
    let config = with(shell(world, "main", script), rights);
    let sandbox = world.config("a");
    prints(world, sandbox, config).await
}

/// A figure of a process's status.
fn field(name: &str) -> String {
    format!("sed -n 's/^{name}:[[:space:]]*//p' /proc/self/status")
}

fn number(value: i64) -> Option<v1::Int64Value> {
    Some(v1::Int64Value { value })
}

#[tokio::test]
async fn a_container_runs_as_the_user_and_the_groups_that_it_is_given() {
    let Some(mut world) = real().await else { return };
    let rights = Rights {
        run_as_user: number(1234),
        run_as_group: number(5678),
        supplemental_groups: vec![4321],
        ..Default::default()
    };
    let lines = found(&mut world, rights, "id -u; id -g; id -G").await;
    assert_eq!(lines[..2], ["1234", "5678"]);
    assert!(lines[2].split(' ').any(|group| group == "4321"), "{lines:?}");
}

/// The capabilities of a process that was given and denied these.
async fn capabilities(add: &[&str], drop: &[&str]) -> Option<u64> {
    let mut world = real().await?;
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let capabilities =
        v1::Capability { add_capabilities: words(add), drop_capabilities: words(drop), ..Default::default() };
    let rights = Rights { capabilities: Some(capabilities), ..Default::default() };
    let lines = found(&mut world, rights, &field("CapEff")).await;
    Some(u64::from_str_radix(&lines[0], 16).unwrap())
}

/// Bits of a set of capabilities.
const CHOWN: u64 = 1;
const NET_ADMIN: u64 = 1 << 12;
const SYS_ADMIN: u64 = 1 << 21;

#[tokio::test]
async fn capabilities_are_added_and_dropped() {
    let Some(held) = capabilities(&["NET_ADMIN"], &["CHOWN"]).await else { return };
    assert_eq!(held & (CHOWN | NET_ADMIN | SYS_ADMIN), NET_ADMIN, "{held:x}");
}

#[tokio::test]
async fn who_drops_all_capabilities_has_those_that_are_added() {
    let Some(held) = capabilities(&["NET_ADMIN"], &["ALL"]).await else { return };
    assert_eq!(held, NET_ADMIN, "{held:x}");
}

fn filter(profile_type: ProfileType, localhost_ref: &str) -> Rights {
    let profile = v1::SecurityProfile { profile_type: profile_type.into(), localhost_ref: localhost_ref.to_owned() };
    Rights { seccomp: Some(profile), ..Default::default() }
}

#[tokio::test]
async fn the_runtimes_own_filter_holds_system_calls_and_unconfined_none() {
    let Some(mut world) = real().await else { return };
    // With namespaces of users much of a kernel is open to those who are root in them.
    let script = "unshare -U true 2>/dev/null && echo made || echo refused";
    assert_eq!(found(&mut world, filter(ProfileType::RuntimeDefault, ""), script).await, ["refused"]);
    let config = with(shell(&world, "other", script), filter(ProfileType::Unconfined, ""));
    let sandbox = world.config("b");
    assert_eq!(prints(&mut world, sandbox, config).await, ["made"]);
}

#[tokio::test]
async fn a_filter_of_the_host_holds_system_calls() {
    let Some(mut world) = real().await else { return };
    let file = tempfile::NamedTempFile::new().unwrap();
    let profile = r#"{"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(file.path(), profile).unwrap();
    let rights = filter(ProfileType::Localhost, &file.path().display().to_string());
    let lines = found(&mut world, rights, "touch /file && echo made; mkdir /folder 2>/dev/null || echo refused").await;
    assert_eq!(lines, ["made", "refused"]);
}

#[tokio::test]
async fn rights_can_be_gained_unless_that_is_forbidden() {
    let Some(mut world) = real().await else { return };
    let rights = Rights { no_new_privs: true, ..Default::default() };
    assert_eq!(found(&mut world, rights, &field("NoNewPrivs")).await, ["1"]);
    let (config, sandbox) = (shell(&world, "other", &field("NoNewPrivs")), world.config("b"));
    assert_eq!(prints(&mut world, sandbox, with(config, Rights::default())).await, ["0"]);
}

#[tokio::test]
async fn a_privileged_container_may_mount_and_another_may_not() {
    let Some(mut world) = real().await else { return };
    let script = "mount -t tmpfs none /home 2>/dev/null && echo mounted || echo refused";
    let context = v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() };
    let linux = v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    let sandbox = v1::PodSandboxConfig { linux: Some(linux), ..world.config("b") };
    let free = with(shell(&world, "other", script), Rights { privileged: true, ..Default::default() });
    assert_eq!(prints(&mut world, sandbox, free).await, ["mounted"]);
    assert_eq!(found(&mut world, Rights::default(), script).await, ["refused"]);
}

#[tokio::test]
async fn a_root_file_system_is_written_to_unless_it_is_read_only() {
    let Some(mut world) = real().await else { return };
    let script = "touch /file 2>/dev/null && echo written || echo refused";
    let rights = Rights { readonly_rootfs: true, ..Default::default() };
    assert_eq!(found(&mut world, rights, script).await, ["refused"]);
    let (config, sandbox) = (shell(&world, "other", script), world.config("b"));
    assert_eq!(prints(&mut world, sandbox, config).await, ["written"]);
}

/// As a kubelet asks for it, unless a Pod wants its `/proc` whole.
#[tokio::test]
async fn what_is_the_kernels_is_masked_or_read_only() {
    let Some(mut world) = real().await else { return };
    let paths = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect();
    let rights = Rights {
        masked_paths: paths(&["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"]),
        readonly_paths: paths(&["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]),
        ..Default::default()
    };
    let script = "cat /proc/keys 2>/dev/null | wc -l; ls /sys/firmware 2>/dev/null | wc -l; \
                  (echo x >/proc/sys/kernel/hostname) 2>/dev/null && echo written || echo refused";
    assert_eq!(found(&mut world, rights, script).await, ["0", "0", "refused"]);
}
