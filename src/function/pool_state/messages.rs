//! What goes into a pool and what comes out of it: ids, events, actions, and the two ways a call fails.

use std::fmt;
use std::time::{Duration, Instant};

use crate::function::settings::Settings;

/// A call, from its arrival to its end. The front numbers them; a number is used once per pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// Somebody who looks into an environment without calling it: an exec session, a port-forward. Numbered by whoever
/// lets them in; a number is used once per pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VisitId(pub u64);

/// A replica. The pool numbers them and uses no number twice, those it adopted included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(pub u64);

/// An environment: its replica, and its number in it, which is used once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EnvironmentId {
    /// The replica that holds it.
    pub replica: ReplicaId,
    /// Counted from 0.
    pub ordinal: u32,
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for EnvironmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.replica, self.ordinal)
    }
}

/// What happened. What names something the pool does not know (any more) changes nothing, so late news is harmless.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A call wants an environment. Answered by exactly one of [`Action::Grant`] and [`Action::Refuse`], unless its
    /// client goes first.
    CallArrived {
        /// Its number.
        call: CallId,
    },
    /// A granted call has ended in its environment, well or not; also one whose client is gone.
    CallEnded {
        /// Its number.
        call: CallId,
        /// Whether the environment can take another; if not it is replaced.
        reuse: bool,
    },
    /// A granted call broke off, or did not get through: its environment does not answer, and is replaced. Most likely
    /// it has ended by itself, which [`Event::EnvironmentDied`] may still say until it is stopped.
    CallLost {
        /// Its number.
        call: CallId,
    },
    /// The client of a call has gone. A waiting call is forgotten; a granted one goes on to hold its place in the
    /// environment until [`Event::CallEnded`] or [`Event::CallLost`].
    ClientGone {
        /// Its number.
        call: CallId,
    },
    /// Somebody wants to look into an environment. Answered by [`Action::Enter`] or [`Action::RefuseVisit`].
    VisitArrived {
        /// Its number.
        visit: VisitId,
    },
    /// They have left, or waited no longer.
    VisitEnded {
        /// Its number.
        visit: VisitId,
    },
    /// [`Action::StartReplica`] is done.
    ReplicaStarted {
        /// Which.
        replica: ReplicaId,
    },
    /// The node has no capacity to lend: nothing was started.
    ReplicaDenied {
        /// Which.
        replica: ReplicaId,
    },
    /// A replica could not start, or died with all its environments. Answered by [`Action::StopReplica`].
    ReplicaFailed {
        /// Which.
        replica: ReplicaId,
        /// Why.
        exit: Exit,
    },
    /// [`Action::StopReplica`] is done: nothing of it is left.
    ReplicaStopped {
        /// Which.
        replica: ReplicaId,
    },
    /// An environment takes calls: it started, thawed, or an adopted one turned out to be idle.
    EnvironmentReady {
        /// Which.
        environment: EnvironmentId,
    },
    /// What probes say of an environment that runs. It is ready until they say otherwise; while it is not it gets no new
    /// call, and keeps those it has.
    EnvironmentProbed {
        /// Which.
        environment: EnvironmentId,
        /// Whether it may have calls.
        ready: bool,
    },
    /// An environment could not start, ended by itself, or must not be used (an adopted one that cannot be known to be
    /// idle). Answered by [`Action::StopEnvironment`], unless a lost call was before.
    EnvironmentDied {
        /// Which.
        environment: EnvironmentId,
        /// Why.
        exit: Exit,
    },
    /// [`Action::StopEnvironment`] is done: nothing of it is left.
    EnvironmentStopped {
        /// Which.
        environment: EnvironmentId,
    },
    /// The node may have capacity again.
    CapacityFreed,
    /// The node needs a replica's capacity back. It takes no new call, ends its own, and goes.
    GiveBack {
        /// Which.
        replica: ReplicaId,
    },
    /// The Pod's labels have changed.
    SettingsChanged(Settings),
    /// What environments are made of has changed, such as their image: those there are end their calls and go, and new
    /// ones take their place. What the old ones crashed of says nothing about these.
    Outdated,
    /// The Pod is being deleted: no new call. Waiting and running ones may finish until the given moment, then
    /// everything is stopped.
    Drain {
        /// The end of the grace period. A second drain may shorten it.
        until: Instant,
    },
    /// [`Pool::next_deadline`](super::Pool::next_deadline) has come. Harmless at any time.
    Tick,
}

/// What a pool would start next: whoever has it ready when it is asked for saves a call the waiting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reserve {
    /// In the order in which they would be started; also of replicas that do not exist yet. No more than
    /// [`Settings::reserve`], and none beyond the maximum.
    pub environments: Vec<EnvironmentId>,
    /// What it has asked for, and what has not taken a call yet: whatever of this is ready is about to be used.
    pub starting: Vec<EnvironmentId>,
    /// Nothing starts and nothing has crashed: what is missing may be made. Otherwise only what is there is kept.
    pub calm: bool,
}

