//! Whether this host has every CPU feature that a saved guest was shown.

use kvm_bindings::kvm_cpuid_entry2;

use crate::{
    Error, GuestCpuid, VcpuState,
    cpuid::{address_bits, find, vendor},
    feature_names,
};

/// A register of a CPUID leaf whose bits are features, one each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Leaf, sub-leaf, register, and the bits that are no features: they mirror the guest's own control
/// registers, or say how stable the host's clock is at the moment.
pub(crate) const FEATURES: [(u32, u32, Register, u32); 18] = [
    (1, 0, Register::Ecx, 1 << 27),
    (1, 0, Register::Edx, 1 << 28),
    (7, 0, Register::Ebx, 0),
    (7, 0, Register::Ecx, 1 << 4),
    (7, 0, Register::Edx, 0),
    (7, 1, Register::Eax, 0),
    (7, 1, Register::Edx, 0),
    (7, 2, Register::Edx, 0),
    (0xd, 0, Register::Eax, 0),
    (0xd, 0, Register::Edx, 0),
    (0xd, 1, Register::Eax, 0),
    (0xd, 1, Register::Ecx, 0),
    (0x4000_0001, 0, Register::Eax, 1 << 24),
    (0x8000_0001, 0, Register::Ecx, 0),
    (0x8000_0001, 0, Register::Edx, 0),
    (0x8000_0007, 0, Register::Edx, 0),
    (0x8000_0008, 0, Register::Ebx, 0),
    (0x8000_0021, 0, Register::Eax, 0),
];

impl Register {
    pub(crate) fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    pub(crate) fn of_mut(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }
}

/// The features that the guest of `saved` uses and `host` cannot give it, by name; empty when the
/// guest can run here.
///
/// # Errors
///
/// When the saved CPUID is not one.
pub fn missing_features(saved: &VcpuState, host: &GuestCpuid) -> Result<Vec<String>, Error> {
    Ok(missing(&saved.cpuid_entries()?, host.entries()))
}

fn missing(guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut names = Vec::new();
    let vendors = (vendor(guest), vendor(host));
    if vendors.0 != vendors.1 {
        names.push(format!(
            "a CPU by {} (this one is by {})",
            vendors.0, vendors.1
        ));
    }
    for (function, index, register, ignored) in FEATURES {
        let bits = |entries| find(entries, function, index).map_or(0, |entry| register.of(entry));
        let lacking = bits(guest) & !bits(host) & !ignored;
        let set = (0..32).filter(|bit| lacking & (1 << bit) != 0);
        names.extend(set.map(|bit| feature_names::name(function, index, register, bit)));
    }
    if address_bits(guest) > address_bits(host) {
        names.push(format!("{} bits of physical address", address_bits(guest)));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn a_host_with_more_lacks_nothing() {
        let guest = [leaf(1, 0, 0, 0, 1 << 20, 0), leaf(7, 0, 0, 1 << 5, 0, 0)];
        let host = [leaf(1, 0, 0, 0, 3 << 20, 7), leaf(7, 0, 0, 0xff, 0, 0)];
        assert_eq!(missing(&guest, &host), Vec::<String>::new());
        assert!(!missing(&host, &guest).is_empty());
    }

    #[test]
    fn what_lacks_is_named() {
        let guest = [
            leaf(1, 0, 0, 0, 1 << 20, 0),
            leaf(7, 0, 0, 1 << 5 | 1 << 15, 0, 0),
        ];
        assert_eq!(
            missing(&guest, &[]),
            ["sse4.2", "avx2", "CPUID 0x7.0 EBX bit 15"]
        );
    }

    #[test]
    fn bits_that_mirror_the_guests_own_registers_are_no_features() {
        let guest = [
            leaf(1, 0, 0, 0, 1 << 27, 1 << 28),
            leaf(7, 0, 0, 0, 1 << 4, 0),
        ];
        assert_eq!(missing(&guest, &[]), Vec::<String>::new());
    }

    #[test]
    fn another_vendor_is_named() {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let intel = [leaf(0, 0, 0, word(b"Genu"), word(b"ntel"), word(b"ineI"))];
        let amd = [leaf(0, 0, 0, word(b"Auth"), word(b"cAMD"), word(b"enti"))];
        assert_eq!(
            missing(&intel, &amd),
            ["a CPU by GenuineIntel (this one is by AuthenticAMD)"]
        );
    }
}
