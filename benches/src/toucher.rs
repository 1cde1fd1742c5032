//! A guest of a few instructions that fills its memory, and then touches the same pages all over it again and again.

#![allow(unsafe_code)]

use std::{arch::global_asm, slice};

use crate::{
    elf,
    full::{fill, with_parameters},
};

/// What the guest is to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Toucher {
    /// End of the memory that it fills, at most [`MAX_BYTES`](crate::filler::MAX_BYTES).
    pub(crate) memory_bytes: u64,
    /// How many pages it touches in a round, less than 2^32.
    pub(crate) pages: u64,
    /// Whether it goes to CPL 3 first.
    pub(crate) user: bool,
}

// Each round is a dot on the serial console, the first of which comes when memory is full. The pages of a round are those at the fractions
// of memory that the multiples of the golden ratio have, the third parameter being how many there are: as far from each other as can be.
global_asm!(
    ".section .rodata",
    ".globl benches_toucher, benches_toucher_end",
    ".balign 8",
    "benches_toucher:",
    fill!(),
    "22:",
    "mov al, 0x2e",
    "mov dx, 0x3f8",
    "out dx, al",
    "xor ecx, ecx",
    "23:",
    "imul eax, ecx, -1640531527",
    "imul rax, [rip + 4b]",
    "shr rax, 32",
    "shl rax, 12",
    "mov rsi, [rax + 0x400000]",
    "inc ecx",
    "cmp rcx, [rip + 3b]",
    "jb 23b",
    "jmp 22b",
    "benches_toucher_end:",
    ".text",
);

unsafe extern "C" {
    #[link_name = "benches_toucher"]
    static START: u8;
    #[link_name = "benches_toucher_end"]
    static END: u8;
}

/// Where the guest's memory begins that it fills.
const FILLED_FROM: u64 = 4 << 20;

impl Toucher {
    /// The guest as a kernel in ELF.
    pub(crate) fn kernel(self) -> Vec<u8> {
        let Self {
            memory_bytes,
            pages,
            user,
        } = self;
        let (start, end) = (&raw const START, &raw const END);
        // SAFETY: both labels are in one block of assembly above, in this order.
        let code = unsafe { slice::from_raw_parts(start, end as usize - start as usize) };
        let filled_pages = (memory_bytes - FILLED_FROM) >> 12;
        let parameters = [memory_bytes, pages, filled_pages, user.into()];
        elf::executable(&with_parameters(code, parameters))
    }
}
