//! Guests of a few instructions, which any KVM can run: kernels in ELF, entered in 64-bit mode.
//!
//! They are assembled with this crate; what lies between two labels is a guest.

#![allow(unsafe_code)]

mod crew;
mod runner;
mod writer;

use std::{arch::global_asm, env, fs::File, slice};

pub use crew::crew;
pub use runner::{RUN_ENDLESS, RUN_PAGES, RUN_POWER_OFF, RUN_RESULT, WENT_ON, runner, shouter};
pub use writer::writer;

/// Whether this machine has a KVM to test with; says so if it has none.
///
/// # Panics
///
/// When it has none, and the variable `FERMATA_KVM` says `required`, as where it had one before the tests.
#[must_use]
pub fn has_kvm() -> bool {
    let Err(error) = File::open("/dev/kvm") else {
        return true;
    };
    let required = env::var_os("FERMATA_KVM").is_some_and(|value| value == "required");
    assert!(!required, "cannot open /dev/kvm: {error}");
    eprintln!("cannot open /dev/kvm, so nothing was tested: {error}");
    false
}

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
    // Prints the digits from 0 to 7, over and over, as fast as it can.
    ".globl guest_babbler, guest_babbler_end",
    "guest_babbler:",
    "mov dx, 0x3f8",
    "mov al, 48",
    "25:",
    "out dx, al",
    "inc al",
    "and al, 55",
    "jmp 25b",
    "guest_babbler_end:",
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
    // Writes to 8192 pages from 16 MiB on, and drives the balloon that is the machine's second virtio device: puts those pages
    // into it, 1024 at a time, until so many are in it as the host wants, or takes them out again and writes to them.
    // Prints how many are in it, again and again, with the topmost bit set if one came back with content.
    ".globl guest_balloon, guest_balloon_end",
    "guest_balloon:",
    "mov edi, 0x1000000",
    "mov ecx, 8192",
    "100:",
    "mov qword ptr [rdi], 1",
    "add rdi, 4096",
    "dec ecx",
    "jnz 100b",
    "mov r12d, 0xd0001000",
    // The handshake, with nothing accepted but version 1.
    "mov dword ptr [r12 + 0x70], 0",
    "mov dword ptr [r12 + 0x70], 1",
    "mov dword ptr [r12 + 0x70], 3",
    "mov dword ptr [r12 + 0x24], 0",
    "mov dword ptr [r12 + 0x20], 0",
    "mov dword ptr [r12 + 0x24], 1",
    "mov dword ptr [r12 + 0x20], 1",
    "mov dword ptr [r12 + 0x70], 11",
    // The first queue has 16 entries, of which one is used: a page of page numbers.
    "mov dword ptr [r12 + 0x30], 0",
    "mov dword ptr [r12 + 0x38], 16",
    "mov dword ptr [r12 + 0x80], 0x300000",
    "mov dword ptr [r12 + 0x90], 0x301000",
    "mov dword ptr [r12 + 0xa0], 0x302000",
    "mov dword ptr [r12 + 0x44], 1",
    "mov dword ptr [r12 + 0x70], 15",
    "mov qword ptr [0x300000], 0x310000",
    "mov qword ptr [0x300008], 4096",
    "xor ebx, ebx",
    "xor r13d, r13d",
    "xor r15d, r15d",
    "101:",
    "mov eax, [r12 + 0x100]",
    "cmp eax, ebx",
    "ja 102f",
    "jb 105f",
    "mov r14d, ebx",
    "test r15, r15",
    "jz 107f",
    "bts r14d, 31",
    "107:",
    "mov ecx, 28",
    "108:",
    "mov eax, r14d",
    "shr eax, cl",
    "and al, 15",
    "add al, 48",
    "cmp al, 57",
    "jbe 109f",
    "add al, 39",
    "109:",
    "mov dx, 0x3f8",
    "out dx, al",
    "sub ecx, 4",
    "jns 108b",
    "mov al, 10",
    "out dx, al",
    "rdtsc",
    "shl rdx, 32",
    "lea rdi, [rax + rdx]",
    "110:",
    "rdtsc",
    "shl rdx, 32",
    "add rax, rdx",
    "sub rax, rdi",
    "cmp rax, 0x800000",
    "jb 110b",
    "jmp 101b",
    // More.
    "102:",
    "lea eax, [ebx + 0x1000]",
    "mov edi, 0x310000",
    "mov ecx, 1024",
    "103:",
    "mov [rdi], eax",
    "inc eax",
    "add rdi, 4",
    "dec ecx",
    "jnz 103b",
    "inc r13d",
    "mov [0x301002], r13w",
    "mov dword ptr [r12 + 0x50], 0",
    "104:",
    "mov ax, [0x302002]",
    "cmp ax, r13w",
    "jne 104b",
    "add ebx, 1024",
    "mov [r12 + 0x104], ebx",
    "jmp 101b",
    // Fewer.
    "105:",
    "sub ebx, 1024",
    "mov edi, ebx",
    "shl rdi, 12",
    "add rdi, 0x1000000",
    "mov ecx, 1024",
    "106:",
    "or r15, [rdi]",
    "mov qword ptr [rdi], 1",
    "add rdi, 4096",
    "dec ecx",
    "jnz 106b",
    "mov [r12 + 0x104], ebx",
    "jmp 101b",
    "guest_balloon_end:",
    // Writes a mark to 2048 pages from 16 MiB on, again and again: the first part of the machine's generation below the number of
    // the round; and looks first whether each still has that of the round before. Prints generation, round, and whether a page ever
    // had another, as three numbers of eight hexadecimal digits, after each round.
    ".globl guest_witness, guest_witness_end",
    "guest_witness:",
    "xor r14d, r14d",
    "xor r15d, r15d",
    "xor ebx, ebx",
    "120:",
    "inc ebx",
    "mov r13d, [0xdf000]",
    "mov rax, rbx",
    "shl rax, 32",
    "or r13, rax",
    "mov edi, 0x1000000",
    "mov ecx, 2048",
    "121:",
    "cmp [rdi], r14",
    "je 122f",
    "mov r15d, 1",
    "122:",
    "mov [rdi], r13",
    "add rdi, 4096",
    "dec ecx",
    "jnz 121b",
    "mov r14, r13",
    "mov r8d, r13d",
    "lea r11, [rip + 123f]",
    "jmp 127f",
    "123:",
    "mov al, 32",
    "out dx, al",
    "mov r8d, ebx",
    "lea r11, [rip + 124f]",
    "jmp 127f",
    "124:",
    "mov al, 32",
    "out dx, al",
    "mov r8d, r15d",
    "lea r11, [rip + 125f]",
    "jmp 127f",
    "125:",
    "mov al, 10",
    "out dx, al",
    "jmp 120b",
    // Prints r8d and goes to r11.
    "127:",
    "mov dx, 0x3f8",
    "mov ecx, 28",
    "128:",
    "mov eax, r8d",
    "shr eax, cl",
    "and al, 15",
    "add al, 48",
    "cmp al, 57",
    "jbe 129f",
    "add al, 39",
    "129:",
    "out dx, al",
    "sub ecx, 4",
    "jns 128b",
    "jmp r11",
    "guest_witness_end:",
    // Writes to both ends of each page from 4 to 128 MiB, and then, again and again, looks whether each has what was written there
    // last, writes something else, and prints how often it has done so, as eight hexadecimal digits, with the topmost bit set
    // if anything was ever not as it should be.
    ".globl guest_keeper, guest_keeper_end",
    "guest_keeper:",
    "xor ebx, ebx",
    "xor r15d, r15d",
    "mov edi, 0x400000",
    "130:",
    "mov [rdi], rdi",
    "mov [rdi + 4088], rdi",
    "add rdi, 4096",
    "cmp rdi, 0x8000000",
    "jb 130b",
    // What each end has is its page's address and, from bit 32 on, how often it was written.
    "131:",
    "mov r8, rbx",
    "shl r8, 32",
    "inc ebx",
    "mov r9, rbx",
    "shl r9, 32",
    "mov edi, 0x400000",
    "132:",
    "lea rax, [rdi + r8]",
    "mov rcx, [rdi]",
    "xor rcx, rax",
    "or r15, rcx",
    "mov rcx, [rdi + 4088]",
    "xor rcx, rax",
    "or r15, rcx",
    "lea rax, [rdi + r9]",
    "mov [rdi], rax",
    "mov [rdi + 4088], rax",
    "add rdi, 4096",
    "cmp rdi, 0x8000000",
    "jb 132b",
    "mov r14d, ebx",
    "test r15, r15",
    "jz 133f",
    "bts r14d, 31",
    "133:",
    "mov ecx, 28",
    "134:",
    "mov eax, r14d",
    "shr eax, cl",
    "and al, 15",
    "add al, 48",
    "cmp al, 57",
    "jbe 135f",
    "add al, 39",
    "135:",
    "mov dx, 0x3f8",
    "out dx, al",
    "sub ecx, 4",
    "jns 134b",
    "mov al, 10",
    "out dx, al",
    "jmp 131b",
    "guest_keeper_end:",
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
    /// Prints `01234567` over and over, as fast as it can.
    babbler: guest_babbler..guest_babbler_end;
    /// Prints the largest step that its TSC makes between two readings: see [`clock_step`].
    clock: guest_clock..guest_clock_end;
    /// Prints the first part of the machine's generation, which [`count`] reads, again and again.
    generation: guest_generation..guest_generation_end;
    /// Gives up to 32 MiB to its balloon, in steps of 4 MiB, and prints the number of pages there, which [`count`] reads.
    balloon: guest_balloon..guest_balloon_end;
    /// Writes to 8 MiB of memory all the time, looks whether anybody else has, and prints what [`Testimony`] reads.
    witness: guest_witness..guest_witness_end;
    /// Keeps all of 128 MiB, and prints how often it has looked at it, which [`count`] reads; more than 2^31 if it has lost anything.
    keeper: guest_keeper..guest_keeper_end;
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

