//! The CPUID that guests see: what the host's KVM supports, with the machine's own topology.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::{Error, error::Asked, probe::open};

/// Leaf 1, ECX.
const VMX: u32 = 1 << 5;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 7, ECX.
const SHSTK: u32 = 1 << 7;
/// Leaf 1, EDX.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX.
const CMP_LEGACY: u32 = 1 << 1;
const SVM: u32 = 1 << 2;
/// Leaf 0xb, ECX: what a level of the topology is made of.
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// The CPUID of a machine with a given number of vCPUs: one socket, one thread a core, the APIC id
/// equal to the vCPU's number.
///
/// Virtualisation extensions and shadow stacks are hidden: the state of a guest's own guests is not saved, nor is the shadow stack's pointer.
#[derive(Clone, Debug)]
pub struct GuestCpuid {
    entries: Vec<kvm_cpuid_entry2>,
    vcpus: u32,
}

impl GuestCpuid {
    pub(crate) fn new(kvm: &Kvm, vcpus: u32) -> Result<Self, Error> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .asked("list the CPUID it supports")?;
        let mut entries = supported.as_slice().to_vec();
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        // One level for threads, one for cores; what the host has of its own is replaced.
        entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_000a));
        entries.extend(
            [0xb, 0x1f]
                .iter()
                .flat_map(|&function| topology(function, vcpus)),
        );
        let amd = matches!(&*vendor(&entries), "AuthenticAMD" | "HygonGenuine");
        for entry in &mut entries {
            describe(entry, vcpus, deadline);
            if amd {
                describe_amd(entry, vcpus);
            }
        }
        Ok(Self { entries, vcpus })
    }

    /// What a machine with so many vCPUs would be shown on this host, for who has no machine.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when `/dev/kvm` is not to be had.
    pub fn of_host(vcpus: u32) -> Result<Self, Error> {
        Self::new(&open()?, vcpus)
    }

    #[cfg(test)]
    pub(crate) fn of_entries(entries: Vec<kvm_cpuid_entry2>) -> Self {
        Self { entries, vcpus: 1 }
    }

    /// The entries of vCPU 0.
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// Bits of a guest-physical address.
    pub fn address_bits(&self) -> u32 {
        address_bits(&self.entries)
    }

    /// The same, with other entries.
    pub(crate) fn map_entries(&self, change: impl FnOnce(&mut Vec<kvm_cpuid_entry2>)) -> Self {
        let mut other = self.clone();
        change(&mut other.entries);
        other
    }

    /// What vCPU `id` sees.
    pub(crate) fn of_vcpu(&self, id: u32) -> Vec<kvm_cpuid_entry2> {
        debug_assert!(id < self.vcpus);
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | id << 24,
                0xb | 0x1f => entry.edx = id,
                0x8000_001e => {
                    entry.eax = id;
                    entry.ebx = id & 0xff;
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        entries
    }
}

/// Makes `entry` one of a machine with `vcpus` vCPUs.
fn describe(entry: &mut kvm_cpuid_entry2, vcpus: u32, deadline: bool) {
    match entry.function {
        1 => {
            entry.ecx &= !(VMX | TSC_DEADLINE);
            entry.ecx |= HYPERVISOR | X2APIC;
            if deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            // EBX: APIC id, number of logical CPUs, cache line flush size, brand index.
            entry.ebx = (entry.ebx & 0x0000_ffff) | vcpus << 16;
            entry.edx = if vcpus > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Intel's caches: EAX has the threads that share one (bits 25 to 14) and the cores (31 to 26).
        4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level >= 3 { vcpus - 1 } else { 0 };
            entry.eax = (entry.eax & 0x0000_3fff) | sharing << 14 | (vcpus - 1).min(63) << 26;
        }
        // Shadow stacks: from Linux 6.18 on KVM has them, and the guest's current pointer is among neither the extended state nor the MSRs but
        // a register of KVM's own (`KVM_REG_GUEST_SSP`, by `KVM_GET_ONE_REG`). They can be shown once that is saved, restored and reset.
        7 if entry.index == 0 => entry.ecx &= !SHSTK,
        0x8000_0001 => entry.ecx &= !SVM,
        _ => {}
    }
}

