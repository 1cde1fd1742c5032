//! CPUID of a level instead of a host's: what runs on one host of the level runs on any.
//!
//! The levels are those of the x86-64 psABI ("Micro-Architecture Levels"). A guest is shown what its level asks for, what KVM gives every
//! guest whatever the host, and nothing else: no extension, no counter, no size of the host's own.

use kvm_bindings::kvm_cpuid_entry2;

use crate::{
    Error, GuestCpuid,
    compat::Register::{self, Eax, Ebx, Ecx, Edx},
    cpuid::find,
    feature_names,
};

/// What a guest's CPU is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum CpuLevel {
    /// SSE4.2, POPCNT, CMPXCHG16B: any server since 2009.
    V2,
    /// AVX2, BMI, FMA, MOVBE: any server since 2015.
    V3,
    /// All that the host's KVM supports.
    #[default]
    Host,
}

/// The bits of a CPUID register that guests of a level see.
struct Shown {
    function: u32,
    index: u32,
    register: Register,
    /// Those that level 2 asks for.
    v2: u32,
    /// Those that level 3 asks for besides.
    v3: u32,
    /// Those that a host may have or lack: KVM provides them, or they mirror something else.
    optional: u32,
}

const fn shown(
    function: u32,
    index: u32,
    register: Register,
    [v2, v3, optional]: [u32; 3],
) -> Shown {
    Shown {
        function,
        index,
        register,
        v2,
        v3,
        optional,
    }
}

const fn bits<const N: usize>(numbers: [u32; N]) -> u32 {
    let mut mask = 0;
    let mut at = 0;
    while at < N {
        mask |= 1 << numbers[at];
        at += 1;
    }
    mask
}

/// Any x86-64 CPU can have these in leaf 1, EDX, and emulated ones lack some; AMD's repeat some of them in leaf
/// 0x8000_0001.
const BASELINE: u32 = 0x078b_fbff;
const REPEATED: u32 = 0x0183_f3ff;

/// Every register of features; one that is not listed is not shown.
const SHOWN: [Shown; 10] = [
    // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT; FMA, MOVBE, XSAVE, AVX, F16C; x2APIC, TSC deadline, OSXSAVE, hypervisor.
    shown(
        1,
        0,
        Ecx,
        [
            bits([0, 9, 13, 19, 20, 23]),
            bits([12, 22, 26, 28, 29]),
            bits([21, 24, 27, 31]),
        ],
    ),
    // FPU, TSC, MSR, PAE, CX8, APIC, CMOV, MMX, FXSR, SSE, SSE2; HTT says how many vCPUs there are.
    shown(
        1,
        0,
        Edx,
        [
            bits([0, 4, 5, 6, 8, 9, 15, 23, 24, 25, 26]),
            0,
            BASELINE | bits([28]),
        ],
    ),
    // ARAT: the local APIC's timer never stops, which is KVM's.
    shown(6, 0, Eax, [0, 0, bits([2])]),
    // BMI1, AVX2, BMI2; TSC_ADJUST.
    shown(7, 0, Ebx, [0, bits([3, 5, 8]), bits([1])]),
    // x87, SSE, AVX.
    shown(0xd, 0, Eax, [0, bits([0, 1, 2]), 0]),
    // kvmclock, no delay for I/O, kvmclock2, steal time, end of interrupt, unhalt, TLB flush, IPIs, poll control, yield, stable clock: all of
    // KVM's since Linux 5.4.
    shown(
        0x4000_0001,
        0,
        Eax,
        [0, 0, bits([0, 1, 3, 5, 6, 7, 9, 11, 12, 13, 24])],
    ),
    // LAHF; LZCNT; CMP_LEGACY, which counts vCPUs.
    shown(0x8000_0001, 0, Ecx, [bits([0]), bits([5]), bits([1])]),
    // SYSCALL, NX, long mode.
    shown(0x8000_0001, 0, Edx, [bits([11, 20, 29]), 0, REPEATED]),
    shown(0x8000_0007, 0, Edx, [0, 0, 0]),
    shown(0x8000_0008, 0, Ebx, [0, 0, 0]),
];

