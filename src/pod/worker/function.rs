//! A function Pod: a sandbox with nothing but a front in it, and a pool of environments behind that.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::{Past, Worker};
use crate::function::front::{Front, FunctionLabels, listen_in};
use crate::function::labels::{self, Complaint};
use crate::function::pool_state::{Summary, Why};
use crate::function::protocol::ImageConfig;
use crate::function::service::{Door, Scaled, Service};
use crate::function::settings::{DEFAULT_PORT, Settings};
use crate::pod::Shared;
use crate::pod::backoff;
use crate::pod::crew::{Crew, kept};
use crate::pod::ephemeral;
use crate::pod::plan::FunctionPhase;
use crate::pod::status::{Shown, Trouble, function};
use crate::pod::unsupported;
use crate::runtime::types::{Image, PodRef, SandboxId, SandboxStatus};
use crate::shutdown::owned;
use crate::telemetry::chain;

/// How often the numbers of a busy function are written anew while its replicas stay as they are.
pub(super) const NUMBERS: Duration = Duration::from_secs(10);

/// How long a Pod that is being deleted still takes calls, of which it may be a quarter of the grace period at most:
/// Services go on sending them until every kube-proxy knows, which writes its rules once a second.
const FAREWELL: Duration = Duration::from_secs(2);

/// What the worker of a function Pod has beyond any other's.
pub(super) struct Function {
    /// The image that decides how environments are called, once it is here.
    image: Option<ImageConfig>,
    /// The images that environments are made of, all of which are here.
    made_of: watch::Sender<Vec<String>>,
    complaints: Vec<Complaint>,
    settings: watch::Sender<Settings>,
    pool: Option<Pool>,
    front: Option<Listening>,
    drained: bool,
    /// Its environments are microVMs.
    in_guests: bool,
    /// Since when it has run, as the API server was told before a restart of the node agent; until it listens again.
    since: Option<Timestamp>,
}

/// The pool, at work.
struct Pool {
    service: Arc<Service>,
    summary: watch::Receiver<Summary>,
    _news: AbortOnDropHandle<()>,
}

/// The front, listening in one sandbox.
struct Listening {
    sandbox: SandboxId,
    since: Timestamp,
    drain: watch::Sender<Option<Instant>>,
    task: AbortOnDropHandle<()>,
}

impl Function {
    /// What a function Pod begins with; `None` for any other Pod.
    pub(super) fn of(pod: &Pod) -> Option<Self> {
        let reading = labels::read(pod, None)?;
        Some(Self {
            image: None,
            made_of: watch::Sender::default(),
            complaints: Vec::new(),
            settings: watch::Sender::new(reading.settings),
            pool: None,
            front: None,
            drained: false,
            in_guests: false,
            since: function::running_since(pod),
        })
    }

    pub(super) fn phase(&self, pod: &Pod) -> FunctionPhase<'_> {
        match (&self.front, self.drained) {
            (_, true) => FunctionPhase::Drained,
            (Some(front), false) if !images(pod).eq(self.made_of.borrow().iter()) => {
                FunctionPhase::Outdated(&front.sandbox)
            }
            (Some(front), false) => FunctionPhase::Serving(&front.sandbox),
            (None, false) => FunctionPhase::Idle,
        }
    }

    /// Woken when replicas, environments or their health have changed.
    pub(super) async fn changed(&mut self) {
        let Some(pool) = &mut self.pool else { return std::future::pending().await };
        if pool.summary.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// What the Pod's status is made from instead of containers.
    pub(super) fn shown(&self, pod: &Pod, sandbox: Option<&SandboxStatus>) -> Shown {
        let summary = self.pool.as_ref().map(|pool| pool.service.summary_now());
        let since = self.front.as_ref().map(|front| front.since);
        function::shown(pod, sandbox, since, summary, self.drained)
    }
}

