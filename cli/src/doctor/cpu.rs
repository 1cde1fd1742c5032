//! What the processor and KVM's modules can do.

use super::{Finding, Host};

const VIRTUALISATION: &str = "hardware virtualisation";
const PVM: &str = "PVM";
const NESTING: &str = "nested virtualisation";

/// The vendors' names for it, and KVM's module for each.
const EXTENSIONS: [(&str, &str, &str); 2] = [
    ("vmx", "Intel VT-x", "kvm_intel"),
    ("svm", "AMD-V", "kvm_amd"),
];

/// Whether the processor says that it can run guests. A processor can be shown without it and KVM be
/// there nevertheless, by PVM; whether KVM is there is not asked here.
pub(super) fn virtualisation(host: &Host) -> Finding {
    if let Some((flag, name, _)) = extension(host) {
        return Finding::ok(VIRTUALISATION, format!("{name} ({flag})"));
    }
    if has_pvm(host) {
        return Finding::warn(
            VIRTUALISATION,
            "none, but PVM does without",
            "guests of a few instructions run; Linux kernels that know nothing of PVM may stay silent: boot those where the \
             processor shows vmx or svm",
        );
    }
    Finding::warn(
        VIRTUALISATION,
        "the processor shows neither vmx nor svm",
        "switch it on in the firmware; if this is itself a virtual machine, have its host nest, or load \
         a kernel with PVM",
    )
}

/// Whether KVM can do without hardware virtualisation.
pub(super) fn pvm(host: &Host) -> Finding {
    if has_pvm(host) {
        return Finding::ok(PVM, "loaded");
    }
    if extension(host).is_some() {
        return Finding::ok(PVM, "not loaded, and not needed");
    }
    Finding::warn(
        PVM,
        "not loaded",
        "without hardware virtualisation, a kernel with the module kvm-pvm can still run guests",
    )
}

/// Whether guests can run guests.
pub(super) fn nesting(host: &Host) -> Finding {
    let Some((_, _, module)) = extension(host) else {
        return Finding::warn(
            NESTING,
            "not to be had without hardware virtualisation",
            "guests run, but none in them; nothing to do",
        );
    };
    match host
        .read(&format!("sys/module/{module}/parameters/nested"))
        .as_deref()
    {
        Some("Y" | "1") => Finding::ok(NESTING, "guests can run guests"),
        Some(_) => Finding::warn(
            NESTING,
            "switched off",
            format!("`modprobe -r {module}; modprobe {module} nested=1` lets guests run guests"),
        ),
        None => Finding::warn(
            NESTING,
            format!("{module} is not loaded"),
            format!("`modprobe {module}`"),
        ),
    }
}

fn extension(host: &Host) -> Option<(&'static str, &'static str, &'static str)> {
    let cpuinfo = host.read("proc/cpuinfo")?;
    let flags = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags")?.split_once(':'))?
        .1;
    EXTENSIONS
        .into_iter()
        .find(|(flag, ..)| flags.split_ascii_whitespace().any(|has| has == *flag))
}

fn has_pvm(host: &Host) -> bool {
    host.path("sys/module/kvm_pvm").exists()
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Verdict, host::fake::Fake},
        *,
    };

    const INTEL: (&str, &str) = ("proc/cpuinfo", "vendor_id : x\nflags\t\t: fpu vmx sse\n");
    const PLAIN: (&str, &str) = ("proc/cpuinfo", "flags\t\t: fpu vmxx sse\n");
    const PVM_LOADED: (&str, &str) = ("sys/module/kvm_pvm/refcnt", "0");

    fn verdicts(files: &[(&str, &str)]) -> [Verdict; 3] {
        let fake = Fake::new(files);
        let host = fake.host();
        [virtualisation(&host), pvm(&host), nesting(&host)].map(|finding| finding.verdict)
    }

    #[test]
    fn hardware_or_pvm_will_do() {
        use Verdict::{Ok, Warn};

        let nested = ("sys/module/kvm_intel/parameters/nested", "Y\n");
        let flat = ("sys/module/kvm_intel/parameters/nested", "N\n");
        assert_eq!(verdicts(&[INTEL, nested]), [Ok, Ok, Ok]);
        assert_eq!(verdicts(&[INTEL, flat]), [Ok, Ok, Warn]);
        assert_eq!(verdicts(&[INTEL]), [Ok, Ok, Warn]);
        assert_eq!(verdicts(&[PLAIN]), [Warn, Warn, Warn]);
        assert_eq!(verdicts(&[PLAIN, PVM_LOADED]), [Warn, Ok, Warn]);
        assert_eq!(verdicts(&[]), [Warn, Warn, Warn]);
    }
}
