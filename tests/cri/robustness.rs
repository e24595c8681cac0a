//! Clients that are many, gone, or at odds, and servers that end under them.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use lambdalet::runtime::SandboxRuntime as _;
use lambdalet::runtime::verb::Verb;
use lambdalet_proto::cri::v1;
use lambdalet_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::promises::streams::exec_sync;
use crate::support::{PATIENCE, World, refused};

/// Until the next look at something that no event tells.
const SOON: Duration = Duration::from_millis(5);

fn request(config: v1::PodSandboxConfig) -> v1::RunPodSandboxRequest {
    v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() }
}

/// Until the fake has been asked this once more than `before`.
async fn asked(world: &World, verb: Verb, before: u64) {
    let begun = async {
        while world.fake().calls(verb) == before {
            sleep(SOON).await;
        }
    };
    timeout(PATIENCE, begun).await.expect("it begins");
}

fn records(world: &World, kind: &str) -> usize {
    std::fs::read_dir(world.root().join("root").join(kind)).unwrap().count()
}

/// The range of addresses can only be changed while nobody has one.
async fn change_range(world: &mut World) -> Result<(), Status> {
    let network_config = Some(v1::NetworkConfig { pod_cidr: "10.99.0.0/24".into() });
    let change = v1::UpdateRuntimeConfigRequest { runtime_config: Some(v1::RuntimeConfig { network_config }) };
    world.runtime.update_runtime_config(change).await.map(drop)
}

/// Nothing is left: no sandbox, no record, no address.
async fn assert_nothing_is_left(world: &mut World) {
    assert!(world.sandboxes(v1::PodSandboxFilter::default()).await.is_empty());
    for kind in ["sandboxes", "containers"] {
        assert_eq!(records(world, kind), 0, "records of {kind}");
    }
    change_range(world).await.unwrap();
}

#[tokio::test]
async fn only_the_owner_of_the_socket_may_connect() {
    let world = World::inside().await;
    let mode = std::fs::metadata(world.root().join("cri.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_client_that_leaves_half_way_finds_a_whole_sandbox_later() {
    let mut world = World::inside().await;
    let hold = world.fake().hang_next(Verb::RunPodSandbox);
    let (mut client, config) = (world.runtime.clone(), world.config("a"));
    let call = tokio::spawn(async move { client.run_pod_sandbox(request(config)).await.map(|_| ()) });
    asked(&world, Verb::RunPodSandbox, 0).await;
    call.abort();
    assert!(call.await.is_err());
    drop(hold);
    let found = async {
        loop {
            let list = world.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().into_inner();
            if let Some(sandbox) = list.items.into_iter().next() {
                return sandbox;
            }
            sleep(SOON).await;
        }
    };
    let sandbox = timeout(PATIENCE, found).await.expect("it is there");
    assert_eq!(sandbox.labels, world.config("a").labels);
}

#[tokio::test]
async fn a_removal_that_has_begun_goes_to_its_end_without_its_client() {
    let mut world = World::inside().await;
    let id = world.sandbox("a").await;
    let hold = world.fake().hang_next(Verb::RemovePodSandbox);
    let (mut client, pod_sandbox_id) = (world.runtime.clone(), id.clone());
    let removal = v1::RemovePodSandboxRequest { pod_sandbox_id };
    let call = tokio::spawn(async move { client.remove_pod_sandbox(removal).await.map(|_| ()) });
    asked(&world, Verb::RemovePodSandbox, 0).await;
    call.abort();
    assert!(call.await.is_err());
    drop(hold);
    let gone = async {
        while world.sandbox_status(&id).await.is_ok() {
            sleep(SOON).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("it is removed");
    // Its address goes a moment later than itself.
    world.remove_sandbox(&id).await.unwrap();
    assert_nothing_is_left(&mut world).await;
}

/// All verbs of a Pod's life, one after the other.
async fn live(
    mut client: RuntimeServiceClient<Channel>,
    (config, container): (v1::PodSandboxConfig, v1::ContainerConfig),
) -> Result<(), Status> {
    let pod_sandbox_id = client.run_pod_sandbox(request(config)).await?.into_inner().pod_sandbox_id;
    let create = v1::CreateContainerRequest {
        pod_sandbox_id: pod_sandbox_id.clone(),
        config: Some(container),
        sandbox_config: None,
    };
    let container_id = client.create_container(create).await?.into_inner().container_id;
    client.start_container(v1::StartContainerRequest { container_id: container_id.clone() }).await?;
    client.stop_container(v1::StopContainerRequest { container_id: container_id.clone(), timeout: 1 }).await?;
    client.remove_container(v1::RemoveContainerRequest { container_id }).await?;
    client.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() }).await?;
    client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id }).await.map(|_| ())
}

