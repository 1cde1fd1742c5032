//! A guest of a few instructions that fills its memory and then goes on changing it.
//!
//! On hardware virtualisation it stays as it was entered, at CPL 0. KVM-PVM interprets what runs there,
//! at about a microsecond an instruction, and runs natively what runs at CPL 3; of the instructions that
//! go there, its interpreter knows one, `sysexit`.

#![allow(unsafe_code)]

use std::{arch::global_asm, slice};

use crate::{
    elf,
    full::{fill, with_parameters},
};

/// The most that it fills: what the page tables that it begins with reach.
pub(crate) const MAX_BYTES: u64 = 3 << 30;

/// What the guest is to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filler {
    /// End of the memory that it fills, at most [`MAX_BYTES`].
    pub(crate) memory_bytes: u64,
    /// How many pages it writes to between two ticks, one after the other, round and round.
    pub(crate) pages_a_tick: u64,
    /// How far apart ticks are, in cycles of the TSC.
    pub(crate) cycles_a_tick: u64,
    /// Whether it goes to CPL 3 first.
    pub(crate) user: bool,
}

// Each tick is a dot on the serial console. The first comes when memory is full.
global_asm!(
    ".section .rodata",
    ".globl benches_filler, benches_filler_end",
    ".balign 8",
    "benches_filler:",
    fill!(),
    "mov edi, 0x400000",
    "22:",
    "mov al, 0x2e",
    "mov dx, 0x3f8",
    "out dx, al",
    "rdtsc",
    "shl rdx, 32",
    "lea rsi, [rax + rdx]",
    "mov rcx, [rip + 3b]",
    "23:",
    "sub rcx, 1",
    "jb 25f",
    "add [rdi], rbx",
    "add rdi, 4096",
    "cmp rdi, rbp",
    "jb 23b",
    "mov edi, 0x400000",
    "jmp 23b",
    "25:",
    "pause",
    "rdtsc",
    "shl rdx, 32",
    "add rax, rdx",
    "sub rax, rsi",
    "cmp rax, [rip + 4b]",
    "jb 25b",
    "jmp 22b",
    "benches_filler_end:",
    ".text",
);

unsafe extern "C" {
    #[link_name = "benches_filler"]
    static START: u8;
    #[link_name = "benches_filler_end"]
    static END: u8;
}

impl Filler {
    /// The guest as a kernel in ELF.
    pub(crate) fn kernel(self) -> Vec<u8> {
        let Self {
            memory_bytes,
            pages_a_tick,
            cycles_a_tick,
            user,
        } = self;
        let (start, end) = (&raw const START, &raw const END);
        // SAFETY: both labels are in one block of assembly above, in this order.
        let code = unsafe { slice::from_raw_parts(start, end as usize - start as usize) };
        let parameters = [memory_bytes, pages_a_tick, cycles_a_tick, user.into()];
        elf::executable(&with_parameters(code, parameters))
    }
}
