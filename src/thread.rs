//! Threads that end with their work.

use std::io;
use std::thread::Builder;

use tokio::sync::oneshot;

/// Does the work on a thread of that name, which ends with it: so whatever it has entered, as a namespace, is left for good. It
/// goes on to its end whether or not the caller waits for it; what is made for one that has gone is `unclaimed`.
///
/// The answer does not come if the work panics.
///
/// # Errors
/// The thread cannot be started.
pub(crate) fn begin<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
    unclaimed: impl FnOnce(T) + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (answer, answered) = oneshot::channel();
    let run = move || {
        if let Err(made) = answer.send(work()) {
            unclaimed(made);
        }
    };
    Builder::new().name(name.to_owned()).spawn(run)?;
    Ok(answered)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[tokio::test]
    async fn the_work_is_done_on_a_thread_of_that_name() {
        let name = || thread::current().name().map(str::to_owned);
        assert_eq!(begin("elsewhere", name, drop).unwrap().await.unwrap().as_deref(), Some("elsewhere"));
    }

    #[test]
    fn what_is_made_for_a_caller_that_has_gone_is_unclaimed() {
        let (go, gone) = mpsc::channel();
        let (undo, undone) = mpsc::channel();
        let work = move || {
            gone.recv().unwrap();
            "made"
        };
        drop(begin("test", work, move |made| undo.send(made).unwrap()).unwrap());
        go.send(()).unwrap();
        assert_eq!(undone.recv(), Ok("made"));
    }

    #[tokio::test]
    async fn work_that_panics_gives_no_answer() {
        assert!(begin::<()>("test", || panic!("as it is to"), drop).unwrap().await.is_err());
    }
}
