//! The client of the agent in a guest: one session over one byte stream, one method per verb.
//!
//! ```text
//! Agent --tonic--> HTTP/2 --> session frames (lambdalet_proto::session) --> virtio-serial | vsock --> agent
//! ```
//! A session lives as long as its [`Agent`] or the wire; after it the node connects again, and asks for what it missed
//! ([`list`](Agent::list), [`logs`](Agent::logs) from the offset it has). The guest goes on meanwhile, but ends the commands
//! that were executed through the session.
//!
//! Requests are the protocol's own messages (`proto/lambdalet/agent/v1/agent.proto` says what they mean). Answers are
//! [`said`]: checked before anything of them is kept.

mod files;
mod forward;
mod outlet;
mod process;
pub mod said;
pub mod spec;

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use hyper_util::rt::TokioIo;
use lambdalet_proto::MAX_MESSAGE;
use lambdalet_proto::agent::v1::agent_client::AgentClient;
use lambdalet_proto::agent::v1::{self, ContainerRef};
use lambdalet_proto::session::link::{CONNECTION_WINDOW, NodeSession};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::runtime::{Kind, Result, RuntimeError};
pub use files::{PushedContent, PushedFile};
use said::OutOfBounds;

/// How long a guest may take for a verb that waits for nothing.
const PATIENCE: Duration = Duration::from_secs(30);
/// A guest that answers nothing for so long is lost: twice the pause between two signs of life.
const ALIVE_PAUSE: Duration = Duration::from_secs(20);
/// Bytes of the headers of one answer.
const MAX_HEADERS: u32 = 16 << 10;
/// What a guest may send ahead of the reader of one stream.
const STREAM_WINDOW: u32 = 128 << 10;

/// Calls one verb that waits for nothing.
macro_rules! ask {
    ($agent:ident.$verb:ident($request:expr), $tried:expr) => {{
        let (mut client, request) = ($agent.client.clone(), $request);
        let call = async move { client.$verb(request).await };
        $agent.within(PATIENCE, $tried, call).await.map(tonic::Response::into_inner)
    }};
}

/// A session with the agent of one guest. Clones share it; it ends with the last, and so do the commands executed through
/// it.
#[derive(Clone, Debug)]
pub struct Agent {
    client: AgentClient<Channel>,
    /// Why the session ended, once it has.
    ended: watch::Receiver<Option<Arc<str>>>,
    /// What carries the session's bytes; aborted with the last clone.
    tasks: Arc<Mutex<JoinSet<()>>>,
}

