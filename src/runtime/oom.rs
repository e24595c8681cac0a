//! Who was killed for want of memory.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::OFlag;

/// Containers whose end is remembered; those before were looked at long ago.
const REMEMBERED: usize = 512;
/// Longest record of the kernel's log.
const LONGEST_RECORD: usize = 8 << 10;

/// Which containers were killed for want of memory, where their engine does not know.
///
/// Docker and containerd learn it from their shims, which lose the notice when they have to take the cgroup away first: on a busy machine
/// that is the rule. The kernel's own log names the container's cgroup, and is written before the process is killed.
#[derive(Clone, Debug, Default)]
pub(super) struct Verdicts(Arc<Mutex<VecDeque<(String, bool)>>>);

impl Verdicts {
    /// Remembers that the engine told of it, in an event.
    pub(super) fn convict(&self, id: &str) {
        let mut verdicts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        verdicts.retain(|(known, _)| known != id);
        if verdicts.len() == REMEMBERED {
            verdicts.pop_front();
        }
        verdicts.push_back((id.to_owned(), true));
    }

    /// Whether a container that was killed was so for want of memory. The kernel's log is read once for each.
    pub(super) async fn of(&self, id: &str) -> bool {
        let known = |verdicts: &VecDeque<(String, bool)>| {
            verdicts.iter().find(|(known, _)| known == id).map(|(_, verdict)| *verdict)
        };
        if let Some(verdict) = known(&self.0.lock().unwrap_or_else(PoisonError::into_inner)) {
            return verdict;
        }
        let wanted = id.to_owned();
        let read = tokio::task::spawn_blocking(move || kernel_log_names(&wanted));
        // A log that may not be read says nothing: the engine's word stands.
        let verdict = read.await.ok().and_then(Result::ok).unwrap_or(false);
        let mut verdicts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(verdict) = known(&verdicts) {
            return verdict;
        }
        if verdicts.len() == REMEMBERED {
            verdicts.pop_front();
        }
        verdicts.push_back((id.to_owned(), verdict));
        verdict
    }
}

/// Whether the kernel's log tells of a process killed in the cgroup of container `id`.
fn kernel_log_names(id: &str) -> io::Result<bool> {
    // Each read is one record, from the oldest that is kept; without more it would wait.
    let mut log = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open("/dev/kmsg")?;
    let mut record = [0; LONGEST_RECORD];
    loop {
        match log.read(&mut record) {
            Ok(0) => return Ok(false),
            Ok(length) if is_kill_in(&String::from_utf8_lossy(&record[..length]), id) => return Ok(true),
            Ok(_) => {}
            // Records were overwritten while we read: on with the next.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

fn is_kill_in(record: &str, id: &str) -> bool {
    record.contains("oom-kill:") && record.split(',').any(|part| part.starts_with("task_memcg=") && part.contains(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_is_known_by_the_cgroup_of_the_task() {
        let record = "6,2101,4583628750,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=c1,mems_allowed=0,\
                      oom_memcg=/l/pod1,task_memcg=/l/pod1/c1,task=busybox,pid=27777,uid=0";
        assert!(is_kill_in(record, "c1"));
        assert!(!is_kill_in(record, "c2"));
        assert!(!is_kill_in("6,1,1,-;something about task_memcg=/l/pod1/c1", "c1"));
    }
}