#[tokio::test]
async fn a_client_that_leaves_at_any_stage_leaves_nothing_that_cannot_be_removed() {
    use Verb::{
        CreateContainer, RemoveContainer, RemovePodSandbox, RunPodSandbox, StartContainer, StopContainer,
        StopPodSandbox,
    };
    let stages = [
        RunPodSandbox,
        CreateContainer,
        StartContainer,
        StopContainer,
        RemoveContainer,
        StopPodSandbox,
        RemovePodSandbox,
    ];
    for stage in stages {
        let mut world = World::inside().await;
        let before = world.fake().calls(stage);
        let hold = world.fake().hang_next(stage);
        let configs = (world.config("a"), world.container("main", "sleep 60000"));
        let call = tokio::spawn(live(world.runtime.clone(), configs));
        asked(&world, stage, before).await;
        call.abort();
        assert!(call.await.is_err(), "{stage:?}");
        drop(hold);
        let removed = async {
            // What is still being made is there soon.
            loop {
                let all = world.sandboxes(v1::PodSandboxFilter::default()).await;
                for id in &all {
                    world.stop_sandbox(id).await.unwrap();
                    world.remove_sandbox(id).await.unwrap();
                }
                if all.is_empty() && world.fake().calls(RemovePodSandbox) > 0 {
                    return;
                }
                sleep(SOON).await;
            }
        };
        timeout(PATIENCE, removed).await.unwrap_or_else(|_| panic!("{stage:?}: it is removed"));
        assert_nothing_is_left(&mut world).await;
    }
}

#[tokio::test]
async fn of_two_clients_with_two_configs_one_gets_its_sandbox_whole_and_the_other_is_told() {
    let mut world = World::inside().await;
    let hold = world.fake().hang_next(Verb::RunPodSandbox);
    let run = |config: v1::PodSandboxConfig| {
        let mut client = world.runtime.clone();
        tokio::spawn(async move { client.run_pod_sandbox(request(config)).await })
    };
    let first = run(world.config("a"));
    asked(&world, Verb::RunPodSandbox, 0).await;
    let second = run(v1::PodSandboxConfig { labels: world.labels(&[("app", "other")]), ..world.config("a") });
    // So that the second is there before the first is done.
    sleep(20 * SOON).await;
    drop(hold);
    let id = timeout(PATIENCE, first).await.expect("it ends").unwrap().unwrap().into_inner().pod_sandbox_id;
    assert_eq!(refused(timeout(PATIENCE, second).await.expect("it ends").unwrap()), Code::AlreadyExists);
    assert_eq!(world.sandbox_status(&id).await.unwrap().status.unwrap().labels, world.config("a").labels);
}

#[tokio::test]
async fn clients_that_make_and_remove_the_same_sandbox_at_once_leave_nothing() {
    let mut world = World::inside().await;
    world.fake().set_start_delay(SOON);
    let fights = (0..20).map(|number| {
        let (mut client, config) = (world.runtime.clone(), world.config("a"));
        tokio::spawn(async move {
            for _ in 0..10 {
                let made = client.run_pod_sandbox(request(config.clone())).await.unwrap().into_inner();
                let pod_sandbox_id = made.pod_sandbox_id;
                if number % 2 == 0 {
                    let stop = v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
                    client.stop_pod_sandbox(stop).await.unwrap();
                }
                client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id }).await.unwrap();
            }
        })
    });
    for fight in timeout(PATIENCE, join_all(fights)).await.expect("they end") {
        fight.unwrap();
    }
    assert_nothing_is_left(&mut world).await;
}

#[tokio::test]
async fn a_restart_finds_everything_again() {
    let mut world = World::inside().await;
    let id = world.started("a", "sleep 60000").await;
    let sandbox = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    let before = (world.sandbox_status(&sandbox).await.unwrap().status, world.status(&id).await.unwrap());
    let mut world = world.restarted().await;
    let after = (world.sandbox_status(&sandbox).await.unwrap().status, world.status(&id).await.unwrap());
    assert_eq!(before, after);
    let other = world.sandbox("b").await;
    assert_ne!(world.ip(&sandbox).await, world.ip(&other).await, "an address is not given twice");
}

/// Until there are so many sandboxes; how many there are.
async fn at_least(world: &mut World, wanted: usize) -> usize {
    let there = async {
        loop {
            let count = world.sandboxes(v1::PodSandboxFilter::default()).await.len();
            if count >= wanted {
                return count;
            }
            sleep(SOON).await;
        }
    };
    timeout(PATIENCE, there).await.expect("they are made")
}