impl Agent {
    /// Opens a session over the raw byte stream of the guest's port and says hello; `patience` is for both, and the guest
    /// may still be booting.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if the guest does not answer in time or the stream ends, [`Kind::Unsupported`] for a protocol
    /// that this node does not speak.
    pub async fn connect<S>(stream: S, patience: Duration) -> Result<(Self, said::Hello)>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let tried = "failed to connect to the guest's agent";
        let late = |_| RuntimeError::new(Kind::Unavailable, format!("{tried}: no answer within {patience:?}"));
        timeout(patience, Self::open(stream, tried)).await.map_err(late)?
    }

    async fn open<S>(stream: S, tried: &str) -> Result<(Self, said::Hello)>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let lost = |error| RuntimeError::new(Kind::Unavailable, tried.to_owned()).with_source(error);
        let (io, session) = NodeSession::open(stream, rand::random()).await.map_err(lost)?;
        let (told, ended) = watch::channel(None);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let reason = session.run().await;
            told.send_replace(Some(reason.to_string().into()));
        });
        // There is one stream; a channel that wants another has lost its session.
        let mut io = Some(TokioIo::new(io));
        let connector = tower::service_fn(move |_| {
            let io = io.take().ok_or_else(|| std::io::Error::from(std::io::ErrorKind::ConnectionAborted));
            std::future::ready(io)
        });
        let endpoint = Endpoint::from_static("http://guest")
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_stream_window_size(STREAM_WINDOW)
            .http2_max_header_list_size(MAX_HEADERS)
            .http2_keep_alive_interval(ALIVE_PAUSE)
            .keep_alive_timeout(ALIVE_PAUSE)
            .keep_alive_while_idle(true);
        let lost = |error| RuntimeError::new(Kind::Unavailable, tried.to_owned()).with_source(error);
        let channel = endpoint.connect_with_connector(connector).await.map_err(lost)?;
        let client = AgentClient::new(channel).max_decoding_message_size(MAX_MESSAGE + (64 << 10));
        let agent = Self { client, ended, tasks: Arc::new(Mutex::new(tasks)) };
        let asked = v1::HelloRequest { protocol: v1::PROTOCOL };
        let reply = agent.client.clone().hello(asked).await.map_err(|status| refused(tried, &status))?;
        let unknown = |error| RuntimeError::new(Kind::Unsupported, tried.to_owned()).with_source(error);
        let hello = said::hello(reply.into_inner()).map_err(unknown)?;
        Ok((agent, hello))
    }

    /// Waits until the session has ended, and says why. Cancel-safe.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.as_deref().unwrap_or_default().to_owned(),
            Err(_) => "the session was dropped".to_owned(),
        }
    }

    /// Ends the session for all clones: a machine has room for one at a time.
    pub fn close(&self) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }

    /// Gives the guest its identity and limits, and its scratch disk. Repeating it changes what differs.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for an address, name or parameter that the guest's kernel refuses.
    pub async fn configure(&self, request: v1::ConfigureRequest) -> Result<()> {
        ask!(self.configure(request), "failed to configure the guest").map(drop)
    }

    /// Sets the guest's clock to now, and says by how much it was behind (negative: ahead), in nanoseconds.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if the guest does not answer.
    pub async fn sync_time(&self, seed: Vec<u8>) -> Result<i64> {
        let now = u64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or_default();
        let request = v1::SyncTimeRequest { time_ns: now, seed: seed.into() };
        let reply = ask!(self.sync_time(request), "failed to set the guest's clock")?;
        Ok(now.wrapping_sub(reply.before_ns).cast_signed())
    }

    /// Ends every container, then the guest; the VMM ends with it.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if the guest does not answer.
    pub async fn shutdown(&self, grace: Duration) -> Result<()> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let request = v1::ShutdownRequest { grace_ms };
        let mut client = self.client.clone();
        let call = async move { client.shutdown(request).await };
        self.within(grace.saturating_add(PATIENCE), "failed to shut the guest down", call).await.map(drop)
    }

    /// Mounts the image that was put into a slot, under the name that [`create_container`](Self::create_container) uses.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for a slot that the guest does not have, [`Kind::Invalid`] for what is no such file system.
    pub async fn mount_image(&self, slot: &str, image: &str, filesystem: &str) -> Result<()> {
        let request = v1::MountImageRequest { slot: slot.into(), image: image.into(), filesystem: filesystem.into() };
        let tried = format!("failed to mount image {image} from {slot} in the guest");
        ask!(self.mount_image(request), &tried).map(drop)
    }

    /// Lets go of an image, and of whatever is mounted from a slot. What is not mounted is fine.
    ///
    /// # Errors
    /// [`Kind::AlreadyExists`] while a container uses it.
    pub async fn unmount_image(&self, slot: &str, image: &str) -> Result<()> {
        let request = v1::UnmountImageRequest { image: image.into(), slot: slot.into() };
        let tried = format!("failed to unmount image {image} in the guest");
        ask!(self.unmount_image(request), &tried).map(drop)
    }

    /// Makes a volume. One of the same name is fine.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a name or kind that the guest refuses.
    pub async fn make_volume(&self, volume: v1::Volume) -> Result<()> {
        let tried = format!("failed to make volume {} in the guest", volume.name);
        ask!(self.make_volume(volume), &tried).map(drop)
    }

    /// Removes a volume and what is in it. One that is not there is fine.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if the guest does not answer.
    pub async fn remove_volume(&self, name: &str) -> Result<()> {
        let tried = format!("failed to remove volume {name} in the guest");
        let request = v1::VolumeRef { name: name.into() };
        ask!(self.remove_volume(request), &tried).map(drop)
    }

    /// Makes a container, not started. One of the same id is left as it is.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an image or volume that the guest does not have, [`Kind::Invalid`] for what it cannot do.
    pub async fn create_container(&self, spec: v1::ContainerSpec) -> Result<()> {
        let tried = format!("failed to create container {} in the guest", spec.id);
        ask!(self.create_container(spec), &tried).map(drop)
    }

    /// Starts a created container. A running one is fine.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it could not be started: it has exited then, with 127 or 128; or if it had exited before.
    pub async fn start(&self, id: &str) -> Result<()> {
        let tried = format!("failed to start container {id} in the guest");
        let reply = ask!(self.start_container(reference(id)), &tried)?;
        if reply.failure.is_empty() {
            return Ok(());
        }
        Err(RuntimeError::new(Kind::Invalid, format!("{tried}: {}", said::text(&reply.failure))))
    }

    /// Sends a signal to a container's first process, or to all. One that does not run is fine.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown container, [`Kind::Invalid`] for an unknown signal.
    pub async fn signal(&self, id: &str, signal: &str, all: bool) -> Result<()> {
        let tried = format!("failed to send {signal} to container {id} in the guest");
        let request = v1::SignalContainerRequest { id: id.into(), signal: signal.into(), all };
        ask!(self.signal_container(request), &tried).map(drop)
    }

    /// Waits until a container has exited. Cancel-safe.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown container, or one that was removed meanwhile.
    pub async fn wait(&self, id: &str) -> Result<said::Container> {
        let tried = format!("failed to wait for container {id} in the guest");
        let reply =
            self.client.clone().wait_container(reference(id)).await.map_err(|status| refused(&tried, &status))?;
        said::container(reply.into_inner()).map_err(|error| hostile(&tried, error))
    }

    /// Removes a container, its log and what it wrote, killing it first if it runs. An unknown one is fine.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if the guest does not answer.
    pub async fn remove(&self, id: &str) -> Result<()> {
        let tried = format!("failed to remove container {id} in the guest");
        ask!(self.remove_container(reference(id)), &tried).map(drop)
    }

    /// Every container of the guest, in no order.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if the guest does not answer.
    pub async fn list(&self) -> Result<Vec<said::Container>> {
        let tried = "failed to list the containers of the guest";
        let request = v1::ListContainersRequest {};
        let reply = ask!(self.list_containers(request), tried)?;
        said::containers(reply).map_err(|error| hostile(tried, error))
    }

    /// Freezes a container. A frozen one is fine.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown container, [`Kind::Invalid`] for one that does not run.
    pub async fn freeze(&self, id: &str) -> Result<()> {
        let tried = format!("failed to freeze container {id} in the guest");
        ask!(self.freeze_container(reference(id)), &tried).map(drop)
    }

    /// Thaws a container. One that is not frozen is fine.
    ///
    /// # Errors
    /// As [`freeze`](Self::freeze).
    pub async fn thaw(&self, id: &str) -> Result<()> {
        let tried = format!("failed to thaw container {id} in the guest");
        ask!(self.thaw_container(reference(id)), &tried).map(drop)
    }

    /// Gives a container other limits.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown container, [`Kind::Invalid`] for limits that the kernel refuses.
    pub async fn update(&self, id: &str, resources: v1::Resources) -> Result<()> {
        let tried = format!("failed to update container {id} in the guest");
        let request = v1::UpdateContainerRequest { id: id.into(), resources: Some(resources) };
        ask!(self.update_container(request), &tried).map(drop)
    }

    /// What everything uses; with `disk` also what the writable layers and the volumes on the scratch disk take, which
    /// costs a walk.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if the guest does not answer.
    pub async fn stats(&self, disk: bool) -> Result<said::Stats> {
        let tried = "failed to read the statistics of the guest";
        let request = v1::StatsRequest { disk };
        let reply = ask!(self.stats(request), tried)?;
        said::stats(reply).map_err(|error| hostile(tried, error))
    }

    /// What happens from now on; returns once the subscription stands. The stream ends with the session.
    ///
    /// # Errors
    /// [`Kind::Unavailable`] if the guest does not answer.
    pub async fn events(&self) -> Result<BoxStream<'static, said::Event>> {
        let tried = "failed to subscribe to the events of the guest";
        let asked = self.client.clone();
        let subscribe = async move {
            let mut asked = asked;
            let mut stream = asked.events(v1::EventsRequest {}).await?.into_inner();
            stream.message().await.map(|first| (first, stream))
        };
        let (first, stream) = self.within(PATIENCE, tried, subscribe).await?;
        let first = first.map(said::event).transpose().map_err(|error| hostile(tried, error))?;
        if first != Some(said::Event::Subscribed) {
            return Err(hostile(tried, OutOfBounds("first event")));
        }
        // An event that no agent sends ends the stream: the caller lists and subscribes again.
        let read = |event: Result<v1::Event, Status>| event.ok().and_then(|event| said::event(event).ok());
        let events = tokio_stream::StreamExt::map_while(stream, read);
        Ok(events.boxed())
    }

    /// A container's log from an offset (0, or [`said::LogBatch::next`] of an earlier batch); with `follow` it ends when the
    /// container has exited or is removed.
    ///
    /// # Errors
    /// [`Kind::NotFound`] for an unknown container.
    pub async fn logs(
        &self,
        id: &str,
        offset: u64,
        follow: bool,
    ) -> Result<BoxStream<'static, Result<said::LogBatch>>> {
        let tried = format!("failed to read the log of container {id} in the guest");
        let request = v1::LogsRequest { id: id.into(), offset, follow };
        let mut client = self.client.clone();
        let stream = self.within(PATIENCE, &tried, async move { client.logs(request).await }).await?.into_inner();
        let state = (stream, offset, tried);
        let batches = futures::stream::try_unfold(state, |(mut stream, from, tried)| async move {
            let Some(batch) = stream.message().await.map_err(|status| refused(&tried, &status))? else {
                return Ok(None);
            };
            let batch = said::log_batch(batch, from).map_err(|error| hostile(&tried, error))?;
            let next = batch.next;
            Ok(Some((batch, (stream, next, tried))))
        });
        Ok(batches.boxed())
    }

    async fn within<A>(
        &self,
        patience: Duration,
        tried: &str,
        call: impl Future<Output = Result<A, Status>>,
    ) -> Result<A> {
        match timeout(patience, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(status)) => Err(refused(tried, &status)),
            Err(_) => Err(RuntimeError::new(Kind::Unavailable, format!("{tried}: no answer within {patience:?}"))),
        }
    }

    /// Runs a task that ends with the session.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        // A set of tasks is never half changed, so a panic elsewhere does not spoil it.
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }
}

fn reference(id: &str) -> ContainerRef {
    ContainerRef { id: id.to_owned() }
}

/// What a guest's refusal means; its words are cut.
fn refused(tried: &str, status: &Status) -> RuntimeError {
    let kind = match status.code() {
        Code::NotFound => Kind::NotFound,
        Code::AlreadyExists => Kind::AlreadyExists,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange | Code::ResourceExhausted => Kind::Invalid,
        Code::Unimplemented => Kind::Unsupported,
        Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Aborted => Kind::Unavailable,
        // How the transport tells that the session went away.
        Code::Unknown if std::error::Error::source(status).is_some() => Kind::Unavailable,
        Code::Ok | Code::Unknown | Code::PermissionDenied | Code::Internal | Code::DataLoss | Code::Unauthenticated => {
            Kind::Internal
        }
    };
    RuntimeError::new(kind, format!("{tried}: {}", said::text(status.message())))
}

/// A guest that says what no agent says.
fn hostile(tried: &str, error: OutOfBounds) -> RuntimeError {
    RuntimeError::new(Kind::Internal, tried.to_owned()).with_source(error)
}