impl Worker {
    /// Listens on the Pod's address, with a pool behind it.
    pub(super) async fn serve(&mut self) {
        let Some(sandbox) = self.observed.ready_sandbox().cloned() else { return };
        let pod = self.pod.clone();
        let Some(image) = self.function_images(&pod).await else { return };
        let in_guests = self.is_in_guests(&pod).await;
        let Some(function) = &mut self.function else { return };
        function.in_guests = in_guests;
        function.front = None;
        self.take_images(&pod, &image);
        if let Err(trouble) = self.open_pool(self.past).await {
            return self.hold_pod(&trouble.reason, trouble.message);
        }
        self.past = Past::None;
        match self.listen(&pod, &sandbox).await {
            Ok(()) => self.tell(None, "Serving", "The function's front takes calls".to_owned()),
            Err(message) => self.hold_pod("FailedFront", message),
        }
    }

    /// Has environments of the images that the Pod names now take the place of those there are. Until all of them are here
    /// everything stays as it is.
    pub(super) async fn renew(&mut self) {
        let pod = self.pod.clone();
        if let Some(image) = self.function_images(&pod).await {
            self.take_images(&pod, &image);
        }
    }

    /// Environments are made of the Pod's images from now on, and called as the one that serves wants it.
    fn take_images(&mut self, pod: &Pod, serving: &Image) {
        let Some(function) = &mut self.function else { return };
        function.image = Some(config_of(serving));
        let made_of: Vec<String> = images(pod).cloned().collect();
        let renewed = function.made_of.send_if_modified(|before| std::mem::replace(before, made_of) != *before);
        self.retune();
        if let Some(pool) = self.function.as_ref().and_then(|function| function.pool.as_ref()).filter(|_| renewed) {
            pool.service.replace_all();
            self.tell(None, "Renewing", "Its images have changed: the function's environments are replaced".to_owned());
        }
    }

