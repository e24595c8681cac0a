//! Carries out what a pool decides: between the front's calls and whatever makes replicas.
//!
//! ```text
//! Leases::lease --CallArrived--.                       .--Grant/Refuse--> the waiting lease
//! Lease ends ----CallEnded-----+--> feed: Pool::handle +--Start/Stop/...-> attendant (one per replica, environment)
//! attendant, alarm ------------'                       '--> Summary on a watch channel
//! ```
//! A call that finds an idle environment takes no other task's turn: the pool is behind a lock that is never held
//! across a wait. What takes time is done by an attendant, one task per replica and per environment, in the order in
//! which the pool decided it.

mod alarm;
mod attendant;
mod keeper;
mod lease;
mod meters;
mod replicas;
mod visit;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::front::{Environment, TryAgain};
use super::pool_state::{
    Action, CallId, EnvironmentId, Event, Exit, Found, Pool, ReplicaId, Reserve, Summary, VisitId, Why,
};
use super::protocol::Protocol;
use super::settings::Settings;
use crate::shutdown::owned;
use attendant::{Desk, Order, ReplicaOrder};
pub use lease::Door;
use lease::{Caller, Granted};
use meters::Counts;
pub use meters::Meters;
pub use replicas::{Adopted, NotStarted, Replicas, Started};
pub use visit::Visit;
use visit::Visitor;

/// Orders that an attendant may have before it. It has at most one each to start, freeze, thaw and stop.
const ORDERS: usize = 8;
/// Changes of scale that may wait to be told; more are only logged.
const NEWS: usize = 256;

/// The pool of one function, at work. Dropped, it stops working: what runs is left running.
pub struct Service {
    inner: Mutex<Inner>,
    replicas: Arc<dyn Replicas>,
    next_call: AtomicU64,
    /// The next deadline has moved forward, or the service is gone.
    alarm: Arc<Notify>,
    summary: watch::Sender<Summary>,
    counts: Counts,
    scaled: mpsc::Sender<Scaled>,
    /// What is to be prepared; `None`: nothing any more.
    reserve: watch::Sender<Option<Arc<Reserve>>>,
    ring: OnceLock<AbortOnDropHandle<()>>,
    tasks: TaskTracker,
}

struct Inner {
    pool: Pool,
    /// Calls that wait for their environment.
    waiting: HashMap<CallId, Caller>,
    /// Visitors that wait for theirs.
    visitors: HashMap<VisitId, Visitor>,
    /// Calls that run, and where.
    running: HashMap<CallId, EnvironmentId>,
    environments: HashMap<EnvironmentId, Place>,
    replicas: HashMap<ReplicaId, mpsc::Sender<ReplicaOrder>>,
    /// When the alarm goes off.
    armed: Option<Instant>,
}

/// What a waiting call gets.
type Answer = Result<Granted, TryAgain>;

/// An environment as its calls and its attendant know it.
struct Place {
    orders: mpsc::Sender<Order>,
    /// Cancelled once its attendant is done.
    ended: CancellationToken,
    /// What leases are made of, once it listens.
    front: Option<Arc<Environment>>,
    /// When it first did.
    ready: Option<Instant>,
}

/// A change of the number of replicas, for an event on the Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scaled {
    /// A replica was started.
    Up,
    /// One was stopped.
    Down(Why),
    /// None could be started for want of capacity on the node.
    Limited,
}

/// What is done once the lock is free: a lease that nobody takes comes back by feeding the pool.
#[derive(Default)]
struct Afterwards {
    answers: Vec<(Caller, Answer)>,
    entries: Vec<(Visitor, Result<EnvironmentId, TryAgain>)>,
    lost: Vec<(Arc<Environment>, String)>,
    /// A replica that became busy or idle.
    touched: Option<ReplicaId>,
}

// === impl Service ===

