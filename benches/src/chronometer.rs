//! A guest of a few instructions that does nothing but look at the time, and tells the largest step that it saw.
//!
//! Like [`Filler`](crate::filler::Filler) it goes to CPL 3 where only that runs natively.

#![allow(unsafe_code)]

use std::{arch::global_asm, slice, time::Duration};

use crate::elf;

/// Where the parameter lies in the code, behind the jump over it.
const PARAMETER_AT: usize = 8;

// It has kvmclock keep its page (Documentation/virt/kvm/x86/msr.rst, `MSR_KVM_SYSTEM_TIME_NEW`) at 3 MiB. Every 2^24 ticks of
// the TSC it prints the largest step between two readings of the TSC, and that of kvmclock between the same two, each as
// sixteen hexadecimal digits. What printing takes is in no step.
global_asm!(
    ".section .rodata",
    ".globl benches_chronometer, benches_chronometer_end",
    ".balign 8",
    "benches_chronometer:",
    "jmp 10f",
    ".balign 8",
    "2: .quad 0",
    "10:",
    "mov esp, 0x80000",
    "mov ecx, 0x4b564d01",
    "mov eax, 0x300001",
    "xor edx, edx",
    "wrmsr",
    "cmp qword ptr [rip + 2b], 0",
    "je 20f",
    // Page tables down to the directory of the first GiB become the user's as well.
    "mov rdi, cr3",
    "and rdi, -4096",
    "or qword ptr [rdi], 4",
    "mov rdi, [rdi]",
    "and rdi, -4096",
    "or qword ptr [rdi], 4",
    "mov rdi, [rdi]",
    "and rdi, -4096",
    "mov ecx, 512",
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
    // R12 and R13: the last readings of TSC and kvmclock. R14 and R15: the largest steps. RBX: when the interval began.
    "20:",
    "mov ebp, 0x300000",
    "21:",
    "call 50f",
    "mov r12, r8",
    "mov r13, rax",
    "mov rbx, r8",
    "xor r14d, r14d",
    "xor r15d, r15d",
    "22:",
    "call 50f",
    "mov rcx, r8",
    "sub rcx, r12",
    "mov rdx, rax",
    "sub rdx, r13",
    "mov r12, r8",
    "mov r13, rax",
    "cmp rcx, r14",
    "jbe 23f",
    "mov r14, rcx",
    "mov r15, rdx",
    "23:",
    "sub r8, rbx",
    "cmp r8, 0x1000000",
    "jb 22b",
    "mov rdi, r14",
    "call 60f",
    "mov rdi, r15",
    "call 60f",
    "mov al, 10",
    "mov dx, 0x3f8",
    "out dx, al",
    "jmp 21b",
    // Reads the TSC into R8 and kvmclock of the same moment into RAX.
    "50:",
    "mov r9d, [rbp]",
    "test r9d, 1",
    "jnz 50b",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov r8, rax",
    "sub rax, [rbp + 8]",
    "movsx ecx, byte ptr [rbp + 28]",
    "test ecx, ecx",
    "js 51f",
    "shl rax, cl",
    "jmp 52f",
    "51:",
    "neg ecx",
    "shr rax, cl",
    "52:",
    "mov ecx, [rbp + 24]",
    "mul rcx",
    "shrd rax, rdx, 32",
    "add rax, [rbp + 16]",
    "cmp r9d, [rbp]",
    "jne 50b",
    "ret",
    // Prints RDI.
    "60:",
    "mov ecx, 60",
    "61:",
    "mov rax, rdi",
    "shr rax, cl",
    "and al, 15",
    "add al, 48",
    "cmp al, 57",
    "jbe 62f",
    "add al, 39",
    "62:",
    "mov dx, 0x3f8",
    "out dx, al",
    "sub ecx, 4",
    "jns 61b",
    "ret",
    "benches_chronometer_end:",
    ".text",
);

unsafe extern "C" {
    #[link_name = "benches_chronometer"]
    static START: u8;
    #[link_name = "benches_chronometer_end"]
    static END: u8;
}

/// The guest as a kernel in ELF; `user` says whether it goes to CPL 3.
pub(crate) fn kernel(user: bool) -> Vec<u8> {
    let (start, end) = (&raw const START, &raw const END);
    // SAFETY: both labels are in one block of assembly above, in this order.
    let code = unsafe { slice::from_raw_parts(start, end as usize - start as usize) };
    let mut code = code.to_vec();
    code[PARAMETER_AT..PARAMETER_AT + 8].copy_from_slice(&u64::from(user).to_le_bytes());
    elf::executable(&code)
}

/// The largest step in an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// What the TSC went forward, in ticks.
    pub(crate) tsc: u64,
    /// What kvmclock did.
    pub(crate) kvmclock: Duration,
}

impl Step {
    /// What a line of the guest's says. kvmclock that went back is a very long time.
    pub(crate) fn of_line(line: &str) -> Option<Self> {
        let line = line.trim_end();
        let (tsc, kvmclock) = line.split_at_checked(16).filter(|_| line.len() == 32)?;
        let number = |digits| u64::from_str_radix(digits, 16).ok();
        Some(Self {
            tsc: number(tsc)?,
            kvmclock: Duration::from_nanos(number(kvmclock)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_two_steps() {
        let step = Step::of_line("0000000000000fff00000000000003e8\n");
        let expected = Step {
            tsc: 0xfff,
            kvmclock: Duration::from_micros(1),
        };
        assert_eq!(step, Some(expected));
        assert_eq!(Step::of_line("0000000000000fff"), None);
        assert_eq!(Step::of_line("0000000000000fff0000000000000 e8"), None);
    }
}
