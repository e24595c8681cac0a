//! A pool in the situations that the design names, one by one. `model` checks the rules on random sequences.

mod model;

use std::time::{Duration, Instant};

use super::*;
use crate::function::protocol::Protocol;

/// A pool with a clock that is set by hand, in milliseconds.
struct Hand {
    pool: Pool,
    start: Instant,
}

impl Hand {
    fn new(change: impl Fn(&mut Settings)) -> Self {
        let mut settings = Settings { environments: 1, ..Settings::of(Protocol::Rie) };
        change(&mut settings);
        Self { pool: Pool::new(settings), start: Instant::now() }
    }

    fn at(&mut self, millis: u64, event: Event) -> Vec<Action> {
        self.pool.handle(event, self.start + Duration::from_millis(millis))
    }

    /// The next deadline, once everything was looked at.
    fn deadline(&mut self, millis: u64) -> Option<u64> {
        assert_eq!(self.at(millis, Event::Tick), []);
        let at = self.pool.next_deadline()?;
        Some(u64::try_from((at - self.start).as_millis()).unwrap())
    }

    fn call(&mut self, millis: u64, call: u64) -> Vec<Action> {
        self.at(millis, Event::CallArrived { call: CallId(call) })
    }

    fn ended(&mut self, millis: u64, call: u64) -> Vec<Action> {
        self.at(millis, Event::CallEnded { call: CallId(call), reuse: true })
    }

    fn started(&mut self, millis: u64, id: u64) -> Vec<Action> {
        self.at(millis, Event::ReplicaStarted { replica: ReplicaId(id) })
    }

    fn ready(&mut self, millis: u64, id: EnvironmentId) -> Vec<Action> {
        self.at(millis, Event::EnvironmentReady { environment: id })
    }

    fn died(&mut self, millis: u64, id: EnvironmentId) -> Vec<Action> {
        self.at(millis, Event::EnvironmentDied { environment: id, exit: exit() })
    }

    fn stopped(&mut self, millis: u64, id: u64) -> Vec<Action> {
        self.at(millis, Event::ReplicaStopped { replica: ReplicaId(id) })
    }

    fn summary(&self) -> Summary {
        self.pool.summary(self.start)
    }

    /// Lets replicas with one idle environment each be there, all ready at 0, as if by calls.
    fn with_idle(mut self, replicas: u64) -> Self {
        (0..replicas).for_each(|id| self.adopt(0, id, &[(0, Found::Idle)]));
        self
    }

    fn adopt(&mut self, millis: u64, id: u64, environments: &[(u32, Found)]) {
        self.pool.adopt(ReplicaId(id), environments, self.start + Duration::from_millis(millis));
    }
}

fn env(replica: u64, ordinal: u32) -> EnvironmentId {
    EnvironmentId { replica: ReplicaId(replica), ordinal }
}

fn exit() -> Exit {
    Exit { code: Some(137), reason: "OOMKilled".to_owned(), message: String::new() }
}

fn start(id: u64) -> Action {
    Action::StartReplica { replica: ReplicaId(id) }
}

fn start_environment(id: EnvironmentId) -> Action {
    Action::StartEnvironment { environment: id, warm_up: false }
}

fn stop(id: u64, why: Why) -> Action {
    Action::StopReplica { replica: ReplicaId(id), why }
}

fn grant(call: u64, environment: EnvironmentId) -> Action {
    Action::Grant { call: CallId(call), environment }
}

fn refuse(call: u64, reason: Reason, seconds: u64) -> Action {
    Action::Refuse { call: CallId(call), try_again: TryAgain { reason, retry_after: Duration::from_secs(seconds) } }
}

#[test]
fn an_environment_that_is_not_ready_gets_no_new_call_until_it_is() {
    let mut hand = Hand::new(|_| {}).with_idle(1);
    let probed = |ready| Event::EnvironmentProbed { environment: env(0, 0), ready };
    assert_eq!(hand.call(0, 1), [grant(1, env(0, 0))]);
    assert_eq!((hand.at(1, probed(false)), hand.summary().ready), (vec![], 0), "the call goes on");
    assert_eq!(hand.ended(2, 1), []);
    assert_eq!(hand.call(3, 2), [start(1)], "another is started for the next one");
    assert_eq!(hand.at(4, probed(true)), [grant(2, env(0, 0))]);
    assert_eq!(hand.summary().ready, 1);
}

