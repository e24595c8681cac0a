//! What the environment of a function says about its machine, and the kernel arguments that guests are given.
//!
//! The rules are those of the function server's first form (its table of variables and defaults); values only.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use super::VmId;
use super::error::{MachineError, Result};

/// Of a function's kernel arguments, in bytes. The kernel's own limit (x86: COMMAND_LINE_SIZE, 2048) is shared with the
/// node's arguments; what is above it the kernel would cut off without a word.
pub const LONGEST_ARGUMENTS: usize = 1536;
/// Longest part of bad arguments that an error repeats, in characters.
const SHOWN: usize = 64;

/// What the kernel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum VmType {
    /// Linux.
    #[default]
    Linux,
    /// OSv.
    Osv,
}

/// The machine that a function asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineWish {
    /// `KERNEL_IMAGE_PATH`; without it the node's own.
    pub kernel: Option<PathBuf>,
    /// `INITRD_PATH`; without it the node's own.
    pub initrd: Option<PathBuf>,
    /// `INET_DEV`: the host's interface that its traffic is to leave by.
    pub inet_dev: Option<String>,
    /// `IMAGE_STORAGE`: where its images are to lie.
    pub image_storage: Option<String>,
    /// `NAMESERVER`: whom it is to ask for names.
    pub name_server: Option<IpAddr>,
    /// `VM_TYPE`: linux or osv.
    pub vm_type: VmType,
    /// `KERNEL_ARGS`: one line of ASCII, at most [`LONGEST_ARGUMENTS`] bytes.
    pub kernel_args: Option<String>,
}

impl MachineWish {
    /// What these variables say.
    ///
    /// # Errors
    /// [`MachineError::Invalid`] for a value that cannot be, and for `GPU_MEM`: no machine here has a GPU.
    pub fn read(environment: &BTreeMap<String, String>) -> Result<Self> {
        let text = |name: &str| environment.get(name).filter(|value| !value.is_empty()).cloned();
        let path = |name: &str| match text(name) {
            None => Ok(None),
            Some(value) if value.starts_with('/') => Ok(Some(PathBuf::from(value))),
            Some(value) => Err(invalid(name, &value, "it must be an absolute path")),
        };
        if let Some(value) = text("GPU_MEM") {
            return Err(invalid("GPU_MEM", &value, "no machine of this node has a GPU"));
        }
        let address =
            |value: String| value.parse().map_err(|_| invalid("NAMESERVER", &value, "it must be an IP address"));
        let vm_type = match text("VM_TYPE").as_deref() {
            None | Some("linux") => VmType::Linux,
            Some("osv") => VmType::Osv,
            Some(value) => return Err(invalid("VM_TYPE", value, "it must be linux or osv")),
        };
        let kernel_args = text("KERNEL_ARGS");
        kernel_args.as_deref().map_or(Ok(()), check_arguments)?;
        Ok(Self {
            kernel: path("KERNEL_IMAGE_PATH")?,
            initrd: path("INITRD_PATH")?,
            inet_dev: text("INET_DEV"),
            image_storage: text("IMAGE_STORAGE"),
            name_server: text("NAMESERVER").map(address).transpose()?,
            vm_type,
            kernel_args,
        })
    }
}

/// Where a guest finds the services of its node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Services {
    /// `RES_MNGR_ADDR`: the resource manager's address.
    pub resource_manager: String,
    /// `FCD_ADDR`: this node's function server.
    pub function_server: String,
    /// `REDIS_CACHE_ADDR`: the cache.
    pub cache: String,
    /// `AVA_LOG_LEVEL`.
    pub log_level: String,
}

