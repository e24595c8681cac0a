//! Guests that wait, paused, for Pods to come: restored ahead of time, of the sizes that are started.
//!
//! ```text
//! a start --behind it--> restore, until enough wait --> WarmPool --name--> promised --launch--> the Pod's
//!                                                          '-- of a kernel, guest or template that is gone: ended
//! ```
//! One that waits has a name already, in its directory, its tap and its cgroup: a sandbox that gets it takes that name for
//! its own. So nothing is renamed, and one that no sandbox is named after is nobody's, whichever process looks.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use futures::future::join_all;
use tokio::sync::Mutex as AsyncMutex;
use tokio_util::sync::CancellationToken;

use super::size::Size;
use super::{HostVms, Inner, RESTORE_PATIENCE};
use crate::runtime::Result;
use crate::runtime::microvm::agent::Agent;
use crate::runtime::microvm::machine::warm::{Warm, WarmPool};
use crate::runtime::microvm::machine::{self, Asset, Machine, MachineError, TemplateKind, VmDir, VmId};
use crate::runtime::microvm::vm::fresh_name;
use crate::runtime::types::{MachineFiles, SandboxConfig};
use crate::telemetry::chain;

/// Who waits, and who is waited for.
pub(super) struct Waiting {
    pool: WarmPool,
    /// Whose names were given out, and that were not launched yet.
    promised: Mutex<HashMap<String, Warm>>,
    /// One is restored at a time: whoever starts a Pod meanwhile comes first. Of which size guests were made last, and since
    /// when.
    turn: AsyncMutex<Option<(Size, Instant)>>,
    /// No more are to be made.
    closing: CancellationToken,
}

impl Waiting {
    pub(super) fn new(most: usize) -> Self {
        Self {
            pool: WarmPool::new(most),
            promised: Mutex::default(),
            turn: AsyncMutex::default(),
            closing: CancellationToken::new(),
        }
    }

    fn promised(&self) -> MutexGuard<'_, HashMap<String, Warm>> {
        // Entries are inserted and removed whole, so a panic elsewhere does not spoil them.
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of_promise(&self, id: &str) -> Option<Warm> {
        self.promised().remove(id)
    }

    /// Ends one that was promised and will not be launched.
    pub(super) async fn give_up(&self, id: &str) -> machine::Result<()> {
        match self.of_promise(id) {
            Some(warm) => warm.machine().kill().await,
            None => Ok(()),
        }
    }
}

impl HostVms {
    /// How many guests wait for Pods; `None` while one is restored or ended.
    pub fn waiting(&self) -> Option<usize> {
        let waiting = &self.inner.waiting;
        let _turn = waiting.turn.try_lock().ok()?;
        Some(waiting.pool.count(|_| true))
    }

    /// What an earlier process left, by name.
    pub(super) fn left_behind(&self) -> Vec<String> {
        let dirs = self.inner.dirs.list().unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "failed to look for guests that waited");
            Vec::new()
        });
        dirs.iter().map(|dir| dir.id().to_string()).collect()
    }

    /// Ends these behind whoever asks, for what is ended needs the network, which may come later. What cannot be ended is left
    /// to the next process.
    pub(super) fn end_behind(&self, ids: Vec<String>) {
        let inner = Arc::clone(&self.inner);
        let dirs: Vec<_> = ids.into_iter().filter_map(|id| VmId::new(id).ok()).map(|id| inner.dirs.of(&id)).collect();
        self.spawn(async move {
            join_all(dirs.iter().map(|dir| async {
                if let Err(error) = inner.end(dir, None).await {
                    tracing::warn!(machine = %dir.id(), error = chain(&error), "failed to end a guest that waited");
                }
            }))
            .await;
        });
    }
}

impl Inner {
    /// The name of one that waits and fits; from here on it waits for who launches by that.
    pub(super) fn promise(&self, config: &SandboxConfig) -> Option<String> {
        let size = self.waits_for(config)?;
        let warm = self.waiting.pool.take(|kind| size.is_of(kind) && self.is_good(kind))?;
        let id = warm.id().to_string();
        self.waiting.promised().insert(id.clone(), warm);
        Some(id)
    }

    /// Of which size a guest may wait for such a sandbox; `None` if it has files of its own.
    fn waits_for(&self, config: &SandboxConfig) -> Option<Size> {
        let plain = config.machine == MachineFiles::default();
        plain.then(|| Size::of(&config.resources, self.options.memory))
    }

    /// Whether a guest that is started now would be of this kind. Seldom asked and soon answered: by what the files say of
    /// themselves.
    fn is_good(&self, kind: &TemplateKind) -> bool {
        let Ok((kernel, initramfs)) = self.assets() else { return false };
        let same = |asset: &Asset, known: &str| asset.identity().is_ok_and(|identity| identity == known);
        // A template that was written to is under its clones too.
        same(&kernel, &kind.kernel) && same(&initramfs, &kind.initramfs) && self.templates.find(kind).is_some()
    }

