//! The pool's deadlines.

use std::sync::{Arc, Weak};

use tokio::sync::Notify;

use super::Service;
use crate::function::pool_state::Event;

/// Feeds the pool when its next deadline comes, for as long as there is a service.
pub(super) async fn ring(service: Weak<Service>, alarm: Arc<Notify>) {
    loop {
        let Some(armed) = service.upgrade().map(|service| service.inner().armed) else { return };
        let due = async {
            match armed {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // Cancel-safe: a permit that is not taken stays.
            () = alarm.notified() => {}
            // Cancel-safe: a timer.
            () = due => {
                let Some(service) = service.upgrade() else { return };
                service.inner().armed = None;
                service.feed(Event::Tick);
            }
        }
    }
}
