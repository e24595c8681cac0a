//! Replicas that a resource manager asks the node for by gRPC.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use lambdalet_proto::functionserver::function_client::FunctionClient;
use lambdalet_proto::functionserver::{CreateReply, CreateRequest, ReleaseRequest};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use super::{BOOT, bundle, options};
use crate::harness::leaks::all_vmms;
use crate::harness::on_own_node;
use crate::harness::wait::{SOON, poll};

/// Within which the node's bridge and its pool are there.
const OPEN: Duration = Duration::from_secs(30);

async fn client(port: u16) -> FunctionClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).unwrap();
    FunctionClient::new(
        poll("the function server", SOON, async || endpoint.connect().await.map_err(|e| format!("{e:?}"))).await,
    )
}

async fn create(client: &FunctionClient<Channel>, wish: &CreateRequest) -> Result<CreateReply, Status> {
    client.clone().create_replica(wish.clone()).await.map(Response::into_inner)
}

async fn release(client: &FunctionClient<Channel>, vmid: &str) -> Result<(), Status> {
    client.clone().release_vm_setup(ReleaseRequest { vmid: vmid.to_owned() }).await.map(Response::into_inner)
}

#[test]
#[ignore = "needs cluster: run hack/test"]
fn a_resource_manager_gets_replicas_and_gives_them_back() {
    let Some(bundle) = bundle() else { return };
    let (guest, folder) = (PathBuf::from(&bundle), tempfile::tempdir().unwrap());
    fs::write(folder.path().join("function.img"), vec![b'f'; 4096]).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (assets, address) = (format!("{bundle},{}", folder.path().display()), port.to_string());
    let flags = ["--vm-asset-dirs", &assets, "--function-server-addr", &address, "--function-server-memory", "300Mi"];
    on_own_node("replicas", options(&bundle, &flags), async |t| {
        let wish = CreateRequest {
            kernel_image_path: guest.join("vmlinux").display().to_string(),
            initrd_path: guest.join("initramfs.cpio").display().to_string(),
            image_storage_prefix: folder.path().display().to_string(),
            image_name: "function.img".to_owned(),
            mem: 256,
            ..CreateRequest::default()
        };
        let callers = client(port).await;
        let replica = poll("the first replica", OPEN, async || match create(&callers, &wish).await {
            Err(status) if status.code() == Code::Unavailable => Err(status.message().to_owned()),
            other => Ok(other),
        });
        let replica = replica.await.unwrap();
        assert!(t.node.has_address(&replica.ip), "{replica:?}");
        assert_eq!(all_vmms(&t.node).len(), 1);
        let full = create(&callers, &wish).await.unwrap_err();
        assert_eq!(full.code(), Code::ResourceExhausted, "300 MiB are less than two: {full:?}");

        t.node.kill9();
        t.node.spawn(&[]);
        let callers = client(port).await;
        let released =
            poll("a node that knows its replica", BOOT, async || match release(&callers, &replica.vmid).await {
                Err(status) if status.code() == Code::Unavailable => Err(status.message().to_owned()),
                other => Ok(other),
            });
        released.await.unwrap();
        assert_eq!(all_vmms(&t.node), Vec::<i32>::new());
        let unknown = release(&callers, &replica.vmid).await.unwrap_err();
        assert_eq!((unknown.code(), unknown.message()), (Code::NotFound, "VM setup is not assigned"));
    });
}