#[test]
fn what_is_not_ready_is_not_frozen_since_its_probes_could_not_see_it_recover() {
    let mut hand = Hand::new(|s| s.freeze_after = Some(Duration::from_millis(100))).with_idle(1);
    let probed = |ready| Event::EnvironmentProbed { environment: env(0, 0), ready };
    assert_eq!(hand.at(0, probed(false)), []);
    assert_eq!(hand.at(200, Event::Tick), []);
    assert_eq!(hand.at(300, probed(true)), [Action::FreezeEnvironment { environment: env(0, 0) }]);
}

#[test]
fn the_first_call_starts_a_replica_and_gets_its_environment() {
    let mut hand = Hand::new(|_| {});
    assert_eq!(hand.at(0, Event::Tick), []);
    assert_eq!(hand.call(0, 1), [start(0)]);
    assert_eq!(hand.started(100, 0), [start_environment(env(0, 0))]);
    assert_eq!(hand.ready(300, env(0, 0)), [grant(1, env(0, 0))]);
    assert_eq!(hand.ended(400, 1), []);
    assert_eq!(hand.call(500, 2), [grant(2, env(0, 0))]);
    assert_eq!(hand.summary().to_string(), "1/20 replicas, 1 environments, 1 busy, 0 queued");
}

#[test]
fn a_pool_with_min_zero_goes_back_to_zero_after_the_idle_timeout() {
    let mut hand = Hand::new(|s| s.idle_timeout = Duration::from_secs(60)).with_idle(1);
    assert_eq!(hand.call(1_000, 1), [grant(1, env(0, 0))]);
    assert_eq!(hand.deadline(1_000), None, "a long call holds everything");
    assert_eq!(hand.at(1_000_000, Event::Tick), []);
    assert_eq!(hand.ended(1_000_000, 1), []);
    assert_eq!(hand.deadline(1_000_000), Some(1_060_000));
    assert_eq!(hand.at(1_059_999, Event::Tick), []);
    assert_eq!(hand.at(1_060_000, Event::Tick), [stop(0, Why::Idle)]);
    assert_eq!(hand.summary().replicas, 1, "what is stopping still takes its place");
    assert_eq!(hand.stopped(1_060_200, 0), []);
    assert_eq!(hand.summary().replicas, 0);
    assert_eq!(hand.deadline(1_060_200), None);
}

#[test]
fn the_minimum_is_started_warm_and_kept() {
    let mut hand = Hand::new(|s| (s.min, s.warm_up) = (2, true));
    assert_eq!(hand.at(0, Event::Tick), [start(0), start(1)]);
    for id in 0..2 {
        let warm = Action::StartEnvironment { environment: env(id, 0), warm_up: true };
        assert_eq!(hand.started(0, id), [warm]);
        assert!(!hand.summary().is_ready());
        hand.ready(0, env(id, 0));
    }
    assert!(hand.summary().is_ready());
    assert_eq!(hand.at(10_000_000, Event::Tick), []);
    assert_eq!(hand.deadline(10_000_000), None);
}

#[test]
fn no_more_starts_than_calls_wait_and_never_more_replicas_than_the_maximum() {
    let mut hand = Hand::new(|s| (s.max, s.queue_length) = (3, 4));
    for call in 0..3 {
        assert_eq!(hand.call(0, call), [start(call)]);
    }
    for call in 3..4 {
        assert_eq!(hand.call(0, call), []);
    }
    assert_eq!(hand.call(0, 4), [refuse(4, Reason::QueueFull, 1)]);
    hand.started(0, 0);
    assert_eq!(hand.ready(0, env(0, 0)), [grant(0, env(0, 0))]);
    assert_eq!(hand.call(0, 5), []);
    assert_eq!(hand.at(30_000, Event::Tick).len(), 4);
    assert_eq!(hand.summary().queued, 0);
}

