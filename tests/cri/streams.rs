//! What our server promises of streams besides.

use lambdalet_proto::cri::v1;
use tonic::Code;

use crate::promises::streams::{ask, exec_sync, exec_url, parts};
use crate::support::{World, refused};

#[tokio::test]
async fn a_url_is_on_a_loopback_address_and_for_what_it_was_given_for() {
    let mut world = World::inside().await;
    let id = world.started("a", "sleep 60000").await;
    let url = exec_url(&mut world, &id, "exit 0").await;
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    let (address, path) = parts(&url);
    let elsewhere = format!("http://{address}{}", path.replace("/exec/", "/attach/"));
    assert!(ask(&elsewhere, "", "minute").await.starts_with(b"HTTP/1.1 404"));
    let url = exec_url(&mut world, &id, "exit 0").await;
    assert!(ask(&url, "", "upgrade").await.starts_with(b"HTTP/1.1 400"));
}

#[tokio::test]
async fn what_makes_no_sense_is_an_invalid_argument() {
    let mut world = World::inside().await;
    let id = world.started("a", "sleep 60000").await;
    assert_eq!(refused(exec_sync(&mut world, &id, "", 1).await), Code::InvalidArgument);
    assert_eq!(refused(exec_sync(&mut world, &id, "exit 0", -1).await), Code::InvalidArgument);
    let nothing = v1::ExecRequest { container_id: id, stdout: true, ..Default::default() };
    assert_eq!(refused(world.runtime.exec(nothing).await), Code::InvalidArgument);
    let pod_sandbox_id = world.sandboxes(v1::PodSandboxFilter::default()).await.remove(0);
    let wrong = v1::PortForwardRequest { pod_sandbox_id, port: vec![70_000] };
    assert_eq!(refused(world.runtime.port_forward(wrong).await), Code::InvalidArgument);
}

#[tokio::test]
async fn a_command_is_for_a_container_that_runs() {
    let mut world = World::inside().await;
    let sandbox = world.sandbox("a").await;
    let id = world.create(&sandbox, "main", "sleep 60000").await.unwrap();
    assert_eq!(refused(exec_sync(&mut world, &id, "exit 0", 1).await), Code::FailedPrecondition);
}
