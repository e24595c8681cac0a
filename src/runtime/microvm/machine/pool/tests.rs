//! The pool, over setups that are only remembered, and over those of this host.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Barrier;
use tokio::time::timeout;

use super::*;
use crate::network::tap::{Surroundings, Tap};

/// Setups of nothing, numbered as they are made; faults on demand.
#[derive(Default)]
struct Remembered {
    made: AtomicUsize,
    cleaned: AtomicUsize,
    destroyed: AtomicUsize,
    /// The build of this number fails.
    bad_build: Option<usize>,
    bad_clean: bool,
    slow_clean: bool,
    /// All that are built at once meet here.
    together: Option<Barrier>,
    /// And all that are cleaned.
    clean_together: Option<Barrier>,
}

fn dir(name: &str) -> VmDir {
    VmDirs::new(std::path::Path::new("/run/vms"), "default").unwrap().of(&VmId::new(name).unwrap())
}

fn fault() -> MachineError {
    MachineError::Invalid { what: "this".to_owned(), reason: "a fault".to_owned() }
}

#[async_trait]
impl Setups for &Remembered {
    async fn build(&self) -> Result<Setup> {
        let number = self.made.fetch_add(1, Ordering::SeqCst);
        if let Some(together) = &self.together {
            together.wait().await;
        }
        if self.bad_build == Some(number) {
            return Err(fault());
        }
        let tap = TapLink { name: format!("lt{number}"), mac: [2; 6], device: None, namespace: None };
        Ok(Setup { dir: dir(&format!("vm{number}")), tap })
    }

    async fn clean(&self, setup: &Setup) -> Result<Setup> {
        self.cleaned.fetch_add(1, Ordering::SeqCst);
        if let Some(together) = &self.clean_together {
            together.wait().await;
        }
        if self.slow_clean {
            std::future::pending::<()>().await;
        }
        if self.bad_clean { Err(fault()) } else { Ok(setup.clone()) }
    }