#[test]
fn environments_of_a_replica_are_started_before_another_replica_is() {
    let mut hand = Hand::new(|s| s.environments = 2);
    assert_eq!(hand.call(0, 1), [start(0)]);
    assert_eq!(hand.call(0, 2), []);
    assert_eq!(hand.call(0, 3), [start(1)]);
    assert_eq!(hand.started(0, 0), [start_environment(env(0, 0)), start_environment(env(0, 1))]);
    assert_eq!(hand.started(0, 1), [start_environment(env(1, 0))]);
    hand.ready(0, env(0, 0));
    assert_eq!(hand.ended(10, 1), [grant(2, env(0, 0))], "whoever is free first takes the next");
    assert_eq!(hand.call(20, 4), [], "two are starting for two that wait");
    assert_eq!(hand.call(20, 5), [start_environment(env(1, 1))]);
}

#[test]
fn the_environment_used_last_goes_first_and_the_longest_idle_replica_goes_away_first() {
    let mut hand = Hand::new(|s| s.idle_timeout = Duration::from_secs(60)).with_idle(3);
    for call in 0..3 {
        hand.call(0, call);
    }
    hand.ended(10, 2);
    hand.ended(20, 0);
    hand.ended(30, 1);
    let of = |call: u64| env(2 - call, 0);
    assert_eq!(hand.call(40, 7), [grant(7, of(1))]);
    hand.ended(50, 7);
    assert_eq!(hand.deadline(50), Some(60_010));
    assert_eq!(hand.at(60_020, Event::Tick), [stop(of(2).replica.0, Why::Idle), stop(of(0).replica.0, Why::Idle)]);
}

#[test]
fn calls_gather_in_replicas_that_are_in_use() {
    let mut hand = Hand::new(|s| s.environments = 2);
    hand.adopt(0, 0, &[(0, Found::Idle), (1, Found::Idle)]);
    hand.adopt(5, 1, &[(0, Found::Idle), (1, Found::Idle)]);
    assert_eq!(hand.call(10, 1), [grant(1, env(1, 1))]);
    hand.ended(20, 1);
    assert_eq!(hand.call(30, 2), [grant(2, env(1, 1))]);
    assert_eq!(hand.call(30, 3), [grant(3, env(1, 0))]);
    assert_eq!(hand.call(30, 4), [grant(4, env(0, 1))]);
}

#[test]
fn a_dead_environment_fails_its_call_and_is_replaced_while_others_notice_nothing() {
    let mut hand = Hand::new(|s| s.max = 5).with_idle(2);
    assert_eq!(hand.call(0, 1), [grant(1, env(1, 0))]);
    assert_eq!(hand.call(0, 2), [grant(2, env(0, 0))]);
    let failed = Action::FailCall { call: CallId(1), exit: exit() };
    let removed = Action::StopEnvironment { environment: env(1, 0) };
    assert_eq!(hand.died(10, env(1, 0)), [failed, removed, start_environment(env(1, 1))]);
    assert_eq!(hand.ended(11, 1), [], "too late");
    assert_eq!(hand.ended(11, 2), []);
    assert_eq!(hand.summary().crashes, 1);
}

#[test]
fn a_dead_replica_fails_all_its_calls_and_is_replaced() {
    let mut hand = Hand::new(|s| s.environments = 2);
    hand.adopt(0, 4, &[(0, Found::Idle), (1, Found::Idle)]);
    hand.call(0, 1);
    hand.call(0, 2);
    hand.at(0, Event::ClientGone { call: CallId(2) });
    let actions = hand.at(5, Event::ReplicaFailed { replica: ReplicaId(4), exit: exit() });
    let failed = Action::FailCall { call: CallId(1), exit: exit() };
    assert_eq!(actions, [failed, stop(4, Why::Failed), start(5)]);
}

#[test]
fn starts_that_fail_wait_as_a_container_does_and_hopeless_calls_are_told_when_to_come_back() {
    let mut hand = Hand::new(|s| (s.min, s.queue_timeout) = (1, Duration::from_secs(15)));
    assert_eq!(hand.at(0, Event::Tick), [start(0)]);
    assert_eq!(hand.started(0, 0), [start_environment(env(0, 0))]);
    let removed = |ordinal| Action::StopEnvironment { environment: env(0, ordinal) };
    assert_eq!(hand.died(0, env(0, 0)), [removed(0), start_environment(env(0, 1))], "the first restart is immediate");
    assert_eq!(hand.died(1_000, env(0, 1)), [removed(1)]);
    assert_eq!(hand.deadline(1_000), Some(11_000));
    assert_eq!(hand.call(2_000, 1), [], "it can be served in time");
    assert_eq!(hand.at(10_999, Event::Tick), []);
    assert_eq!(hand.at(11_000, Event::Tick), [start_environment(env(0, 2))]);
    assert_eq!(hand.died(12_000, env(0, 2)), [removed(2), refuse(1, Reason::CrashLoop, 20)]);
    assert_eq!(hand.call(13_000, 2), [refuse(2, Reason::CrashLoop, 19)]);
    let crash = hand.pool.summary(hand.start + Duration::from_secs(13)).crash.unwrap();
    assert_eq!((crash.exit, crash.until), (exit(), Some(hand.start + Duration::from_secs(32))));
    assert_eq!(hand.at(32_000, Event::Tick), [start_environment(env(0, 3))]);
    hand.ready(33_000, env(0, 3));
    hand.call(34_000, 3);
    hand.ended(35_000, 3);
    assert_eq!(hand.summary().crash, None, "a call served forgives");
}

