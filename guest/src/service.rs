//! The verbs as the node calls them: read the message, call, answer. What may block does so on a thread of its own.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_core::Stream;
use lambdalet_proto::agent::v1::agent_server::Agent;
use lambdalet_proto::agent::v1::port_data::Message as Data;
use lambdalet_proto::agent::v1::process_input::Message as Input;
use lambdalet_proto::agent::v1::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::clock;
use crate::error::{Error, Result as Verb, Tried};
use crate::events::event;
use crate::guest::Guest;
use crate::streams::{QUEUE, follow};
use crate::sys;

/// Events that wait for the node.
const EVENT_QUEUE: usize = 16;

type Answer<T> = Result<Response<T>, Status>;
type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The agent's service, for one session.
#[derive(Clone, Debug)]
pub(crate) struct Service(Arc<Guest>);

impl Service {
    pub(crate) fn new(guest: Arc<Guest>) -> Self {
        Self(guest)
    }

    /// Does something that may block, once everything is loaded.
    async fn run<T: Send + 'static>(&self, verb: impl FnOnce(&Arc<Guest>) -> Verb<T> + Send + 'static) -> Answer<T> {
        self.0.is_loaded().await?;
        let guest = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || verb(&guest)).await;
        let done = done.map_err(|panicked| Status::internal(format!("the agent failed: {panicked}")))?;
        Ok(Response::new(done?))
    }

    async fn empty(&self, verb: impl FnOnce(&Arc<Guest>) -> Verb<()> + Send + 'static) -> Answer<Empty> {
        self.run(verb).await.map(|answer| answer.map(|()| Empty {}))
    }
}

fn outgoing<T: Send + 'static>(receiver: mpsc::Receiver<Result<T, Status>>) -> Response<Outgoing<T>> {
    Response::new(Box::pin(ReceiverStream::new(receiver)))
}

#[tonic::async_trait]
impl Agent for Service {
    type EventsStream = Outgoing<Event>;
    type LogsStream = Outgoing<LogBatch>;
    type ExecStream = Outgoing<ProcessOutput>;
    type AttachStream = Outgoing<ProcessOutput>;
    type PortForwardStream = Outgoing<PortData>;

    async fn hello(&self, _: Request<HelloRequest>) -> Answer<HelloReply> {
        let (memory_bytes, cpus) = self.0.size;
        let kernel = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
        Ok(Response::new(HelloReply {
            protocol: PROTOCOL,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: kernel.unwrap_or_default(),
            ready_after_ns: self.0.ready_after_ns,
            configured: self.0.configured(),
            memory_bytes,
            cpus,
            machine_id: self.0.machine_id(),
        }))
    }

    async fn configure(&self, request: Request<ConfigureRequest>) -> Answer<Empty> {
        self.0.is_loaded().await?;
        // Here: it is soon done, and nothing else is to be answered meanwhile.
        self.0.configure(request.get_ref())?;
        Ok(Response::new(Empty {}))
    }

    async fn sync_time(&self, request: Request<SyncTimeRequest>) -> Answer<SyncTimeReply> {
        let request = request.into_inner();
        let before_ns = clock::now_ns();
        if !self.0.stand_in {
            sys::reseed(&request.seed).tried(|| "failed to seed the random number generator".to_owned())?;
            clock::set(request.time_ns).tried(|| "failed to set the clock".to_owned())?;
        }
        Ok(Response::new(SyncTimeReply { before_ns }))
    }

    async fn shutdown(&self, request: Request<ShutdownRequest>) -> Answer<Empty> {
        let grace = Duration::from_millis(u64::from(request.into_inner().grace_ms));
        self.0.end_containers(grace).await;
        Arc::clone(&self.0).end_machine();
        Ok(Response::new(Empty {}))
    }

    async fn mount_image(&self, request: Request<MountImageRequest>) -> Answer<Empty> {
        let MountImageRequest { slot, image, filesystem } = request.into_inner();
        self.empty(move |guest| guest.mount_image(&slot, &image, &filesystem)).await
    }

    async fn unmount_image(&self, request: Request<UnmountImageRequest>) -> Answer<Empty> {
        let UnmountImageRequest { image, slot } = request.into_inner();
        self.empty(move |guest| guest.unmount_image(&image, &slot)).await
    }

    async fn make_volume(&self, request: Request<Volume>) -> Answer<Empty> {
        let volume = request.into_inner();
        self.empty(move |guest| guest.make_volume(&volume)).await
    }

    async fn remove_volume(&self, request: Request<VolumeRef>) -> Answer<Empty> {
        let name = request.into_inner().name;
        self.empty(move |guest| guest.remove_volume(&name)).await
    }

    async fn push_files(&self, request: Request<Streaming<PushFilesRequest>>) -> Answer<Empty> {
        let mut files = request.into_inner();
        self.0.is_loaded().await?;
        let first = files.message().await?.ok_or_else(|| Error::invalid("a push of nothing"))?;
        let mut push = self.0.begin_push(&first)?;
        push.add(&first)?;
        // Memory is quick: the pieces are written as they come.
        while let Some(file) = files.message().await? {
            push.add(&file)?;
        }
        push.finish()?;
        Ok(Response::new(Empty {}))
    }

