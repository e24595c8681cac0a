//! The system calls that a workload does without.
//!
//! The machine around the guest is the wall; this filter keeps the guest's own kernel a harder target, as the default
//! profiles of other runtimes do: what manages the kernel, its modules, clocks, keys and namespaces, and what needs a
//! capability that the workload does not have. Whoever has the capability may call.
//!
//! One rule holds for everybody, the unconfined too: no vsock, for the agent listens there.

use std::collections::BTreeMap;
use std::io;

use lambdalet_proto::agent::v1::ContainerSpec;
use nix::libc;
use rustix::thread::CapabilitySet;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::sys::install_filter;

/// Rules of one filter: for each call, when it is refused (always, if there is no rule).
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Calls nobody needs in a container.
const NEVER: &[i64] = &[
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_move_pages,
    libc::SYS_userfaultfd,
    libc::SYS_nfsservctl,
    libc::SYS_vmsplice,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// Calls for which one must hold a capability.
const GUARDED: &[(CapabilitySet, &[i64])] = &[
    (
        CapabilitySet::SYS_ADMIN,
        &[
            libc::SYS_fanotify_init,
            libc::SYS_fsconfig,
            libc::SYS_fsmount,
            libc::SYS_fsopen,
            libc::SYS_fspick,
            libc::SYS_mount,
            libc::SYS_mount_setattr,
            libc::SYS_move_mount,
            libc::SYS_open_tree,
            libc::SYS_pivot_root,
            libc::SYS_quotactl,
            libc::SYS_setdomainname,
            libc::SYS_sethostname,
            libc::SYS_setns,
            libc::SYS_swapon,
            libc::SYS_swapoff,
            libc::SYS_umount2,
            libc::SYS_unshare,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_lookup_dcookie,
        ],
    ),
    (CapabilitySet::DAC_READ_SEARCH, &[libc::SYS_open_by_handle_at]),
    (CapabilitySet::SYS_BOOT, &[libc::SYS_reboot, libc::SYS_kexec_load, libc::SYS_kexec_file_load]),
    (CapabilitySet::SYS_MODULE, &[libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module]),
    (CapabilitySet::SYS_PACCT, &[libc::SYS_acct]),
    (CapabilitySet::SYS_PTRACE, &[libc::SYS_kcmp]),
    (CapabilitySet::SYS_TIME, &[libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_clock_adjtime]),
    (CapabilitySet::SYS_TTY_CONFIG, &[libc::SYS_vhangup]),
    (CapabilitySet::SYSLOG, &[libc::SYS_syslog]),
    #[cfg(target_arch = "x86_64")]
    (CapabilitySet::SYS_RAWIO, &[libc::SYS_iopl, libc::SYS_ioperm]),
];

/// Installs the filters for what follows in this process.
///
/// # Errors
/// What the kernel refused.
pub(super) fn apply(spec: &ContainerSpec, kept: CapabilitySet) -> io::Result<()> {
    let refuse = |rules, errno: i32| install(rules, SeccompAction::Errno(errno.unsigned_abs()));
    if !spec.seccomp_unconfined && !spec.privileged {
        refuse(rules(kept)?, libc::EPERM)?;
        if !kept.contains(CapabilitySet::SYS_ADMIN) {
            // Its flags lie in memory, where no filter sees them: callers fall back to clone.
            refuse(BTreeMap::from([(libc::SYS_clone3, vec![])]), libc::ENOSYS)?;
        }
    }
    refuse(BTreeMap::from([(libc::SYS_socket, vec![first_is(libc::AF_VSOCK as u64)?])]), libc::EAFNOSUPPORT)
}

fn rules(kept: CapabilitySet) -> io::Result<Rules> {
    let mut rules: Rules = NEVER.iter().map(|call| (*call, vec![])).collect();
    for (capability, calls) in GUARDED.iter().filter(|(capability, _)| !kept.contains(*capability)) {
        debug_assert!(!capability.is_empty());
        rules.extend(calls.iter().map(|call| (*call, vec![])));
    }
    if !kept.contains(CapabilitySet::SYS_ADMIN) {
        // New namespaces, which open much of the kernel to whoever is root in them.
        let namespaces = [
            libc::CLONE_NEWNS,
            libc::CLONE_NEWCGROUP,
            libc::CLONE_NEWUTS,
            libc::CLONE_NEWIPC,
            libc::CLONE_NEWUSER,
            libc::CLONE_NEWPID,
            libc::CLONE_NEWNET,
        ];
        let flags = namespaces.map(|flag| first_has(u64::from(flag.unsigned_abs())));
        rules.insert(libc::SYS_clone, flags.into_iter().collect::<io::Result<_>>()?);
    }
    Ok(rules)
}

fn first_is(value: u64) -> io::Result<SeccompRule> {
    first(SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn first_has(bit: u64) -> io::Result<SeccompRule> {
    first(SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(bit), bit)
}

fn first(length: SeccompCmpArgLen, operator: SeccompCmpOp, value: u64) -> io::Result<SeccompRule> {
    let condition = SeccompCondition::new(0, length, operator, value).map_err(io::Error::other)?;
    SeccompRule::new(vec![condition]).map_err(io::Error::other)
}

fn install(rules: Rules, refusal: SeccompAction) -> io::Result<()> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refusal, architecture).map_err(io::Error::other)?;
    let program = BpfProgram::try_from(filter).map_err(io::Error::other)?;
    install_filter(&program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_opens_its_calls() {
        let none = rules(CapabilitySet::empty()).unwrap();
        assert!([libc::SYS_mount, libc::SYS_reboot, libc::SYS_clone].iter().all(|call| none.contains_key(call)));
        let admin = rules(CapabilitySet::SYS_ADMIN).unwrap();
        assert!(!admin.contains_key(&libc::SYS_mount) && !admin.contains_key(&libc::SYS_clone));
        assert!(admin.contains_key(&libc::SYS_reboot) && admin.contains_key(&libc::SYS_keyctl));
    }
}
