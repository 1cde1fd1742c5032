//! A guest of a few instructions that writes to some pages each time it finds itself to be another machine than it was.
//!
//! Like [`Filler`](crate::filler::Filler) it goes to CPL 3 where only that runs natively, and has memory that is full.

#![allow(unsafe_code)]

use std::{arch::global_asm, slice};

use crate::elf;

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

/// Where the four parameters lie in the code, behind the jump over them.
const PARAMETERS_AT: usize = 8;

// It prints a dot when memory is full, and waits for its machine's generation to be another one. Then it writes to the pages, prints
// a dot, and does nothing more.
global_asm!(
    ".section .rodata",
    ".globl benches_dirtier, benches_dirtier_end",
    ".balign 8",
    "benches_dirtier:",
    "jmp 10f",
    ".balign 8",
    "2: .quad 0",
    "3: .quad 0",
    "4: .quad 0",
    "5: .quad 0",
    "10:",
    "mov esp, 0x80000",
    "cmp qword ptr [rip + 5b], 0",
    "je 20f",
    // Page tables down to the directories of the first 4 GiB, which lie one behind the other, become the user's as well.
    "mov rdi, cr3",
    "and rdi, -4096",
    "or qword ptr [rdi], 4",
    "mov rdi, [rdi]",
    "and rdi, -4096",
    "or qword ptr [rdi], 4",
    "or qword ptr [rdi + 8], 4",
    "or qword ptr [rdi + 16], 4",
    "or qword ptr [rdi + 24], 4",
    "mov rdi, [rdi]",
    "and rdi, -4096",
    "mov ecx, 2048",
    "11:",
    "or qword ptr [rdi + rcx * 8 - 8], 4",
    "dec ecx",
    "jnz 11b",
    "mov rax, cr3",
    "mov cr3, rax",
    // IOPL 3: the console may be written to at CPL 3.
    "push 0x3002",
    "popfq",
    // sysexit makes flat 64-bit segments with selectors behind this one.
    "mov ecx, 0x174",
    "mov eax, 0x10",
    "xor edx, edx",
    "wrmsr",
    "lea rdx, [rip + 20f]",
    "mov rcx, rsp",
    ".byte 0x48, 0x0f, 0x35",
    // From 4 MiB on, no word is like another.
    "20:",
    "mov rbp, [rip + 2b]",
    "mov edi, 0x400000",
    "movabs rbx, 0x9e3779b97f4a7c15",
    "xor eax, eax",
    "21:",
    "add rax, rbx",
    "mov [rdi], rax",
    "add rdi, 8",
    "cmp rdi, rbp",
    "jb 21b",
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
        let parameters = parameters.map(u64::to_le_bytes).concat();
        let mut code = code.to_vec();
        code[PARAMETERS_AT..PARAMETERS_AT + parameters.len()].copy_from_slice(&parameters);
        elf::executable(&code)
    }
}
