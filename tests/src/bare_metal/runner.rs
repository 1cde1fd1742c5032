//! Guests that are run from where they were forked, over and over.

use std::{arch::global_asm, slice};

global_asm!(
    ".section .rodata",
    // Prints 00000000, and waits for a run. Then it prints the run's number, looks whether the first word of each of 256 pages from
    // 16 MiB on is zero, and writes the number there. What comes of the run is in the number: with bit 16, the 16 bits below it are
    // said; with bit 17, nothing is; with bit 18, the machine is switched off; else zero is. If a word was not zero, 0xbad is said.
    // Who is not heard, or goes on, prints the first of those words with bit 31, and waits for a run again.
    ".globl guest_runner, guest_runner_end",
    "guest_runner:",
    "xor r8d, r8d",
    "lea r11, [rip + 300f]",
    "jmp 310f",
    "300:",
    "mov edx, 0xce4",
    "in eax, dx",
    "test eax, eax",
    "jz 300b",
    "mov ebx, eax",
    "mov r8d, eax",
    "lea r11, [rip + 301f]",
    "jmp 310f",
    "301:",
    "xor r15d, r15d",
    "mov edi, 0x1000000",
    "mov ecx, 256",
    "302:",
    "or r15, [rdi]",
    "mov [rdi], rbx",
    "add rdi, 4096",
    "dec ecx",
    "jnz 302b",
    "xor eax, eax",
    "bt ebx, 17",
    "jnc 304f",
    "303:",
    "pause",
    "jmp 303b",
    "304:",
    "bt ebx, 18",
    "jnc 305f",
    "mov dx, 0x604",
    "mov al, 0x34",
    "out dx, al",
    "hlt",
    "305:",
    "bt ebx, 16",
    "jnc 306f",
    "movzx eax, bx",
    "306:",
    "test r15, r15",
    "jz 307f",
    "mov eax, 0xbad",
    "307:",
    "mov edx, 0xce4",
    "out dx, eax",
    "mov r8d, [0x1000000]",
    "bts r8d, 31",
    "lea r11, [rip + 300b]",
    // Prints r8d and a newline, and goes to r11.
    "310:",
    "mov dx, 0x3f8",
    "mov ecx, 28",
    "311:",
    "mov eax, r8d",
    "shr eax, cl",
    "and al, 15",
    "add al, 48",
    "cmp al, 57",
    "jbe 312f",
    "add al, 39",
    "312:",
    "out dx, al",
    "sub ecx, 4",
    "jns 311b",
    "mov al, 10",
    "out dx, al",
    "jmp r11",
    "guest_runner_end:",
    // All vCPUs do nothing but say that a run is done with result zero, and the first also reads and writes what nobody means. The
    // others do it in real mode.
    ".globl guest_shouter, guest_shouter_end",
    "guest_shouter:",
    "lea rsi, [rip + 330f]",
    "mov edi, 0x8000",
    "lea rcx, [rip + 332f]",
    "sub rcx, rsi",
    "rep movsb",
    // To all but this one: INIT, then SIPI at 0x8000.
    "mov edi, 0xfee00300",
    "mov dword ptr [rdi], 0xc4500",
    "mov dword ptr [rdi], 0xc4608",
    "mov dx, 0x3f8",
    "mov al, 10",
    "out dx, al",
    "320:",
    "mov dx, 0xce4",
    "in eax, dx",
    "in al, dx",
    "mov al, 1",
    "out dx, al",
    "mov eax, 0x10001",
    "out dx, ax",
    "xor eax, eax",
    "out dx, eax",
    "mov dx, 0xce5",
    "out dx, eax",
    "mov dx, 0xce6",
    "out dx, ax",
    "jmp 320b",
    ".code16",
    "330:",
    "mov dx, 0xce4",
    "xor eax, eax",
    "331:",
    "out dx, eax",
    "jmp 331b",
    "332:",
    ".code64",
    "guest_shouter_end:",
    ".text",
);

unsafe extern "C" {
    static guest_runner: u8;
    static guest_runner_end: u8;
    static guest_shouter: u8;
    static guest_shouter_end: u8;
}

/// Does in each run what its number says, which [`count`](super::count) reads; see the numbers of [`RUN_RESULT`], [`RUN_ENDLESS`] and
/// [`RUN_POWER_OFF`]. It says 0xbad if memory is not as it was when it was forked.
pub fn runner() -> Vec<u8> {
    let (start, end) = (&raw const guest_runner, &raw const guest_runner_end);
    // SAFETY: both labels are in one block of assembly above, in this order.
    let code = unsafe { slice::from_raw_parts(start, end as usize - start as usize) };
    super::elf(code)
}

/// Says on all vCPUs, all the time, that a run is done. It prints a newline when the others have been started.
pub fn shouter() -> Vec<u8> {
    let (start, end) = (&raw const guest_shouter, &raw const guest_shouter_end);
    // SAFETY: as above.
    let code = unsafe { slice::from_raw_parts(start, end as usize - start as usize) };
    super::elf(code)
}

/// In a run's number, the [`runner`] says what the 16 bits below it are.
pub const RUN_RESULT: u32 = 1 << 16;
/// It says nothing.
pub const RUN_ENDLESS: u32 = 1 << 17;
/// It switches itself off.
pub const RUN_POWER_OFF: u32 = 1 << 18;
/// In what it prints when it goes on after a run.
pub const WENT_ON: u64 = 1 << 31;
/// Pages that it writes to in each run.
pub const RUN_PAGES: u64 = 256;
