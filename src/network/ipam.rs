//! Which Pod has which address: crash-safe, never handing one out twice.
//!
//! ```text
//! free --allocate--> held by a Pod UID --release--> cooling down --cool-down over--> free
//!                        ^--allocate, same UID--'
//! ```
//!
//! The memory is a directory with one file per address, named as the address. A file is written whole beside its place,
//! synced and renamed, so a crash leaves the old record or the new one. What cannot be read is moved aside as
//! `<address>.quarantined` and that address stays out of use until the file is removed or the address is adopted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::NetworkError;
use crate::file::{self, Synced};

/// How long a released address rests by default: clients that keep connections by address must have noticed.
pub const DEFAULT_COOL_DOWN: Duration = Duration::from_secs(60);

/// Begins what holds an address and is no Pod: its owner frees it, and no sweep of Pods does.
pub const NO_POD: &str = "replica/";

/// Ends the name of a record that could not be read.
const QUARANTINED: &str = "quarantined";
/// Begins the name of a record that is being written.
const TEMPORARY: &str = ".new-";

/// The addresses of one node.
///
/// Every method that changes something writes one small file and blocks for that long.
pub struct Ipam {
    dir: PathBuf,
    range: IpNet,
    cool_down: Duration,
    clock: Box<dyn Fn() -> Timestamp + Send + Sync>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    records: BTreeMap<IpAddr, Record>,
    by_uid: HashMap<String, IpAddr>,
    quarantined: BTreeSet<IpAddr>,
    /// The greatest sequence number ever given, and to which address: the search goes on after it.
    last: Option<(u64, IpAddr)>,
}

/// What the file of an address says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// The Pod's UID.
    uid: String,
    /// Counts allocations, so that a restart knows where the search was.
    sequence: u64,
    /// When the Pod was gone, in milliseconds since 1970; absent while it holds the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    released: Option<i64>,
}

// === impl Ipam ===

impl Ipam {
    /// Loads the records under `dir` (made if missing). The first address of `range` is the gateway; the network's own
    /// address and the last one are not used either.
    ///
    /// # Errors
    /// [`NetworkError::RangeTooSmall`], or a directory that cannot be read or written. An unreadable record is no
    /// error: it is moved aside with a warning.
    pub fn open(dir: &Path, range: IpNet, cool_down: Duration) -> Result<Self, NetworkError> {
        Self::open_with_clock(dir, range, cool_down, Box::new(Timestamp::now))
    }

    /// [`Ipam::open`] with the caller's clock.
    ///
    /// # Errors
    /// As [`Ipam::open`].
    pub fn open_with_clock(
        dir: &Path,
        range: IpNet,
        cool_down: Duration,
        clock: Box<dyn Fn() -> Timestamp + Send + Sync>,
    ) -> Result<Self, NetworkError> {
        let range = range.trunc();
        if usable(range) == 0 {
            return Err(NetworkError::RangeTooSmall { range });
        }
        fs::create_dir_all(dir).map_err(|source| file_error("create directory", dir, source))?;
        let state = load(dir, range)?;
        Ok(Self { dir: dir.to_owned(), range, cool_down, clock, state: Mutex::new(state) })
    }

    /// The Pod's address: the one it holds already, or the next free one after the last that was given.
    ///
    /// # Errors
    /// [`NetworkError::Exhausted`], or the record could not be written (the address is then not given).
    pub fn allocate(&self, pod_uid: &str) -> Result<IpAddr, NetworkError> {
        let mut state = self.state();
        if let Some(address) = state.by_uid.get(pod_uid).copied() {
            if state.records.get(&address).is_some_and(|record| record.released.is_some()) {
                self.record(&mut state, address, pod_uid)?;
            }
            return Ok(address);
        }
        self.forget_cooled(&mut state);
        let address = self.next_free(&state).ok_or_else(|| self.exhausted(&state))?;
        self.record(&mut state, address, pod_uid)?;
        Ok(address)
    }

