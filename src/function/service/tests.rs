//! The service over replicas that do what a script, or chance, says.

#![allow(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::*;
use crate::function::front::{Lease, Leases as _, Outcome, Reason};

/// Replicas that exist in a table only. Their environments listen all on one socket, each at an address of its own.
struct Stage {
    port: u16,
    /// Something was prepared or dismissed.
    changed: Notify,
    inner: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// How the next replicas start; then they just do.
    replicas: VecDeque<Result<(), NotStarted>>,
    /// How the next environments start; then they just do.
    environments: VecDeque<Result<(), Exit>>,
    /// What is there, and in what verb.
    alive: BTreeSet<ReplicaId>,
    running: BTreeMap<EnvironmentId, Option<oneshot::Sender<Exit>>>,
    at_work: BTreeSet<String>,
    /// So many starts of environments without a script never end by themselves.
    stuck: usize,
    prepared: BTreeSet<EnvironmentId>,
    /// What the ledger is told of them.
    idle: BTreeMap<ReplicaId, bool>,
    /// What probes say.
    probes: BTreeMap<EnvironmentId, mpsc::UnboundedSender<bool>>,
    /// Chance decides how long things take, and how they go.
    chance: Option<StdRng>,
}

fn exit(reason: &str) -> Exit {
    Exit { code: Some(1), reason: reason.to_owned(), message: String::new() }
}

/// Where an environment is.
fn place(id: EnvironmentId) -> Ipv4Addr {
    let [high, low] = u16::try_from(id.replica.0).unwrap().to_be_bytes();
    Ipv4Addr::new(127, high + 1, low, u8::try_from(id.ordinal).unwrap() + 1)
}

impl Stage {
    async fn new() -> Arc<Self> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move { while listener.accept().await.is_ok() {} });
        Arc::new(Self { port, changed: Notify::new(), inner: Mutex::default() })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.inner.lock().unwrap()
    }

    fn kill(&self, id: EnvironmentId, how: Exit) {
        let end = self.table().running.get_mut(&id).unwrap().take().unwrap();
        let _ = end.send(how);
    }

    fn only(&self) -> EnvironmentId {
        let table = self.table();
        assert_eq!(table.running.len(), 1, "{:?}", table.running.keys());
        *table.running.keys().next().unwrap()
    }

    fn run(&self, id: EnvironmentId) -> Started {
        let (end, ended) = oneshot::channel();
        assert!(self.table().running.insert(id, Some(end)).is_none(), "{id} runs already");
        let ended = async move {
            match ended.await {
                Ok(exit) => exit,
                Err(_) => std::future::pending().await,
            }
        };
        let prepared = false;
        Started { address: (place(id), self.port).into(), ended: ended.boxed(), prepared }
    }

    fn adopted(&self, id: EnvironmentId, idle: impl Future<Output = ()> + Send + 'static) -> Adopted {
        self.table().alive.insert(id.replica);
        let Started { address, ended, .. } = self.run(id);
        Adopted { environment: id, address, ended, found: Found::Unknown, idle: idle.boxed() }
    }

    fn nothing_is_left(&self) {
        let table = self.table();
        assert!(table.alive.is_empty() && table.running.is_empty(), "{:?} {:?}", table.alive, table.running.keys());
        assert!(table.prepared.is_empty(), "{:?}", table.prepared);
    }

    /// Waits until exactly these are prepared.
    async fn has_ready(&self, wanted: &[(u64, u32)]) {
        let wanted =
            wanted.iter().map(|(replica, ordinal)| EnvironmentId { replica: ReplicaId(*replica), ordinal: *ordinal });
        let wanted: BTreeSet<_> = wanted.collect();
        let ready = async {
            while self.table().prepared != wanted {
                self.changed.notified().await;
            }
        };
        timeout(Duration::from_secs(60), ready).await.unwrap_or_else(|_| panic!("{:?}", self.table().prepared));
    }

    async fn takes_a_while(&self) {
        let while_ = self.table().chance.as_mut().map(|chance| chance.random_range(0..30));
        if let Some(millis) = while_ {
            sleep(Duration::from_millis(millis)).await;
        }
    }
}

/// Checks that verbs on one thing do not overlap.
struct AtWork<'a>(&'a Stage, String);

impl<'a> AtWork<'a> {
    fn on(stage: &'a Stage, what: String) -> Self {
        assert!(stage.table().at_work.insert(what.clone()), "two verbs at once on {what}");
        Self(stage, what)
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner).at_work.remove(&self.1);
    }
}

