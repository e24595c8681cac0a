//! Setups: what a machine needs before there is one, made ahead of time: its directory and its tap.
//!
//! ```text
//! fill(n) --build, in parallel--> idle (oldest first) --get--> occupied --give_back--> made anew --> idle (at its end)
//!    ^                              |- none: get builds one, without holding anybody up
//!    '------- keep_filled ----------'
//! ```
//! A setup is made anew before it is idle again, when it is given back and not when it is needed: nothing of the machine
//! before is there for the next, not even its name, by which an address may rest and a late release may come. What cannot
//! be removed is left to the next process, which finds it by its directory; nothing of this ends the process.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures::future::join_all;
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::time::sleep;

use super::jail::VmmUser;
use super::{MachineError, Result, TapLink, TapUse, VmDir, VmDirs, VmId};
use crate::network::NetworkError;
use crate::network::tap::{Taps, mac_of};
use crate::retry::Retry;
use crate::telemetry::chain;

/// What a machine is started in.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Its directory, empty; its id is the machine's.
    pub dir: VmDir,
    /// Its tap, which leads nowhere yet; the hardware address in it counts until the guest is told its own.
    pub tap: TapLink,
}

/// Makes setups.
#[async_trait]
pub trait Setups: Send + Sync {
    /// Makes one.
    ///
    /// # Errors
    /// Nothing is left behind.
    async fn build(&self) -> Result<Setup>;

    /// Makes a new one in the place of a used one, by another name; no machine uses it any more.
    async fn clean(&self, setup: &Setup) -> Result<Setup>;

    /// Removes all of it. Removing what is half there is Ok.
    async fn destroy(&self, setup: &Setup) -> Result<()>;
}

/// Setups on this host.
pub struct HostSetups {
    dirs: VmDirs,
    taps: Arc<dyn Taps>,
    user: VmmUser,
    tap_use: TapUse,
}

/// The pool of one node.
pub struct SetupPool<S> {
    setups: S,
    most_idle: usize,
    state: Mutex<State>,
    /// Held while setups are made ahead of time, so that none is made behind the back of who removes them.
    filling: AsyncMutex<()>,
    /// One that was idle is not any more.
    taken: Notify,
}

#[derive(Default)]
struct State {
    /// No more are kept.
    closed: bool,
    idle: VecDeque<Setup>,
    occupied: HashMap<VmId, Setup>,
}

// === impl HostSetups ===

impl HostSetups {
    /// For machines of that user, with taps as their manager uses them.
    pub fn new(dirs: VmDirs, taps: Arc<dyn Taps>, user: VmmUser, tap_use: TapUse) -> Self {
        Self { dirs, taps, user, tap_use }
    }

    async fn make(&self, dir: VmDir) -> Result<Setup> {
        let owner = match self.tap_use {
            TapUse::Handed => None,
            TapUse::Named { uid } => Some(uid),
        };
        let failed = |error| tap_error("make the tap", &dir, error);
        let tap = self.taps.make_tap(dir.id().as_str(), owner).await.map_err(failed)?;
        // Of nobody: the tap is led to another once there is an address.
        let mac = mac_of(IpAddr::from([0, 0, 0, 0]));
        Ok(Setup { dir, tap: TapLink { name: tap.name, mac, device: tap.device, namespace: tap.namespace } })
    }

    async fn remove(&self, dir: &VmDir) -> Result<()> {
        // The directory last: by it the tap is found again.
        let removed = self.taps.remove_tap(dir.id().as_str()).await;
        removed.map_err(|error| tap_error("remove the tap", dir, error))?;
        dir.remove()
    }
}

#[async_trait]
impl Setups for HostSetups {
    async fn build(&self) -> Result<Setup> {
        let dir = self.dirs.of(&VmId::random());
        let built = match dir.create(self.user.uid, self.user.gid) {
            Ok(()) => self.make(dir.clone()).await,
            Err(error) => Err(error),
        };
        if built.is_err() {
            // The first error says what is wrong.
            let _ = self.remove(&dir).await;
        }
        built
    }

    async fn clean(&self, setup: &Setup) -> Result<Setup> {
        self.remove(&setup.dir).await?;
        self.build().await
    }

    async fn destroy(&self, setup: &Setup) -> Result<()> {
        self.remove(&setup.dir).await
    }
}

fn tap_error(action: &str, dir: &VmDir, error: NetworkError) -> MachineError {
    MachineError::start(action, dir.id())(std::io::Error::other(error))
}

// === impl SetupPool ===