    /// Notes that a sandbox of this Pod has this address: for a sandbox found at start whose record is missing or
    /// quarantined.
    ///
    /// # Errors
    /// [`NetworkError::Refused`] if the address is outside the range, reserved, or another Pod's, or the Pod has
    /// another one.
    pub fn adopt(&self, pod_uid: &str, address: IpAddr) -> Result<(), NetworkError> {
        let mut state = self.state();
        let refuse = |reason: String| Err(NetworkError::Refused { address, pod_uid: pod_uid.to_owned(), reason });
        if !is_usable(self.range, address) {
            return refuse(format!("it is not usable in {}", self.range));
        }
        if let Some(own) = state.by_uid.get(pod_uid).filter(|own| **own != address) {
            return refuse(format!("the Pod has {own}"));
        }
        if let Some(other) = state.records.get(&address).filter(|record| record.uid != pod_uid && !self.cooled(record))
        {
            return refuse(format!("Pod {} has it", other.uid));
        }
        if state.records.get(&address).is_some_and(|record| record.uid == pod_uid && record.released.is_none()) {
            return Ok(());
        }
        self.record(&mut state, address, pod_uid)?;
        if state.quarantined.remove(&address) {
            remove(&self.dir.join(format!("{address}.{QUARANTINED}")))?;
        }
        Ok(())
    }

    /// Starts the cool-down of the Pod's address: the Pod object is gone. Releasing twice, or an unknown Pod, is Ok.
    ///
    /// # Errors
    /// The record could not be written; the Pod then still holds the address.
    pub fn release(&self, pod_uid: &str) -> Result<(), NetworkError> {
        let mut state = self.state();
        let Some(address) = state.by_uid.get(pod_uid).copied() else { return Ok(()) };
        self.release_address(&mut state, address)
    }

    /// Forgets the Pod's address at once: nobody outside this node was ever told of it.
    ///
    /// # Errors
    /// The record could not be removed; the Pod then still holds the address.
    pub fn discard(&self, pod_uid: &str) -> Result<(), NetworkError> {
        let mut state = self.state();
        let Some(address) = state.by_uid.get(pod_uid).copied() else { return Ok(()) };
        remove(&self.dir.join(address.to_string()))?;
        state.records.remove(&address);
        state.by_uid.remove(pod_uid);
        Ok(())
    }

    /// The first address of the range: the host's end.
    pub fn gateway(&self) -> IpAddr {
        at(self.range, 1)
    }

    /// Prefix length of the range.
    pub fn prefix_len(&self) -> u8 {
        self.range.prefix_len()
    }

    /// The range.
    pub fn range(&self) -> IpNet {
        self.range
    }

