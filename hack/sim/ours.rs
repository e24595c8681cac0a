//! Our policy: the pool of the node agent itself.

use std::time::{Duration, Instant};

use lambdalet::function::pool_state::{Action, CallId, EnvironmentId, Event, Pool, ReplicaId};
use lambdalet::function::protocol::Protocol;
use lambdalet::function::settings::Settings;

use crate::engine::{Micros, News, Order, Policy};

/// Drives a pool with one environment per replica, so that replicas can be compared.
pub(crate) struct Ours {
    pool: Pool,
    start: Instant,
}

impl Ours {
    pub(crate) fn new(idle_timeout: Duration, max: usize) -> Self {
        let max = u32::try_from(max).expect("it is small");
        let settings = Settings { environments: 1, max, idle_timeout, ..Settings::of(Protocol::Rie) };
        Self { pool: Pool::new(settings), start: Instant::now() }
    }

    fn tell(&mut self, event: Event, now: Micros, orders: &mut Vec<Order>) {
        for action in self.pool.handle(event, self.start + Duration::from_micros(now)) {
            match action {
                // The engine's start is that of replica and environment together.
                Action::StartReplica { replica } => self.tell(Event::ReplicaStarted { replica }, now, orders),
                Action::StartEnvironment { environment, .. } => orders.push(Order::Start(environment.replica.0)),
                Action::StopReplica { replica, .. } => orders.push(Order::Stop(replica.0)),
                Action::Grant { call, environment } => {
                    let call = usize::try_from(call.0).expect("it is an index");
                    orders.push(Order::Run { call, replica: environment.replica.0 });
                }
                Action::Refuse { .. } => orders.push(Order::Refuse),
                other => unreachable!("nothing here fails, freezes or visits: {other:?}"),
            }
        }
    }
}

impl Policy for Ours {
    fn hear(&mut self, news: News, now: Micros, orders: &mut Vec<Order>) {
        let event = match news {
            News::Arrived(call) => Event::CallArrived { call: CallId(call as u64) },
            News::Started(id) => {
                Event::EnvironmentReady { environment: EnvironmentId { replica: ReplicaId(id), ordinal: 0 } }
            }
            News::Ended { call, .. } => Event::CallEnded { call: CallId(call as u64), reuse: true },
            News::Stopped(id) => Event::ReplicaStopped { replica: ReplicaId(id) },
            News::Tick => Event::Tick,
        };
        self.tell(event, now, orders);
    }

    fn wakes(&self, _now: Micros) -> Option<Micros> {
        let at = self.pool.next_deadline()?;
        // Whole microseconds, and never early.
        u64::try_from((at - self.start).as_nanos().div_ceil(1000)).ok()
    }
}