impl Service {
    /// A pool that begins with what was found running, and the news of its scaling. To be made within the runtime that
    /// it runs on.
    pub fn new(
        settings: Settings,
        replicas: Arc<dyn Replicas>,
        found: Vec<Adopted>,
    ) -> (Arc<Self>, mpsc::Receiver<Scaled>) {
        let (scaled, news) = mpsc::channel(NEWS);
        let inner = Inner {
            waiting: HashMap::new(),
            visitors: HashMap::new(),
            running: HashMap::new(),
            environments: HashMap::new(),
            replicas: HashMap::new(),
            armed: None,
            pool: Pool::new(settings),
        };
        let service = Arc::new(Self {
            inner: Mutex::new(inner),
            replicas,
            next_call: AtomicU64::new(0),
            alarm: Arc::new(Notify::new()),
            summary: watch::Sender::new(Summary::default()),
            counts: Counts::default(),
            scaled,
            reserve: watch::Sender::new(Some(Arc::default())),
            ring: OnceLock::new(),
            tasks: TaskTracker::new(),
        });
        service.adopt(found);
        let keeper = keeper::keep(Arc::clone(&service.replicas), service.reserve.subscribe());
        service.tasks.spawn(keeper);
        let alarm = owned(alarm::ring(Arc::downgrade(&service), Arc::clone(&service.alarm)));
        // Set once, here.
        let _ = service.ring.set(alarm);
        (service, news)
    }

    /// The pool in numbers. A receiver is woken when replicas, environments or their health change, not by each call.
    pub fn summary(&self) -> watch::Receiver<Summary> {
        self.summary.subscribe()
    }

    /// The pool in numbers at this moment, calls included.
    pub fn summary_now(&self) -> Summary {
        self.inner().pool.summary(Instant::now())
    }

    /// The Pod's labels have changed.
    pub fn set(self: &Arc<Self>, settings: Settings) {
        self.feed(Event::SettingsChanged(settings));
    }

    /// Environments are made of something else from now on: those there are replaced as their calls end.
    pub fn replace_all(self: &Arc<Self>) {
        self.feed(Event::Outdated);
    }

    /// How environments are called.
    fn protocol(&self) -> Protocol {
        self.inner().pool.settings().protocol
    }

    /// What environments are made from has changed, perhaps: those prepared are looked at again.
    pub fn renew(&self) {
        self.reserve.send_modify(|_| {});
    }

    /// The node may have capacity again.
    pub fn capacity_freed(self: &Arc<Self>) {
        self.feed(Event::CapacityFreed);
    }

    /// The node needs a replica's capacity back.
    pub fn give_back(self: &Arc<Self>, replica: ReplicaId) {
        self.feed(Event::GiveBack { replica });
    }

