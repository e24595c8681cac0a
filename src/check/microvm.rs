//! MicroVMs: which VMM will run them on this host, why the others will not, and what guests lack.

use super::{Finding, Level};
use crate::config::microvm::{MicrovmAccel, VmmChoice};
use crate::config::{RuntimeKind, Settings};
use crate::runtime::microvm::vmms::{Lack, Survey, Vmm};

const SUBJECT: &str = "microVMs";

/// The VMMs, the tools, the guest. What is missing is bad only for a node that was told to have microVMs.
pub(super) async fn examine(settings: &Settings) -> Vec<Finding> {
    of_survey(&Survey::of(&settings.runtime.microvm).await, settings)
}

fn of_survey(survey: &Survey, settings: &Settings) -> Vec<Finding> {
    let microvm = &settings.runtime.microvm;
    let worst = match settings.runtime.kind {
        RuntimeKind::Microvm => Level::Fail,
        _ if microvm.guest_image_was_told => Level::Warn,
        // Nobody asked for them.
        _ => Level::Ok,
    };
    let usable = survey.usable(microvm.vmm);
    let mut findings = Vec::new();
    for (vmm, told) in &survey.vmms {
        findings.push(match told {
            Ok(found) if usable.first() == Some(vmm) => {
                let text = format!("{found}; runs Pods that are microVMs");
                match found.contains("without KVM") && microvm.accel != MicrovmAccel::Tcg {
                    true => Finding::warn(
                        SUBJECT,
                        text,
                        "make KVM work for guests that are quick to start, or live without",
                    ),
                    false => Finding::ok(SUBJECT, text),
                }
            }
            Ok(found) if usable.contains(vmm) => {
                Finding::ok(SUBJECT, format!("{found}; runs those annotated lambdalet.dev/vmm: {}", vmm.name()))
            }
            Ok(found) => Finding::ok(SUBJECT, format!("{found}; not used: see what is missing")),
            Err(Lack { what, remedy }) => {
                let what = format!("{} cannot run them here: {what}", title(*vmm));
                let level = if needed(survey, *vmm, microvm.vmm) { worst } else { Level::Ok };
                missing(&Lack { what, remedy: remedy.clone() }, level)
            }
        });
    }
    findings.extend(survey.lacks.iter().map(|lack| missing(lack, worst)));
    if survey.lacks.is_empty() {
        let kernel = microvm.kernel_image.as_ref().map_or(String::new(), |path| format!(", kernel {}", path.display()));
        findings.push(Finding::ok("guest", format!("{}{kernel}", microvm.guest_image.display())));
    }
    for (flag, dirs) in [("--vm-asset-dirs", &microvm.asset_dirs), ("--microvm-host-paths", &microvm.host_paths)] {
        findings.extend(dirs.iter().filter(|dir| !dir.is_dir()).map(|dir| {
            let found = format!("{} of {flag} is no directory: Pods get nothing of it", dir.display());
            Finding::warn(SUBJECT, found, "make it, or leave it out")
        }));
    }
    findings
}

fn title(vmm: Vmm) -> &'static str {
    match vmm {
        Vmm::Qemu => "QEMU",
        Vmm::Firecracker => "Firecracker",
    }
}

/// Whether the node would have no microVMs, or not as it was told, for want of this VMM.
fn needed(survey: &Survey, vmm: Vmm, choice: VmmChoice) -> bool {
    match choice {
        VmmChoice::Auto => survey.vmms.iter().all(|(_, told)| told.is_err()),
        VmmChoice::Qemu => vmm == Vmm::Qemu,
        VmmChoice::Firecracker => vmm == Vmm::Firecracker,
    }
}

fn missing(lack: &Lack, level: Level) -> Finding {
    let consequence = if level == Level::Ok { "" } else { ": no Pod can be a microVM" };
    Finding {
        level,
        subject: SUBJECT,
        found: format!("{}{consequence}", lack.what),
        remedy: match level {
            Level::Ok => format!("if Pods are to be microVMs: {}", lack.remedy),
            _ => lack.remedy.clone(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn survey(qemu: Result<&str, &str>, lacks: usize) -> Survey {
        let lack = |what: &str| Lack { what: what.to_owned(), remedy: format!("get {what}") };
        Survey {
            vmms: vec![(Vmm::Qemu, qemu.map(str::to_owned).map_err(lack)), (Vmm::Firecracker, Err(lack("KVM")))],
            lacks: (0..lacks).map(|_| lack("a guest")).collect(),
        }
    }

    fn levels(survey: &Survey, settings: &Settings) -> Vec<Level> {
        of_survey(survey, settings).iter().map(|finding| finding.level).collect()
    }

    #[test]
    fn what_nobody_asked_for_may_be_missing() {
        use Level::{Fail, Ok, Warn};
        let mut settings = Settings::default();
        assert_eq!(levels(&survey(Err("QEMU"), 1), &settings), [Ok, Ok, Ok]);
        settings.runtime.microvm.guest_image_was_told = true;
        assert_eq!(levels(&survey(Err("QEMU"), 1), &settings), [Warn, Warn, Warn]);
        settings.runtime.kind = RuntimeKind::Microvm;
        assert_eq!(levels(&survey(Result::Ok("QEMU with KVM"), 1), &settings), [Ok, Ok, Fail], "one VMM is enough");
        assert_eq!(levels(&survey(Result::Ok("QEMU with KVM"), 0), &settings), [Ok, Ok, Ok]);
        assert_eq!(levels(&survey(Result::Ok("QEMU without KVM"), 0), &settings), [Warn, Ok, Ok]);
        settings.runtime.microvm.vmm = VmmChoice::Firecracker;
        assert_eq!(levels(&survey(Result::Ok("QEMU with KVM"), 0), &settings), [Ok, Fail, Ok]);
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let mut settings = Settings::default();
        settings.runtime.microvm.asset_dirs = vec!["/nowhere/kernels".into(), "/".into()];
        let findings = of_survey(&survey(Ok("QEMU with KVM"), 0), &settings);
        let told: Vec<_> = findings.iter().filter(|finding| finding.level == Level::Warn).collect();
        assert_eq!(told.len(), 1);
        assert!(told[0].found.contains("/nowhere/kernels of --vm-asset-dirs"), "{}", told[0].found);
    }

    #[test]
    fn it_is_said_which_works_why_the_other_does_not_and_what_to_do() {
        let findings = of_survey(&survey(Ok("QEMU 7.2 with KVM"), 0), &Settings::default());
        assert_eq!(findings[0].found, "QEMU 7.2 with KVM; runs Pods that are microVMs");
        assert_eq!(findings[1].found, "Firecracker cannot run them here: KVM");
        assert_eq!(findings[1].remedy, "if Pods are to be microVMs: get KVM");
    }
}
