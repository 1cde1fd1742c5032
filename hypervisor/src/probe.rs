//! What this host's KVM can do, for people to read.

use kvm_ioctls::{Cap, Kvm};
use saved_state::CpuIdentity;

use crate::{Error, GuestCpuid, error::Asked};

/// What `/dev/kvm` says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSupport {
    /// Version of its API; 12 since Linux 2.6.22.
    pub api_version: i32,
    /// The most vCPUs that one machine can have.
    pub max_vcpus: usize,
    /// Whether a guest's time stamp counter can run at another rate than the host's.
    pub tsc_scaling: bool,
    /// Model-specific registers that are part of a saved vCPU.
    pub msrs: usize,
}

/// Asks KVM what it can do.
///
/// # Errors
///
/// [`Error::Open`] when `/dev/kvm` is not to be had.
pub fn probe() -> Result<HostSupport, Error> {
    let kvm = open()?;
    Ok(HostSupport {
        api_version: kvm.get_api_version(),
        max_vcpus: kvm.get_max_vcpus(),
        tsc_scaling: kvm.check_extension(Cap::TscControl),
        msrs: kvm
            .get_msr_index_list()
            .asked("list its MSRs")?
            .as_slice()
            .len(),
    })
}

/// Opens `/dev/kvm`.
pub(crate) fn open() -> Result<Kvm, Error> {
    Kvm::new().map_err(|e| Error::Open(std::io::Error::from_raw_os_error(e.errno())))
}

/// The CPU that guests see on this host, for the header of a state file.
pub fn cpu_identity(cpuid: &GuestCpuid) -> CpuIdentity {
    let leaf = |function| {
        let entry = cpuid
            .entries()
            .iter()
            .find(|entry| entry.function == function);
        entry.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    };
    let text = |words: &[u32]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        String::from_utf8_lossy(&bytes)
            .trim_matches(['\0', ' '])
            .to_owned()
    };
    let [_, ebx, ecx, edx] = leaf(0);
    let brand: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(leaf).collect();
    CpuIdentity {
        vendor: text(&[ebx, edx, ecx]),
        signature: leaf(1)[0],
        brand: text(&brand),
    }
}
