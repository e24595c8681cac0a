//! Real containers that print what they find. What the runtime in memory runs finds nothing.

use lambdalet_proto::cri::v1;

use crate::support::World;

/// A client of a server whose containers are real; `None`, and a word on it, where they are not.
pub(super) async fn real() -> Option<World> {
    let world = World::new().await;
    if world.is_in_memory() {
        println!("skipped: what the runtime in memory runs is not real");
        return None;
    }
    Some(world)
}

/// A container of this script.
pub(super) fn shell(world: &World, name: &str, script: &str) -> v1::ContainerConfig {
    let command = ["sh", "-c", script].map(str::to_owned).to_vec();
    v1::ContainerConfig { command, ..world.container(name, "exit 0") }
}

/// The container with these rights.
pub(super) fn with(config: v1::ContainerConfig, rights: v1::LinuxContainerSecurityContext) -> v1::ContainerConfig {
    let linux = v1::LinuxContainerConfig { security_context: Some(rights), ..config.linux.unwrap_or_default() };
    v1::ContainerConfig { linux: Some(linux), ..config }
}

/// The container in these namespaces.
pub(super) fn within(config: v1::ContainerConfig, namespaces: v1::NamespaceOption) -> v1::ContainerConfig {
    let rights = v1::LinuxContainerSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
    with(config, rights)
}

/// Makes and starts it in a sandbox that is there, with the config of that as a kubelet repeats it.
pub(super) async fn starts(
    world: &mut World,
    (sandbox, of_sandbox): (&str, &v1::PodSandboxConfig),
    config: v1::ContainerConfig,
) -> String {
    let id = world.create_in(sandbox, of_sandbox.clone(), config).await.unwrap();
    world.start(&id).await.unwrap();
    id
}

/// Runs it to its end in a sandbox that is there: the lines that it printed, those of its standard error with a mark.
pub(super) async fn finds(
    world: &mut World,
    sandbox: (&str, &v1::PodSandboxConfig),
    config: v1::ContainerConfig,
) -> Vec<String> {
    let id = starts(world, sandbox, config).await;
    let log = world.ended(&id).await.log_path;
    let text = std::fs::read_to_string(log).unwrap();
    let mut lines = vec![String::new()];
    for line in text.lines() {
        let (_, line) = line.split_once(' ').unwrap();
        let (piece, is_whole) = match line.strip_prefix("stdout P ") {
            Some(piece) => (piece, false),
            None => (line.strip_prefix("stdout F ").unwrap_or(line), true),
        };
        lines.last_mut().expect("there is always one").push_str(piece);
        if is_whole {
            lines.push(String::new());
        }
    }
    if lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines
}

/// Runs it to its end in a sandbox of its own: the lines that it printed.
pub(super) async fn prints(
    world: &mut World,
    sandbox: v1::PodSandboxConfig,
    config: v1::ContainerConfig,
) -> Vec<String> {
    let id = world.run(sandbox.clone()).await.unwrap();
    finds(world, (&id, &sandbox), config).await
}
