//! What the environment of a function says about its machine, and the kernel arguments that follow from it.
//!
//! The rules are those of the function server's first form (its table of variables and defaults); values only.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use super::VmId;
use super::error::{MachineError, Result};

const DEFAULT_NAME_SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(8, 8, 8, 8));
/// The kernel's limit on its command line (x86: COMMAND_LINE_SIZE), in bytes.
const LONGEST_LINE: usize = 2048;

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
    /// `INET_DEV`: the host's interface that its traffic leaves by; empty: any.
    pub inet_dev: String,
    /// `IMAGE_STORAGE`: where images lie; empty: the node's own store.
    pub image_storage: String,
    /// `NAMESERVER`; 8.8.8.8.
    pub name_server: IpAddr,
    /// `VM_TYPE`: linux or osv.
    pub vm_type: VmType,
    /// `KERNEL_ARGS`, if it is there at all.
    pub kernel_args: Option<String>,
}

impl MachineWish {
    /// What these variables say.
    ///
    /// # Errors
    /// [`MachineError::Invalid`] for a value that cannot be, and for `GPU_MEM`: no machine here has a GPU.
    pub fn read(environment: &BTreeMap<String, String>) -> Result<Self> {
        let text = |name: &str| environment.get(name).map(String::as_str).unwrap_or_default().to_owned();
        let path = |name: &str| match environment.get(name).map(String::as_str) {
            None | Some("") => Ok(None),
            Some(value) if value.starts_with('/') => Ok(Some(PathBuf::from(value))),
            Some(value) => Err(invalid(name, value, "it must be an absolute path")),
        };
        if let Some(value) = environment.get("GPU_MEM") {
            return Err(invalid("GPU_MEM", value, "no machine of this node has a GPU"));
        }
        let name_server = match text("NAMESERVER").as_str() {
            "" => DEFAULT_NAME_SERVER,
            value => value.parse().map_err(|_| invalid("NAMESERVER", value, "it must be an IP address"))?,
        };
        let vm_type = match text("VM_TYPE").as_str() {
            "" | "linux" => VmType::Linux,
            "osv" => VmType::Osv,
            value => return Err(invalid("VM_TYPE", value, "it must be linux or osv")),
        };
        let kernel_args = environment.get("KERNEL_ARGS").cloned();
        if let Some(value) = kernel_args.as_deref().filter(|value| value.contains(char::is_control)) {
            return Err(invalid("KERNEL_ARGS", value, "it must be one line"));
        }
        Ok(Self {
            kernel: path("KERNEL_IMAGE_PATH")?,
            initrd: path("INITRD_PATH")?,
            inet_dev: text("INET_DEV"),
            image_storage: text("IMAGE_STORAGE"),
            name_server,
            vm_type,
            kernel_args,
        })
    }

    /// The function's part of the kernel's command line, with a space at each end. Without `KERNEL_ARGS` there is none of
    /// the function's variables in it; otherwise Linux gets them behind it, and OSv before it.
    ///
    /// # Errors
    /// [`MachineError::Invalid`] for a variable that would not arrive as it is: with white space or a quote in it.
    pub fn kernel_line(&self, variables: &[(String, String)]) -> Result<String> {
        let Some(arguments) = &self.kernel_args else {
            return Ok(match self.vm_type {
                VmType::Linux => "  ".to_owned(),
                VmType::Osv => " --no-pci ".to_owned(),
            });
        };
        let mut environment = String::new();
        for (name, value) in variables {
            environment += &format!(" {} ", variable(name, value)?);
        }
        let line = match self.vm_type {
            VmType::Linux => format!(" {arguments}{environment} "),
            VmType::Osv => format!(" {environment}{arguments} "),
        };
        if line.len() > LONGEST_LINE {
            let reason = format!("with the function's variables it has more than {LONGEST_LINE} bytes");
            return Err(invalid("KERNEL_ARGS", arguments, &reason));
        }
        Ok(line)
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
    /// [`MachineError::Invalid`] as in [`MachineWish::kernel_line`].
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

    fn line(pairs: &[(&str, &str)]) -> String {
        let variables = [("A", "1"), ("B", "x=y")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        wish(pairs).unwrap().kernel_line(&variables).unwrap()
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let wish = wish(&[]).unwrap();
        assert_eq!((wish.kernel, wish.initrd, wish.kernel_args), (None, None, None));
        assert_eq!((wish.inet_dev.as_str(), wish.image_storage.as_str(), wish.vm_type), ("", "", VmType::Linux));
        assert_eq!(wish.name_server.to_string(), "8.8.8.8");
    }

    #[test]
    fn the_kernel_line_follows_the_type_and_whether_there_are_arguments() {
        assert_eq!(line(&[]), "  ");
        assert_eq!(line(&[("VM_TYPE", "osv")]), " --no-pci ");
        assert_eq!(line(&[("KERNEL_ARGS", "a b")]), " a b --env=A=1  --env=B=x=y  ");
        assert_eq!(line(&[("KERNEL_ARGS", "a b"), ("VM_TYPE", "osv")]), "  --env=A=1  --env=B=x=y a b ");
        assert_eq!(line(&[("KERNEL_ARGS", "")]), "  --env=A=1  --env=B=x=y  ");
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (name, value) in [
            ("GPU_MEM", "1024"),
            ("VM_TYPE", "windows"),
            ("NAMESERVER", "dns.example"),
            ("KERNEL_IMAGE_PATH", "vmlinux"),
            ("KERNEL_ARGS", "a\nb"),
        ] {
            let error = wish(&[(name, value)]).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
        let all = wish(&[("KERNEL_ARGS", "a")]).unwrap();
        for (name, value) in [("A", "1 init=/bin/sh"), ("A", "\"x"), ("A B", "1"), ("", "1"), ("A=B", "1")] {
            assert!(all.kernel_line(&[(name.to_owned(), value.to_owned())]).is_err(), "{name}={value}");
        }
        assert!(all.kernel_line(&[("A".to_owned(), "x".repeat(3000))]).is_err());
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