#[tokio::test]
async fn a_restart_under_load_leaves_nothing_half_made() {
    let mut world = World::inside().await;
    world.fake().set_start_delay(SOON);
    let enough = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..16)
        .map(|number| {
            let (mut client, template, enough) = (world.runtime.clone(), world.config("a"), Arc::clone(&enough));
            tokio::spawn(async move {
                for attempt in 0.. {
                    if enough.load(Ordering::SeqCst) {
                        return;
                    }
                    let uid = format!("{number}-{attempt}");
                    let metadata = template.metadata.clone().map(|known| v1::PodSandboxMetadata { uid, ..known });
                    // While there is no server it is refused.
                    let _ =
                        client.run_pod_sandbox(request(v1::PodSandboxConfig { metadata, ..template.clone() })).await;
                    sleep(SOON).await;
                }
            })
        })
        .collect();
    let count = at_least(&mut world, 50).await;
    let mut world = world.restarted().await;
    at_least(&mut world, count + 50).await;
    enough.store(true, Ordering::SeqCst);
    timeout(PATIENCE, join_all(load)).await.expect("the clients end");
    let every = world.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().into_inner().items;
    let mut addresses = std::collections::HashSet::new();
    for sandbox in &every {
        assert_eq!(sandbox.labels, world.config("a").labels, "each is as its client said");
        assert!(addresses.insert(world.ip(&sandbox.id).await), "an address is not given twice");
        world.remove_sandbox(&sandbox.id).await.unwrap();
    }
    assert_nothing_is_left(&mut world).await;
}

