//! Spares a task from waking itself.
//!
//! The two sides of a call hand each other bytes within one task, and each handing over wakes the task, which is running.
//! Left to the runtime that is a turn in its queue, and often another thread woken to take it. Here a wake that comes while
//! the task is being polled makes it look once more, right away.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures::task::AtomicWaker;

/// Looks within one turn; then others have theirs.
const LOOKS: usize = 8;

/// Stands between a task and what it polls.
pub(super) struct Wakes {
    inner: Arc<Inner>,
    waker: Waker,
}

#[derive(Default)]
struct Inner {
    task: AtomicWaker,
    polling: AtomicBool,
    woken: AtomicBool,
}

impl Wakes {
    pub(super) fn new() -> Self {
        let inner = Arc::new(Inner::default());
        Self { waker: Waker::from(inner.clone()), inner }
    }

    /// Polls until it is ready or was not woken meanwhile.
    pub(super) fn poll<T>(&self, cx: &mut Context<'_>, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        let inner = &*self.inner;
        inner.task.register(cx.waker());
        for _ in 0..LOOKS {
            inner.polling.store(true, Ordering::SeqCst);
            inner.woken.store(false, Ordering::SeqCst);
            let polled = poll(&mut Context::from_waker(&self.waker));
            // In this order, and the other way round in `wake`: a wake is seen here, or sees that nobody polls.
            inner.polling.store(false, Ordering::SeqCst);
            if polled.is_ready() || !inner.woken.load(Ordering::SeqCst) {
                return polled;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Wake for Inner {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::SeqCst);
        if !self.polling.load(Ordering::SeqCst) {
            self.task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Task(AtomicUsize);

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_wake_in_between_is_another_look_and_no_turn_of_the_task() {
        let task = Arc::new(Task::default());
        let waker = Waker::from(task.clone());
        let (wakes, mut looks) = (Wakes::new(), 0);
        let polled = wakes.poll(&mut Context::from_waker(&waker), |cx| {
            looks += 1;
            cx.waker().wake_by_ref();
            if looks == 3 { Poll::Ready(()) } else { Poll::Pending }
        });
        assert_eq!((polled, looks, task.0.load(Ordering::SeqCst)), (Poll::Ready(()), 3, 0));
    }

    #[test]
    fn a_wake_from_outside_reaches_the_task() {
        let task = Arc::new(Task::default());
        let waker = Waker::from(task.clone());
        let (wakes, mut kept) = (Wakes::new(), None);
        let polled: Poll<()> = wakes.poll(&mut Context::from_waker(&waker), |cx| {
            kept = Some(cx.waker().clone());
            Poll::Pending
        });
        assert!(polled.is_pending());
        kept.unwrap().wake();
        assert_eq!(task.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn one_that_always_wakes_itself_lets_others_have_their_turn() {
        let task = Arc::new(Task::default());
        let waker = Waker::from(task.clone());
        let mut looks = 0;
        let polled: Poll<()> = Wakes::new().poll(&mut Context::from_waker(&waker), |cx| {
            looks += 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!((looks, task.0.load(Ordering::SeqCst)), (LOOKS, 1));
    }
}