    /// No new call from now on; waiting and running ones may end until then. Resolves when nothing is left. Dropped, the
    /// drain goes on.
    pub async fn drain(self: &Arc<Self>, until: Instant) {
        self.feed(Event::Drain { until });
        let mut summary = self.summary();
        while !self.inner().pool.is_drained() {
            if summary.changed().await.is_err() {
                return;
            }
        }
        self.reserve.send_replace(None);
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn adopt(self: &Arc<Self>, found: Vec<Adopted>) {
        let now = Instant::now();
        let mut by_replica: HashMap<ReplicaId, Vec<(u32, Found)>> = HashMap::new();
        for Adopted { environment: id, found, .. } in &found {
            by_replica.entry(id.replica).or_default().push((id.ordinal, *found));
        }
        let adopted: Vec<_> = by_replica.keys().copied().collect();
        {
            let mut inner = self.inner();
            for (replica, environments) in by_replica {
                inner.pool.adopt(replica, &environments, now);
                let orders = self.attend_replica(replica);
                inner.replicas.insert(replica, orders);
            }
            for adopted in found {
                let id = adopted.environment;
                let (orders, taken) = mpsc::channel(ORDERS);
                let (address, frozen) = (adopted.address, adopted.found == Found::Frozen);
                let mut place = self.attend(orders, self.desk().adopted(adopted, taken));
                // It listens, if not yet; one that is unknown is told of once it is known.
                place.front = frozen.then(|| Environment::new(address));
                inner.environments.insert(id, place);
            }
        }
        self.feed(Event::Tick);
        // What is frozen has no more to say of itself.
        for replica in adopted {
            let since = self.inner().pool.idle_since(replica);
            self.replicas.set_idle(replica, since);
        }
    }

    /// Takes an event in and carries out what follows from it.
    fn feed(self: &Arc<Self>, event: Event) {
        let now = Instant::now();
        let mut after = Afterwards::default();
        let mut inner = self.inner();
        // Told before what follows from it: a replica is started before it is stopped.
        let scaled = match event {
            Event::ReplicaStarted { .. } => Some(Scaled::Up),
            Event::ReplicaDenied { .. } => Some(Scaled::Limited),
            _ => None,
        };
        after.touched = inner.touched(&event).map(|environment| environment.replica);
        if let Some(scaled) = scaled {
            self.say(scaled);
        }
        for action in inner.pool.handle(event, now) {
            self.act(&mut inner, action, &mut after);
        }
        let idle = after.touched.map(|replica| (replica, inner.pool.idle_since(replica)));
        let deadline = inner.pool.next_deadline();
        // A deadline that moves back needs no word: the alarm goes off early, and sets itself anew.
        if deadline.is_some_and(|new| inner.armed.is_none_or(|armed| new < armed)) {
            inner.armed = deadline;
            self.alarm.notify_one();
        }
        let (summary, drained) = (inner.pool.summary(now), inner.pool.is_drained());
        self.reserve.send_if_modified(|before| match before {
            Some(reserve) if !Arc::ptr_eq(reserve, inner.pool.reserve()) => {
                *reserve = Arc::clone(inner.pool.reserve());
                true
            }
            _ => false,
        });
        drop(inner);
        if let Some((replica, since)) = idle {
            self.replicas.set_idle(replica, since);
        }
        self.summary.send_if_modified(|before| {
            let differs = outline(before) != outline(&summary);
            *before = summary;
            // The last of a drain may be a call that waited, which is not worth a word otherwise.
            differs || drained
        });
        after.finish();
    }

    fn act(self: &Arc<Self>, inner: &mut Inner, action: Action, after: &mut Afterwards) {
        match action {
            Action::StartReplica { replica } => {
                let orders = self.attend_replica(replica);
                give(&orders, ReplicaOrder::Start);
                inner.replicas.insert(replica, orders);
            }
            Action::StopReplica { replica, why } => {
                self.say(Scaled::Down(why));
                inner.stop_replica(replica, after);
            }
            Action::StartEnvironment { environment, warm_up } => {
                let (orders, taken) = mpsc::channel(ORDERS);
                let patience = inner.pool.settings().listen_timeout;
                give(&orders, Order::Start { warm_up, patience });
                let place = self.attend(orders, self.desk().environment(environment, taken));
                inner.environments.insert(environment, place);
            }
            Action::StopEnvironment { environment } => inner.stop(environment, after),
            Action::FreezeEnvironment { environment } => inner.order(environment, Order::Freeze),
            Action::ThawEnvironment { environment } => inner.order(environment, Order::Thaw),
            Action::Grant { call, environment } => {
                if let Some(caller) = inner.waiting.remove(&call) {
                    inner.running.insert(call, environment);
                    after.touched = Some(environment.replica);
                    let place = inner.environments.get(&environment);
                    self.counts.granted(caller.since, place.and_then(|place| place.ready));
                    let front = place.and_then(|place| place.front.clone());
                    after.answers.push((caller, self.grant(call, front)));
                }
            }
            Action::Refuse { call, try_again } => {
                if let Some(caller) = inner.waiting.remove(&call) {
                    after.answers.push((caller, Err(lease::refusal(&try_again, inner.pool.last_crash()))));
                }
            }
            Action::FailCall { call, exit } => {
                let place = inner.running.remove(&call).and_then(|id| inner.environments.get_mut(&id));
                if let Some(front) = place.and_then(|place| place.front.take()) {
                    after.lost.push((front, exit.to_string()));
                }
            }
            Action::Enter { visit, environment } => {
                after.touched = Some(environment.replica);
                let visitor = inner.visitors.remove(&visit);
                after.entries.extend(visitor.map(|visitor| (visitor, Ok(environment))));
            }
            Action::RefuseVisit { visit, try_again } => {
                let refusal = lease::refusal(&try_again, inner.pool.last_crash());
                let visitor = inner.visitors.remove(&visit);
                after.entries.extend(visitor.map(|visitor| (visitor, Err(refusal))));
            }
        }
    }

    fn desk(self: &Arc<Self>) -> Desk {
        Desk { service: Arc::downgrade(self), replicas: Arc::clone(&self.replicas) }
    }

    fn attend(&self, orders: mpsc::Sender<Order>, work: impl Future<Output = ()> + Send + 'static) -> Place {
        let ended = CancellationToken::new();
        let done = ended.clone().drop_guard();
        self.tasks.spawn(async move {
            let _done = done;
            work.await;
        });
        Place { orders, ended, front: None, ready: None }
    }

    fn attend_replica(self: &Arc<Self>, id: ReplicaId) -> mpsc::Sender<ReplicaOrder> {
        let (orders, taken) = mpsc::channel(ORDERS);
        self.tasks.spawn(self.desk().replica(id, taken));
        orders
    }

    /// An environment listens.
    fn ready(self: &Arc<Self>, environment: EnvironmentId, front: Arc<Environment>) {
        if let Some(place) = self.inner().environments.get_mut(&environment) {
            place.front = Some(front);
            place.ready.get_or_insert_with(Instant::now);
        }
        self.feed(Event::EnvironmentReady { environment });
    }

    /// An environment has ended by itself. The pool is told before its calls are: woken, they may want another.
    fn lost(self: &Arc<Self>, environment: EnvironmentId, exit: Exit) {
        self.feed(Event::EnvironmentDied { environment, exit });
    }

    /// Nothing is left of an environment.
    fn forget_environment(self: &Arc<Self>, environment: EnvironmentId) {
        self.inner().environments.remove(&environment);
        self.feed(Event::EnvironmentStopped { environment });
    }

    /// Nothing is left of a replica.
    fn forget_replica(self: &Arc<Self>, replica: ReplicaId) {
        self.inner().replicas.remove(&replica);
        self.feed(Event::ReplicaStopped { replica });
    }

    fn say(&self, scaled: Scaled) {
        if let Err(error) = self.scaled.try_send(scaled) {
            tracing::debug!(%error, "a change of scale is not told");
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic inside the pool leaves it as it was decided: to go on is better than to serve nobody.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new_call(&self) -> CallId {
        CallId(self.next_call.fetch_add(1, Ordering::Relaxed))
    }
}

impl Inner {
    /// Notes which calls come to their end with an event. Returns the environment that it makes busy or idle, before
    /// anything is decided.
    fn touched(&mut self, event: &Event) -> Option<EnvironmentId> {
        match event {
            Event::CallEnded { call, .. } | Event::CallLost { call } => self.running.remove(call),
            Event::ClientGone { call } => {
                // With its place in the pool's queue, under one lock: a grant always finds its caller.
                self.waiting.remove(call);
                None
            }
            Event::EnvironmentReady { environment }
            | Event::EnvironmentDied { environment, .. }
            | Event::EnvironmentStopped { environment } => Some(*environment),
            Event::VisitEnded { visit } => self.pool.visited(*visit),
            _ => None,
        }
    }

    fn order(&self, environment: EnvironmentId, order: Order) {
        if let Some(place) = self.environments.get(&environment) {
            give(&place.orders, order);
        }
    }

    /// Nothing runs in it any more, or may.
    fn stop(&mut self, environment: EnvironmentId, after: &mut Afterwards) {
        if let Some(place) = self.environments.get_mut(&environment) {
            let front = place.front.take();
            after.lost.extend(front.map(|front| (front, "the environment was stopped".to_owned())));
        }
        self.order(environment, Order::Stop { broke: self.pool.broke(environment) });
    }

    /// Its environments first; the replica's attendant waits for theirs.
    fn stop_replica(&mut self, replica: ReplicaId, after: &mut Afterwards) {
        let ids: Vec<_> = self.environments.keys().filter(|id| id.replica == replica).copied().collect();
        let ended = ids.iter().filter_map(|id| self.environments.get(id)).map(|place| place.ended.clone()).collect();
        ids.into_iter().for_each(|id| self.stop(id, after));
        if let Some(orders) = self.replicas.get(&replica) {
            give(orders, ReplicaOrder::Stop(ended));
        }
    }
}

impl Afterwards {
    fn finish(self) {
        for (environment, why) in self.lost {
            environment.lose(why);
        }
        for (caller, answer) in self.answers {
            // A caller who has left drops what it is given.
            drop(caller.answer.send(answer));
        }
        for (visitor, entry) in self.entries {
            drop(visitor.send(entry));
        }
    }
}

/// Gives an attendant an order. One that is gone needs none.
fn give<T>(orders: &mpsc::Sender<T>, order: T) {
    if let Err(mpsc::error::TrySendError::Full(_)) = orders.try_send(order) {
        tracing::error!("an attendant has more orders than there are kinds");
    }
}

/// What of a pool is worth waking somebody for.
fn outline(summary: &Summary) -> Summary {
    Summary { busy: 0, tainted: 0, running: 0, queued: 0, ..summary.clone() }
}

#[cfg(test)]
mod tests;