/// What only AMD's CPUs have: Intel's reserve the bits.
fn describe_amd(entry: &mut kvm_cpuid_entry2, vcpus: u32) {
    match entry.function {
        0x8000_0001 if vcpus > 1 => entry.ecx |= CMP_LEGACY,
        0x8000_0001 => entry.ecx &= !CMP_LEGACY,
        // The count of cores and bits of APIC id.
        0x8000_0008 => entry.ecx = (vcpus - 1) | (id_bits(vcpus) << 12),
        // The caches: EAX bits 25 to 14 have the threads that share one.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharing = if level >= 3 { vcpus - 1 } else { 0 };
            entry.eax = (entry.eax & 0xfc00_3fff) | (sharing << 14);
        }
        _ => {}
    }
}

/// The extended topology leaf `function`: one thread a core, all cores in one package.
fn topology(function: u32, vcpus: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index, eax, ebx, kind| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | kind,
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_SMT),
        level(1, id_bits(vcpus), vcpus, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

/// Bits that hold every APIC id below `vcpus`.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// The entry of a leaf and its sub-leaf.
pub(crate) fn find(
    entries: &[kvm_cpuid_entry2],
    function: u32,
    index: u32,
) -> Option<&kvm_cpuid_entry2> {
    entries
        .iter()
        .find(|entry| entry.function == function && entry.index == index)
}

/// Bits of a physical address; CPUs that do not say have 36.
pub(crate) fn address_bits(entries: &[kvm_cpuid_entry2]) -> u32 {
    find(entries, 0x8000_0008, 0).map_or(36, |entry| entry.eax & 0xff)
}

/// Who made the CPU, by leaf 0.
pub(crate) fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let Some(leaf) = find(entries, 0, 0) else {
        return "nobody".to_owned();
    };
    [leaf.ebx, leaf.edx, leaf.ecx]
        .iter()
        .flat_map(|register| register.to_le_bytes())
        .map(|byte| byte.escape_ascii().to_string())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_ids_have_bits_enough() {
        assert_eq!([1, 2, 3, 4, 5, 32].map(id_bits), [0, 1, 2, 2, 3, 5]);
    }

    #[test]
    fn the_topology_has_one_thread_a_core() {
        let [threads, cores, end] = topology(0xb, 6);
        assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (3, 6, 0x201));
        assert_eq!((end.ebx, end.ecx), (0, 2));
    }

    #[test]
    fn only_amd_counts_cores_its_own_way() {
        let mut leaf = kvm_cpuid_entry2 {
            function: 0x8000_0008,
            ..Default::default()
        };
        describe(&mut leaf, 6, false);
        assert_eq!(leaf.ecx, 0);
        describe_amd(&mut leaf, 6);
        assert_eq!(leaf.ecx, 5 | 3 << 12);
    }

    #[test]
    fn virtualisation_is_hidden() {
        let mut leaf1 = kvm_cpuid_entry2 {
            function: 1,
            ecx: VMX,
            ..Default::default()
        };
        describe(&mut leaf1, 2, false);
        assert_eq!(leaf1.ecx, HYPERVISOR | X2APIC);
        assert_eq!(leaf1.edx, HTT);
        let mut amd = kvm_cpuid_entry2 {
            function: 0x8000_0001,
            ecx: SVM,
            ..Default::default()
        };
        describe(&mut amd, 1, false);
        assert_eq!(amd.ecx, 0);
    }
    #[test]
    fn shadow_stacks_are_hidden() {
        let of = |index| {
            let mut leaf = kvm_cpuid_entry2 {
                function: 7,
                index,
                ecx: !0,
                ..Default::default()
            };
            describe(&mut leaf, 1, false);
            leaf.ecx
        };
        assert_eq!(of(0), !SHSTK);
        // Another's bit.
        assert_eq!(of(1), !0);
    }
}
