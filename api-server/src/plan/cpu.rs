//! From the CPUs of a request, or of a file, to what a VMM is told.

use api_types::{CpuLevel, ErrorCode};
use control::{CpuModel, CpuTemplate, CpuidChange, CpuidRegister, MsrChange};

use crate::error::ApiError;

/// The CPUs that a request asks for, if it does.
pub(super) fn checked(asked: Option<&api_types::CpuModel>) -> Result<CpuModel, ApiError> {
    let Some(asked) = asked else {
        return Ok(CpuModel::default());
    };
    if let api_types::CpuModel::Template(template) = asked {
        let wrong = |wrong| ApiError::new(ErrorCode::BadRequest, format!("cpu: {wrong}"));
        template.check().map_err(wrong)?;
    }
    Ok(cpu_model(asked.clone()))
}

/// CPUs as a VMM is told of them.
pub fn cpu_model(model: api_types::CpuModel) -> CpuModel {
    match model {
        api_types::CpuModel::Level(level) => of_level(level),
        api_types::CpuModel::Template(template) => {
            CpuModel::Template(Box::new(of_template(template)))
        }
    }
}

fn of_level(level: CpuLevel) -> CpuModel {
    match level {
        CpuLevel::Host => CpuModel::Host,
        CpuLevel::V2 => CpuModel::V2,
        CpuLevel::V3 => CpuModel::V3,
    }
}

fn of_template(template: api_types::CpuTemplate) -> CpuTemplate {
    let api_types::CpuTemplate { base, cpuid, msr } = template;
    CpuTemplate {
        base: of_level(base),
        cpuid: cpuid.into_iter().map(of_cpuid).collect(),
        msrs: msr.into_iter().map(of_msr).collect(),
    }
}

fn of_cpuid(change: api_types::CpuidChange) -> CpuidChange {
    let api_types::CpuidChange {
        leaf,
        subleaf,
        register,
        clear,
        set,
    } = change;
    CpuidChange {
        leaf: leaf.0,
        subleaf: subleaf.0,
        register: match register {
            api_types::CpuidRegister::Eax => CpuidRegister::Eax,
            api_types::CpuidRegister::Ebx => CpuidRegister::Ebx,
            api_types::CpuidRegister::Ecx => CpuidRegister::Ecx,
            api_types::CpuidRegister::Edx => CpuidRegister::Edx,
        },
        clear: clear.0,
        set: set.0,
    }
}

fn of_msr(change: api_types::MsrChange) -> MsrChange {
    let api_types::MsrChange { index, clear, set } = change;
    MsrChange {
        index: index.0,
        clear: clear.0,
        set: set.0,
    }
}
