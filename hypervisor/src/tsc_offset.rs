//! The offset of a vCPU's time stamp counter from the host's, as a device attribute of the vCPU
//! (Documentation/virt/kvm/devices/vcpu.rst, `KVM_VCPU_TSC_CTRL`), which kvm-ioctls does not have.

#![allow(unsafe_code)]

use std::io;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::{ioctl::ioctl_with_ref, ioctl_iow_nr};

use crate::Error;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Reads the offset, in guest ticks modulo 2^64.
pub(crate) fn get(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0u64;
    let attribute = attribute(&raw mut offset as u64);
    // SAFETY: the kernel writes eight bytes to `offset`, which outlives the call.
    match unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(offset),
        _ => Err(refused("tell the TSC's offset")),
    }
}

/// Sets the offset, in guest ticks modulo 2^64.
pub(crate) fn set(vcpu: &VcpuFd, offset: u64) -> Result<(), Error> {
    let attribute = attribute(&raw const offset as u64);
    // SAFETY: the kernel reads eight bytes from `offset`, which outlives the call.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => Err(refused("set the TSC's offset")),
    }
}

fn attribute(addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr,
        flags: 0,
    }
}

fn refused(what: &'static str) -> Error {
    Error::Kvm {
        what,
        source: io::Error::last_os_error(),
    }
}
