//! What somebody changes of the CPU that guests see: bits of CPUID, and of the model-specific registers that a vCPU begins with.
//!
//! A template stands on a level, or on all that the host has, and can add to it only what the host has.

use std::collections::BTreeSet;

use crate::{
    CpuLevel, Error, GuestCpuid, MsrEntry, Vcpu, compat::Register, cpuid::find, feature_names,
    msrs, probe::open,
};

/// A CPU, as somebody describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuTemplate {
    /// What it stands on.
    pub level: CpuLevel,
    /// What is changed of CPUID, in this order.
    pub cpuid: Vec<CpuidChange>,
    /// What is changed of model-specific registers, in this order.
    pub msrs: Vec<MsrChange>,
}

/// A change of one register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidChange {
    /// The leaf, which a guest puts into EAX,
    pub leaf: u32,
    /// and its sub-leaf, which it puts into ECX; 0 where there are none.
    pub subleaf: u32,
    /// The register that is changed.
    pub register: Register,
    /// Bits that guests are not shown.
    pub clear: u32,
    /// Bits that they are shown, which the host must have.
    pub set: u32,
}

/// A change of what a model-specific register has when a vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrChange {
    /// Its number.
    pub index: u32,
    /// Bits that become 0.
    pub clear: u64,
    /// Bits that become 1.
    pub set: u64,
}

impl GuestCpuid {
    /// What the vCPUs of a machine of `template` see here.
    ///
    /// # Errors
    ///
    /// [`Error::CpuLevel`] and [`Error::TemplateBits`] when the host lacks something that the template asks for,
    /// [`Error::TemplateLeaf`] when it changes what is not to be changed.
    pub fn of_template(&self, template: &CpuTemplate) -> Result<Self, Error> {
        let CpuTemplate {
            level,
            cpuid,
            msrs: _,
        } = template;
        let fixed = cpuid.iter().find(|change| is_fixed(change.leaf));
        if let Some(CpuidChange { leaf, .. }) = fixed {
            return Err(Error::TemplateLeaf(*leaf));
        }
        let missing: BTreeSet<_> = cpuid.iter().flat_map(|it| it.missing(self)).collect();
        if !missing.is_empty() {
            return Err(Error::TemplateBits { missing });
        }
        let based = self.at_level(*level)?;
        Ok(based.map_entries(|entries| {
            for change in cpuid {
                change.apply(entries, self);
            }
        }))
    }
}

impl CpuTemplate {
    /// Whether this host can give a machine such CPUs, as far as that can be told without one: which bits a
    /// model-specific register takes shows when a vCPU has it.
    ///
    /// # Errors
    ///
    /// As of [`GuestCpuid::of_template`], and [`Error::TemplateMsr`].
    pub fn check(&self) -> Result<(), Error> {
        let cpuid = GuestCpuid::of_host(1)?.of_template(self)?;
        let indices = msrs::of_guest(&msrs::saved_indices(&open()?)?, cpuid.entries());
        let unknown = |change: &&MsrChange| indices.binary_search(&change.index).is_err();
        match self.msrs.iter().find(unknown) {
            Some(change) => Err(Error::TemplateMsr(change.index)),
            None => Ok(()),
        }
    }
}

impl CpuidChange {
    /// The bits that it sets and the host lacks, by name.
    fn missing(&self, host: &GuestCpuid) -> Vec<String> {
        let found = find(host.entries(), self.leaf, self.subleaf);
        let lacks = self.set & !found.map_or(0, |entry| self.register.of(entry));
        let bits = (0..u32::BITS).filter(|bit| lacks & (1 << bit) != 0);
        bits.map(|bit| feature_names::name(self.leaf, self.subleaf, self.register, bit))
            .collect()
    }

    fn apply(&self, entries: &mut Vec<kvm_bindings::kvm_cpuid_entry2>, host: &GuestCpuid) {
        let is_it = |entry: &kvm_bindings::kvm_cpuid_entry2| {
            (entry.function, entry.index) == (self.leaf, self.subleaf)
        };
        if !entries.iter().any(is_it) && self.set != 0 {
            // The level hides the leaf: it comes back, with nothing in it but what is set.
            let found = find(host.entries(), self.leaf, self.subleaf).copied();
            entries.extend(found.map(|entry| kvm_bindings::kvm_cpuid_entry2 {
                eax: 0,
                ebx: 0,
                ecx: 0,
                edx: 0,
                ..entry
            }));
        }
        for entry in entries.iter_mut().filter(|entry| is_it(entry)) {
            let register = self.register.of_mut(entry);
            *register = *register & !self.clear | self.set;
        }
    }
}