#[async_trait]
impl Replicas for Stage {
    async fn start_replica(&self, replica: ReplicaId) -> Result<(), NotStarted> {
        let _work = AtWork::on(self, replica.to_string());
        let scripted = self.table().replicas.pop_front();
        let how = scripted.unwrap_or_else(|| match &mut self.table().chance {
            Some(chance) => match chance.random_range(0..100) {
                0..3 => Err(NotStarted::Denied),
                3..6 => Err(NotStarted::Failed(exit("FailedMount"))),
                _ => Ok(()),
            },
            None => Ok(()),
        });
        if how.is_ok() {
            self.table().alive.insert(replica);
        }
        self.takes_a_while().await;
        how
    }

    async fn stop_replica(&self, replica: ReplicaId) {
        let _work = AtWork::on(self, replica.to_string());
        self.takes_a_while().await;
        let mut table = self.table();
        table.alive.remove(&replica);
        assert!(table.running.keys().all(|id| id.replica != replica), "its environments go first");
    }

    async fn start_environment(&self, environment: EnvironmentId) -> Result<Started, Exit> {
        let _work = AtWork::on(self, environment.to_string());
        assert!(self.table().alive.contains(&environment.replica), "its replica comes first");
        let scripted = self.table().environments.pop_front();
        let stuck = scripted.is_none() && std::mem::take(&mut self.table().stuck) > 0;
        if stuck {
            std::future::pending::<()>().await;
        }
        scripted.unwrap_or(Ok(()))?;
        let mut started = self.run(environment);
        started.prepared = self.table().prepared.remove(&environment);
        self.takes_a_while().await;
        Ok(started)
    }

    async fn stop_environment(&self, environment: EnvironmentId) {
        let _work = AtWork::on(self, environment.to_string());
        self.takes_a_while().await;
        self.table().running.remove(&environment);
    }

    fn readiness(&self, environment: EnvironmentId) -> BoxStream<'static, bool> {
        let (say, said) = mpsc::unbounded_channel();
        self.table().probes.insert(environment, say);
        futures::stream::unfold(said, async |mut said| Some((said.recv().await?, said))).boxed()
    }

    async fn prepare(&self, environment: EnvironmentId) {
        self.takes_a_while().await;
        self.table().prepared.insert(environment);
        self.changed.notify_one();
    }

    async fn dismiss_all_but(&self, kept: &BTreeSet<EnvironmentId>) {
        self.table().prepared.retain(|id| kept.contains(id));
        self.changed.notify_one();
    }

    async fn freeze(&self, _environment: EnvironmentId) {}

    async fn thaw(&self, _environment: EnvironmentId) -> Result<(), Exit> {
        Ok(())
    }

    fn set_idle(&self, replica: ReplicaId, since: Option<Instant>) {
        self.table().idle.insert(replica, since.is_some());
    }
}

fn settings(min: u32, max: u32, environments: u32) -> Settings {
    let idle_timeout = Duration::from_millis(50);
    Settings { min, max, environments, idle_timeout, ..Settings::of(Protocol::Rie) }
}

/// Without an idle timeout that matters.
fn lasting(settings: Settings) -> Settings {
    Settings { idle_timeout: Duration::from_secs(60), ..settings }
}

async fn door(stage: &Arc<Stage>, settings: Settings, found: Vec<Adopted>) -> (Door, mpsc::Receiver<Scaled>) {
    let (service, news) = Service::new(settings, stage.clone(), found);
    (Door(service), news)
}

async fn drained(door: &Door, stage: &Stage, within: Duration) {
    timeout(Duration::from_secs(60), door.0.drain(Instant::now() + within)).await.unwrap();
    stage.nothing_is_left();
}

/// Long enough for what takes no time, short enough to wait for.
const GRACE: Duration = Duration::from_millis(300);