#[tokio::test]
async fn a_sandbox_that_went_by_itself_leaves_nothing() {
    let mut world = World::inside().await;
    world.started("a", "sleep 60000").await;
    let sandbox = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    world.fake().remove_pod_sandbox(&sandbox.as_str().into()).await.unwrap();
    let gone = async {
        while records(&world, "sandboxes") + records(&world, "containers") > 0
            || change_range(&mut world).await.is_err()
        {
            sleep(SOON).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("all goes");
    world.remove_sandbox(&sandbox).await.unwrap();
    assert_nothing_is_left(&mut world).await;
}

#[tokio::test]
async fn a_sandbox_that_went_while_nobody_was_told_leaves_nothing_once_it_is_removed() {
    let mut world = World::inside().await;
    world.started("a", "sleep 60000").await;
    let sandbox = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    // Whoever looks by itself does not come to an end.
    let _hold = world.fake().hang_next(Verb::ListContainers);
    world.fake().remove_pod_sandbox(&sandbox.as_str().into()).await.unwrap();
    world.remove_sandbox(&sandbox).await.unwrap();
    for kind in ["sandboxes", "containers"] {
        assert_eq!(records(&world, kind), 0, "records of {kind}");
    }
    change_range(&mut world).await.unwrap();
}

#[tokio::test]
async fn a_sandbox_that_gives_way_to_another_takes_what_was_in_it_along() {
    let mut world = World::inside().await;
    world.started("a", "sleep 60000").await;
    let before = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    world.stop_sandbox(&before).await.unwrap();
    let now = world.sandbox("a").await;
    assert_ne!(before, now);
    assert_eq!((records(&world, "sandboxes"), records(&world, "containers")), (1, 0));
    // Who removes the one before late does not mean the one that is there now.
    world.remove_sandbox(&before).await.unwrap();
    assert_eq!(world.sandboxes(v1::PodSandboxFilter::default()).await, [now.as_str()]);
    assert!(!world.ip(&now).await.is_empty());
    world.remove_sandbox(&now).await.unwrap();
    assert_nothing_is_left(&mut world).await;
}

#[tokio::test]
async fn a_container_that_is_made_while_its_sandbox_is_removed_leaves_nothing() {
    let mut world = World::inside().await;
    let sandbox = world.sandbox("a").await;
    let hold = world.fake().hang_next(Verb::RemovePodSandbox);
    let (mut client, pod_sandbox_id) = (world.runtime.clone(), sandbox.clone());
    let removal = v1::RemovePodSandboxRequest { pod_sandbox_id };
    let removal = tokio::spawn(async move { client.remove_pod_sandbox(removal).await });
    asked(&world, Verb::RemovePodSandbox, 0).await;
    world.create(&sandbox, "main", "sleep 60000").await.unwrap();
    drop(hold);
    timeout(PATIENCE, removal).await.expect("it ends").unwrap().unwrap();
    assert_nothing_is_left(&mut world).await;
}

#[tokio::test]
async fn of_two_attempts_that_run_at_once_each_gives_its_own_address_back() {
    let mut world = World::inside().await;
    let first = world.sandbox("a").await;
    let config = world.config("a");
    let metadata = config.metadata.clone().map(|metadata| v1::PodSandboxMetadata { attempt: 1, ..metadata });
    let second = world.run(v1::PodSandboxConfig { metadata, ..config }).await.unwrap();
    let mut world = world.restarted().await;
    let address = world.ip(&second).await;
    assert_ne!(world.ip(&first).await, address);
    world.remove_sandbox(&first).await.unwrap();
    assert_eq!(world.ip(&second).await, address);
    assert_eq!(refused(change_range(&mut world).await), Code::FailedPrecondition);
    world.remove_sandbox(&second).await.unwrap();
    assert_nothing_is_left(&mut world).await;
}

#[tokio::test]
async fn a_thousand_calls_of_all_kinds_at_once_are_all_answered() {
    let mut world = World::inside().await;
    let id = world.started("a", "sleep 60000").await;
    let calls = (0..1000).map(|number| {
        let (mut client, id) = (world.runtime.clone(), id.clone());
        let config = world.config(&format!("pod{number}"));
        let cmd = ["print", "out", "exit", "0"].map(str::to_owned).to_vec();
        async move {
            match number % 4 {
                0 => client.run_pod_sandbox(request(config)).await.map(drop),
                1 => client.exec_sync(v1::ExecSyncRequest { container_id: id, cmd, timeout: 60 }).await.map(drop),
                2 => client
                    .container_status(v1::ContainerStatusRequest { container_id: id, verbose: true })
                    .await
                    .map(drop),
                _ => client.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.map(drop),
            }
        }
    });
    let answers = timeout(PATIENCE, join_all(calls)).await.expect("all are answered");
    let failed: Vec<_> = answers.into_iter().filter_map(Result::err).collect();
    assert!(failed.is_empty(), "{failed:?}");
    assert_eq!(world.sandboxes(v1::PodSandboxFilter::default()).await.len(), 251);
}

#[tokio::test]
async fn calls_that_are_given_up_do_not_end_those_beside_them() {
    let mut world = World::inside().await;
    let mut events = world.runtime.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner();
    // More at once than a server of HTTP/2 takes from somebody whom it does not know, each a little further on its way.
    for turns in 0..8 {
        let give_up = |mut client: RuntimeServiceClient<Channel>| async move {
            let turns = async {
                for _ in 0..turns {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                biased;
                _ = client.version(v1::VersionRequest::default()) => {}
                () = turns => {}
            }
        };
        join_all((0..200).map(|_| give_up(world.runtime.clone()))).await;
    }
    let id = world.started("a", "sleep 60000").await;
    let told = async { while events.message().await.unwrap().unwrap().container_id != id {} };
    timeout(PATIENCE, told).await.expect("the events go on");
}

#[tokio::test]
async fn a_command_whose_client_leaves_is_ended() {
    let mut world = World::inside().await;
    let container_id = world.started("a", "sleep 60000").await;
    let id = container_id.as_str().into();
    let (mut client, cmd) = (world.runtime.clone(), world.command("sleep 60000"));
    let call =
        tokio::spawn(
            async move { client.exec_sync(v1::ExecSyncRequest { container_id, cmd, timeout: 0 }).await.map(drop) },
        );
    let begun = async {
        while world.fake().running_execs(&id) == 0 {
            sleep(SOON).await;
        }
    };
    timeout(PATIENCE, begun).await.expect("it begins");
    call.abort();
    timeout(PATIENCE, world.fake().execs_ended(&id)).await.expect("it ends");
}

#[tokio::test]
async fn a_pull_whose_client_leaves_holds_up_no_other() {
    let mut world = World::inside().await;
    let _hold = world.fake().hang_next(Verb::PullImage);
    let image = Some(v1::ImageSpec { image: "docker.io/library/busybox:1".into(), ..Default::default() });
    let request = v1::PullImageRequest { image, ..Default::default() };
    let (mut client, first) = (world.images.clone(), request.clone());
    let call = tokio::spawn(async move { client.pull_image(first).await.map(drop) });
    asked(&world, Verb::PullImage, 0).await;
    call.abort();
    assert!(call.await.is_err());
    timeout(PATIENCE, world.images.pull_image(request)).await.expect("it is pulled").unwrap();
}

#[tokio::test]
async fn listeners_that_leave_take_nothing_from_those_that_stay() {
    let mut world = World::inside().await;
    let listen = |mut client: RuntimeServiceClient<Channel>| async move {
        client.get_container_events(v1::GetEventsRequest {}).await.unwrap().into_inner()
    };
    let mut stays = listen(world.runtime.clone()).await;
    for _ in 0..100 {
        drop(listen(world.runtime.clone()).await);
    }
    let id = world.sandbox("a").await;
    let heard = async { while stays.message().await.unwrap().unwrap().container_id != id {} };
    timeout(PATIENCE, heard).await.expect("the event comes");
    let container = world.create(&id, "main", "sleep 60000").await.unwrap();
    world.start(&container).await.unwrap();
    assert_eq!(exec_sync(&mut world, &container, "exit 4", 10).await.unwrap().exit_code, 4);
}