    /// The machine that was promised by the name of this directory, running; `None` if there is none, or it is of no use any
    /// more: then nothing of it is left.
    pub(super) async fn wake(&self, dir: &VmDir, cgroup_parent: &str) -> machine::Result<Option<Box<dyn Machine>>> {
        let Some(mut warm) = self.waiting.of_promise(dir.id().as_str()) else { return Ok(None) };
        match warm.claim(cgroup_parent).await {
            Ok(machine) => Ok(Some(machine)),
            Err(error) => {
                tracing::warn!(machine = %dir.id(), error = chain(&error), "a guest that waited is of no use");
                self.discard(warm).await?;
                Ok(None)
            }
        }
    }

    /// Ends one that nobody is promised.
    async fn end_one(&self, warm: Warm) {
        let machine = warm.id().clone();
        if let Err(error) = self.discard(warm).await {
            // It is found by its directory.
            tracing::warn!(%machine, error = chain(&error), "failed to end a guest that waited");
        }
    }

    async fn discard(&self, warm: Warm) -> machine::Result<()> {
        // The process is waited for by whoever has started it.
        warm.machine().kill().await?;
        self.end(&self.dirs.of(warm.id()), None).await
    }

    /// Ends those that wait, and has no more do so.
    pub(super) async fn end_waiting(&self) {
        self.waiting.closing.cancel();
        join_all(self.waiting.pool.close().into_iter().map(|warm| self.end_one(warm))).await;
        // One that was restored is not waited for.
        let _turn = self.waiting.turn.lock().await;
    }

    /// Has as many wait as there is room for, of the size that was just started; if all wait for others, the one that does for
    /// longest gives way to one of it.
    pub(super) async fn keep_waiting(&self, config: &SandboxConfig) {
        let Some(size) = self.waits_for(config).filter(|_| self.options.warm > 0) else { return };
        let asked = Instant::now();
        let mut turn = self.waiting.turn.lock().await;
        // Whoever began since has looked for this start too: many that fail are not each tried again, one after the other.
        if turn.is_some_and(|(of, begun)| of == size && begun >= asked) {
            return;
        }
        *turn = Some((size, Instant::now()));
        if let Err(error) = self.fill(size).await {
            // The next start tries again.
            tracing::warn!(error = chain(&error), "failed to have guests wait for Pods");
        }
    }

    async fn fill(&self, size: Size) -> Result<()> {
        let pool = &self.waiting.pool;
        for warm in pool.take_others(|kind| self.is_good(kind)) {
            self.end_one(warm).await;
        }
        if pool.room() == 0
            && pool.count(|kind| size.is_of(kind)) == 0
            && let Some(warm) = pool.take(|_| true)
        {
            self.end_one(warm).await;
        }
        while pool.room() > 0 {
            let Some(warm) = self.restore_ahead(size).await? else { return Ok(()) };
            if let Some(surplus) = pool.put(warm) {
                self.end_one(surplus).await;
            }
        }
        Ok(())
    }

    /// Restores a guest for nobody yet, and pauses it; `None` if there is no template of its size.
    async fn restore_ahead(&self, size: Size) -> Result<Option<Warm>> {
        let failed = |error: MachineError| error.during("failed to restore a guest ahead of time");
        let dir = self.dirs.of(&VmId::new(fresh_name()).map_err(failed)?);
        let restored = self.restore_in(&dir, size).await;
        if !matches!(restored, Ok(Some(_))) {
            self.end(&dir, None).await.map_err(failed)?;
        }
        restored
    }

    async fn restore_in(&self, dir: &VmDir, size: Size) -> Result<Option<Warm>> {
        let failed = |error: MachineError| error.during("failed to restore a guest ahead of time");
        let spec = self.spec(dir.clone(), size, None, &self.options.cgroup).await?;
        let kind = self.manager.template_kind(&spec).await.map_err(failed)?;
        let Some(template) = self.templates.find(&kind) else { return Ok(None) };
        let machine = self.manager.restore(&spec, &template).await.map_err(failed)?;
        let warm = Warm::new(machine, kind, spec);
        let settled = tokio::select! {
            // Cancel-safe: it only asks the guest. What starts a VMM goes to its end, so that whoever removes it meets nobody at
            // work.
            () = self.waiting.closing.cancelled() => Ok(false),
            settled = settle(&warm) => settled.map(|()| true),
        };
        match settled {
            Ok(true) => Ok(Some(warm)),
            given_up => {
                // As above; the first error says what is wrong.
                let _ = warm.machine().kill().await;
                given_up.map(|_| None)
            }
        }
    }
}

/// Has a guest answer, so that what this takes is read from the template, and translated where there is no KVM, before it is
/// needed; then pauses it.
async fn settle(warm: &Warm) -> Result<()> {
    let failed = |error: MachineError| error.during("failed to have a guest wait");
    let (agent, _) = Agent::connect(warm.machine().agent().await.map_err(failed)?, RESTORE_PATIENCE).await?;
    let answered = agent.stats(false).await;
    agent.close();
    answered?;
    warm.machine().pause().await.map_err(failed)
}
