//! What a machine's CPUs are, from how a client says it to how the hypervisor takes it.

use control::{CpuModel, CpuidChange, CpuidRegister, MsrChange};
use hypervisor::{CpuLevel, CpuTemplate, Register};

/// The template that `model` is. One on another template changes what that makes of its own base.
pub(crate) fn template(model: &CpuModel) -> CpuTemplate {
    let of = |level| CpuTemplate {
        level,
        ..CpuTemplate::default()
    };
    match model {
        CpuModel::Host => of(CpuLevel::Host),
        CpuModel::V2 => of(CpuLevel::V2),
        CpuModel::V3 => of(CpuLevel::V3),
        CpuModel::Template(changes) => {
            let mut template = template(&changes.base);
            template.cpuid.extend(changes.cpuid.iter().map(cpuid));
            template.msrs.extend(changes.msrs.iter().map(msr));
            template
        }
    }
}

fn cpuid(change: &CpuidChange) -> hypervisor::CpuidChange {
    let CpuidChange {
        leaf,
        subleaf,
        register,
        clear,
        set,
    } = *change;
    hypervisor::CpuidChange {
        leaf,
        subleaf,
        register: match register {
            CpuidRegister::Eax => Register::Eax,
            CpuidRegister::Ebx => Register::Ebx,
            CpuidRegister::Ecx => Register::Ecx,
            CpuidRegister::Edx => Register::Edx,
        },
        clear,
        set,
    }
}

fn msr(change: &MsrChange) -> hypervisor::MsrChange {
    let MsrChange { index, clear, set } = *change;
    hypervisor::MsrChange { index, clear, set }
}
