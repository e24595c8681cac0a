//! Booted guests that wait, paused, for a Pod: the second level of the pool, by what they are of.
//!
//! A paused guest costs no time and the memory it has touched. The host's word on how many there may be is final: what
//! does not fit is handed back. Nothing keeps what nobody has claimed: its VMM ends with the value that stands for it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures::FutureExt;

use super::template::TemplateKind;
use super::{Machine, MachineSpec, Result, VmId};

/// A machine that nobody has yet. Its VMM is killed when this is dropped; whoever waits for its end calls
/// [`Machine::kill`] before.
#[derive(Debug)]
pub struct Warm {
    machine: Option<Box<dyn Machine>>,
    /// What its guest is of.
    pub kind: TemplateKind,
    spec: MachineSpec,
}

/// Paused machines, the one that waits for longest first.
#[derive(Debug)]
pub struct WarmPool {
    most: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// No more are kept.
    closed: bool,
    waiting: VecDeque<Warm>,
}

// === impl Warm ===

impl Warm {
    /// A machine that was made of this; its guest was told nothing yet.
    pub fn new(machine: Box<dyn Machine>, kind: TemplateKind, spec: MachineSpec) -> Self {
        // The tap is to end with its VMM.
        Self { machine: Some(machine), kind, spec: MachineSpec { tap: None, ..spec } }
    }

    /// Its name.
    pub fn id(&self) -> &VmId {
        self.spec.dir.id()
    }

    /// The machine.
    pub fn machine(&self) -> &dyn Machine {
        self.machine.as_deref().expect("a claim is the last that is done with it")
    }

    /// Lets it run, in a cgroup that is made in this one; from then on it is the caller's.
    ///
    /// # Errors
    /// It is still nobody's.
    pub async fn claim(&mut self, cgroup_parent: &str) -> Result<Box<dyn Machine>> {
        let spec = MachineSpec { cgroup_parent: cgroup_parent.to_owned(), ..self.spec.clone() };
        let machine = self.machine.as_mut().expect("it is claimed once");
        machine.move_to(&spec).await?;
        machine.resume().await?;
        Ok(self.machine.take().expect("it was there just now"))
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        if let Some(machine) = &self.machine {
            machine.kill_unwaited();
        }
    }
}

// === impl WarmPool ===

