//! Model-specific registers: enumerated, never listed by hand, because the next host has others.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::{
    Error,
    compat::Register::{self, Ecx, Edx},
    cpuid::find,
    error::Asked,
};

pub(crate) const IA32_TSC: u32 = 0x10;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
pub(crate) const IA32_MISC_ENABLE: u32 = 0x1a0;
pub(crate) const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Where KVM tells a guest of pages that the host brings behind it (Documentation/virt/kvm/x86/msr.rst).
pub(crate) const KVM_ASYNC_PF: u32 = 0x4b56_4d02;

/// Writing one of these makes KVM write the wall clock into guest memory there and then; the guest
/// does so each time that it wants to know the time and never expects a value to stay.
const KVM_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];
/// Hyper-V's registers, which no guest of ours is offered.
const HYPER_V: RangeInclusive<u32> = 0x4000_0000..=0x4000_0fff;

/// Memory type ranges and machine check banks, which KVM has and does not list (`KVM_GET_MSR_INDEX_LIST`
/// in Documentation/virt/kvm/api.rst speaks of those whose number depends on the vCPU).
const UNLISTED: [RangeInclusive<u32>; 6] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
    0x400..=0x47f,
];
/// Registers that a guest has if CPUID says so, by leaf, register and bit. Before Linux 6.13 KVM has them hold the host's value in every vCPU, whatever
/// its CPUID; since then it refuses to set them where CPUID does not say so, and so does a host for which the value is not right.
const OF_FEATURES: [(u32, (u32, Register, u32)); 2] = [
    // IA32_ARCH_CAPABILITIES, and IA32_PERF_CAPABILITIES, of PDCM.
    (0x10a, (7, Edx, 29)),
    (0x345, (1, Ecx, 15)),
];

/// What is asked for at a time: as many as KVM takes.
const BATCH: usize = 255;

/// The value of one model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Versionize)]
pub struct MsrEntry {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// The registers that are part of a vCPU's state on this host. The time stamp counter and its
/// deadline are not among them: they are the clock's.
pub(crate) fn saved_indices(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let list = kvm.get_msr_index_list().asked("list its MSRs")?;
    let ours = |index: &u32| {
        !matches!(*index, IA32_TSC | IA32_TSC_DEADLINE)
            && !KVM_WALL_CLOCK.contains(index)
            && !HYPER_V.contains(index)
    };
    let mut indices: Vec<u32> = list.as_slice().iter().copied().filter(ours).collect();
    indices.extend(UNLISTED.into_iter().flatten());
    indices.sort_unstable();
    indices.dedup();
    Ok(indices)
}

/// Those of `indices` that a vCPU with this CPUID has, as far as that tells.
pub(crate) fn of_guest(indices: &[u32], cpuid: &[kvm_cpuid_entry2]) -> Vec<u32> {
    let all = indices.iter().copied();
    all.filter(|index| has(cpuid, *index)).collect()
}

/// Whether a vCPU with this CPUID has the register, as far as that tells.
pub(crate) fn has(cpuid: &[kvm_cpuid_entry2], index: u32) -> bool {
    let feature = OF_FEATURES.iter().find(|(of, _)| *of == index);
    feature.is_none_or(|(_, (function, register, bit))| {
        find(cpuid, *function, 0).is_some_and(|leaf| register.of(leaf) >> bit & 1 == 1)
    })
}

/// Reads `indices`, leaving out what this vCPU does not have: the list is the host's, and a guest may
/// be given fewer features.
pub(crate) fn get(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<MsrEntry>, Error> {
    let mut entries = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let asked: Vec<_> = rest
            .iter()
            .take(BATCH)
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = fam(&asked)?;
        // KVM stops at the first register that it cannot read and says how many it did.
        let count = vcpu.get_msrs(&mut msrs).asked("read MSRs")?;
        entries.extend(msrs.as_slice()[..count].iter().map(|entry| MsrEntry {
            index: entry.index,
            value: entry.data,
        }));
        let skipped = usize::from(count < asked.len());
        rest = &rest[count + skipped..];
    }
    Ok(entries)
}

/// What of `entry` can be set again. On a CPU that is not Intel's the two SYSENTER addresses have 32
/// bits: SYSENTER does not exist in long mode there. A guest can write 64, and KVM reads them back,
/// but sets 32.
pub(crate) fn settable(entry: MsrEntry, intel: bool) -> MsrEntry {
    match entry.index {
        IA32_SYSENTER_ESP | IA32_SYSENTER_EIP if !intel => MsrEntry {
            value: entry.value & u64::from(u32::MAX),
            ..entry
        },
        _ => entry,
    }
}

/// Reads one register.
pub(crate) fn get_one(vcpu: &VcpuFd, index: u32) -> Result<u64, Error> {
    get(vcpu, &[index])?
        .first()
        .map(|entry| entry.value)
        .ok_or(Error::Missing(
            "a model-specific register that every vCPU has",
        ))
}

/// Sets `entries` in their order. A register that cannot be set is fine if it has its value already, and so is one that
/// this vCPU does not have if the value is zero: KVM reads as zero what it lists and the guest does not have.
pub(crate) fn set(vcpu: &VcpuFd, entries: &[MsrEntry]) -> Result<(), Error> {
    let mut rest = entries;
    while !rest.is_empty() {
        let asked: Vec<_> = rest
            .iter()
            .take(BATCH)
            .map(|entry| kvm_msr_entry {
                index: entry.index,
                data: entry.value,
                ..Default::default()
            })
            .collect();
        let count = vcpu.set_msrs(&fam(&asked)?).asked("set MSRs")?;
        if count == asked.len() {
            rest = &rest[count..];
            continue;
        }
        let refused = &rest[count];
        let has = get(vcpu, &[refused.index])?;
        if has.first().map_or(0, |entry| entry.value) != refused.value {
            return Err(Error::Msr {
                index: refused.index,
                value: refused.value,
            });
        }
        rest = &rest[count + 1..];
    }
    Ok(())
}

fn fam(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries)
        .map_err(|_| Error::Missing("room for that many model-specific registers"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuLevel, GuestCpuid, cpu_level};

    #[test]
    fn what_a_level_hides_is_neither_saved_nor_set() {
        let host = cpu_level::tests::host();
        let indices = [0x10, 0x10a, 0x174, 0x345];
        assert_eq!(of_guest(&indices, &host), indices);
        for level in [CpuLevel::V2, CpuLevel::V3] {
            let host = GuestCpuid::of_entries(host.clone());
            let guest = host.at_level(level).unwrap();
            assert_eq!(of_guest(&indices, guest.entries()), [0x10, 0x174]);
        }
        assert_eq!(of_guest(&indices, &[]), [0x10, 0x174]);
    }

    #[test]
    fn each_is_of_its_own_bit() {
        let with = |index: u32| {
            let mut cpuid = cpu_level::tests::host();
            for leaf in &mut cpuid {
                (leaf.eax, leaf.ebx) = (0, 0);
                match (leaf.function, index) {
                    (1, 0x345) => (leaf.ecx, leaf.edx) = (1 << 15, 0),
                    (7, 0x10a) => (leaf.ecx, leaf.edx) = (0, 1 << 29),
                    _ => (leaf.ecx, leaf.edx) = (0, 0),
                }
            }
            of_guest(&[0x10a, 0x345], &cpuid)
        };
        assert_eq!(with(0x10a), [0x10a]);
        assert_eq!(with(0x345), [0x345]);
    }
}
