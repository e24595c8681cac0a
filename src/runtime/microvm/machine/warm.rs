//! Booted guests that wait, paused, for a Pod: the second level of the pool, by what they are of.
//!
//! A paused guest costs no time and the memory it has touched. The host's word on how many there may be is final: what
//! does not fit is handed back, for whoever made it to end.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures::FutureExt;

use super::pool::Setup;
use super::template::TemplateKind;
use super::{Machine, Result};

/// A machine and what it was started in.
#[derive(Debug)]
pub struct Warm {
    /// The machine; its guest was told nothing yet.
    pub machine: Box<dyn Machine>,
    /// Its setup, occupied in its pool.
    pub setup: Setup,
}

/// Paused machines.
#[derive(Debug)]
pub struct WarmPool {
    most: usize,
    waiting: Mutex<HashMap<TemplateKind, VecDeque<Warm>>>,
}

impl WarmPool {
    /// An empty pool of at most `most` machines in all.
    pub fn new(most: usize) -> Self {
        Self { most, waiting: Mutex::default() }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<TemplateKind, VecDeque<Warm>>> {
        // It is never half changed, so a panic elsewhere does not spoil it.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many of that kind wait.
    pub fn count(&self, kind: &TemplateKind) -> usize {
        self.waiting().get(kind).map_or(0, VecDeque::len)
    }

    /// Pauses a machine and keeps it; `Some` if there is no room for it.
    ///
    /// # Errors
    /// It cannot be paused. It is dropped then, and goes on: whoever has its directory ends it.
    pub async fn put(&self, kind: TemplateKind, warm: Warm) -> Result<Option<Warm>> {
        warm.machine.pause().await?;
        let mut waiting = self.waiting();
        if waiting.values().map(VecDeque::len).sum::<usize>() >= self.most {
            return Ok(Some(warm));
        }
        waiting.entry(kind).or_default().push_back(warm);
        Ok(None)
    }

    /// The one of that kind that waits for longest, running again; and those that ended meanwhile, to be given back.
    ///
    /// # Errors
    /// It cannot be resumed.
    pub async fn take(&self, kind: &TemplateKind) -> Result<(Option<Warm>, Vec<Warm>)> {
        let (mut found, mut ended) = (None, Vec::new());
        while found.is_none() {
            let Some(warm) = self.waiting().get_mut(kind).and_then(VecDeque::pop_front) else { break };
            match warm.machine.exited().now_or_never() {
                Some(_) => ended.push(warm),
                None => found = Some(warm),
            }
        }
        if let Some(warm) = &found {
            warm.machine.resume().await?;
        }
        Ok((found, ended))
    }

    /// All of them, to be ended.
    pub fn drain(&self) -> Vec<Warm> {
        std::mem::take(&mut *self.waiting()).into_values().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::pin::Pin;
    use std::sync::Arc;

    use async_trait::async_trait;

    use super::*;
    use crate::runtime::microvm::machine::template::tests::kind;
    use crate::runtime::microvm::machine::{TapLink, Template, VmDir, VmDirs, VmExit, VmId};
    use crate::runtime::session::Duplex;

    /// A machine that remembers what it was told.
    #[derive(Debug)]
    struct Told {
        dir: VmDir,
        told: Arc<Mutex<Vec<&'static str>>>,
        ended: bool,
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
            self.told.lock().unwrap().push("pause");
            Ok(())
        }
        async fn resume(&self) -> Result<()> {
            self.told.lock().unwrap().push("resume");
            Ok(())
        }
        async fn save(&self) -> Result<Template> {
            Ok(Template { path: "/".into() })
        }
        fn weigh(&self, _: u64) -> Result<()> {
            Ok(())
        }

        async fn kill(&self) -> Result<()> {
            Ok(())
        }
        async fn exited(&self) -> VmExit {
            if self.ended { VmExit::Code(1) } else { std::future::pending().await }
        }
    }

    fn warm(name: &str, ended: bool) -> (Warm, Arc<Mutex<Vec<&'static str>>>) {
        let dir = VmDirs::new(Path::new("/run/vms"), "default").unwrap().of(&VmId::new(name).unwrap());
        let told = Arc::new(Mutex::new(Vec::new()));
        let machine = Box::new(Told { dir: dir.clone(), told: Arc::clone(&told), ended });
        let tap = TapLink { name: "lt0".to_owned(), mac: [2; 6], device: None };
        (Warm { machine, setup: Setup { dir, tap } }, told)
    }

    #[tokio::test]
    async fn the_oldest_of_a_kind_that_still_lives_is_resumed() {
        let pool = WarmPool::new(3);
        let ((dead, _), (first, told), (second, _)) = (warm("dead", true), warm("first", false), warm("second", false));
        for warm in [dead, first, second] {
            assert!(pool.put(kind(1), warm).await.unwrap().is_none());
        }
        assert!(pool.put(kind(2), warm("more", false).0).await.unwrap().is_some(), "there is no room");
        assert!(pool.take(&kind(2)).await.unwrap().0.is_none());
        let (found, ended) = pool.take(&kind(1)).await.unwrap();
        assert_eq!(found.unwrap().setup.dir.id().as_str(), "first");
        assert_eq!(*told.lock().unwrap(), ["pause", "resume"]);
        assert_eq!(ended.len(), 1);
        assert_eq!(pool.count(&kind(1)), 1);
        assert_eq!(pool.drain().len(), 1);
        assert_eq!(pool.count(&kind(1)), 0);
    }
}
