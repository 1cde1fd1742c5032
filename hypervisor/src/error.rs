//! Why KVM could not do as it was asked.

use std::{collections::BTreeSet, io};

use crate::CpuLevel;

/// How much of what is missing an error names.
const NAMED: usize = 10;

/// An error of the hypervisor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` cannot be used.
    #[error("/dev/kvm cannot be opened: {0}; run `fermata doctor` to see what this host lacks")]
    Open(io::Error),
    /// The host's KVM lacks something that every machine needs.
    #[error("this host's KVM lacks {0}; a Linux kernel of version 5.17 or newer has it")]
    Missing(&'static str),
    /// KVM refused a request.
    #[error("KVM refused to {what}: {source}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// More vCPUs than a machine can have.
    #[error("a machine cannot have {0} vCPUs; choose 1 to {max}", max = crate::MAX_VCPUS)]
    VcpuCount(u32),
    /// The host lacks what a level of CPUs asks for.
    #[error(
        "this host's KVM does not give guests all of {level}: it lacks {}; choose a lower level, or host",
        .missing.join(", ")
    )]
    CpuLevel {
        /// The level.
        level: CpuLevel,
        /// What it lacks, by name.
        missing: Vec<String>,
    },
    /// The host lacks what a CPU template sets.
    #[error(
        "this host's KVM does not give guests all that the CPU template sets: it lacks {}; leave that out of the template",
        some_of(.missing)
    )]
    TemplateBits {
        /// What it lacks, by name.
        missing: BTreeSet<String>,
    },
    /// A CPU template changes a leaf of CPUID that belongs to the machine.
    #[error(
        "the CPU template changes CPUID leaf {0:#x}, which says who made the CPU or how the vCPUs are arranged; leave it out"
    )]
    TemplateLeaf(u32),
    /// A CPU template changes a model-specific register in a way that cannot be.
    #[error(
        "this host's KVM does not let guests have MSR {0:#x} as the CPU template sets it; leave it out of the template"
    )]
    TemplateMsr(u32),
    /// A saved structure of KVM's has the wrong size.
    #[error(
        "the saved {what} has {found} bytes instead of {expected}; the state was not saved by fermata on x86_64"
    )]
    SavedSize {
        /// Which structure.
        what: &'static str,
        /// Bytes found.
        found: usize,
        /// Bytes there should be.
        expected: usize,
    },
    /// The state of another vCPU than the one that it is to be.
    #[error(
        "the state of vCPU {expected} is that of {found}; take another copy, or save the machine again"
    )]
    OtherVcpu {
        /// Whose it says that it is.
        found: u32,
        /// Whose it should be.
        expected: u32,
    },
    /// A model-specific register cannot be set to its saved value.
    #[error(
        "this host cannot set MSR {index:#x} to its saved value {value:#x}; restore on a host with the same CPU model or a newer one"
    )]
    Msr {
        /// Its number.
        index: u32,
        /// The saved value.
        value: u64,
    },
    /// The guest's time stamp counter runs at a rate that this host cannot give it.
    #[error(
        "the guest's TSC runs at {guest} kHz and was promised to be invariant, this host's runs at {host} kHz and cannot be scaled; restore on a host with TSC scaling"
    )]
    TscRate {
        /// The guest's rate in kHz.
        guest: u32,
        /// The host's rate in kHz.
        host: u32,
    },
    /// A vCPU ended in a way that no guest can cause on a sound host.
    #[error("vCPU {id} cannot run: {reason}")]
    Run {
        /// Which.
        id: u32,
        /// What KVM reported.
        reason: String,
    },
}

/// Says what was asked of KVM when it refuses.
pub(crate) trait Asked<T> {
    fn asked(self, what: &'static str) -> Result<T, Error>;
}

impl<T> Asked<T> for Result<T, kvm_ioctls::Error> {
    fn asked(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|e| Error::Kvm {
            what,
            source: io::Error::from_raw_os_error(e.errno()),
        })
    }
}

/// What is missing, in a sentence that can be read.
fn some_of(missing: &BTreeSet<String>) -> String {
    let named: Vec<&str> = missing.iter().map(String::as_str).take(NAMED).collect();
    match missing.len() - named.len() {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_as_far_as_it_can_be_read() {
        let of = |count| some_of(&(0..count).map(|bit| format!("b{bit}")).collect());
        assert_eq!(of(2), "b0, b1");
        assert!(of(NAMED).ends_with(", b9"));
        assert!(of(1000).ends_with(" and 990 more"));
    }
}
