//! What this host has for microVMs: virtual machine monitors, tools, a guest; and what is to be done about the rest.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::machine::firecracker::{Firecracker, Memory};
use super::machine::qemu::{AccelChoice, Qemu};
use super::machine::{MachineManager, VmmUser, Why};
use crate::config::microvm::{MicrovmAccel, MicrovmMemory, MicrovmSettings, VmmChoice};

/// QEMU, where distributions have it.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Where Firecracker and its jailer are looked for besides `PATH`: where their guide has them installed.
const FIRECRACKER_DIR: &str = "/usr/local/bin";
/// What a guest bundle has.
const BUNDLE: [&str; 2] = ["vmlinux", "initramfs.cpio"];
/// Programs that make file systems, and the Debian packages they come in.
const TOOLS: [(&str, &str); 2] = [("mkfs.erofs", "erofs-utils"), ("mkfs.ext4", "e2fsprogs")];

/// A virtual machine monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU's `microvm` machine.
    Qemu,
    /// Firecracker.
    Firecracker,
}

/// Something that is missing, and what to do about it; both for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack {
    /// What is missing, and what that means.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// What this host has.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Each VMM: what it will use, or why it does not work here.
    pub vmms: Vec<(Vmm, Result<String, Lack>)>,
    /// What guests of every VMM need and this host has not.
    pub lacks: Vec<Lack>,
}

// === impl Vmm ===

impl Vmm {
    /// Every one, the preferred first.
    pub const ALL: [Self; 2] = [Self::Qemu, Self::Firecracker];

    /// As flags and annotations name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        }
    }

    /// Where its machines, sandboxes and templates are, below the node's root directory. Each has its own place, so that
    /// they are found again whichever is the node's first choice.
    pub fn root(self, root_dir: &Path) -> PathBuf {
        root_dir.join(match self {
            Self::Qemu => "microvm",
            Self::Firecracker => "microvm-firecracker",
        })
    }

    /// Its manager, with these settings.
    pub fn manager(self, settings: &MicrovmSettings, user: VmmUser) -> Arc<dyn MachineManager> {
        match self {
            Self::Qemu => Arc::new(Qemu::new(QEMU.into(), user, accel(settings.accel))),
            Self::Firecracker => {
                let program = |name| in_path(name).unwrap_or_else(|| Path::new(FIRECRACKER_DIR).join(name));
                let memory = match settings.memory {
                    MicrovmMemory::File => Memory::File,
                    // As it is by this number whatever became of the file.
                    MicrovmMemory::Uffd => Memory::Paged(format!("/proc/{}/exe", std::process::id()).into()),
                };
                Arc::new(Firecracker::new(program("firecracker"), program("jailer"), user, memory))
            }
        }
    }

    /// What to do where it does not work for this reason.
    fn remedy(self, settings: &MicrovmSettings, why: &str) -> String {
        let text = if why.contains("KVM") || why.contains("/dev/kvm") {
            match (self, settings.accel) {
                (Self::Qemu, MicrovmAccel::Kvm) => {
                    "load the module kvm_intel or kvm_amd (in a virtual machine: turn nested virtualization on for it), or \
                     pass --microvm-accel auto"
                }
                _ => {
                    "load the module kvm_intel or kvm_amd (in a virtual machine: turn nested virtualization on for it), or \
                     let QEMU run guests (--vmm qemu)"
                }
            }
        } else if why.contains("not root") {
            "run lambdalet as root"
        } else if self == Self::Qemu {
            "install QEMU 7.2 or newer (Debian: apt-get install qemu-system-x86)"
        } else {
            "install firecracker and jailer 1.10 or newer from its project's releases into /usr/local/bin"
        };
        text.to_owned()
    }
}

fn accel(setting: MicrovmAccel) -> AccelChoice {
    match setting {
        MicrovmAccel::Auto => AccelChoice::Auto,
        MicrovmAccel::Kvm => AccelChoice::Kvm,
        MicrovmAccel::Tcg => AccelChoice::Tcg,
    }
}