    /// Every image of the Pod is here before it is ready; that of the function's container is returned. What cannot be
    /// had is put on hold as a container would be.
    async fn function_images(&mut self, pod: &Pod) -> Option<Image> {
        let serving = labels::container(pod)?.name.clone();
        let spec = pod.spec.as_ref()?;
        let mut found = None;
        for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
            let image = self.image(pod, container).await?;
            self.memory.waiting.remove(&container.name);
            self.memory.holds.remove(&container.name);
            if container.name == serving {
                found = Some(image);
            }
        }
        found
    }

    /// The pool, with what an earlier process left of it.
    async fn open_pool(&mut self, past: Past) -> Result<(), Trouble> {
        let Some(function) = &mut self.function else { return Ok(()) };
        if function.pool.is_some() {
            return Ok(());
        }
        let uid = &self.reference.uid;
        let wishes = (self.desired.clone(), function.settings.subscribe(), function.made_of.subscribe());
        let crew = Crew::new(Arc::clone(&self.shared), uid, wishes, function.in_guests);
        let found = match past {
            Past::None => Vec::new(),
            Past::Unknown => crew.adopt().await.map_err(|error| Trouble::new("FailedAdoption", chain(&error)))?,
        };
        let settings = *function.settings.borrow();
        let (service, news) = Service::new(settings, crew, found);
        self.shared.capacity.register(uid, &service);
        self.shared.fronts.pools.show(labels_of(&self.reference), &service);
        self.shared.directory.pools.open(uid, &service, kept::place(&self.shared, uid));
        let told = report_scaling(Arc::clone(&self.shared), self.pod.clone(), Arc::clone(&service), news);
        function.pool = Some(Pool { summary: service.summary(), service, _news: owned(told) });
        Ok(())
    }

    async fn listen(&mut self, pod: &Pod, sandbox: &SandboxStatus) -> Result<(), String> {
        let Some(function) = &mut self.function else { return Ok(()) };
        let (Some(pool), Some(pid)) = (&function.pool, sandbox.pid) else {
            return Err("the Pod's sandbox has no process".to_owned());
        };
        let everywhere = everywhere(&sandbox.addresses);
        let ports = ports(pod).into_iter();
        let addresses = ports.flat_map(|port| everywhere.iter().map(move |ip| SocketAddr::new(*ip, port))).collect();
        let namespace = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let listeners = listen_in(Some(namespace), addresses).await.map_err(|error| chain(&error))?;
        let fronts = &self.shared.fronts;
        let labels = labels_of(&self.reference);
        let door = Arc::new(Door(Arc::clone(&pool.service)));
        let front = Front::new(door, fronts.limits.clone(), fronts.connections.clone(), &fronts.meters, labels);
        let (drain, drained) = watch::channel(None);
        let reference = self.reference.clone();
        let task = owned(async move {
            match front.run(listeners, drained).await {
                Ok(ended) if ended.cut > 0 => {
                    tracing::warn!(pod = %reference, calls = ended.cut, "calls were cut off at the end of the grace period");
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(pod = %reference, error = chain(&error), "the front of a function failed")
                }
            }
        });
        let since = function.since.take().unwrap_or_else(Timestamp::now);
        function.front = Some(Listening { sandbox: sandbox.id.clone(), since, drain, task });
        Ok(())
    }

    /// Takes no new call; those under way may end within `grace`. Then nothing of the pool is left.
    pub(super) async fn drain(&mut self, grace: Duration) {
        while let Err(trouble) = self.open_pool(self.past).await {
            tracing::warn!(pod = %self.reference, error = trouble.message, "failed to find the function's environments");
            tokio::time::sleep(backoff::RETRY).await;
        }
        let deadline = *self.memory.stop_by.get_or_insert_with(|| Instant::now() + grace);
        let deadline = deadline.min(Instant::now() + grace);
        self.memory.stop_by = Some(deadline);
        let Some(function) = &mut self.function else { return };
        if let Some(front) = &function.front {
            let until = *self.memory.farewell.get_or_insert_with(|| Instant::now() + FAREWELL.min(grace / 4));
            // Should the Pod have to end sooner, this is dropped and asked anew.
            tokio::time::sleep_until(until.min(deadline)).await;
            front.drain.send_replace(Some(deadline));
        }
        if let Some(pool) = &function.pool {
            let left = deadline.saturating_duration_since(Instant::now());
            pool.service.drain(StdInstant::now() + left).await;
        }
        if let Some(front) = &mut function.front {
            // Clients may still be taking what their environments have said. The front ends with its last connection, and
            // cuts off what is left at the deadline, as does this.
            let _ = timeout_at(deadline, &mut front.task).await;
        }
        function.front = None;
        function.pool = None;
        function.drained = true;
    }

    /// Takes the Pod's labels as they are now, and says what is wrong with them.
    pub(super) fn retune(&mut self) {
        let Some(function) = &mut self.function else { return };
        let Some(mut reading) = labels::read(&self.pod, function.image.as_ref()) else { return };
        if function.in_guests {
            labels::settle_in_guests(&self.pod, &mut reading.settings);
        }
        if let Some(pool) = &function.pool {
            pool.service.renew();
        }
        let changed = *function.settings.borrow() != reading.settings;
        if changed {
            function.settings.send_replace(reading.settings);
            if let Some(pool) = &function.pool {
                pool.service.set(reading.settings);
            }
        }
        if function.image.is_some() && function.complaints != reading.complaints {
            for complaint in &reading.complaints {
                self.shared.events.warning(&self.pod, None, "InvalidFunctionLabel", complaint.to_string());
            }
            function.complaints = reading.complaints;
        }
    }

    /// An ephemeral container of a function Pod would be beside its front, which nobody wants to look into; in which
    /// environment it should be nobody has said.
    pub(super) fn refuse_ephemeral(&mut self) {
        if self.function.is_none() {
            return;
        }
        for container in self.pod.spec.iter().flat_map(ephemeral::all) {
            if !self.memory.waiting.contains_key(&container.name) {
                let trouble = unsupported::ephemeral(&container.name);
                self.shared.events.warning(&self.pod, Some(&container.name), &trouble.reason, trouble.message.clone());
                self.memory.waiting.insert(container.name.clone(), trouble);
            }
        }
    }
}

