//! The only crate that speaks to KVM.
//!
//! [`Vm`] is a virtual machine with its memory slots and in-kernel interrupt controllers, [`Vcpu`] one
//! of its processors. Both save themselves into, and are restored from, types of their own
//! ([`VmState`], [`VcpuState`]) that hold KVM's structures byte for byte as the kernel's ABI defines
//! them; `docs/state-format.md` lists them.

mod abi;
mod clock;
mod compat;
mod cpu_level;
mod cpu_needs;
mod cpu_template;
mod cpuid;
mod error;
mod feature_names;
mod kick;
mod msrs;
mod probe;
mod sregs;
mod tsc_offset;
mod vcpu;
mod vcpu_state;
mod vm;
mod vm_state;

pub use clock::{ClockPlan, ClockStart, HostTsc, MachineClock, VcpuClock};
pub use compat::{Register, missing_features};
pub use cpu_level::CpuLevel;
pub use cpu_needs::CpuNeeds;
pub use cpu_template::{CpuTemplate, CpuidChange, MsrChange};
pub use cpuid::GuestCpuid;
pub use error::Error;
pub use kick::{Kick, install_kick_handler};
pub use msrs::MsrEntry;
pub use probe::{HostSupport, cpu_identity, probe};
pub use vcpu::{BootRegisters, BoundVcpu, IoHandler, Ran, Vcpu};
pub use vcpu_state::VcpuState;
pub use vm::{IoEvent, MAX_VCPUS, Vm};
pub use vm_state::VmState;
pub use vmm_sys_util::eventfd::EventFd;