#[tokio::test]
async fn a_call_from_zero_is_granted_and_the_replica_goes_when_idle() {
    let stage = Stage::new().await;
    let (door, mut news) = door(&stage, settings(0, 2, 1), vec![]).await;
    let lease = door.lease().await.unwrap();
    assert_eq!(lease.environment().address().ip(), place(stage.only()));
    assert_eq!(news.recv().await, Some(Scaled::Up));
    lease.finish(Outcome::Answered);
    assert_eq!(news.recv().await, Some(Scaled::Down(Why::Idle)));
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn what_was_denied_is_asked_for_again_when_there_is_room_and_no_start_is_told() {
    let stage = Stage::new().await;
    stage.table().replicas.push_back(Err(NotStarted::Denied));
    let (door, mut news) = door(&stage, settings(0, 2, 1), vec![]).await;
    let began = Instant::now();
    let (lease, ()) = tokio::join!(door.lease(), async {
        assert_eq!(news.recv().await, Some(Scaled::Limited));
        assert!(door.0.summary_now().limited);
        door.0.capacity_freed();
    });
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert_eq!(news.recv().await, Some(Scaled::Up));
    drop(lease);
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn what_cannot_start_refuses_its_callers_with_the_reason() {
    let stage = Stage::new().await;
    stage.table().environments.extend([Err(exit("ErrImagePull")), Err(exit("ErrImagePull"))]);
    let settings = Settings { queue_timeout: GRACE, ..settings(0, 1, 1) };
    let (door, _news) = door(&stage, settings, vec![]).await;
    let refused = door.lease().await.unwrap_err();
    let why = "its environments crash: ErrImagePull, exit code 1".to_owned();
    assert_eq!(refused.reason, Reason::CannotStart(why));
    assert_eq!(door.0.summary_now().crashes, 2);
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn an_environment_that_dies_tells_its_call_and_is_replaced() {
    let stage = Stage::new().await;
    let (door, _news) = door(&stage, settings(0, 1, 1), vec![]).await;
    let lease = door.lease().await.unwrap();
    let first = stage.only();
    stage.kill(first, exit("OOMKilled"));
    assert_eq!(&*lease.environment().lost().await.reason, "OOMKilled, exit code 1");
    let next = door.lease().await.unwrap();
    assert_ne!(stage.only(), first);
    // What the dead one's lease says counts no more.
    lease.finish(Outcome::Lost("broken".into()));
    next.finish(Outcome::Answered);
    assert_eq!(door.0.summary_now().busy, 0);
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn an_environment_whose_probe_fails_gets_no_call_until_it_succeeds_again() {
    let stage = Stage::new().await;
    let (door, _news) =
        door(&stage, Settings { idle_timeout: Duration::from_secs(60), ..settings(0, 1, 1) }, vec![]).await;
    door.lease().await.unwrap().finish(Outcome::Answered);
    let only = stage.only();
    let says = |ready| stage.table().probes[&only].send(ready).unwrap();
    says(false);
    timeout(Duration::from_secs(60), door.0.summary().wait_for(|summary| summary.ready == 0)).await.unwrap().unwrap();
    assert!(timeout(GRACE, door.lease()).await.is_err(), "it is the only one there may be");
    says(true);
    let lease = door.lease().await.unwrap();
    assert_eq!(lease.environment().address().ip(), place(only));
    lease.finish(Outcome::Answered);
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn a_lambda_whose_call_was_dropped_gets_no_other() {
    let stage = Stage::new().await;
    let (door, _news) = door(&stage, settings(0, 1, 1), vec![]).await;
    drop(door.lease().await.unwrap());
    let lease = door.lease().await.unwrap();
    let second = EnvironmentId { replica: ReplicaId(0), ordinal: 1 };
    assert_eq!(lease.environment().address().ip(), place(second));
    drop(lease);
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn who_leaves_the_queue_takes_nothing_along() {
    let stage = Stage::new().await;
    let (door, _news) = door(&stage, settings(0, 1, 1), vec![]).await;
    let held = door.lease().await.unwrap();
    assert!(timeout(GRACE, door.lease()).await.is_err(), "there is one environment");
    assert_eq!(door.0.summary_now().queued, 0);
    held.finish(Outcome::Answered);
    let again = door.lease().await.unwrap();
    assert_eq!(again.environment().address().ip(), place(EnvironmentId { replica: ReplicaId(0), ordinal: 0 }));
    again.finish(Outcome::Answered);
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn who_leaves_just_as_the_grant_comes_leaves_the_environment_to_others() {
    let stage = Stage::new().await;
    let (door, _news) = door(&stage, lasting(settings(0, 1, 1)), vec![]).await;
    let mut held = door.lease().await.unwrap();
    for round in 0..2_000 {
        let mut waiting = Box::pin(door.lease());
        assert!(futures::poll!(&mut waiting).is_pending());
        let start = std::sync::Barrier::new(2);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                start.wait();
                drop(waiting);
            });
            start.wait();
            held.finish(Outcome::Answered);
        });
        let next = timeout(Duration::from_secs(5), door.lease()).await;
        held = next.unwrap_or_else(|_| panic!("busy for ever after {round}: {}", door.0.summary_now())).unwrap();
    }
    held.finish(Outcome::Answered);
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn whoever_leaves_the_queue_of_the_pool_leaves_that_of_the_callers_at_once() {
    let stage = Stage::new().await;
    stage.table().stuck = 1;
    let (door, _news) = door(&stage, settings(0, 1, 1), vec![]).await;
    let mut waiting = Box::pin(door.lease());
    assert!(futures::poll!(&mut waiting).is_pending());
    let call = *door.0.inner().waiting.keys().next().unwrap();
    door.0.feed(Event::ClientGone { call });
    assert!(door.0.inner().waiting.is_empty());
    drop(waiting);
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn a_drain_ends_with_the_last_call_that_waits_also_where_nothing_could_start() {
    let stage = Stage::new().await;
    stage.table().replicas.push_back(Err(NotStarted::Denied));
    let (door, mut news) = door(&stage, Settings { queue_timeout: GRACE, ..settings(0, 1, 1) }, vec![]).await;
    let (refused, ()) = tokio::join!(door.lease(), async {
        assert_eq!(news.recv().await, Some(Scaled::Limited));
        let drain = door.0.drain(Instant::now() + Duration::from_secs(60));
        timeout(Duration::from_secs(10), drain).await.expect("nothing is left");
    });
    assert_eq!(refused.unwrap_err().reason, Reason::ShuttingDown);
    stage.nothing_is_left();
}

#[tokio::test]
async fn an_environment_that_ends_right_after_its_call_broke_off_has_crashed() {
    for outcome in [Outcome::Lost("connection reset".into()), Outcome::Unreachable("connection refused".into())] {
        let stage = Stage::new().await;
        let (door, _news) = door(&stage, lasting(settings(0, 1, 1)), vec![]).await;
        let lease = door.lease().await.unwrap();
        let first = stage.only();
        lease.finish(outcome);
        stage.kill(first, exit("OOMKilled"));
        let mut summary = door.0.summary();
        let crashed = summary.wait_for(|summary| summary.crashes == 1);
        let crash = timeout(Duration::from_secs(10), crashed).await.unwrap().unwrap().crash.clone();
        assert_eq!(crash.unwrap().exit, exit("OOMKilled"));
        let next = door.lease().await.unwrap();
        assert_ne!(stage.only(), first);
        next.finish(Outcome::Answered);
        assert_eq!(door.0.summary_now().crash, None, "what came after it serves");
        drained(&door, &stage, GRACE).await;
    }
}

#[tokio::test]
async fn an_environment_that_broke_off_a_call_and_lives_is_stopped_and_no_crash() {
    let stage = Stage::new().await;
    let (door, _news) = door(&stage, lasting(settings(0, 1, 1)), vec![]).await;
    let lease = door.lease().await.unwrap();
    let first = stage.only();
    lease.finish(Outcome::Lost("connection reset".into()));
    let next = door.lease().await.unwrap();
    assert_ne!(stage.only(), first);
    assert_eq!(door.0.summary_now().crashes, 0);
    next.finish(Outcome::Answered);
    drained(&door, &stage, GRACE).await;
}

/// Calls again in the very moment in which a call is told that its environment is lost.
struct Again {
    door: Arc<Door>,
    refused: Mutex<Vec<Reason>>,
}

impl std::task::Wake for Again {
    fn wake(self: Arc<Self>) {
        if let Some(Err(refused)) = self.door.lease().now_or_never() {
            self.refused.lock().unwrap().push(refused.reason);
        }
    }
}

#[tokio::test]
async fn who_hears_of_the_end_of_an_environment_is_not_sent_there_again() {
    let stage = Stage::new().await;
    let (door, _news) = door(&stage, lasting(Settings { calls: 2, ..settings(0, 1, 1) }), vec![]).await;
    let door = Arc::new(door);
    let lease = door.lease().await.unwrap();
    let again = Arc::new(Again { door: Arc::clone(&door), refused: Mutex::default() });
    {
        let mut lost = std::pin::pin!(lease.environment().lost());
        let waker = std::task::Waker::from(Arc::clone(&again));
        assert!(lost.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_pending());
        stage.kill(stage.only(), exit("Error"));
        let mut summary = door.0.summary();
        timeout(Duration::from_secs(10), summary.wait_for(|summary| summary.crashes == 1)).await.unwrap().unwrap();
        assert!(lost.now_or_never().is_some());
    }
    assert_eq!(*again.refused.lock().unwrap(), []);
    drop(lease);
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn the_ledger_knows_who_is_idle_without_a_call() {
    let stage = Stage::new().await;
    let frozen = EnvironmentId { replica: ReplicaId(4), ordinal: 0 };
    let found = vec![Adopted { found: Found::Frozen, ..stage.adopted(frozen, std::future::pending()) }];
    let (door, _news) = door(&stage, lasting(settings(2, 3, 1)), found).await;
    assert_eq!(stage.table().idle, BTreeMap::from([(ReplicaId(4), true)]));
    timeout(Duration::from_secs(10), door.0.summary().wait_for(|summary| summary.ready == 2)).await.unwrap().unwrap();
    let fresh = ReplicaId(5);
    assert_eq!(stage.table().idle.get(&fresh), Some(&true));
    let visit = door.0.visit().await.unwrap();
    let visited = visit.environment().replica;
    assert_eq!(stage.table().idle.get(&visited), Some(&false));
    drop(visit);
    assert_eq!(stage.table().idle.get(&visited), Some(&true));
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn an_adopted_environment_is_called_once_it_is_idle_and_replaced_if_it_dies() {
    let stage = Stage::new().await;
    let ids = [0, 1].map(|ordinal| EnvironmentId { replica: ReplicaId(4), ordinal });
    let (tell, told) = oneshot::channel::<()>();
    let found =
        vec![stage.adopted(ids[0], async { told.await.unwrap() }), stage.adopted(ids[1], std::future::pending())];
    let (door, _news) = door(&stage, settings(0, 1, 2), found).await;
    assert!(timeout(GRACE, door.lease()).await.is_err(), "nobody knows whether they are idle");
    tell.send(()).unwrap();
    let first = door.lease().await.unwrap();
    assert_eq!(first.environment().address().ip(), place(ids[0]));
    stage.kill(ids[1], exit("Error"));
    let second = door.lease().await.unwrap();
    assert_eq!(second.environment().address().ip(), place(EnvironmentId { replica: ReplicaId(4), ordinal: 2 }));
    first.finish(Outcome::Answered);
    second.finish(Outcome::Answered);
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn a_drain_lets_calls_end_refuses_new_ones_and_cuts_off_at_its_deadline() {
    let stage = Stage::new().await;
    let (door, _news) = door(&stage, settings(1, 2, 1), vec![]).await;
    let [short, long] = [door.lease().await.unwrap(), door.lease().await.unwrap()];
    let began = Instant::now();
    let calls = async {
        door.0.summary().wait_for(|summary| summary.draining).await.unwrap();
        assert_eq!(door.lease().await.unwrap_err().reason, Reason::ShuttingDown);
        short.finish(Outcome::Answered);
        long.environment().lost().await;
        began.elapsed()
    };
    let (cut, ()) = tokio::join!(calls, drained(&door, &stage, GRACE));
    assert!(cut >= GRACE && cut < GRACE + Duration::from_secs(1), "{cut:?}");
}

/// One caller: waits, perhaps leaves, perhaps holds on until its environment dies. False if it left.
async fn caller(door: Arc<Door>, busy: Arc<Mutex<BTreeSet<SocketAddr>>>, seed: u64, limit: Duration) -> bool {
    let mut chance = StdRng::seed_from_u64(seed);
    sleep(Duration::from_millis(chance.random_range(0..800))).await;
    let patience = if chance.random_bool(0.15) { Duration::from_millis(chance.random_range(0..40)) } else { limit };
    let lease: Lease = match timeout(patience, door.lease()).await {
        Ok(Ok(lease)) => lease,
        Ok(Err(_)) => return true,
        Err(_) => {
            assert!(patience < limit, "a call got no answer within {limit:?}");
            return false;
        }
    };
    let environment = lease.environment().clone();
    assert!(busy.lock().unwrap().insert(environment.address()), "two calls in one environment");
    let lost = tokio::select! {
        () = sleep(Duration::from_millis(chance.random_range(0..50))) => false,
        _ = environment.lost() => true,
    };
    let dropped = chance.random_bool(0.1);
    if !dropped {
        busy.lock().unwrap().remove(&environment.address());
    }
    match (lost, dropped) {
        (true, _) => lease.finish(Outcome::Lost("it ended".into())),
        // Whoever is still in there is not known: its address must not be granted again.
        (false, true) => drop(lease),
        (false, false) => lease.finish(Outcome::Answered),
    }
    true
}

/// Forty callers, and an end here and there.
async fn chance_decides(seed: u64) {
    let stage = Stage::new().await;
    stage.table().chance = Some(StdRng::seed_from_u64(seed));
    let most = u32::try_from(seed % 3).unwrap() + 1;
    let settings = Settings {
        queue_timeout: Duration::from_millis(400),
        queue_length: 10,
        ..settings(u32::try_from(seed % 2).unwrap(), most, 1 + most % 2)
    };
    // What a busy machine adds to a timer.
    let limit = settings.queue_timeout + Duration::from_secs(2);
    let (door, _news) = door(&stage, settings, vec![]).await;
    let (door, busy) = (Arc::new(door), Arc::default());
    let numbers = (0..100).map(|n| seed * 1000 + n);
    let callers: Vec<_> = numbers.map(|n| tokio::spawn(caller(door.clone(), Arc::clone(&busy), n, limit))).collect();
    let mut chance = StdRng::seed_from_u64(!seed);
    for _ in 0..20 {
        sleep(Duration::from_millis(chance.random_range(0..80))).await;
        let running =
            stage.table().running.iter().filter(|(_, end)| end.is_some()).map(|(id, _)| *id).collect::<Vec<_>>();
        if !running.is_empty() && chance.random_bool(0.4) {
            stage.kill(running[chance.random_range(0..running.len())], exit("Error"));
        }
        assert!(stage.table().alive.len() <= most as usize, "more replicas than the maximum");
        match chance.random_range(0..6) {
            0..3 => door.0.capacity_freed(),
            3 => door.0.give_back(ReplicaId(chance.random_range(0..8))),
            _ => {}
        }
    }
    let mut answered = 0;
    for caller in callers {
        answered += usize::from(caller.await.unwrap());
    }
    assert!(answered > 60, "seed {seed}: {answered}");
    drained(&door, &stage, GRACE).await;
    let summary = door.0.summary_now();
    assert_eq!((summary.running, summary.queued), (0, 0), "seed {seed}");
}

#[tokio::test]
async fn what_is_ready_is_what_a_call_gets_and_the_next_is_made_ready_after_it() {
    let stage = Stage::new().await;
    let settings = Settings { reserve: 1, idle_timeout: Duration::from_secs(60), ..settings(0, 2, 1) };
    let (door, _news) = door(&stage, settings, vec![]).await;
    stage.has_ready(&[(0, 0)]).await;
    let first = door.lease().await.unwrap();
    assert_eq!(door.0.counts.prepared.get(), 1);
    stage.has_ready(&[(1, 0)]).await;
    let second = door.lease().await.unwrap();
    assert_eq!(second.environment().address().ip(), place(EnvironmentId { replica: ReplicaId(1), ordinal: 0 }));
    assert_eq!(door.0.counts.prepared.get(), 2);
    stage.has_ready(&[]).await;
    first.finish(Outcome::Answered);
    second.finish(Outcome::Answered);
    door.0.set(Settings { reserve: 2, max: 5, ..settings });
    stage.has_ready(&[(2, 0), (3, 0)]).await;
    door.0.set(Settings { reserve: 0, max: 5, ..settings });
    stage.has_ready(&[]).await;
    door.0.set(Settings { reserve: 2, max: 5, ..settings });
    stage.has_ready(&[(2, 0), (3, 0)]).await;
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn a_caller_who_waited_in_vain_is_told_of_the_crash_before() {
    let stage = Stage::new().await;
    let patience = Duration::from_millis(200);
    let (door, _news) = door(&stage, Settings { queue_timeout: patience, ..settings(0, 1, 1) }, vec![]).await;
    // The first start fails; the second takes longer than the call may wait.
    stage.table().environments.push_back(Err(exit("NotListening")));
    stage.table().stuck = 1;
    let refused = door.lease().await.unwrap_err();
    let Reason::CannotStart(why) = &refused.reason else { panic!("{refused}") };
    assert!(why.contains("its environments crash: NotListening"), "{why}");
    drained(&door, &stage, GRACE).await;
}

#[tokio::test]
async fn whatever_happens_each_call_is_answered_once_and_no_environment_serves_two() {
    futures::future::join_all((0..24).map(chance_decides)).await;
}