    /// The addresses that Pods hold (not those cooling down), with the Pod's UID, by address.
    pub fn held(&self) -> Vec<(IpAddr, String)> {
        let state = self.state();
        let held = state.records.iter().filter(|(_, record)| record.released.is_none());
        held.map(|(address, record)| (*address, record.uid.clone())).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is written first and then noted in one go, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn release_address(&self, state: &mut State, address: IpAddr) -> Result<(), NetworkError> {
        let Some(record) = state.records.get_mut(&address).filter(|record| record.released.is_none()) else {
            return Ok(());
        };
        let released = Record { released: Some((self.clock)().as_millisecond()), ..record.clone() };
        write(&self.dir, address, &released)?;
        *record = released;
        Ok(())
    }

    fn record(&self, state: &mut State, address: IpAddr, uid: &str) -> Result<(), NetworkError> {
        let sequence = state.last.map_or(0, |(sequence, _)| sequence) + 1;
        let record = Record { uid: uid.to_owned(), sequence, released: None };
        write(&self.dir, address, &record)?;
        if let Some(former) = state.records.insert(address, record).filter(|former| former.uid != uid) {
            state.by_uid.remove(&former.uid);
        }
        state.by_uid.insert(uid.to_owned(), address);
        state.last = Some((sequence, address));
        Ok(())
    }

    /// Drops the records of addresses that are free again, except the last one given: it tells where the search was.
    fn forget_cooled(&self, state: &mut State) {
        let last = state.last.map(|(_, address)| address);
        let cooled: Vec<IpAddr> = state
            .records
            .iter()
            .filter(|(address, record)| Some(**address) != last && self.cooled(record))
            .map(|(address, _)| *address)
            .collect();
        for address in cooled {
            // A record that stays on disk is only a record of a cooled address: harmless, and tried again at next start.
            if let Err(error) = remove(&self.dir.join(address.to_string())) {
                warn!(error = crate::telemetry::chain(&error), "failed to forget a free address");
            }
            if let Some(record) = state.records.remove(&address) {
                state.by_uid.remove(&record.uid);
            }
        }
    }

    fn cooled(&self, record: &Record) -> bool {
        let Some(released) = record.released else { return false };
        let rested = (self.clock)().as_millisecond().saturating_sub(released);
        u64::try_from(rested).is_ok_and(|rested| u128::from(rested) >= self.cool_down.as_millis())
    }

    fn next_free(&self, state: &State) -> Option<IpAddr> {
        let count = usable(self.range);
        let start = state.last.map_or(0, |(_, address)| offset(self.range, address) - 1);
        let free = |address: &IpAddr| {
            !state.quarantined.contains(address) && state.records.get(address).is_none_or(|record| self.cooled(record))
        };
        // At most one turn, and no more steps than there are addresses not free.
        let busy = (state.records.len() + state.quarantined.len()) as u128;
        (0..count.min(busy + 1)).map(|step| at(self.range, 2 + (start + step) % count)).find(free)
    }

    fn exhausted(&self, state: &State) -> NetworkError {
        let held = state.records.values().filter(|record| record.released.is_none()).count();
        NetworkError::Exhausted {
            range: self.range,
            held,
            cooling: state.records.len() - held,
            quarantined: state.quarantined.len(),
        }
    }
}

// === Arithmetic of ranges ===

/// How many addresses Pods can have: all but the network's, the gateway's and the last.
fn usable(range: IpNet) -> u128 {
    let bits = u32::from(range.max_prefix_len() - range.prefix_len());
    1_u128.checked_shl(bits).unwrap_or(u128::MAX).saturating_sub(3)
}

fn is_usable(range: IpNet, address: IpAddr) -> bool {
    range.contains(&address) && (2..2 + usable(range)).contains(&offset(range, address))
}

fn at(range: IpNet, offset: u128) -> IpAddr {
    match range.network() {
        // A v4 range holds at most 2^32 addresses, so the offset fits.
        IpAddr::V4(first) => Ipv4Addr::from(u32::from(first).wrapping_add(offset as u32)).into(),
        IpAddr::V6(first) => Ipv6Addr::from(u128::from(first).wrapping_add(offset)).into(),
    }
}

fn offset(range: IpNet, address: IpAddr) -> u128 {
    match (range.network(), address) {
        (IpAddr::V4(first), IpAddr::V4(address)) => u128::from(u32::from(address).wrapping_sub(u32::from(first))),
        (IpAddr::V6(first), IpAddr::V6(address)) => u128::from(address).wrapping_sub(u128::from(first)),
        _ => 0,
    }
}

// === Files ===

fn load(dir: &Path, range: IpNet) -> Result<State, NetworkError> {
    let mut state = State::default();
    let entries = fs::read_dir(dir).map_err(|source| file_error("read directory", dir, source))?;
    for entry in entries {
        let entry = entry.map_err(|source| file_error("read directory", dir, source))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(TEMPORARY) {
            // Never renamed, so never given to anyone.
            remove(&entry.path())?;
        } else if let Some(address) = name.strip_suffix(&format!(".{QUARANTINED}")) {
            state.quarantined.extend(address.parse::<IpAddr>().ok());
        } else {
            load_record(&mut state, range, &entry.path(), &name)?;
        }
    }
    Ok(state)
}

fn load_record(state: &mut State, range: IpNet, path: &Path, name: &str) -> Result<(), NetworkError> {
    let Ok(address) = name.parse::<IpAddr>() else {
        warn!(path = %path.display(), "a file that names no address among the address records; moving it aside");
        return quarantine(path);
    };
    if !is_usable(range, address) {
        warn!(path = %path.display(), %range, "the record of an address outside the range; moving it aside");
        return quarantine(path);
    }
    let record = match fs::read(path).map(|bytes| serde_json::from_slice::<Record>(&bytes)) {
        Ok(Ok(record)) if !record.uid.is_empty() => record,
        Ok(_) | Err(_) => {
            warn!(path = %path.display(), "an address record that cannot be read; the address is not used again");
            state.quarantined.insert(address);
            return quarantine(path);
        }
    };
    if state.last.is_none_or(|(sequence, _)| record.sequence > sequence) {
        state.last = Some((record.sequence, address));
    }
    if let Some(other) = state.by_uid.get(&record.uid).copied() {
        // Written by nobody we know. Either may be the Pod's, so the newer is believed and the other kept out of use.
        let newer = state.records.get(&other).is_none_or(|known| record.sequence > known.sequence);
        let loser = if newer { other } else { address };
        warn!(uid = record.uid, kept_out = %loser, "one Pod has two address records");
        state.quarantined.insert(loser);
        quarantine(&path.with_file_name(loser.to_string()))?;
        if !newer {
            return Ok(());
        }
        state.records.remove(&other);
    }
    state.by_uid.insert(record.uid.clone(), address);
    state.records.insert(address, record);
    Ok(())
}

fn quarantine(path: &Path) -> Result<(), NetworkError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{QUARANTINED}"));
    fs::rename(path, &aside).map_err(|source| file_error("move aside", path, source))
}

