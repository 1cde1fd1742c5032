//! Guests of a few instructions, which any KVM can run: kernels in ELF, entered in 64-bit mode.
//!
//! They are assembled with this crate; what lies between two labels is a guest.

#![allow(unsafe_code)]

use std::{arch::global_asm, slice};

/// Guest-physical address that the guests are loaded at.
const LOAD_ADDRESS: u64 = 0x10_0000;

const ELF_HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;

// Prints an eight-digit hexadecimal count and a newline, writes it to a page of its own, waits a few
// million ticks of the TSC, and does so again.
global_asm!(
    ".section .rodata",
    ".globl guest_counter, guest_counter_end",
    "guest_counter:",
    "xor ebx, ebx",
    "10:",
    "inc rbx",
    "mov ecx, 28",
    "11:",
    "mov eax, ebx",
    "shr eax, cl",
    "and al, 15",
    "add al, 48",
    "cmp al, 57",
    "jbe 12f",
    "add al, 39",
    "12:",
    "mov dx, 0x3f8",
    "out dx, al",
    "sub ecx, 4",
    "jns 11b",
    "mov al, 10",
    "out dx, al",
    "mov rsi, rbx",
    "and rsi, 1023",
    "shl rsi, 12",
    "mov [rsi + 0x400000], rbx",
    "rdtsc",
    "shl rdx, 32",
    "lea rdi, [rax + rdx]",
    "13:",
    "rdtsc",
    "shl rdx, 32",
    "add rax, rdx",
    "sub rax, rdi",
    "cmp rax, 0x800000",
    "jb 13b",
    "jmp 10b",
    "guest_counter_end:",
    ".globl guest_spinner, guest_spinner_end",
    "guest_spinner:",
    "20:",
    "inc rbx",
    "jmp 20b",
    "guest_spinner_end:",
    ".globl guest_halted, guest_halted_end",
    "guest_halted:",
    "30:",
    "hlt",
    "jmp 30b",
    "guest_halted_end:",
    // Reads the TSC all the time, and prints the largest step between two readings as sixteen hexadecimal digits, every 2^27
    // ticks. What printing takes is not counted. A step back is a very large one.
    ".globl guest_clock, guest_clock_end",
    "guest_clock:",
    "80:",
    "rdtsc",
    "shl rdx, 32",
    "lea r8, [rax + rdx]",
    "mov r10, r8",
    "xor r9d, r9d",
    "81:",
    "rdtsc",
    "shl rdx, 32",
    "add rax, rdx",
    "mov r11, rax",
    "sub rax, r8",
    "mov r8, r11",
    "cmp rax, r9",
    "cmova r9, rax",
    "sub r11, r10",
    "cmp r11, 0x8000000",
    "jb 81b",
    "mov ecx, 60",
    "82:",
    "mov rax, r9",
    "shr rax, cl",
    "and al, 15",
    "add al, 48",
    "cmp al, 57",
    "jbe 83f",
    "add al, 39",
    "83:",
    "mov dx, 0x3f8",
    "out dx, al",
    "sub ecx, 4",
    "jns 82b",
    "mov al, 10",
    "out dx, al",
    "jmp 80b",
    "guest_clock_end:",
    // Prints the first eight digits of the machine's generation again and again.
    ".globl guest_generation, guest_generation_end",
    "guest_generation:",
    "90:",
    "mov ebx, [0xdf000]",
    "mov ecx, 28",
    "91:",
    "mov eax, ebx",
    "shr eax, cl",
    "and al, 15",
    "add al, 48",
    "cmp al, 57",
    "jbe 92f",
    "add al, 39",
    "92:",
    "mov dx, 0x3f8",
    "out dx, al",
    "sub ecx, 4",
    "jns 91b",
    "mov al, 10",
    "out dx, al",
    "rdtsc",
    "shl rdx, 32",
    "lea rdi, [rax + rdx]",
    "93:",
    "rdtsc",
    "shl rdx, 32",
    "add rax, rdx",
    "sub rax, rdi",
    "cmp rax, 0x800000",
    "jb 93b",
    "jmp 90b",
    "guest_generation_end:",
    // A port that nobody answers, and an address that nobody answers.
    ".globl guest_io, guest_io_end",
    "guest_io:",
    "mov dx, 0x10",
    "mov esi, 0xdfff0000",
    "40:",
    "out dx, eax",
    "mov eax, [rsi]",
    "in eax, dx",
    "mov [rsi], eax",
    "jmp 40b",
    "guest_io_end:",
    // ACPI's sleep control register: S5, enabled.
    ".globl guest_power_off, guest_power_off_end",
    "guest_power_off:",
    "mov dx, 0x604",
    "mov al, 0x34",
    "out dx, al",
    "hlt",
    "guest_power_off_end:",
    ".globl guest_reset, guest_reset_end",
    "guest_reset:",
    "mov al, 0xfe",
    "out 0x64, al",
    "hlt",
    "guest_reset_end:",
    // An invalid instruction, with nobody to handle it.
    ".globl guest_triple_fault, guest_triple_fault_end",
    "guest_triple_fault:",
    "ud2",
    "guest_triple_fault_end:",
    ".text",
);

