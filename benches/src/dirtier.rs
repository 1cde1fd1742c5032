//! A guest of a few instructions that writes to some pages each time it finds itself to be another machine than it was, and says so.
//!
//! Like [`Filler`](crate::filler::Filler) it goes to CPL 3 where only that runs natively, and has memory that is full.

#![allow(unsafe_code)]

use std::{arch::global_asm, slice};

use crate::{
    elf,
    full::{fill, with_parameters},
};

/// What the guest is to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dirtier {
    /// End of the memory that it fills, at most [`MAX_BYTES`](crate::filler::MAX_BYTES).
    pub(crate) memory_bytes: u64,
    /// How many pages it writes to.
    pub(crate) pages: u64,
    /// How far apart they are, in bytes.
    pub(crate) stride_bytes: u64,
    /// Whether it goes to CPL 3 first.
    pub(crate) user: bool,
}

// It prints a dot when memory is full, and waits for its machine's generation to be another one. Then it writes to the pages and says that
// its run is done. If nobody has it run, it prints a dot and does nothing more.
global_asm!(
    ".section .rodata",
    ".globl benches_dirtier, benches_dirtier_end",
    ".balign 8",
    "benches_dirtier:",
    fill!(),
    "mov r12, [0xdf000]",
    "mov al, 0x2e",
    "mov dx, 0x3f8",
    "out dx, al",
    "22:",
    "pause",
    "cmp r12, [0xdf000]",
    "je 22b",
    "mov edi, 0x400000",
    "mov rcx, [rip + 3b]",
    "23:",
    "add [rdi], rbx",
    "add rdi, [rip + 4b]",
    "dec rcx",
    "jnz 23b",
    "mov dx, 0xce4",
    "xor eax, eax",
    "out dx, eax",
    "mov al, 0x2e",
    "mov dx, 0x3f8",
    "out dx, al",
    "24:",
    "pause",
    "jmp 24b",
    "benches_dirtier_end:",
    ".text",
);

unsafe extern "C" {
    #[link_name = "benches_dirtier"]
    static START: u8;
    #[link_name = "benches_dirtier_end"]
    static END: u8;
}

impl Dirtier {
    /// The guest as a kernel in ELF.
    pub(crate) fn kernel(self) -> Vec<u8> {
        let Self {
            memory_bytes,
            pages,
            stride_bytes,
            user,
        } = self;
        let (start, end) = (&raw const START, &raw const END);
        // SAFETY: both labels are in one block of assembly above, in this order.
        let code = unsafe { slice::from_raw_parts(start, end as usize - start as usize) };
        let parameters = [memory_bytes, pages, stride_bytes, user.into()];
        elf::executable(&with_parameters(code, parameters))
    }
}
