//! What a host's CPU must have for a saved guest to go on there.

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;

use crate::{
    CpuLevel, Error, VcpuState,
    compat::{FEATURES, Register},
    cpu_level::bits_of,
    cpuid::find,
    feature_names,
};

/// A level, and what the guest was shown besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuNeeds {
    /// The highest level all of which the guest was shown. [`CpuLevel::Host`] if it was not even shown all of level 2.
    pub level: CpuLevel,
    /// The features besides, by name, of which each host must have all; the guest of a level has none.
    pub besides: Vec<String>,
}

impl VcpuState {
    /// What the guest was shown.
    ///
    /// # Errors
    ///
    /// When the saved CPUID is not one.
    pub fn needs(&self) -> Result<CpuNeeds, Error> {
        Ok(needs(&self.cpuid_entries()?))
    }
}

fn needs(entries: &[kvm_cpuid_entry2]) -> CpuNeeds {
    let levels = [CpuLevel::V3, CpuLevel::V2];
    let level = levels.into_iter().find(|level| has_all(entries, *level));
    let level = level.unwrap_or(CpuLevel::Host);
    let mut besides = Vec::new();
    for (function, index, register, ignored) in FEATURES {
        let (required, optional) = bits_of(level, (function, index, register));
        let more = of(entries, function, index, register) & !(ignored | required | optional);
        let bits = (0..u32::BITS).filter(|bit| more & (1 << bit) != 0);
        besides.extend(bits.map(|bit| feature_names::name(function, index, register, bit)));
    }
    CpuNeeds { level, besides }
}

fn has_all(entries: &[kvm_cpuid_entry2], level: CpuLevel) -> bool {
    FEATURES.iter().all(|&(function, index, register, _)| {
        let (required, _) = bits_of(level, (function, index, register));
        required & !of(entries, function, index, register) == 0
    })
}

fn of(entries: &[kvm_cpuid_entry2], function: u32, index: u32, register: Register) -> u32 {
    find(entries, function, index).map_or(0, |entry| register.of(entry))
}

impl fmt::Display for CpuNeeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let besides = self.besides.join(", ");
        match (self.level, &*besides) {
            (CpuLevel::Host, "") => f.write_str("any x86-64"),
            (CpuLevel::Host, more) => write!(f, "x86-64 with {more}"),
            (level, "") => level.fmt(f),
            (level, more) => write!(f, "{level} with {more}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu_level::{limit, tests::host};

    #[test]
    fn a_guest_needs_the_level_that_it_was_limited_to_and_what_was_added() {
        for level in [CpuLevel::V2, CpuLevel::V3] {
            let mut seen = host();
            limit(&mut seen, level);
            assert_eq!(needs(&seen).to_string(), level.to_string());
            for entry in seen.iter_mut().filter(|entry| entry.function == 1) {
                entry.ecx |= 1 << 25;
            }
            assert_eq!(needs(&seen).to_string(), format!("{level} with aes"));
        }
    }

    #[test]
    fn a_guest_of_a_host_needs_all_that_it_has() {
        let all = needs(&host());
        assert_eq!(all.level, CpuLevel::V3);
        for feature in ["aes", "avx512f", "invariant tsc"] {
            assert!(all.besides.iter().any(|name| name == feature), "{feature}");
        }
        let mut less = host();
        less.retain(|entry| entry.function == 7);
        let less = needs(&less);
        assert_eq!(less.level, CpuLevel::Host);
        assert!(
            less.to_string().starts_with("x86-64 with fsgsbase"),
            "{less}"
        );
    }
}
