//! What the workload may do: limits, groups, system calls, capabilities, user. In this order, since each step needs what
//! a later one gives up.

use std::io;

use lambdalet_proto::agent::v1::{ContainerSpec, Rlimit};
use lambdalet_proto::capability::NAMES;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

use super::identity::Identity;
use super::{Failure, seccomp};

/// Where commands are looked for if nobody says.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Gives up all that the spec does not give.
pub(super) fn take(spec: &ContainerSpec, identity: &Identity) -> Result<(), Failure> {
    let kept = capabilities(spec)
        .map_err(|name| Failure::at("take capabilities", io::Error::other(format!("there is no {name}"))))?;
    spec.rlimits.iter().try_for_each(limit).map_err(|error| Failure::at("set resource limits", error))?;
    bound(kept).map_err(|error| Failure::at("take capabilities", error))?;
    become_user(identity, kept, spec).map_err(|error| Failure::at(&format!("become user {}", identity.uid), error))
}

/// Gives up everything.
pub(super) fn none() -> io::Result<()> {
    let none = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?)
}

/// The set that the spec names.
fn capabilities(spec: &ContainerSpec) -> Result<CapabilitySet, String> {
    let all = CapabilitySet::from_bits_retain((1 << NAMES.len()) - 1);
    if spec.privileged {
        return Ok(all);
    }
    let number = |name: &String| {
        let name = name.strip_prefix("CAP_").unwrap_or(name);
        NAMES.iter().position(|known| *known == name).ok_or_else(|| name.to_owned())
    };
    let mut kept = CapabilitySet::empty();
    for name in &spec.capabilities {
        kept |= CapabilitySet::from_bits_retain(1 << number(name)?);
    }
    Ok(kept)
}

/// What the workload can never get back, also not by a setuid program.
fn bound(kept: CapabilitySet) -> io::Result<()> {
    for number in 0..NAMES.len() {
        let one = CapabilitySet::from_bits_retain(1 << number);
        // An older kernel knows fewer.
        if !kept.contains(one) && capability_is_in_bounding_set(one).unwrap_or(false) {
            remove_capability_from_bounding_set(one)?;
        }
    }
    Ok(())
}

fn become_user(identity: &Identity, kept: CapabilitySet, spec: &ContainerSpec) -> io::Result<()> {
    let groups: Vec<Gid> = identity.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups)?;
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    setresgid(gid, gid, gid)?;
    if spec.no_new_privileges {
        set_no_new_privs(true)?;
    }
    // While it may still do so without giving up setuid programs.
    seccomp::apply(spec, kept)?;
    setresuid(uid, uid, uid)?;
    // Another user than root has lost the sets by becoming it; they come back to nobody.
    let effective = if uid.is_root() { kept } else { CapabilitySet::empty() };
    set_capabilities(None, CapabilitySets { effective, permitted: effective, inheritable: CapabilitySet::empty() })?;
    Ok(())
}

fn limit(limit: &Rlimit) -> io::Result<()> {
    let resource = match limit.name.to_ascii_lowercase().trim_start_matches("rlimit_") {
        "as" => Resource::RLIMIT_AS,
        "core" => Resource::RLIMIT_CORE,
        "cpu" => Resource::RLIMIT_CPU,
        "data" => Resource::RLIMIT_DATA,
        "fsize" => Resource::RLIMIT_FSIZE,
        "memlock" => Resource::RLIMIT_MEMLOCK,
        "nofile" => Resource::RLIMIT_NOFILE,
        "nproc" => Resource::RLIMIT_NPROC,
        "stack" => Resource::RLIMIT_STACK,
        name => return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("there is no limit {name:?}"))),
    };
    setrlimit(resource, limit.soft, limit.hard).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_those_of_the_kernel() {
        let spec = |names: &[&str]| ContainerSpec {
            capabilities: names.iter().map(|name| (*name).to_owned()).collect(),
            ..ContainerSpec::default()
        };
        let kept = capabilities(&spec(&["CHOWN", "CAP_NET_RAW", "SYS_ADMIN"])).unwrap();
        assert_eq!(kept, CapabilitySet::CHOWN | CapabilitySet::NET_RAW | CapabilitySet::SYS_ADMIN);
        assert_eq!(capabilities(&spec(&["CHECKPOINT_RESTORE"])).unwrap(), CapabilitySet::CHECKPOINT_RESTORE);
        assert_eq!(capabilities(&spec(&["NOT_ONE"])), Err("NOT_ONE".to_owned()));
        let privileged = ContainerSpec { privileged: true, ..ContainerSpec::default() };
        assert!(capabilities(&privileged).unwrap().contains(CapabilitySet::SYS_MODULE));
    }
}
