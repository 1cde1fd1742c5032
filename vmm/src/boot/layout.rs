//! Where things lie in the first MiB at boot, and what of it the kernel may use.

/// The descriptor table.
pub(crate) const GDT: u64 = 0x500;

/// The boot parameters ("zero page").
pub(crate) const BOOT_PARAMS: u64 = 0x7000;

/// Root of the page tables: one page for each of the two upper levels, then four of directories.
pub(crate) const PAGE_TABLES: u64 = 0x9000;

/// The command line, ended by a zero.
pub(crate) const CMDLINE: u64 = 0x2_0000;

/// The longest command line, as x86 Linux has it (COMMAND_LINE_SIZE), less the zero.
pub(crate) const CMDLINE_MAX_BYTES: usize = 2047;

/// End of the memory that real-mode software would find free.
pub(crate) const LOW_MEMORY_END: u64 = 0x9_fc00;

/// The vmclock page, in memory that no kernel takes for its own.
pub(crate) const VMCLOCK: u64 = 0xd_e000;

/// The machine's generation, in memory that no kernel takes for its own.
pub(crate) const GENERATION: u64 = 0xd_f000;

/// ACPI's root pointer and, behind it, the tables, where a PC's firmware would have them.
pub(crate) const ACPI: u64 = 0xe_0000;

/// End of the room for ACPI tables, and the address that kernels are loaded at.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;