    async fn read_file(&self, request: Request<ReadFileRequest>) -> Answer<ReadFileReply> {
        let ReadFileRequest { volume, path, limit } = request.into_inner();
        let read = self.run(move |guest| guest.read_file(&volume, &path, limit)).await?;
        Ok(read.map(|data| ReadFileReply { data }))
    }

    async fn create_container(&self, request: Request<ContainerSpec>) -> Answer<Empty> {
        let spec = request.into_inner();
        self.empty(move |guest| guest.create_container(spec)).await
    }

    async fn start_container(&self, request: Request<ContainerRef>) -> Answer<StartContainerReply> {
        self.0.is_loaded().await?;
        let (guest, id) = (Arc::clone(&self.0), request.into_inner().id);
        // A start that the node no longer waits for is carried out all the same.
        let started = tokio::task::spawn(guest.start_container(id)).await;
        let started = started.map_err(|panicked| Status::internal(format!("the agent failed: {panicked}")))?;
        Ok(Response::new(started?))
    }

    async fn signal_container(&self, request: Request<SignalContainerRequest>) -> Answer<Empty> {
        let SignalContainerRequest { id, signal, all } = request.into_inner();
        self.empty(move |guest| guest.signal_container(&id, &signal, all)).await
    }

    async fn wait_container(&self, request: Request<ContainerRef>) -> Answer<ContainerState> {
        let container = self.0.container(&request.into_inner().id)?;
        Ok(Response::new(container.exited().await?))
    }

    async fn remove_container(&self, request: Request<ContainerRef>) -> Answer<Empty> {
        let id = request.into_inner().id;
        self.empty(move |guest| guest.remove_container(&id)).await
    }

    async fn list_containers(&self, _: Request<ListContainersRequest>) -> Answer<ListContainersReply> {
        Ok(Response::new(ListContainersReply { containers: self.0.list_containers() }))
    }

    async fn freeze_container(&self, request: Request<ContainerRef>) -> Answer<Empty> {
        let id = request.into_inner().id;
        self.empty(move |guest| guest.freeze_container(&id, true)).await
    }

    async fn thaw_container(&self, request: Request<ContainerRef>) -> Answer<Empty> {
        let id = request.into_inner().id;
        self.empty(move |guest| guest.freeze_container(&id, false)).await
    }

    async fn update_container(&self, request: Request<UpdateContainerRequest>) -> Answer<Empty> {
        let UpdateContainerRequest { id, resources } = request.into_inner();
        self.empty(move |guest| guest.update_container(&id, &resources.unwrap_or_default())).await
    }

    async fn events(&self, _: Request<EventsRequest>) -> Answer<Self::EventsStream> {
        let mut listener = self.0.events.listen();
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
        tokio::task::spawn(async move {
            let mut next = Some(event(EventKind::Subscribed));
            while let Some(event) = next {
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
                // Both are cancel-safe.
                next = tokio::select! {
                    event = listener.next() => event,
                    () = sender.closed() => None,
                };
            }
        });
        Ok(outgoing(receiver))
    }

    async fn logs(&self, request: Request<LogsRequest>) -> Answer<Self::LogsStream> {
        let LogsRequest { id, offset, follow: stay } = request.into_inner();
        let container = self.0.container(&id)?;
        // Batches are large.
        let (sender, receiver) = mpsc::channel(1);
        tokio::task::spawn(follow(Arc::clone(&container.log), offset, stay, sender));
        Ok(outgoing(receiver))
    }

    async fn stats(&self, request: Request<StatsRequest>) -> Answer<StatsReply> {
        let disk = request.into_inner().disk;
        self.run(move |guest| Ok(guest.stats(disk))).await
    }

    async fn exec(&self, request: Request<Streaming<ProcessInput>>) -> Answer<Self::ExecStream> {
        let mut input = request.into_inner();
        let Some(ProcessInput { message: Some(Input::Exec(start)) }) = input.message().await? else {
            return Err(Error::invalid("the first message is no command").into());
        };
        let (sender, receiver) = mpsc::channel(QUEUE);
        Arc::clone(&self.0).exec(start, input, sender).await?;
        Ok(outgoing(receiver))
    }

    async fn exec_exit(&self, request: Request<ExecExitRequest>) -> Answer<ExecExitReply> {
        let ExecExitRequest { exec_id, end } = request.into_inner();
        let code = self.0.exec_exit(&exec_id, end).await?;
        Ok(Response::new(ExecExitReply { code }))
    }

    async fn attach(&self, request: Request<Streaming<ProcessInput>>) -> Answer<Self::AttachStream> {
        let mut input = request.into_inner();
        let Some(ProcessInput { message: Some(Input::Attach(start)) }) = input.message().await? else {
            return Err(Error::invalid("the first message names no container").into());
        };
        let (sender, receiver) = mpsc::channel(QUEUE);
        Arc::clone(&self.0).attach(start, input, sender).await?;
        Ok(outgoing(receiver))
    }

    async fn port_forward(&self, request: Request<Streaming<PortData>>) -> Answer<Self::PortForwardStream> {
        let mut input = request.into_inner();
        let Some(PortData { message: Some(Data::Connect(port)) }) = input.message().await? else {
            return Err(Error::invalid("the first message names no port").into());
        };
        let (sender, receiver) = mpsc::channel(QUEUE);
        Guest::port_forward(port, input, sender).await?;
        Ok(outgoing(receiver))
    }
}