    async fn destroy(&self, _setup: &Setup) -> Result<()> {
        self.destroyed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

async fn name<S: Setups>(pool: &SetupPool<S>) -> String {
    pool.get().await.unwrap().dir.id().to_string()
}

#[tokio::test]
async fn the_oldest_goes_first_and_what_is_given_back_last() {
    let setups = Remembered::default();
    let pool = SetupPool::new(&setups, 10);
    pool.fill(2).await.unwrap();
    assert_eq!(name(&pool).await, "vm0");
    pool.give_back(&VmId::new("vm0").unwrap()).await.unwrap();
    assert_eq!((name(&pool).await, name(&pool).await), ("vm1".to_owned(), "vm0".to_owned()));
    assert_eq!(name(&pool).await, "vm2", "with none idle one is made");
    assert_eq!(pool.count(), (0, 3));
    assert_eq!(setups.cleaned.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn all_of_a_fill_are_made_at_once() {
    let setups = Remembered { together: Some(Barrier::new(8)), ..Remembered::default() };
    let pool = SetupPool::new(&setups, 8);
    timeout(Duration::from_secs(10), pool.fill(8)).await.expect("they wait for one another").unwrap();
    pool.fill(8).await.unwrap();
    assert_eq!(pool.count(), (8, 0), "there is a bound");
}

#[tokio::test]
async fn the_first_error_of_a_fill_is_told_and_the_others_stay() {
    let setups = Remembered { bad_build: Some(1), ..Remembered::default() };
    let pool = SetupPool::new(&setups, 10);
    assert!(pool.fill(3).await.is_err());
    assert_eq!(pool.count(), (2, 0));
}

#[tokio::test]
async fn what_is_not_assigned_cannot_be_given_back() {
    let setups = Remembered::default();
    let pool = SetupPool::new(&setups, 10);
    pool.fill(1).await.unwrap();
    for id in ["unknown", "vm0"] {
        let error = pool.give_back(&VmId::new(id).unwrap()).await.unwrap_err();
        assert!(matches!(error, MachineError::NotAssigned), "{error}");
        assert_eq!(error.to_string(), "VM setup is not assigned");
    }
    let id = pool.get().await.unwrap().dir.id().clone();
    pool.give_back(&id).await.unwrap();
    assert!(pool.give_back(&id).await.is_err(), "only once");
    assert_eq!(pool.count(), (1, 0));
}

#[tokio::test]
async fn errors_give_the_slot_back_and_leave_nothing() {
    let setups = Remembered { bad_build: Some(0), bad_clean: true, ..Remembered::default() };
    let pool = SetupPool::new(&setups, 10);
    assert!(pool.get().await.is_err());
    assert_eq!(pool.count(), (0, 0));
    let setup = pool.get().await.unwrap();
    assert!(pool.give_back(setup.dir.id()).await.is_err());
    assert_eq!((pool.count(), setups.destroyed.load(Ordering::SeqCst)), ((0, 0), 1));
    assert_eq!(name(&pool).await, "vm2", "and it goes on");
}

#[tokio::test]
async fn one_whose_cleaning_is_given_up_stays_occupied() {
    let setups = Remembered { slow_clean: true, ..Remembered::default() };
    let pool = SetupPool::new(&setups, 10);
    let setup = pool.get().await.unwrap();
    assert!(timeout(Duration::from_millis(1), pool.give_back(setup.dir.id())).await.is_err());
    assert_eq!(pool.count(), (0, 1));
}

#[tokio::test]
async fn above_the_bound_it_is_destroyed() {
    let setups = Remembered::default();
    let pool = SetupPool::new(&setups, 1);
    let (first, second) = (pool.get().await.unwrap(), pool.get().await.unwrap());
    pool.give_back(first.dir.id()).await.unwrap();
    pool.give_back(second.dir.id()).await.unwrap();
    assert_eq!((pool.count(), setups.destroyed.load(Ordering::SeqCst)), ((1, 0), 1));
    pool.drain().await.unwrap();
    assert_eq!((pool.count(), setups.destroyed.load(Ordering::SeqCst)), ((0, 0), 2));
}

#[tokio::test]
async fn of_those_given_back_at_once_no_more_are_kept_than_there_is_room_for() {
    let setups = Remembered { clean_together: Some(Barrier::new(3)), ..Remembered::default() };
    let pool = SetupPool::new(&setups, 1);
    let taken = [pool.get().await.unwrap(), pool.get().await.unwrap(), pool.get().await.unwrap()];
    for given in join_all(taken.iter().map(|setup| pool.give_back(setup.dir.id()))).await {
        given.unwrap();
    }
    assert_eq!((pool.count(), setups.destroyed.load(Ordering::SeqCst)), ((1, 0), 2));
}

#[tokio::test]
async fn what_is_taken_is_replaced_meanwhile_and_a_failure_is_no_end() {
    let setups = Remembered { bad_build: Some(2), ..Remembered::default() };
    let pool = SetupPool::new(&setups, 2);
    let filled = async || {
        while pool.count().0 < 2 {
            sleep(Duration::from_millis(1)).await;
        }
    };
    let used = async {
        filled().await;
        let first = name(&pool).await;
        filled().await;
        assert_eq!((first.as_str(), setups.made.load(Ordering::SeqCst)), ("vm0", 4), "one more try after the bad one");
        let second = pool.get().await.unwrap();
        filled().await;
        pool.give_back(second.dir.id()).await.unwrap();
        assert_eq!((pool.count(), setups.destroyed.load(Ordering::SeqCst)), ((2, 1), 1), "its place is taken");
        pool.drain().await.unwrap();
        pool.fill(2).await.unwrap();
        pool.give_back(&VmId::new(first).unwrap()).await.unwrap();
        assert_eq!(pool.count(), (0, 0), "nothing is kept any more");
    };
    tokio::select! {
        // It is asked nothing more.
        () = pool.keep_filled() => panic!("it goes on"),
        // The other is over with it.
        done = timeout(Duration::from_secs(3600), used) => done.expect("it is refilled"),
    }
}

/// Taps that are only remembered; the one of this number cannot be made.
#[derive(Default)]
struct Wires {
    /// None can be removed.
    stuck: AtomicBool,
    there: Mutex<Vec<String>>,
    made: AtomicUsize,
    bad: Option<usize>,
}

#[async_trait]
impl Taps for Wires {
    async fn surroundings(&self) -> Result<Surroundings, NetworkError> {
        Ok(Surroundings { gateway: [10, 0, 0, 1].into(), mtu: 1500 })
    }

    async fn make_tap(&self, sandbox: &str, owner: Option<u32>) -> Result<Tap, NetworkError> {
        assert_eq!(owner, Some(7));
        if self.bad == Some(self.made.fetch_add(1, Ordering::SeqCst)) {
            return Err(NetworkError::BadName { name: sandbox.to_owned() });
        }
        let mut there = self.there.lock().unwrap();
        there.retain(|name| name != sandbox);
        there.push(sandbox.to_owned());
        Ok(Tap { name: sandbox.to_owned(), device: None, namespace: None })
    }

    async fn lead(&self, _sandbox: &str, _address: IpAddr) -> Result<(), NetworkError> {
        Ok(())
    }

    async fn remove_tap(&self, sandbox: &str) -> Result<(), NetworkError> {
        if self.stuck.load(Ordering::SeqCst) {
            return Err(NetworkError::BadName { name: sandbox.to_owned() });
        }
        self.there.lock().unwrap().retain(|name| name != sandbox);
        Ok(())
    }

    async fn remove_other_taps(&self, _sandboxes: &[String]) -> Result<usize, NetworkError> {
        Ok(0)
    }
}

#[tokio::test]
async fn a_setup_of_this_host_is_clean_when_it_is_used_again() {
    let base = tempfile::tempdir().unwrap();
    let user = VmmUser { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
    let dirs = VmDirs::new(base.path(), "default").unwrap();
    let wires = Arc::new(Wires { bad: Some(3), ..Wires::default() });
    let setups = HostSetups::new(dirs.clone(), wires.clone(), user, TapUse::Named { uid: 7 });
    let pool = SetupPool::new(setups, 4);
    pool.fill(1).await.unwrap();
    let setup = pool.get().await.unwrap();
    std::fs::write(setup.dir.inside().join("secret"), "of the last one").unwrap();
    std::fs::write(setup.dir.console(), "console").unwrap();
    pool.give_back(setup.dir.id()).await.unwrap();
    let again = pool.get().await.unwrap();
    assert_ne!(again.dir.id(), setup.dir.id(), "who knew the one before does not reach this one");
    assert!(!setup.dir.path().exists() && !wires.there.lock().unwrap().contains(&setup.dir.id().to_string()));
    assert_eq!(std::fs::read_dir(again.dir.inside()).unwrap().count(), 0);
    assert!(!again.dir.console().exists());
    let other = pool.get().await.unwrap();
    assert!(pool.get().await.is_err(), "the tap cannot be made");
    assert_eq!(dirs.list().unwrap().len(), 2, "a failed build leaves no directory");
    assert_eq!(wires.there.lock().unwrap().len(), 2);
    for setup in [again, other] {
        pool.give_back(setup.dir.id()).await.unwrap();
    }
    pool.drain().await.unwrap();
    assert!(dirs.list().unwrap().is_empty() && wires.there.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_directory_stays_until_its_tap_is_gone() {
    let base = tempfile::tempdir().unwrap();
    let user = VmmUser { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
    let dirs = VmDirs::new(base.path(), "default").unwrap();
    let wires = Arc::<Wires>::default();
    let setups = HostSetups::new(dirs.clone(), wires.clone(), user, TapUse::Named { uid: 7 });
    let setup = setups.build().await.unwrap();
    wires.stuck.store(true, Ordering::SeqCst);
    setups.destroy(&setup).await.unwrap_err();
    setups.clean(&setup).await.unwrap_err();
    assert_eq!(dirs.list().unwrap(), std::slice::from_ref(&setup.dir), "by it the next process finds the tap");
    wires.stuck.store(false, Ordering::SeqCst);
    setups.destroy(&setup).await.unwrap();
    assert!(dirs.list().unwrap().is_empty() && wires.there.lock().unwrap().is_empty());
}
