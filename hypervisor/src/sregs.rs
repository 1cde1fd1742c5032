//! `KVM_GET_SREGS2` and `KVM_SET_SREGS2`, which kvm-ioctls does not have yet.
//!
//! Unlike the older pair they carry the PAE page directory pointers, so that restoring a guest in PAE
//! mode does not read them from memory that may not be there yet.

#![allow(unsafe_code)]

use std::io;

use kvm_bindings::{KVMIO, kvm_dtable, kvm_segment, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::{
    ioctl::{ioctl_with_mut_ref, ioctl_with_ref},
    ioctl_ior_nr, ioctl_iow_nr,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Error;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// `struct kvm_sregs2`, with the traits that make it bytes and back.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes)]
pub(crate) struct Sregs2 {
    pub(crate) cs: kvm_segment,
    pub(crate) ds: kvm_segment,
    pub(crate) es: kvm_segment,
    pub(crate) fs: kvm_segment,
    pub(crate) gs: kvm_segment,
    pub(crate) ss: kvm_segment,
    pub(crate) tr: kvm_segment,
    pub(crate) ldt: kvm_segment,
    pub(crate) gdt: kvm_dtable,
    pub(crate) idt: kvm_dtable,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) cr8: u64,
    pub(crate) efer: u64,
    pub(crate) apic_base: u64,
    pub(crate) flags: u64,
    pub(crate) pdptrs: [u64; 4],
}

const _: () = assert!(size_of::<Sregs2>() == size_of::<kvm_sregs2>());

/// Reads the special registers of `vcpu`.
pub(crate) fn get(vcpu: &VcpuFd) -> Result<Sregs2, Error> {
    let mut sregs = Sregs2::default();
    // SAFETY: the kernel writes a `struct kvm_sregs2`, which `Sregs2` is in size and layout.
    match unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) } {
        0 => Ok(sregs),
        _ => Err(refused("read the special registers")),
    }
}

/// Sets the special registers of `vcpu`.
pub(crate) fn set(vcpu: &VcpuFd, sregs: &Sregs2) -> Result<(), Error> {
    // SAFETY: the kernel reads a `struct kvm_sregs2`, which `Sregs2` is in size and layout.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) } {
        0 => Ok(()),
        _ => Err(refused("set the special registers")),
    }
}

fn refused(what: &'static str) -> Error {
    Error::Kvm {
        what,
        source: io::Error::last_os_error(),
    }
}