/// How an adopted environment was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Known to serve nothing.
    Idle,
    /// Frozen, and only idle ones are frozen.
    Frozen,
    /// Perhaps in a call. It gets none until [`Event::EnvironmentReady`] says that it is idle.
    Unknown,
}

/// What is to be done. Actions on one replica or environment are to be carried out in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make a replica, without environments. Borrow its capacity first: answer with [`Event::ReplicaStarted`],
    /// [`Event::ReplicaDenied`] or [`Event::ReplicaFailed`].
    StartReplica {
        /// Which.
        replica: ReplicaId,
    },
    /// Remove a replica and all its environments, also one that is still starting; try until done, then give its
    /// capacity back and answer with [`Event::ReplicaStopped`].
    StopReplica {
        /// Which.
        replica: ReplicaId,
        /// Why.
        why: Why,
    },
    /// Start an environment in a replica that has started. Answer with [`Event::EnvironmentReady`] once it listens,
    /// or [`Event::EnvironmentDied`], also when it takes too long.
    StartEnvironment {
        /// Which.
        environment: EnvironmentId,
        /// Send it a no-op before it counts as ready: no call waits for it.
        warm_up: bool,
    },
    /// Remove an environment, or what is left of it; answer with [`Event::EnvironmentStopped`].
    StopEnvironment {
        /// Which.
        environment: EnvironmentId,
    },
    /// Freeze an idle environment. Where that fails it may stay as it is.
    FreezeEnvironment {
        /// Which.
        environment: EnvironmentId,
    },
    /// Thaw one; answer with [`Event::EnvironmentReady`] or [`Event::EnvironmentDied`].
    ThawEnvironment {
        /// Which.
        environment: EnvironmentId,
    },
    /// The call may go to the environment.
    Grant {
        /// Which call.
        call: CallId,
        /// Where to.
        environment: EnvironmentId,
    },
    /// The call is turned away.
    Refuse {
        /// Which call.
        call: CallId,
        /// Why, and when to come again.
        try_again: TryAgain,
    },
    /// A granted call's environment died: its caller gets 502 with the reason. No word of the call's end is due.
    FailCall {
        /// Which call.
        call: CallId,
        /// What became of the environment.
        exit: Exit,
    },
    /// The visitor may enter; the environment's replica stays for as long as they do, unless it has to go.
    Enter {
        /// Which visit.
        visit: VisitId,
        /// Where to.
        environment: EnvironmentId,
    },
    /// The visitor is turned away.
    RefuseVisit {
        /// Which visit.
        visit: VisitId,
        /// Why, and when to come again.
        try_again: TryAgain,
    },
}

/// Why a replica is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Why {
    /// No call for the idle timeout.
    Idle,
    /// It has no environment, and nobody waits for one.
    Empty,
    /// More than the labels allow now.
    Surplus,
    /// The node needs its capacity.
    GivenBack,
    /// It is made of what the Pod's spec names no more.
    Outdated,
    /// It failed.
    Failed,
    /// The Pod is being deleted.
    Drained,
}

/// How an environment or replica ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code of its process, if it had one.
    pub code: Option<i32>,
    /// A reason as in a container's status: `OOMKilled`, `Error`, `ErrImagePull`.
    pub reason: String,
    /// What else is known, for people; may be empty.
    pub message: String,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        if let Some(code) = self.code {
            write!(f, ", exit code {code}")?;
        }
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        Ok(())
    }
}

/// A call was not taken and may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the function cannot take the call now: {reason}")]
pub struct TryAgain {
    /// Why.
    pub reason: Reason,
    /// When it is worth another try, for `Retry-After`; at least a second.
    pub retry_after: Duration,
}

/// Why a call was not taken. [`Reason::is_overload`] divides them into 429 and 503.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// As many calls wait as may.
    QueueFull,
    /// It waited as long as it may; every replica there may be is busy.
    Busy,
    /// It waited as long as it may; what was starting has not become ready, and nothing crashed before.
    Starting,
    /// It waited as long as it may; the node has no capacity for a replica.
    NoCapacity,
    /// Environments of this function crash; none was ready in time, or none will be.
    CrashLoop,
    /// The Pod is being deleted.
    ShuttingDown,
}

impl Reason {
    /// Whether there is too much work (429, `RESOURCE_EXHAUSTED`) rather than nobody to do it (503, `UNAVAILABLE`).
    pub fn is_overload(self) -> bool {
        match self {
            Self::QueueFull | Self::Busy => true,
            Self::Starting | Self::NoCapacity | Self::CrashLoop | Self::ShuttingDown => false,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::QueueFull => "too many calls wait already",
            Self::Busy => "all its replicas were busy for too long",
            Self::Starting => "it did not start in time",
            Self::NoCapacity => "the node has no capacity for a replica",
            Self::CrashLoop => "it crashes, and did not or would not start in time",
            Self::ShuttingDown => "its Pod is being deleted",
        })
    }
}