#[test]
fn who_waited_for_what_had_crashed_before_is_told_of_the_crash() {
    let mut hand = Hand::new(|s| (s.max, s.queue_timeout) = (1, Duration::from_secs(5)));
    assert_eq!(hand.call(0, 1), [start(0)]);
    hand.started(100, 0);
    let again = [Action::StopEnvironment { environment: env(0, 0) }, start_environment(env(0, 1))];
    assert_eq!(hand.died(3_000, env(0, 0)), again, "the first restart is immediate");
    // The second start takes so long that the call's time is up before that has failed, too.
    assert_eq!(hand.deadline(3_000), Some(5_000));
    assert_eq!(hand.at(5_000, Event::Tick), [refuse(1, Reason::CrashLoop, 1)]);
    assert_eq!(hand.pool.last_crash(), Some(&exit()));
}

#[test]
fn who_waited_for_a_slow_start_is_told_so() {
    let mut hand = Hand::new(|s| s.queue_timeout = Duration::from_secs(5));
    hand.call(0, 1);
    hand.started(100, 0);
    assert_eq!(hand.at(5_000, Event::Tick), [refuse(1, Reason::Starting, 1)]);
}

#[test]
fn what_is_next_in_line_is_what_starts_next() {
    let mut hand = Hand::new(|s| (s.max, s.environments, s.reserve) = (2, 2, 3));
    let line = |hand: &Hand| (hand.pool.reserve().environments.clone(), hand.pool.reserve().calm);
    assert_eq!(line(&hand), (vec![], false), "nobody has looked at it yet");
    hand.at(0, Event::Tick);
    assert_eq!(line(&hand), (vec![env(0, 0), env(0, 1), env(1, 0)], true));
    assert_eq!(hand.call(1, 1), [start(0)]);
    assert_eq!(line(&hand), (vec![env(0, 1), env(1, 0), env(1, 1)], false), "something starts");
    assert_eq!(hand.pool.reserve().starting, [env(0, 0)], "and is not let go");
    hand.started(2, 0);
    hand.ready(3, env(0, 0));
    assert_eq!(line(&hand), (vec![env(0, 1), env(1, 0), env(1, 1)], true));
    assert_eq!(hand.call(4, 2), [start_environment(env(0, 1))]);
    assert_eq!(line(&hand), (vec![env(1, 0), env(1, 1)], false), "no more than the maximum");
    hand.ready(5, env(0, 1));
    assert_eq!(hand.call(6, 3), [start(1)]);
    hand.at(7, Event::ReplicaDenied { replica: ReplicaId(1) });
    assert_eq!(line(&hand).0, vec![], "the node has nothing to spare");
    hand.at(8, Event::CapacityFreed);
    assert_eq!(line(&hand).0, vec![env(2, 1)]);
    hand.at(9, Event::Drain { until: hand.start + Duration::from_secs(9) });
    assert_eq!(line(&hand).0, vec![], "nothing is started any more");
}

#[test]
fn nothing_is_prepared_after_a_crash_until_a_call_is_served() {
    let mut hand = Hand::new(|_| {});
    hand.call(0, 1);
    hand.started(1, 0);
    hand.died(2, env(0, 0));
    hand.ready(3, env(0, 1));
    assert_eq!((&hand.pool.reserve().environments, hand.pool.reserve().calm), (&vec![env(1, 0)], false));
    hand.ended(4, 1);
    assert!(hand.pool.reserve().calm);
}