/// Bytes of the extended state with x87, SSE and AVX.
const XSAVE_BYTES: u32 = 832;

/// Bits of physical address that any host of a level has.
const ADDRESS_BITS: u32 = 39;

impl Shown {
    fn required(&self, level: CpuLevel) -> u32 {
        match level {
            CpuLevel::V2 => self.v2,
            CpuLevel::V3 => self.v2 | self.v3,
            CpuLevel::Host => 0,
        }
    }
}

impl GuestCpuid {
    /// What the vCPUs of a machine of `level` see here.
    ///
    /// # Errors
    ///
    /// [`Error::CpuLevel`] when the host lacks something that the level asks for.
    pub fn at_level(&self, level: CpuLevel) -> Result<Self, Error> {
        if level == CpuLevel::Host {
            return Ok(self.clone());
        }
        let missing = missing(self.entries(), level);
        if !missing.is_empty() {
            return Err(Error::CpuLevel { level, missing });
        }
        Ok(self.map_entries(|entries| limit(entries, level)))
    }

    /// The highest level that this host has.
    pub fn highest_level(&self) -> Option<CpuLevel> {
        let levels = [CpuLevel::V3, CpuLevel::V2];
        levels
            .into_iter()
            .find(|level| missing(self.entries(), *level).is_empty())
    }
}

/// The bits of a register of features that guests of `level` have, and those that they may have.
pub(crate) fn bits_of(
    level: CpuLevel,
    (function, index, register): (u32, u32, Register),
) -> (u32, u32) {
    let shown = SHOWN
        .iter()
        .find(|shown| (shown.function, shown.index, shown.register) == (function, index, register));
    shown.map_or((0, 0), |shown| (shown.required(level), shown.optional))
}

impl std::fmt::Display for CpuLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::Host => "host",
        })
    }
}

/// What of `level` is missing among `entries`, by name.
fn missing(entries: &[kvm_cpuid_entry2], level: CpuLevel) -> Vec<String> {
    let mut names = Vec::new();
    for shown in &SHOWN {
        let Shown {
            function,
            index,
            register,
            ..
        } = *shown;
        let has = find(entries, function, index).map_or(0, |entry| register.of(entry));
        let lacks = shown.required(level) & !has;
        let set = (0..u32::BITS).filter(|bit| lacks & (1 << bit) != 0);
        names.extend(set.map(|bit| feature_names::name(function, index, register, bit)));
    }
    names
}

/// Leaves `entries` what a guest of `level` sees.
pub(crate) fn limit(entries: &mut Vec<kvm_cpuid_entry2>, level: CpuLevel) {
    entries.retain(|entry| is_shown(entry, level));
    for entry in entries {
        for register in [Eax, Ebx, Ecx, Edx] {
            let listed = SHOWN.iter().find(|shown| {
                (shown.function, shown.index, shown.register)
                    == (entry.function, entry.index, register)
            });
            match listed {
                Some(shown) => {
                    *register.of_mut(entry) &= shown.required(level) | shown.optional;
                }
                // The registers of these leaves that are not listed have features, too, or sizes of the host's own.
                None if matches!(entry.function, 6 | 7) => *register.of_mut(entry) = 0,
                None => {}
            }
        }
        match (entry.function, entry.index) {
            // KVM sets EBX by what the guest has switched on.
            (0xd, 0) => (entry.ecx, entry.edx) = (XSAVE_BYTES, 0),
            (0xd, 1) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (0x8000_0008, _) => {
                let host = entry.eax & 0xff;
                entry.eax = entry.eax & 0xff00 | host.min(ADDRESS_BITS);
            }
            _ => {}
        }
    }
}