// === impl Survey ===

impl Survey {
    /// As [`of`](Self::of), but no VMM is asked where there is no guest and nobody has named one: such a host is not meant
    /// to have microVMs, and asking takes time.
    pub async fn of_wanted(settings: &MicrovmSettings) -> Self {
        match guest(settings).filter(|_| !settings.guest_image_was_told) {
            Some(lack) => {
                let remedy = format!("{} (lambdalet check says what else is needed)", lack.remedy);
                Self { vmms: Vec::new(), lacks: vec![Lack { remedy, ..lack }] }
            }
            None => Self::of(settings).await,
        }
    }

    /// Looks at this host. Changes nothing; asks each VMM for its version.
    pub async fn of(settings: &MicrovmSettings) -> Self {
        let mut lacks: Vec<Lack> = guest(settings).into_iter().collect();
        lacks.extend(TOOLS.into_iter().filter(|(tool, _)| in_path(tool).is_none()).map(|(tool, package)| Lack {
            what: format!("there is no {tool}, which makes the file systems of guests"),
            remedy: format!("install {package} (Debian: apt-get install {package})"),
        }));
        let mut vmms = Vec::new();
        for vmm in Vmm::ALL {
            let told = vmm.manager(settings, VmmUser::default()).check().await;
            let lack = |Why(what)| Lack { remedy: vmm.remedy(settings, &what), what };
            vmms.push((vmm, told.map_err(lack)));
        }
        Self { vmms, lacks }
    }

    /// The VMMs that can run guests here; the first runs those of Pods that name none. The operator's choice, if it is one,
    /// is the first or there is none.
    pub fn usable(&self, choice: VmmChoice) -> Vec<Vmm> {
        if !self.lacks.is_empty() {
            return Vec::new();
        }
        let works = |vmm: &Vmm| self.vmms.iter().any(|(one, told)| one == vmm && told.is_ok());
        let first = match choice {
            VmmChoice::Auto => None,
            VmmChoice::Qemu => Some(Vmm::Qemu),
            VmmChoice::Firecracker => Some(Vmm::Firecracker),
        };
        if first.as_ref().is_some_and(|first| !works(first)) {
            return Vec::new();
        }
        let others = Vmm::ALL.into_iter().filter(|vmm| Some(*vmm) != first);
        first.into_iter().chain(others).filter(works).collect()
    }

    /// Why there are no microVMs, or none of this VMM: what is missing, and what to do, as one sentence's end.
    pub fn missing(&self, of: Option<Vmm>) -> String {
        let vmms = self.vmms.iter().filter(|(vmm, _)| of.is_none_or(|of| of == *vmm));
        // Any one of several would do, so one lack is enough to tell: that of the preferred.
        let lack = vmms.filter_map(|(_, told)| told.as_ref().err()).next();
        let any_works = self.vmms.iter().any(|(vmm, told)| told.is_ok() && of.is_none_or(|of| of == *vmm));
        let all: Vec<String> = self
            .lacks
            .iter()
            .chain(lack.filter(|_| !any_works))
            .map(|lack| format!("{}: {}", lack.what, lack.remedy))
            .collect();
        format!("{}; then start the node again", all.join("; "))
    }
}

/// What there is not of the guest's files.
fn guest(settings: &MicrovmSettings) -> Option<Lack> {
    let bundle = &settings.guest_image;
    let remedy = "put a guest bundle there (hack/guest --out DIR makes one), or pass --guest-image DIR".to_owned();
    if let Some(kernel) = settings.kernel_image.as_ref().filter(|kernel| !kernel.is_file()) {
        let what = format!("the kernel {} of --kernel-image is not there", kernel.display());
        return Some(Lack {
            what,
            remedy: "pass the path of an uncompressed kernel, or leave --kernel-image out".into(),
        });
    }
    let needed = BUNDLE.into_iter().filter(|file| *file != "vmlinux" || settings.kernel_image.is_none());
    let absent = needed.map(|file| bundle.join(file)).find(|path| !path.is_file())?;
    Some(Lack { what: format!("there is no guest to start: {} is missing", absent.display()), remedy })
}