fn write(dir: &Path, address: IpAddr, record: &Record) -> Result<(), NetworkError> {
    let path = dir.join(address.to_string());
    let temporary = dir.join(format!("{TEMPORARY}{address}"));
    let write = || -> io::Result<()> {
        // The name need not be on disk: after a power cut no sandbox is left that could have the address.
        file::replace(&path, &temporary, &serde_json::to_vec(record)?, Synced::Content)
    };
    write().map_err(|source| file_error("write", &path, source))
}

fn remove(path: &Path) -> Result<(), NetworkError> {
    file::remove(path).map_err(|error| file_error("remove", path, error))
}

fn file_error(action: &'static str, path: &Path, source: io::Error) -> NetworkError {
    NetworkError::File { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    use proptest::prelude::*;

    use super::*;

    struct Host {
        dir: tempfile::TempDir,
        range: IpNet,
        now: Arc<AtomicI64>,
    }

    impl Host {
        fn new(range: &str) -> Self {
            let now = Arc::new(AtomicI64::new(1_000_000));
            Self { dir: tempfile::tempdir().unwrap(), range: range.parse().unwrap(), now }
        }

        fn open(&self) -> Ipam {
            let now = Arc::clone(&self.now);
            let clock = Box::new(move || Timestamp::from_second(now.load(Ordering::Relaxed)).unwrap());
            Ipam::open_with_clock(self.dir.path(), self.range, DEFAULT_COOL_DOWN, clock).unwrap()
        }

        fn wait(&self, seconds: i64) {
            self.now.fetch_add(seconds, Ordering::Relaxed);
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.dir.path().join(name), text).unwrap();
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_pod_keeps_its_address_over_sandboxes_and_restarts() {
        let host = Host::new("10.1.0.0/24");
        let ipam = host.open();
        assert_eq!(ipam.gateway(), ip("10.1.0.1"));
        assert_eq!(ipam.prefix_len(), 24);
        assert_eq!(ipam.allocate("a").unwrap(), ip("10.1.0.2"));
        assert_eq!(ipam.allocate("b").unwrap(), ip("10.1.0.3"));
        assert_eq!(ipam.allocate("a").unwrap(), ip("10.1.0.2"));
        let reopened = host.open();
        assert_eq!(reopened.allocate("a").unwrap(), ip("10.1.0.2"));
        assert_eq!(reopened.held(), [(ip("10.1.0.2"), "a".to_owned()), (ip("10.1.0.3"), "b".to_owned())]);
    }

    #[test]
    fn the_search_goes_on_where_it_was_even_after_a_restart() {
        let host = Host::new("10.1.0.0/29");
        for (pod, last) in [2, 3, 4, 5, 6, 2, 3].into_iter().enumerate() {
            let ipam = host.open();
            assert_eq!(ipam.allocate(&pod.to_string()).unwrap(), ip(&format!("10.1.0.{last}")));
            ipam.release(&pod.to_string()).unwrap();
            host.wait(61);
            let files = fs::read_dir(host.dir.path()).unwrap().count();
            assert!(files <= 2, "{files} files");
        }
    }

    #[test]
    fn an_address_rests_for_the_cool_down() {
        let host = Host::new("10.1.0.0/30");
        let ipam = host.open();
        ipam.allocate("a").unwrap();
        let error = ipam.allocate("b").unwrap_err().to_string();
        assert!(error.contains("10.1.0.0/30") && error.contains("1 held") && error.contains("0 released"), "{error}");
        ipam.release("a").unwrap();
        host.wait(59);
        ipam.release("a").unwrap();
        let error = host.open().allocate("b").unwrap_err().to_string();
        assert!(error.contains("0 held") && error.contains("1 released"), "{error}");
        host.wait(1);
        assert_eq!(host.open().allocate("b").unwrap(), ip("10.1.0.2"));
    }

    #[test]
    fn a_clock_set_back_does_not_end_a_cool_down() {
        let host = Host::new("10.1.0.0/30");
        let ipam = host.open();
        ipam.allocate("a").unwrap();
        ipam.release("a").unwrap();
        host.wait(-3600);
        assert!(ipam.allocate("b").is_err());
    }

    #[test]
    fn torn_and_foreign_files_are_moved_aside_and_their_addresses_not_used() {
        let host = Host::new("10.1.0.0/29");
        host.write("10.1.0.2", "");
        host.write("10.1.0.3", "{\"uid\":\"x\",\"seq");
        host.write("10.1.0.1", "{\"uid\":\"g\",\"sequence\":1}");
        host.write("10.9.0.1", "{\"uid\":\"y\",\"sequence\":1}");
        host.write("notes.txt", "hello");
        host.write(".new-10.1.0.6", "{");
        for _ in 0..2 {
            let ipam = host.open();
            assert!(ipam.held().iter().all(|(address, _)| *address == ip("10.1.0.4")));
            assert_eq!(ipam.allocate("a").unwrap(), ip("10.1.0.4"));
        }
        assert!(host.dir.path().join("10.1.0.2.quarantined").exists());
        assert!(host.dir.path().join("notes.txt.quarantined").exists());
        assert!(!host.dir.path().join(".new-10.1.0.6").exists());
        let ipam = host.open();
        ipam.adopt("x", ip("10.1.0.3")).unwrap();
        assert!(!host.dir.path().join("10.1.0.3.quarantined").exists());
        assert_eq!(host.open().allocate("x").unwrap(), ip("10.1.0.3"));
    }

    #[test]
    fn two_records_of_one_pod_leave_the_newer() {
        let host = Host::new("10.1.0.0/24");
        host.write("10.1.0.7", "{\"uid\":\"x\",\"sequence\":9}");
        host.write("10.1.0.8", "{\"uid\":\"x\",\"sequence\":4}");
        let ipam = host.open();
        assert_eq!(ipam.held(), [(ip("10.1.0.7"), "x".to_owned())]);
        assert_eq!(ipam.allocate("y").unwrap(), ip("10.1.0.9"));
    }

    #[test]
    fn adopting_refuses_what_is_not_the_pods() {
        let host = Host::new("10.1.0.0/24");
        let ipam = host.open();
        ipam.allocate("a").unwrap();
        assert!(ipam.adopt("b", ip("10.1.0.2")).unwrap_err().to_string().contains("Pod a has it"));
        assert!(ipam.adopt("a", ip("10.1.0.3")).unwrap_err().to_string().contains("the Pod has 10.1.0.2"));
        for reserved in ["10.1.0.0", "10.1.0.1", "10.1.0.255", "10.2.0.9", "fd00::5"] {
            assert!(ipam.adopt("c", ip(reserved)).is_err(), "{reserved}");
        }
        ipam.adopt("a", ip("10.1.0.2")).unwrap();
        ipam.adopt("c", ip("10.1.0.77")).unwrap();
        assert_eq!(ipam.allocate("d").unwrap(), ip("10.1.0.78"));
    }

    #[test]
    fn ipv6_ranges_work_and_small_ones_are_refused() {
        let host = Host::new("fd00:1::/64");
        let ipam = host.open();
        assert_eq!(ipam.gateway(), ip("fd00:1::1"));
        assert_eq!(ipam.allocate("a").unwrap(), ip("fd00:1::2"));
        assert_eq!(host.open().allocate("b").unwrap(), ip("fd00:1::3"));
        for small in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/127"] {
            let error = Ipam::open(host.dir.path(), small.parse().unwrap(), DEFAULT_COOL_DOWN).err().unwrap();
            assert!(error.to_string().contains(small), "{error}");
        }
        assert_eq!(usable("::/0".parse().unwrap()), u128::MAX - 3);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u8),
        Release(u8),
        Wait(i64),
        Crash,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0_u8..12).prop_map(Step::Allocate),
            4 => (0_u8..12).prop_map(Step::Release),
            2 => (0_i64..50).prop_map(Step::Wait),
            2 => Just(Step::Crash),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Over any history: no two Pods have one address, nobody gets an address before its cool-down is over, a Pod
        /// keeps its own, and an error means that really none is free.
        #[test]
        fn an_address_has_one_pod(steps in proptest::collection::vec(step(), 1..60), v6 in any::<bool>()) {
            let host = Host::new(if v6 { "fd00::/125" } else { "10.1.0.0/29" });
            let mut ipam = host.open();
            let mut held: HashMap<u8, IpAddr> = HashMap::new();
            let mut released: HashMap<IpAddr, (u8, i64)> = HashMap::new();
            for step in steps {
                let now = host.now.load(Ordering::Relaxed);
                match step {
                    Step::Allocate(pod) => match ipam.allocate(&pod.to_string()) {
                        Ok(address) => {
                            prop_assert!(is_usable(host.range, address));
                            prop_assert!(held.iter().all(|(other, theirs)| *other == pod || *theirs != address));
                            prop_assert!(held.get(&pod).is_none_or(|mine| *mine == address));
                            if let Some((owner, since)) = released.remove(&address) {
                                prop_assert!(owner == pod || now - since >= 60, "{} too early", address);
                            }
                            held.insert(pod, address);
                        }
                        Err(_) => {
                            let cooling = released.values().filter(|(_, since)| now - since < 60).count();
                            prop_assert_eq!(held.len() + cooling, 5);
                        }
                    },
                    Step::Release(pod) => {
                        ipam.release(&pod.to_string()).unwrap();
                        if let Some(address) = held.remove(&pod) {
                            released.insert(address, (pod, now));
                        }
                    }
                    Step::Wait(seconds) => host.wait(seconds),
                    Step::Crash => ipam = host.open(),
                }
                let mut listed: Vec<_> = held.iter().map(|(pod, address)| (*address, pod.to_string())).collect();
                listed.sort();
                prop_assert_eq!(ipam.held(), listed);
            }
        }
    }
}