/// Prints the vmclock page's disruption marker, or the generation that it has, as [`generation()`] does that number.
pub fn vmclock(field: VmclockField) -> Vec<u8> {
    let address = match field {
        VmclockField::DisruptionMarker => 0xd_e010_u32,
        VmclockField::Generation => 0xd_e068,
    };
    let mut guest = self::generation();
    let read = 0xd_f000_u32.to_le_bytes();
    // It is read in one instruction, which has the address in it.
    let at = guest.windows(4).position(|bytes| bytes == read);
    let at = at.unwrap_or_default();
    guest[at..at + 4].copy_from_slice(&address.to_le_bytes());
    guest
}

/// A field of the vmclock page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmclockField {
    /// Another number after each disruption of the guest's clocks.
    DisruptionMarker,
    /// Another number in each copy of the machine.
    Generation,
}

/// The count that a line of the [`counter`] is.
pub fn count(line: &str) -> Option<u64> {
    let digits = line.len() == 8;
    digits.then(|| u64::from_str_radix(line, 16).ok()).flatten()
}

/// What a line of the [`witness`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Testimony {
    /// The first part of its machine's generation, which is its mark.
    pub generation: u32,
    /// How often it has written to all of its pages.
    pub round: u32,
    /// Whether a page ever had another content than it wrote last.
    pub disturbed: bool,
}

impl Testimony {
    /// Reads a line.
    pub fn read(line: &str) -> Option<Self> {
        let mut numbers = line.split(' ').map(|number| {
            let digits = number.len() == 8;
            digits
                .then(|| u32::from_str_radix(number, 16).ok())
                .flatten()
        });
        let testimony = Self {
            generation: numbers.next()??,
            round: numbers.next()??,
            disturbed: numbers.next()?? != 0,
        };
        numbers.next().is_none().then_some(testimony)
    }
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