impl Services {
    /// Kernel arguments that tell a guest who it is and where they are; what is empty is left out.
    ///
    /// # Errors
    /// [`MachineError::Invalid`] for a value that would not arrive as it is: with white space or a quote in it.
    pub fn kernel_args(&self, id: &VmId) -> Result<Vec<String>> {
        let pairs = [
            ("RES_MNGR_ADDR", self.resource_manager.as_str()),
            ("FCD_ADDR", &self.function_server),
            ("REDIS_CACHE_ADDR", &self.cache),
            ("OS", "linux"),
            ("VMID", id.as_str()),
            ("AVA_LOG_LEVEL", &self.log_level),
        ];
        pairs.into_iter().filter(|(_, value)| !value.is_empty()).map(|(name, value)| variable(name, value)).collect()
    }
}

fn check_arguments(text: &str) -> Result<()> {
    let (bytes, shown) = (text.len(), text.chars().take(SHOWN).collect::<String>());
    let reason = if bytes > LONGEST_ARGUMENTS {
        format!("it has {bytes} bytes, and a kernel's command line has room for {LONGEST_ARGUMENTS}: shorten it")
    } else if text.contains(char::is_control) {
        "it must be one line".to_owned()
    } else if !text.is_ascii() {
        "a kernel's command line is ASCII".to_owned()
    } else {
        return Ok(());
    };
    Err(invalid("KERNEL_ARGS", &shown, &reason))
}

fn variable(name: &str, value: &str) -> Result<String> {
    let broken = |text: &str| text.contains(|c: char| c.is_whitespace() || c.is_control() || c == '"');
    if name.is_empty() || name.contains('=') || broken(name) || broken(value) {
        return Err(invalid(name, value, "a kernel's command line cannot carry it as one word"));
    }
    Ok(format!("--env={name}={value}"))
}

fn invalid(name: &str, value: &str, reason: &str) -> MachineError {
    MachineError::Invalid { what: format!("{name}={value:?}"), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wish(pairs: &[(&str, &str)]) -> Result<MachineWish> {
        MachineWish::read(&pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let wish = wish(&[]).unwrap();
        assert_eq!((wish.kernel, wish.initrd, wish.kernel_args), (None, None, None));
        assert_eq!((wish.inet_dev, wish.image_storage, wish.name_server), (None, None, None));
        assert_eq!(wish.vm_type, VmType::Linux);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (name, value) in [
            ("GPU_MEM", "1024"),
            ("VM_TYPE", "windows"),
            ("NAMESERVER", "dns.example"),
            ("KERNEL_IMAGE_PATH", "vmlinux"),
            ("KERNEL_ARGS", "a\nb"),
            ("KERNEL_ARGS", "quiet ä"),
            ("KERNEL_ARGS", &"x".repeat(LONGEST_ARGUMENTS + 1)),
        ] {
            let error = wish(&[(name, value)]).unwrap_err().to_string();
            assert!(error.starts_with(name) && error.len() < 250, "{error}");
        }
        let most = "x".repeat(LONGEST_ARGUMENTS);
        assert_eq!(wish(&[("KERNEL_ARGS", &most)]).unwrap().kernel_args, Some(most));
        for (name, value) in [("A", "1 init=/bin/sh"), ("A", "\"x"), ("A B", "1"), ("", "1"), ("A=B", "1")] {
            assert!(variable(name, value).is_err(), "{name}={value}");
        }
    }

    #[test]
    fn a_guest_is_told_who_it_is_and_what_is_there() {
        let services = Services { function_server: "10.0.0.1:50051".to_owned(), ..Services::default() };
        let id = VmId::new("one").unwrap();
        assert_eq!(
            services.kernel_args(&id).unwrap(),
            ["--env=FCD_ADDR=10.0.0.1:50051", "--env=OS=linux", "--env=VMID=one"]
        );
    }

    proptest! {
        #[test]
        fn a_variable_never_becomes_more_than_one_word(name in "[A-Z=]{0,8}", value in ".{0,40}") {
            if let Ok(word) = variable(&name, &value) {
                prop_assert_eq!(word.split_whitespace().count(), 1);
                prop_assert!(!word.contains('"'));
            }
        }
    }
}