/// What a front listens on: each family that the Pod has an address of, and IPv4 for those who forward ports to it.
fn everywhere(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let six = addresses.iter().any(IpAddr::is_ipv6).then_some(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    std::iter::once(IpAddr::V4(Ipv4Addr::UNSPECIFIED)).chain(six).collect()
}

/// The ports that the front listens on: every declared TCP port of the Pod, or the usual one.
fn ports(pod: &Pod) -> Vec<u16> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let declared = containers.flat_map(|container| container.ports.iter().flatten());
    let tcp = declared.filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"));
    let mut ports: Vec<u16> = tcp.filter_map(|port| u16::try_from(port.container_port).ok()).collect();
    ports.sort_unstable();
    ports.dedup();
    if ports.is_empty() { vec![DEFAULT_PORT] } else { ports }
}

/// The images that the Pod's environments are to be made of.
fn images(pod: &Pod) -> impl Iterator<Item = &String> {
    let spec = pod.spec.iter();
    let containers = spec.flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers));
    containers.filter_map(|container| container.image.as_ref())
}

fn labels_of(pod: &PodRef) -> FunctionLabels {
    let PodRef { uid, namespace, name } = pod.clone();
    FunctionLabels { namespace, pod: name, uid }
}

fn config_of(image: &Image) -> ImageConfig {
    let variable = |text: &String| text.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    ImageConfig {
        entrypoint: image.entrypoint.clone(),
        command: image.command.clone(),
        environment: image.environment.iter().filter_map(variable).collect(),
    }
}

/// Tells of every change of the number of replicas.
async fn report_scaling(shared: Arc<Shared>, pod: Arc<Pod>, service: Arc<Service>, mut news: mpsc::Receiver<Scaled>) {
    let service = Arc::downgrade(&{ service });
    while let Some(scaled) = news.recv().await {
        let Some(numbers) = service.upgrade().map(|service| service.summary_now()) else { return };
        match scaled {
            Scaled::Up => shared.events.normal(&pod, None, "ScaledUp", format!("Started a replica: {numbers}")),
            Scaled::Down(why) => {
                shared.events.normal(
                    &pod,
                    None,
                    "ScaledDown",
                    format!("Stopped a replica ({}): {numbers}", why_down(why)),
                );
            }
            Scaled::Limited => {
                let text = format!("The node has no capacity for another replica: {numbers}");
                shared.events.warning(&pod, None, "ScaleLimited", text);
            }
        }
    }
}

fn why_down(why: Why) -> &'static str {
    match why {
        Why::Idle => "idle",
        Why::Empty => "without environments",
        Why::Surplus => "more than its labels allow",
        Why::GivenBack => "the node needs its capacity",
        Why::Outdated => "of an earlier image",
        Why::Failed => "failed",
        Why::Drained => "the Pod ends",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pod::testing::{Node, function};

    /// Drains a function whose front needs so long for its clients once it takes no more calls; whether it had it.
    async fn drained(grace: Duration, front: Duration) -> bool {
        let node = Node::new();
        let mut worker = node.worker(function(json!({ "containers": [{ "name": "code", "image": "code" }] })));
        let (drain, mut told) = watch::channel(None);
        let (ended, has_ended) = watch::channel(false);
        let task = owned(async move {
            let _ = told.wait_for(Option::is_some).await;
            tokio::time::sleep(front).await;
            ended.send_replace(true);
        });
        let listening = Listening { sandbox: "s".into(), since: Timestamp::now(), drain, task };
        worker.function.as_mut().unwrap().front = Some(listening);
        worker.drain(grace).await;
        *has_ended.borrow()
    }

    #[tokio::test]
    async fn clients_may_take_the_rest_of_their_answers_until_the_deadline() {
        let short = Duration::from_millis(400);
        assert!(drained(Duration::from_secs(2), short).await);
        assert!(!drained(short, Duration::from_secs(600)).await);
    }
}