/// The program of that name, where a shell would find it.
fn in_path(program: &str) -> Option<PathBuf> {
    let places = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&places).map(|place| place.join(program)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn survey(qemu: bool, firecracker: bool, lacks: usize) -> Survey {
        let lack = |what: &str| Lack { what: what.to_owned(), remedy: format!("get {what}") };
        let told = |works, name: &str| if works { Ok(name.to_owned()) } else { Err(lack(name)) };
        Survey {
            vmms: vec![(Vmm::Qemu, told(qemu, "qemu")), (Vmm::Firecracker, told(firecracker, "firecracker"))],
            lacks: (0..lacks).map(|_| lack("a guest")).collect(),
        }
    }

    #[test]
    fn the_operators_choice_is_first_or_there_is_none() {
        use Vmm::{Firecracker, Qemu};
        for (found, choice, usable) in [
            (survey(true, true, 0), VmmChoice::Auto, vec![Qemu, Firecracker]),
            (survey(true, true, 0), VmmChoice::Firecracker, vec![Firecracker, Qemu]),
            (survey(true, false, 0), VmmChoice::Auto, vec![Qemu]),
            (survey(true, false, 0), VmmChoice::Firecracker, vec![]),
            (survey(false, true, 0), VmmChoice::Auto, vec![Firecracker]),
            (survey(true, true, 1), VmmChoice::Auto, vec![]),
        ] {
            assert_eq!(found.usable(choice), usable, "{found:?} {choice:?}");
        }
    }

    #[test]
    fn what_is_missing_is_told_with_what_to_do() {
        let told = survey(false, false, 1).missing(None);
        assert_eq!(told, "a guest: get a guest; qemu: get qemu; then start the node again");
        assert_eq!(survey(true, false, 1).missing(None), "a guest: get a guest; then start the node again");
        let told = survey(true, false, 0).missing(Some(Vmm::Firecracker));
        assert_eq!(told, "firecracker: get firecracker; then start the node again");
    }

    #[test]
    fn remedies_are_for_what_is_wrong() {
        let settings = MicrovmSettings::default();
        let absent = Vmm::Qemu.remedy(&settings, "/usr/bin/qemu-system-x86_64 cannot be run: No such file");
        assert!(absent.contains("qemu-system-x86"), "{absent}");
        let kvm = Vmm::Firecracker.remedy(&settings, "Firecracker needs KVM: there is no /dev/kvm");
        assert!(kvm.contains("--vmm qemu"), "{kvm}");
        let told = MicrovmSettings { accel: MicrovmAccel::Kvm, ..settings };
        assert!(Vmm::Qemu.remedy(&told, "there is no /dev/kvm").contains("--microvm-accel auto"));
    }

    #[test]
    fn a_guest_that_is_not_whole_is_missed_by_the_files_name() {
        let place = tempfile::tempdir().unwrap();
        let mut settings = MicrovmSettings { guest_image: place.path().to_owned(), ..MicrovmSettings::default() };
        assert!(guest(&settings).is_some_and(|lack| lack.what.contains("vmlinux")));
        std::fs::write(place.path().join("vmlinux"), "").unwrap();
        assert!(guest(&settings).is_some_and(|lack| lack.what.contains("initramfs.cpio")));
        std::fs::write(place.path().join("initramfs.cpio"), "").unwrap();
        assert_eq!(guest(&settings), None);
        settings.kernel_image = Some(place.path().join("other"));
        assert!(guest(&settings).is_some_and(|lack| lack.what.contains("other")));
    }
}
