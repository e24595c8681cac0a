//! What happens, for those who ask to be told. A listener that does not keep up loses events and is told how many.

use lambdalet_proto::agent::v1::{Event, EventKind};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::clock;

/// Events that wait for the slowest listener.
const QUEUE: usize = 256;

/// Where events come from.
#[derive(Debug)]
pub(crate) struct Events(broadcast::Sender<Event>);

impl Default for Events {
    fn default() -> Self {
        Self(broadcast::Sender::new(QUEUE))
    }
}

impl Events {
    /// Tells everybody who listens.
    pub(crate) fn tell(&self, container: &str, kind: EventKind, exit_code: i32) {
        let event = Event { container: container.to_owned(), exit_code, ..event(kind) };
        // Nobody may be listening.
        let _ = self.0.send(event);
    }

    /// Listens from now on.
    pub(crate) fn listen(&self) -> Listener {
        Listener(self.0.subscribe())
    }
}

/// One listener.
pub(crate) struct Listener(broadcast::Receiver<Event>);

impl Listener {
    /// The next event. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(RecvError::Lagged(lost)) => Some(Event { lost, ..event(EventKind::Lost) }),
            Err(RecvError::Closed) => None,
        }
    }
}

/// An event of the guest as a whole, now.
pub(crate) fn event(kind: EventKind) -> Event {
    Event { time_ns: clock::now_ns(), kind: kind.into(), ..Event::default() }
}
