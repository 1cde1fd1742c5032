//! A guest that writes to its disk.

use std::{arch::global_asm, slice};

global_asm!(
    ".section .rodata",
    // Drives the disk that is the machine's second virtio device: writes the first sector, waits until that is done, prints how
    // often it has been, as eight hexadecimal digits, with the topmost bit set if the device says that it failed, and does so
    // again after a few million ticks of the TSC.
    ".globl guest_writer, guest_writer_end",
    "guest_writer:",
    "mov r12d, 0xd0001000",
    // The handshake, with nothing accepted but version 1 and that there are flushes.
    "mov dword ptr [r12 + 0x70], 0",
    "mov dword ptr [r12 + 0x70], 1",
    "mov dword ptr [r12 + 0x70], 3",
    "mov dword ptr [r12 + 0x24], 0",
    "mov dword ptr [r12 + 0x20], 0x200",
    "mov dword ptr [r12 + 0x24], 1",
    "mov dword ptr [r12 + 0x20], 1",
    "mov dword ptr [r12 + 0x70], 11",
    "mov dword ptr [r12 + 0x30], 0",
    "mov dword ptr [r12 + 0x38], 16",
    "mov dword ptr [r12 + 0x80], 0x300000",
    "mov dword ptr [r12 + 0x90], 0x301000",
    "mov dword ptr [r12 + 0xa0], 0x302000",
    "mov dword ptr [r12 + 0x44], 1",
    "mov dword ptr [r12 + 0x70], 15",
    // Three descriptors: the header, which says that sector 0 is written, the data, and room for the status.
    "mov dword ptr [0x310000], 1",
    "mov qword ptr [0x300000], 0x310000",
    "mov rax, 0x1000100000010",
    "mov [0x300008], rax",
    "mov qword ptr [0x300010], 0x311000",
    "mov rax, 0x2000100000200",
    "mov [0x300018], rax",
    "mov qword ptr [0x300020], 0x310010",
    "mov rax, 0x200000001",
    "mov [0x300028], rax",
    "xor ebx, ebx",
    // Each entry of the available ring is the chain that begins with descriptor 0.
    "340:",
    "inc ebx",
    "mov [0x311000], ebx",
    "mov [0x301002], bx",
    "mov dword ptr [r12 + 0x50], 0",
    "341:",
    "pause",
    "mov ax, [0x302002]",
    "cmp ax, bx",
    "jne 341b",
    "mov r8d, ebx",
    "cmp byte ptr [0x310010], 0",
    "je 342f",
    "bts r8d, 31",
    "342:",
    "mov dx, 0x3f8",
    "mov ecx, 28",
    "343:",
    "mov eax, r8d",
    "shr eax, cl",
    "and al, 15",
    "add al, 48",
    "cmp al, 57",
    "jbe 344f",
    "add al, 39",
    "344:",
    "out dx, al",
    "sub ecx, 4",
    "jns 343b",
    "mov al, 10",
    "out dx, al",
    "rdtsc",
    "shl rdx, 32",
    "lea rdi, [rax + rdx]",
    "345:",
    "rdtsc",
    "shl rdx, 32",
    "add rax, rdx",
    "sub rax, rdi",
    "cmp rax, 0x800000",
    "jb 345b",
    "jmp 340b",
    "guest_writer_end:",
    ".text",
);

unsafe extern "C" {
    static guest_writer: u8;
    static guest_writer_end: u8;
}

/// Writes to its first disk again and again, 512 bytes each time, and prints how often that is done, which
/// [`count`](super::count) reads; more than 2^31 if it failed.
pub fn writer() -> Vec<u8> {
    let (start, end) = (&raw const guest_writer, &raw const guest_writer_end);
    // SAFETY: both labels are in one block of assembly above, in this order.
    let code = unsafe { slice::from_raw_parts(start, end as usize - start as usize) };
    super::elf(code)
}