impl<S: Setups> SetupPool<S> {
    /// An empty pool that keeps at most `most_idle` setups ready; what is given back above that is destroyed.
    pub fn new(setups: S, most_idle: usize) -> Self {
        Self { setups, most_idle, state: Mutex::default(), filling: AsyncMutex::default(), taken: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // It is never half changed, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are idle, and occupied.
    pub fn count(&self) -> (usize, usize) {
        let state = self.state();
        (state.idle.len(), state.occupied.len())
    }

    /// How many more it would keep.
    fn room(&self) -> usize {
        let state = self.state();
        if state.closed { 0 } else { self.most_idle.saturating_sub(state.idle.len()) }
    }

    /// Makes `count` more, all at once. Those above the pool's bound are not made.
    ///
    /// # Errors
    /// The first one; the others stay in the pool.
    pub async fn fill(&self, count: usize) -> Result<()> {
        let _turn = self.filling.lock().await;
        let room = self.room();
        let made = join_all((0..count.min(room)).map(|_| self.setups.build())).await;
        let mut first = Ok(());
        for setup in made {
            let kept = match setup.map(|setup| self.keep(setup)) {
                Ok(None) => Ok(()),
                // Others were given back meanwhile.
                Ok(Some(surplus)) => self.setups.destroy(&surplus).await,
                Err(error) => Err(error),
            };
            first = first.and(kept);
        }
        first
    }

    /// Keeps as many ready as there is room for, in the background of those who take them; it does not end.
    ///
    /// Dropped, it leaves what it was making to the next process.
    pub async fn keep_filled(&self) {
        let mut retry = Retry::new("make VM setups ahead of time");
        loop {
            match self.fill(self.room()).await {
                Ok(()) => {
                    retry.succeeded();
                    self.taken.notified().await;
                }
                // Meanwhile whoever needs one makes it, and is told why he cannot.
                Err(error) => sleep(retry.failed(chain(&error))).await,
            }
        }
    }

    /// The setup that is idle for longest, or a new one; it is occupied until it is given back.
    ///
    /// # Errors
    /// Those of making one.
    pub async fn get(&self) -> Result<Setup> {
        if let Some(setup) = self.take_idle() {
            return Ok(setup);
        }
        let setup = self.setups.build().await?;
        self.state().occupied.insert(setup.dir.id().clone(), setup.clone());
        Ok(setup)
    }

    fn take_idle(&self) -> Option<Setup> {
        let mut state = self.state();
        let setup = state.idle.pop_front()?;
        state.occupied.insert(setup.dir.id().clone(), setup.clone());
        self.taken.notify_one();
        Some(setup)
    }

    /// Takes a setup for occupied that an earlier process of this node gave out: its machine was adopted.
    pub fn adopt(&self, setup: Setup) {
        self.state().occupied.insert(setup.dir.id().clone(), setup);
    }

    /// Gives a setup back: one made in its place is idle as the last, unless there are enough.
    ///
    /// # Errors
    /// [`MachineError::NotAssigned`] if it is not occupied; and those of cleaning: it is then destroyed, not idle.
    pub async fn give_back(&self, id: &VmId) -> Result<()> {
        let setup = self.state().occupied.remove(id).ok_or(MachineError::NotAssigned)?;
        // Dropped while it is cleaned, it is occupied again.
        let mut returning = Returning { pool: self, setup: Some(setup) };
        let Some(setup) = &returning.setup else { return Ok(()) };
        let cleaned = match self.room() > 0 {
            true => self.setups.clean(setup).await.map(Some),
            false => self.setups.destroy(setup).await.map(|()| None),
        };
        if cleaned.is_err() {
            // What is left of it has a name that is never given again; the error says what it was.
            let _ = self.setups.destroy(setup).await;
        }
        returning.setup = None;
        match cleaned?.and_then(|setup| self.keep(setup)) {
            // Others were given back meanwhile.
            Some(surplus) => self.setups.destroy(&surplus).await,
            None => Ok(()),
        }
    }

    /// Keeps a setup idle, or returns what there is no room for.
    fn keep(&self, setup: Setup) -> Option<Setup> {
        let mut state = self.state();
        if state.closed || state.idle.len() >= self.most_idle {
            return Some(setup);
        }
        state.idle.push_back(setup);
        None
    }

    /// Destroys all that is idle, before the end of the process, and keeps no more. What is being made is waited for.
    ///
    /// # Errors
    /// The first one; all are tried.
    pub async fn drain(&self) -> Result<()> {
        let _turn = self.filling.lock().await;
        let idle = {
            let mut state = self.state();
            state.closed = true;
            std::mem::take(&mut state.idle)
        };
        let destroyed = join_all(idle.iter().map(|setup| self.setups.destroy(setup))).await;
        destroyed.into_iter().collect()
    }
}

struct Returning<'a, S: Setups> {
    pool: &'a SetupPool<S>,
    setup: Option<Setup>,
}

impl<S: Setups> Drop for Returning<'_, S> {
    fn drop(&mut self) {
        if let Some(setup) = self.setup.take() {
            self.pool.adopt(setup);
        }
    }
}

#[cfg(test)]
mod tests;