/// Leaves that say who made the CPU, how many leaves there are, and how a machine's vCPUs are arranged.
fn is_fixed(leaf: u32) -> bool {
    matches!(
        leaf,
        0 | 0xb | 0x1f | 0x4000_0000 | 0x8000_0000 | 0x8000_001e
    )
}

impl Vcpu {
    /// Changes model-specific registers of a vCPU that has not run. What is not part of its saved state cannot be
    /// changed: a restored guest would lose it.
    ///
    /// # Errors
    ///
    /// [`Error::TemplateMsr`] names the register that this host does not have or does not let have that value.
    pub fn change_msrs(&self, changes: &[MsrChange]) -> Result<(), Error> {
        let indices = msrs::of_guest(&self.msr_indices, &self.cpuid);
        for change in changes {
            let refused = Error::TemplateMsr(change.index);
            if indices.binary_search(&change.index).is_err() {
                return Err(refused);
            }
            let found = msrs::get(&self.fd, &[change.index])?;
            let Some(entry) = found.first() else {
                return Err(refused);
            };
            let value = entry.value & !change.clear | change.set;
            let wanted = MsrEntry { value, ..*entry };
            msrs::set(&self.fd, &[wanted]).map_err(|_| refused)?;
            // KVM drops the bits that some registers do not have.
            let read = msrs::get(&self.fd, &[change.index])?;
            if read.first() != Some(&wanted) {
                return Err(Error::TemplateMsr(change.index));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    fn leaf(function: u32, index: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn host(entries: &[kvm_cpuid_entry2]) -> GuestCpuid {
        GuestCpuid::of_entries(entries.to_vec())
    }

    fn change(leaf: u32, register: Register, clear: u32, set: u32) -> CpuTemplate {
        CpuTemplate {
            cpuid: vec![CpuidChange {
                leaf,
                subleaf: 0,
                register,
                clear,
                set,
            }],
            ..CpuTemplate::default()
        }
    }

    #[test]
    fn bits_are_cleared_and_others_stay() {
        let host = host(&[leaf(1, 0, 0b1110, 7), leaf(7, 0, 0b1110, 7)]);
        let template = change(1, Register::Ecx, 0b0110, 0);
        let seen = host.of_template(&template).unwrap();
        assert_eq!(
            seen.entries(),
            [leaf(1, 0, 0b1000, 7), leaf(7, 0, 0b1110, 7)]
        );
        assert_eq!(
            host.of_template(&CpuTemplate::default()).unwrap().entries(),
            host.entries()
        );
    }

    #[test]
    fn what_is_set_is_had_by_the_host_or_refused_by_name() {
        let aes = 1 << 25;
        let template = change(1, Register::Ecx, 0, aes);
        let error = host(&[leaf(1, 0, 0, 0)]).of_template(&template);
        assert!(
            matches!(&error, Err(Error::TemplateBits { missing }) if missing.iter().eq(["aes"])),
            "{error:?}"
        );
        assert!(host(&[]).of_template(&template).is_err());
        let has = host(&[leaf(1, 0, aes, 0)]);
        assert_eq!(has.of_template(&template).unwrap().entries(), has.entries());
    }

    #[test]
    fn a_level_can_be_added_to() {
        let mut everything: Vec<_> = [0, 1, 4, 6, 7, 0xd, 0x14, 0x8000_0001, 0x8000_0021]
            .map(|function| leaf(function, 0, !0, !0))
            .to_vec();
        for entry in &mut everything {
            (entry.eax, entry.ebx) = (!0, !0);
        }
        let host = host(&everything);
        let mut template = change(1, Register::Ecx, 0, 1 << 25);
        template
            .cpuid
            .extend(change(0x8000_0021, Register::Eax, 0, 1).cpuid);
        template.level = CpuLevel::V2;
        let level = host.at_level(CpuLevel::V2).unwrap();
        let seen = host.of_template(&template).unwrap();
        let of = |cpuid: &GuestCpuid, function| find(cpuid.entries(), function, 0).copied();
        let ecx = |cpuid| of(cpuid, 1).unwrap().ecx;
        assert_eq!(ecx(&seen), ecx(&level) | 1 << 25);
        assert_eq!(of(&level, 0x8000_0021), None);
        let back = of(&seen, 0x8000_0021).unwrap();
        assert_eq!((back.eax, back.ebx, back.ecx, back.edx), (1, 0, 0, 0));
    }

    #[test]
    fn vendor_and_topology_cannot_be_changed() {
        for leaf in [0, 0xb, 0x1f, 0x4000_0000] {
            let error = host(&[]).of_template(&change(leaf, Register::Ebx, 1, 0));
            assert!(matches!(error, Err(Error::TemplateLeaf(at)) if at == leaf));
        }
    }
}