#[test]
fn a_client_that_goes_leaves_the_queue_or_taints_the_environment_until_its_call_ends() {
    let mut hand = Hand::new(|s| s.max = 1).with_idle(1);
    hand.call(0, 1);
    assert_eq!(hand.call(0, 2), []);
    assert_eq!(hand.call(0, 3), []);
    assert_eq!(hand.at(1, Event::ClientGone { call: CallId(2) }), []);
    assert_eq!(hand.at(1, Event::ClientGone { call: CallId(1) }), []);
    assert_eq!((hand.summary().tainted, hand.summary().queued), (1, 1));
    assert_eq!(hand.ended(500, 1), [grant(3, env(0, 0))]);
    assert_eq!(hand.summary().tainted, 0);
}

#[test]
fn an_environment_that_must_not_be_reused_is_replaced() {
    let mut hand = Hand::new(|s| s.max = 1).with_idle(1);
    hand.call(0, 1);
    let actions = hand.at(10, Event::CallEnded { call: CallId(1), reuse: false });
    assert_eq!(actions, [Action::StopEnvironment { environment: env(0, 0) }]);
    assert_eq!(hand.call(20, 2), []);
    let stopped = Event::EnvironmentStopped { environment: env(0, 0) };
    assert_eq!(hand.at(30, stopped), [start_environment(env(0, 1))]);
    assert_eq!(hand.summary().crashes, 0);
}

#[test]
fn what_ended_under_a_call_that_broke_off_before_is_a_crash_of_that_moment() {
    let mut hand = Hand::new(|s| s.max = 2).with_idle(1);
    let broke = |call| Event::CallLost { call: CallId(call) };
    hand.call(0, 1);
    let stopped = Action::StopEnvironment { environment: env(0, 0) };
    assert_eq!(hand.at(10, broke(1)), [stopped, start(1)], "and its replica stays until more is known");
    assert_eq!((hand.pool.broke(env(0, 0)), hand.summary().crashes), (true, 0));
    assert_eq!(hand.died(15, env(0, 0)), [stop(0, Why::Empty)]);
    assert_eq!((hand.summary().crashes, hand.pool.last_crash()), (1, Some(&exit())));
    assert_eq!(hand.died(16, env(0, 0)), [], "once");
    hand.started(20, 1);
    hand.ready(30, env(1, 0));
    hand.call(40, 2);
    assert_eq!(hand.at(50, broke(2)).len(), 1, "there may be no more replicas");
    hand.died(60, env(1, 0));
    let crash = hand.pool.summary(hand.start + Duration::from_millis(60)).crash.unwrap();
    let until = hand.start + Duration::from_millis(10_050);
    assert_eq!(crash.until, Some(until), "what replaced the first one was started after its crash");
}

#[test]
fn what_broke_off_a_call_and_had_not_ended_is_no_crash() {
    let mut hand = Hand::new(|s| s.max = 1).with_idle(1);
    hand.call(0, 1);
    hand.at(10, Event::CallLost { call: CallId(1) });
    let stopped = Event::EnvironmentStopped { environment: env(0, 0) };
    assert_eq!(hand.at(1_010, stopped), [start_environment(env(0, 1))]);
    assert_eq!(hand.summary().crashes, 0);
}

#[test]
fn what_ends_because_it_is_stopped_is_no_crash() {
    let mut hand = Hand::new(|s| s.max = 1).with_idle(1);
    hand.call(0, 1);
    hand.at(10, Event::CallEnded { call: CallId(1), reuse: false });
    assert_eq!((hand.died(11, env(0, 0)), hand.summary().crashes), (vec![], 0));
}

#[test]
fn an_environment_may_take_several_calls_where_it_can() {
    let mut hand = Hand::new(|s| (s.calls, s.max) = (2, 1)).with_idle(1);
    assert_eq!(hand.call(0, 1), [grant(1, env(0, 0))]);
    assert_eq!(hand.call(0, 2), [grant(2, env(0, 0))]);
    assert_eq!(hand.call(0, 3), []);
    assert_eq!(hand.at(1, Event::CallEnded { call: CallId(1), reuse: false }), [], "the other call goes on");
    assert_eq!(hand.ended(2, 2), [Action::StopEnvironment { environment: env(0, 0) }]);
}

