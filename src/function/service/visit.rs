//! Visitors: who looks into an environment without calling it.

use std::sync::{Arc, Weak};

use tokio::sync::oneshot;

use super::{Service, lease};
use crate::function::front::TryAgain;
use crate::function::pool_state::{EnvironmentId, Event, VisitId};

/// How a visitor is told where to go.
pub(super) type Visitor = oneshot::Sender<Result<EnvironmentId, TryAgain>>;

/// A visit. Its replica stays for as long as this does, unless it has to go; dropped, the visitor has left.
#[derive(Debug)]
pub struct Visit {
    environment: EnvironmentId,
    _stay: Stay,
}

impl Visit {
    /// Where the visitor is.
    pub fn environment(&self) -> EnvironmentId {
        self.environment
    }
}

/// A visitor who waits, or is inside. Dropped, they have left.
#[derive(Debug)]
struct Stay {
    service: Weak<Service>,
    id: VisitId,
}

impl Drop for Stay {
    fn drop(&mut self) {
        if let Some(service) = self.service.upgrade() {
            service.inner().visitors.remove(&self.id);
            service.feed(Event::VisitEnded { visit: self.id });
        }
    }
}

impl Service {
    /// Enters the environment that has been ready longest; where there is none, one is thawed or started. Dropped, the
    /// visitor waits no longer.
    ///
    /// # Errors
    /// Why there is none to enter, after the time that a call may wait at most.
    pub async fn visit(self: &Arc<Self>) -> Result<Visit, TryAgain> {
        let id = VisitId(self.new_call().0);
        let (visitor, entry) = oneshot::channel();
        self.inner().visitors.insert(id, visitor);
        let stay = Stay { service: Arc::downgrade(self), id };
        self.feed(Event::VisitArrived { visit: id });
        let environment = entry.await.unwrap_or_else(|_| Err(lease::gone()))?;
        Ok(Visit { environment, _stay: stay })
    }
}