macro_rules! guests {
    ($($(#[$doc:meta])* $name:ident: $start:ident .. $end:ident;)*) => {
        unsafe extern "C" {
            $(static $start: u8; static $end: u8;)*
        }
        $(
            $(#[$doc])*
            pub fn $name() -> Vec<u8> {
                let (start, end) = (&raw const $start, &raw const $end);
                // SAFETY: both labels are in one block of assembly above, in this order.
                let code = unsafe { slice::from_raw_parts(start, end as usize - start as usize) };
                elf(code)
            }
        )*
    };
}

guests! {
    /// Counts on the serial console, and writes each count to the next of 1024 pages.
    counter: guest_counter..guest_counter_end;
    /// Prints the largest step that its TSC makes between two readings: see [`clock_step`].
    clock: guest_clock..guest_clock_end;
    /// Prints the first part of the machine's generation, which [`count`] reads, again and again.
    generation: guest_generation..guest_generation_end;
    /// Never leaves the guest.
    spinner: guest_spinner..guest_spinner_end;
    /// Halts with interrupts off.
    halted: guest_halted..guest_halted_end;
    /// Leaves the guest for ports and addresses that nobody answers, all the time.
    io: guest_io..guest_io_end;
    /// Switches itself off.
    power_off: guest_power_off..guest_power_off_end;
    /// Resets itself.
    reset: guest_reset..guest_reset_end;
    /// Has a triple fault.
    triple_fault: guest_triple_fault..guest_triple_fault_end;
}

/// The count that a line of the [`counter`] is.
pub fn count(line: &str) -> Option<u64> {
    let digits = line.len() == 8;
    digits.then(|| u64::from_str_radix(line, 16).ok()).flatten()
}

/// The step, in ticks, that a line of the [`clock`] is.
pub fn clock_step(line: &str) -> Option<u64> {
    let digits = line.len() == 16;
    digits.then(|| u64::from_str_radix(line, 16).ok()).flatten()
}

/// An ELF executable for x86_64 with one segment, `code`, at whose first byte it is entered.
fn elf(code: &[u8]) -> Vec<u8> {
    let offset = ELF_HEADER_BYTES + PROGRAM_HEADER_BYTES;
    let mut file = Vec::new();
    // 64 bits, little-endian, version 1.
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let executable_x86_64 = [2u16, 62];
    file.extend(executable_x86_64.iter().flat_map(|half| half.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend(
        [LOAD_ADDRESS, ELF_HEADER_BYTES, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    file.extend(0u32.to_le_bytes());
    // Sizes and counts: this header, one program header, no sections.
    let sizes = [
        ELF_HEADER_BYTES as u16,
        PROGRAM_HEADER_BYTES as u16,
        1,
        0,
        0,
        0,
    ];
    file.extend(sizes.iter().flat_map(|half| half.to_le_bytes()));
    // A loadable segment that can be read, written and executed.
    file.extend([1u32, 7].iter().flat_map(|half| half.to_le_bytes()));
    let length = code.len() as u64;
    let segment = [offset, LOAD_ADDRESS, LOAD_ADDRESS, length, length, 0x1000];
    file.extend(segment.iter().flat_map(|word| word.to_le_bytes()));
    file.extend_from_slice(code);
    file
}