#[test]
fn idle_environments_freeze_and_thaw_for_a_call() {
    let mut hand = Hand::new(|s| s.freeze_after = Some(Duration::from_millis(50))).with_idle(2);
    assert_eq!(hand.deadline(0), Some(50));
    let freeze = |id| Action::FreezeEnvironment { environment: env(id, 0) };
    assert_eq!(hand.at(50, Event::Tick), [freeze(0), freeze(1)]);
    assert_eq!(hand.summary().frozen, 2);
    assert_eq!(hand.call(100, 1), [Action::ThawEnvironment { environment: env(1, 0) }]);
    assert_eq!(hand.ready(115, env(1, 0)), [grant(1, env(1, 0))]);
    assert_eq!(hand.ended(120, 1), []);
    assert_eq!(hand.at(170, Event::Tick), [freeze(1)]);
    assert_eq!(hand.at(300_000, Event::Tick), [stop(0, Why::Idle)], "ice does not stop the clock");
}

#[test]
fn an_adopted_environment_gets_no_call_until_it_is_known_to_be_idle() {
    let mut hand = Hand::new(|s| s.max = 1);
    hand.adopt(0, 7, &[(3, Found::Unknown)]);
    assert_eq!(hand.call(0, 1), []);
    assert_eq!(hand.at(10_000_000, Event::Tick), [refuse(1, Reason::Busy, 1)], "and is not taken for idle");
    hand.call(10_000_000, 2);
    assert_eq!(hand.ready(10_000_001, env(7, 3)), [grant(2, env(7, 3))]);
    hand.at(10_000_002, Event::SettingsChanged(Settings { max: 2, ..*hand.pool.settings() }));
    assert_eq!(hand.call(10_000_003, 3), [start(8)], "numbers are not used twice");
}

#[test]
fn a_denied_replica_is_asked_for_again_when_there_may_be_capacity() {
    let mut hand = Hand::new(|_| {});
    assert_eq!(hand.call(0, 1), [start(0)]);
    assert_eq!(hand.at(1, Event::ReplicaDenied { replica: ReplicaId(0) }), []);
    assert!(hand.summary().limited);
    assert_eq!(hand.deadline(1), Some(5_001));
    assert_eq!(hand.at(5_001, Event::Tick), [start(1)]);
    hand.at(5_002, Event::ReplicaDenied { replica: ReplicaId(1) });
    assert_eq!(hand.at(5_003, Event::CapacityFreed), [start(2)]);
    hand.at(29_999, Event::ReplicaDenied { replica: ReplicaId(2) });
    assert_eq!(hand.at(30_000, Event::Tick), [refuse(1, Reason::NoCapacity, 5)]);
}

#[test]
fn what_the_node_takes_back_ends_its_call_first() {
    let mut hand = Hand::new(|_| {}).with_idle(2);
    hand.call(0, 1);
    assert_eq!(hand.at(1, Event::GiveBack { replica: ReplicaId(0) }), [stop(0, Why::GivenBack)]);
    assert_eq!(hand.at(1, Event::GiveBack { replica: ReplicaId(1) }), []);
    assert_eq!(hand.call(2, 2), [start(2)], "it takes no new call");
    assert_eq!(hand.ended(1_000_000, 1).last(), Some(&stop(1, Why::GivenBack)));
}

#[test]
fn what_is_outdated_ends_its_calls_and_is_replaced_without_a_word_of_its_crashes() {
    let mut hand = Hand::new(|settings| (settings.min, settings.max) = (1, 2)).with_idle(1);
    hand.call(0, 1);
    assert_eq!(hand.at(1, Event::Outdated), [start(1)], "the minimum is wanted anew, and there is room beside the old");
    assert_eq!(hand.call(2, 2), [], "the old one takes no new call");
    assert_eq!(hand.ended(3, 1).last(), Some(&stop(0, Why::Outdated)));
}

#[test]
fn labels_that_change_take_effect_at_once_without_ending_calls() {
    let mut hand = Hand::new(|_| {}).with_idle(3);
    hand.call(0, 1);
    let fewer = Settings { max: 1, ..*hand.pool.settings() };
    assert_eq!(hand.at(1, Event::SettingsChanged(fewer)), [stop(0, Why::Surplus), stop(1, Why::Surplus)]);
    let more = Settings { min: 4, max: 5, ..fewer };
    assert_eq!(hand.at(2, Event::SettingsChanged(more)), [start(3), start(4)], "two are stopping still");
    assert_eq!(hand.stopped(3, 0), [start(5)]);
    let shorter = Settings { min: 0, idle_timeout: Duration::from_secs(1), ..more };
    hand.ended(10, 1);
    hand.at(11, Event::SettingsChanged(shorter));
    assert_eq!(hand.at(1_010, Event::Tick), [stop(2, Why::Idle)]);
}

