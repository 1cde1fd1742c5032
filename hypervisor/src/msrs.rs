//! Model-specific registers: enumerated, never listed by hand, because the next host has others.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::{Error, error::Asked};

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
