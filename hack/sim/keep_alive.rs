//! A fixed keep-alive, as public clouds are reported to have it: a call takes an idle replica, the one used last, or
//! starts one; a replica goes ten minutes after its last call. Queue and deadline are ours.

use std::collections::{BTreeMap, VecDeque};

use crate::engine::{Micros, News, Order, Policy};

const KEPT: Micros = 600_000_000;
const QUEUE_TIMEOUT: Micros = 30_000_000;
const QUEUE_LENGTH: usize = 1000;

/// The policy for one function.
#[derive(Default)]
pub(crate) struct KeepAlive {
    max: usize,
    /// `Some`: idle since then.
    replicas: BTreeMap<u64, Option<Micros>>,
    starting: usize,
    waiting: VecDeque<(usize, Micros)>,
    next: u64,
}

impl KeepAlive {
    pub(crate) fn new(max: usize) -> Self {
        Self { max, ..Self::default() }
    }

    fn arrived(&mut self, call: usize, now: Micros, orders: &mut Vec<Order>) {
        let idle = self.replicas.iter().filter_map(|(id, since)| Some(((*since)?, *id))).max();
        if let Some((_, replica)) = idle {
            self.replicas.insert(replica, None);
            orders.push(Order::Run { call, replica });
            return;
        }
        if self.waiting.len() == QUEUE_LENGTH {
            orders.push(Order::Refuse);
            return;
        }
        self.waiting.push_back((call, now));
        if self.waiting.len() > self.starting && self.replicas.len() < self.max {
            self.next += 1;
            self.starting += 1;
            self.replicas.insert(self.next, None);
            orders.push(Order::Start(self.next));
        }
    }

    fn free(&mut self, replica: u64, now: Micros, orders: &mut Vec<Order>) {
        match self.waiting.pop_front() {
            Some((call, _)) => orders.push(Order::Run { call, replica }),
            None => {
                self.replicas.insert(replica, Some(now));
            }
        }
    }
}

impl Policy for KeepAlive {
    fn hear(&mut self, news: News, now: Micros, orders: &mut Vec<Order>) {
        while self.waiting.front().is_some_and(|(_, since)| since + QUEUE_TIMEOUT <= now) {
            self.waiting.pop_front();
            orders.push(Order::Refuse);
        }
        match news {
            News::Arrived(call) => self.arrived(call, now, orders),
            News::Started(id) => {
                self.starting -= 1;
                self.free(id, now, orders);
            }
            News::Ended { replica, .. } => self.free(replica, now, orders),
            News::Stopped(_) => {}
            News::Tick => {
                let over = |since: &Option<Micros>| since.is_some_and(|since| since + KEPT <= now);
                let gone: Vec<u64> = self.replicas.iter().filter(|(_, since)| over(since)).map(|(id, _)| *id).collect();
                for id in gone {
                    self.replicas.remove(&id);
                    orders.push(Order::Stop(id));
                }
            }
        }
    }

    fn wakes(&self, now: Micros) -> Option<Micros> {
        let idle = self.replicas.values().flatten().map(|since| since + KEPT).min();
        let waiting = self.waiting.front().map(|(_, since)| since + QUEUE_TIMEOUT);
        idle.into_iter().chain(waiting).filter(|at| *at > now).min()
    }
}