#[test]
fn a_drain_lets_calls_finish_and_then_stops_everything() {
    let mut hand = Hand::new(|s| (s.min, s.max) = (2, 2)).with_idle(2);
    for call in 1..=3 {
        hand.call(0, call);
    }
    let until = hand.start + Duration::from_secs(30);
    assert_eq!(hand.at(1, Event::Drain { until }), []);
    assert_eq!(hand.call(2, 9), [refuse(9, Reason::ShuttingDown, 1)]);
    assert_eq!(hand.ended(3, 1), [grant(3, env(1, 0))], "who waited already is served");
    assert_eq!(hand.ended(4, 2), [stop(0, Why::Drained)]);
    assert_eq!(hand.ended(5, 3), [stop(1, Why::Drained)]);
    hand.stopped(6, 0);
    assert!(!hand.pool.is_drained());
    assert_eq!(hand.stopped(6, 1), []);
    assert!(hand.pool.is_drained());
    assert_eq!(hand.deadline(6), None);
}

#[test]
fn a_drain_ends_with_the_grace_period() {
    let mut hand = Hand::new(|s| s.max = 1).with_idle(1);
    hand.call(0, 1);
    hand.call(0, 2);
    let until = hand.start + Duration::from_secs(2);
    hand.at(1, Event::Drain { until });
    assert_eq!(hand.deadline(1), Some(2_000));
    let actions = hand.at(2_000, Event::Tick);
    assert_eq!(actions[0], refuse(2, Reason::ShuttingDown, 1));
    assert!(matches!(&actions[1], Action::FailCall { call: CallId(1), exit } if exit.reason == "GracePeriodExceeded"));
    assert_eq!(actions[2..], [stop(0, Why::Drained)]);
    hand.stopped(2_100, 0);
    assert!(hand.pool.is_drained());
}

#[test]
fn a_visitor_enters_the_oldest_environment_and_pins_its_replica() {
    let mut hand = Hand::new(|s| s.freeze_after = Some(Duration::from_secs(1)));
    let visit = VisitId(1);
    assert_eq!(hand.at(0, Event::VisitArrived { visit }), [start(0)]);
    hand.started(0, 0);
    assert_eq!(hand.ready(0, env(0, 0)), [Action::Enter { visit, environment: env(0, 0) }]);
    assert_eq!(hand.call(1, 1), [grant(1, env(0, 0))], "a visitor takes no place");
    hand.call(2, 2);
    hand.started(2, 1);
    hand.ready(3, env(1, 0));
    hand.ended(4, 1);
    hand.ended(4, 2);
    let second = VisitId(2);
    assert_eq!(
        hand.at(5, Event::VisitArrived { visit: second }),
        [Action::Enter { visit: second, environment: env(0, 0) }]
    );
    assert_eq!(hand.at(1_004, Event::Tick), [Action::FreezeEnvironment { environment: env(1, 0) }]);
    assert_eq!(hand.at(1_000_000, Event::Tick), [stop(1, Why::Idle)]);
    hand.at(1_000_001, Event::VisitEnded { visit });
    assert_eq!(hand.at(1_000_001, Event::VisitEnded { visit: second }), [stop(0, Why::Idle)]);
}

#[test]
fn a_load_that_comes_and_goes_starts_nothing_anew_within_the_idle_timeout() {
    let mut hand = Hand::new(|s| s.idle_timeout = Duration::from_secs(60)).with_idle(8);
    let mut call = 0;
    for burst in 0..1_000 {
        let now = burst * 30_000;
        for n in 0..8 {
            assert!(matches!(hand.call(now, call + n)[..], [Action::Grant { .. }]));
        }
        for n in 0..8 {
            assert_eq!(hand.ended(now + 500, call + n), []);
        }
        assert_eq!(hand.at(now + 29_999, Event::Tick), []);
        call += 8;
    }
}