/// Who made the CPU and which it is, caches, topology, KVM's own leaves, the brand, sizes of addresses. Not: performance counters, tracing,
/// enclaves, tiles, frequencies, and sub-leaves of features that no level has.
fn is_shown(entry: &kvm_cpuid_entry2, level: CpuLevel) -> bool {
    match entry.function {
        7 => entry.index == 0,
        // Without XSAVE there is none of its leaf.
        0xd => level >= CpuLevel::V3 && entry.index <= 2,
        0..=2 | 4 | 6 | 0xb | 0x1f => true,
        0x4000_0000..=0x4000_0001 | 0x8000_0000..=0x8000_0008 => true,
        0x8000_001d..=0x8000_001e => true,
        _ => false,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::compat::FEATURES;

    fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    /// A host that has everything.
    pub(crate) fn host() -> Vec<kvm_cpuid_entry2> {
        let functions = [
            0,
            1,
            4,
            6,
            7,
            0xa,
            0xd,
            0x14,
            0x4000_0001,
            0x8000_0001,
            0x8000_0007,
            0x8000_0008,
            0x8000_0021,
        ];
        functions.map(|function| leaf(function, [!0; 4])).to_vec()
    }

    #[test]
    fn what_hosts_of_a_level_have_besides_is_not_seen() {
        let mut plain = host();
        // AES and RDRAND, AVX-512 and SMAP, counters: another host of the level lacks them.
        let mut other = host();
        for entry in &mut other {
            match entry.function {
                1 => entry.ecx &= !(1 << 25 | 1 << 30),
                7 => (entry.ebx, entry.ecx) = (entry.ebx & !(1 << 16 | 1 << 20), 0),
                _ => {}
            }
        }
        other.retain(|entry| entry.function != 0xa);
        limit(&mut plain, CpuLevel::V3);
        limit(&mut other, CpuLevel::V3);
        assert_eq!(plain, other);
        let entry = |function| find(&plain, function, 0);
        assert_eq!(entry(7).map(|leaf| leaf.ebx), Some(0b1_0010_1010));
        assert_eq!(
            entry(7).map(|leaf| (leaf.eax, leaf.ecx, leaf.edx)),
            Some((0, 0, 0))
        );
        assert_eq!(entry(0xd).map(|leaf| (leaf.eax, leaf.ecx)), Some((7, 832)));
        assert_eq!(entry(0x8000_0008).map(|leaf| leaf.eax & 0xff), Some(39));
        assert_eq!(
            (entry(0xa), entry(0x14), entry(0x8000_0021)),
            (None, None, None)
        );
    }

    #[test]
    fn level_2_has_nothing_of_level_3() {
        let mut seen = host();
        limit(&mut seen, CpuLevel::V2);
        assert_eq!(missing(&seen, CpuLevel::V2), Vec::<String>::new());
        for shown in &SHOWN {
            let has =
                find(&seen, shown.function, shown.index).map_or(0, |leaf| shown.register.of(leaf));
            assert_eq!(has & shown.v3, 0, "leaf {:#x}", shown.function);
        }
        assert_eq!(find(&seen, 0xd, 0), None);
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let mut host = host();
        for entry in &mut host {
            if entry.function == 7 {
                entry.ebx &= !(1 << 5);
            }
        }
        assert_eq!(missing(&host, CpuLevel::V2), Vec::<String>::new());
        assert_eq!(missing(&host, CpuLevel::V3), ["avx2"]);
        assert!(missing(&[], CpuLevel::V2).contains(&"sse4.2".to_owned()));
    }

    #[test]
    fn every_register_of_features_is_looked_at() {
        for (function, index, register, _) in FEATURES {
            let mut entry = leaf(function, [!0; 4]);
            entry.index = index;
            let mut entries = vec![entry];
            limit(&mut entries, CpuLevel::V3);
            let left = entries.first().map_or(0, |entry| register.of(entry));
            assert_ne!(left, !0, "{function:#x}.{index} {register:?} is the host's");
        }
    }
}