impl WarmPool {
    /// An empty pool of at most `most` machines in all.
    pub fn new(most: usize) -> Self {
        Self { most, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // It is never half changed, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many more it would keep.
    pub fn room(&self) -> usize {
        let state = self.state();
        if state.closed { 0 } else { self.most.saturating_sub(state.waiting.len()) }
    }

    /// How many of these kinds wait.
    pub fn count(&self, of: impl Fn(&TemplateKind) -> bool) -> usize {
        self.state().waiting.iter().filter(|warm| of(&warm.kind)).count()
    }

    /// Keeps a machine that was paused; `Some` if there is no room for it.
    pub fn put(&self, warm: Warm) -> Option<Warm> {
        let mut state = self.state();
        if state.closed || state.waiting.len() >= self.most {
            return Some(warm);
        }
        state.waiting.push_back(warm);
        None
    }

    /// The one of these kinds that waits for longest and has not ended; it is still paused.
    pub fn take(&self, of: impl Fn(&TemplateKind) -> bool) -> Option<Warm> {
        let waiting = &mut self.state().waiting;
        let at = waiting.iter().position(|warm| of(&warm.kind) && !has_ended(warm))?;
        waiting.remove(at)
    }

    /// Those that have ended, and those that are not of these kinds.
    pub fn take_others(&self, of: impl Fn(&TemplateKind) -> bool) -> Vec<Warm> {
        let waiting = &mut self.state().waiting;
        let all = std::mem::take(waiting);
        let (left, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|warm| of(&warm.kind) && !has_ended(warm));
        waiting.extend(left);
        others
    }

    /// All of them; no more are kept.
    pub fn close(&self) -> Vec<Warm> {
        let mut state = self.state();
        state.closed = true;
        std::mem::take(&mut state.waiting).into()
    }
}

fn has_ended(warm: &Warm) -> bool {
    warm.machine().exited().now_or_never().is_some()
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::pin::Pin;
    use std::sync::Arc;

    use async_trait::async_trait;

    use super::*;
    use crate::runtime::microvm::machine::template::tests::kind;
    use crate::runtime::microvm::machine::tests::spec;
    use crate::runtime::microvm::machine::{MachineError, Template, VmDir, VmDirs, VmExit};
    use crate::runtime::session::Duplex;

    /// A machine that remembers what it was told.
    #[derive(Debug)]
    struct Told {
        dir: VmDir,
        told: Arc<Mutex<Vec<String>>>,
        ended: bool,
        /// It cannot go on.
        stuck: bool,
    }

    #[async_trait]
    impl Machine for Told {
        fn pid(&self) -> i32 {
            0
        }
        fn dir(&self) -> &VmDir {
            &self.dir
        }
        async fn agent(&self) -> Result<Pin<Box<dyn Duplex>>> {
            Ok(Box::pin(tokio::io::empty()))
        }
        async fn put_image(&self, _slot: u8, _image: &Path) -> Result<()> {
            Ok(())
        }
        async fn take_image(&self, _slot: u8) -> Result<()> {
            Ok(())
        }
        async fn pause(&self) -> Result<()> {
            Ok(())
        }
        async fn resume(&self) -> Result<()> {
            self.told.lock().unwrap().push("resume".to_owned());
            if self.stuck { Err(MachineError::NotAssigned) } else { Ok(()) }
        }
        async fn save(&self) -> Result<Template> {
            Ok(Template { path: "/".into() })
        }
        fn weigh(&self, _: u64) -> Result<()> {
            Ok(())
        }
        async fn move_to(&mut self, spec: &MachineSpec) -> Result<()> {
            self.told.lock().unwrap().push(format!("to {}", spec.cgroup_parent));
            Ok(())
        }
        fn kill_unwaited(&self) {
            self.told.lock().unwrap().push("killed".to_owned());
        }
        async fn kill(&self) -> Result<()> {
            Ok(())
        }
        async fn exited(&self) -> VmExit {
            if self.ended { VmExit::Code(1) } else { std::future::pending().await }
        }
    }

    type Heard = Arc<Mutex<Vec<String>>>;

    fn warm(name: &str, of: u64, (ended, stuck): (bool, bool)) -> (Warm, Heard) {
        let dir = VmDirs::new(Path::new("/run/vms"), "default").unwrap().of(&VmId::new(name).unwrap());
        let told = Heard::default();
        let machine = Box::new(Told { dir: dir.clone(), told: Arc::clone(&told), ended, stuck });
        (Warm::new(machine, kind(of), MachineSpec { dir, ..spec() }), told)
    }

    fn heard(told: &Heard) -> Vec<String> {
        told.lock().unwrap().clone()
    }

    #[tokio::test]
    async fn the_oldest_of_a_kind_that_still_lives_is_claimed() {
        let pool = WarmPool::new(3);
        let ((dead, gone), (first, told)) = (warm("dead", 1, (true, false)), warm("first", 1, (false, false)));
        let (second, _second) = warm("second", 1, (false, false));
        for warm in [dead, first, second] {
            assert!(pool.put(warm).is_none());
        }
        let (more, surplus) = warm("more", 2, (false, false));
        drop(pool.put(more).expect("there is no room"));
        assert_eq!(heard(&surplus), ["killed"]);
        assert!(pool.take(|of| *of == kind(2)).is_none());
        let mut found = pool.take(|of| *of == kind(1)).unwrap();
        assert_eq!((found.id().as_str(), pool.room()), ("first", 1));
        drop(found.claim("l/pod").await.unwrap());
        drop(found);
        assert_eq!(heard(&told), ["to l/pod", "resume"], "it is somebody's: nobody ends it");
        assert_eq!(pool.take_others(|of| *of == kind(1)).len(), 1);
        assert_eq!(heard(&gone), ["killed"]);
        assert_eq!((pool.count(|of| *of == kind(1)), pool.close().len(), pool.room()), (1, 1, 0));
        assert!(pool.put(warm("late", 1, (false, false)).0).is_some(), "nothing is kept any more");
    }

    #[tokio::test]
    async fn what_nobody_claimed_ends_with_the_pool() {
        let pool = WarmPool::new(2);
        let ((first, told), (second, other)) = (warm("first", 1, (false, false)), warm("second", 1, (false, true)));
        assert!(pool.put(second).is_none() && pool.put(first).is_none());
        let mut left = pool.take(|_| true).unwrap();
        left.claim("l/pod").await.unwrap_err();
        assert_eq!(heard(&other), ["to l/pod", "resume"]);
        drop(left);
        assert_eq!(heard(&other).last().unwrap(), "killed");
        assert!(heard(&told).is_empty());
        drop(pool);
        assert_eq!(heard(&told), ["killed"]);
    }
}
