//! Names of CPU features, as `/proc/cpuinfo` spells them, for messages.

use crate::compat::Register;

type Names = &'static [(u32, &'static str)];

const LEAF_1_ECX: Names = &[
    (0, "sse3"),
    (1, "pclmulqdq"),
    (3, "monitor"),
    (9, "ssse3"),
    (12, "fma"),
    (13, "cx16"),
    (17, "pcid"),
    (19, "sse4.1"),
    (20, "sse4.2"),
    (21, "x2apic"),
    (22, "movbe"),
    (23, "popcnt"),
    (24, "tsc_deadline_timer"),
    (25, "aes"),
    (26, "xsave"),
    (28, "avx"),
    (29, "f16c"),
    (30, "rdrand"),
];
const LEAF_1_EDX: Names = &[
    (0, "fpu"),
    (4, "tsc"),
    (6, "pae"),
    (8, "cx8"),
    (9, "apic"),
    (13, "pge"),
    (15, "cmov"),
    (16, "pat"),
    (19, "clflush"),
    (23, "mmx"),
    (24, "fxsr"),
    (25, "sse"),
    (26, "sse2"),
];
const LEAF_7_EBX: Names = &[
    (0, "fsgsbase"),
    (1, "tsc_adjust"),
    (3, "bmi1"),
    (4, "hle"),
    (5, "avx2"),
    (7, "smep"),
    (8, "bmi2"),
    (9, "erms"),
    (10, "invpcid"),
    (11, "rtm"),
    (16, "avx512f"),
    (17, "avx512dq"),
    (18, "rdseed"),
    (19, "adx"),
    (20, "smap"),
    (21, "avx512ifma"),
    (23, "clflushopt"),
    (24, "clwb"),
    (28, "avx512cd"),
    (29, "sha_ni"),
    (30, "avx512bw"),
    (31, "avx512vl"),
];
const LEAF_7_ECX: Names = &[
    (1, "avx512vbmi"),
    (2, "umip"),
    (3, "pku"),
    (6, "avx512_vbmi2"),
    (7, "shstk"),
    (8, "gfni"),
    (9, "vaes"),
    (10, "vpclmulqdq"),
    (11, "avx512_vnni"),
    (12, "avx512_bitalg"),
    (14, "avx512_vpopcntdq"),
    (16, "la57"),
    (22, "rdpid"),
];
const LEAF_7_EDX: Names = &[
    (4, "fsrm"),
    (8, "avx512_vp2intersect"),
    (14, "serialize"),
    (20, "ibt"),
    (22, "amx_bf16"),
    (23, "avx512_fp16"),
    (24, "amx_tile"),
    (25, "amx_int8"),
    (26, "spec_ctrl"),
    (27, "intel_stibp"),
    (28, "flush_l1d"),
    (29, "arch_capabilities"),
    (31, "ssbd"),
];
const LEAF_D_1_EAX: Names = &[
    (0, "xsaveopt"),
    (1, "xsavec"),
    (2, "xgetbv1"),
    (3, "xsaves"),
];
const EXTENDED_1_ECX: Names = &[
    (0, "lahf_lm"),
    (5, "abm"),
    (6, "sse4a"),
    (7, "misalignsse"),
    (8, "3dnowprefetch"),
    (11, "xop"),
    (16, "fma4"),
    (21, "tbm"),
    (22, "topoext"),
];
const EXTENDED_1_EDX: Names = &[
    (11, "syscall"),
    (20, "nx"),
    (22, "mmxext"),
    (25, "fxsr_opt"),
    (26, "pdpe1gb"),
    (27, "rdtscp"),
    (29, "lm"),
];
const EXTENDED_7_EDX: Names = &[(8, "invariant tsc")];
const KVM_EAX: Names = &[
    (0, "kvmclock"),
    (3, "kvmclock2"),
    (4, "kvm async page faults"),
    (5, "kvm steal time"),
    (6, "kvm pv eoi"),
    (7, "kvm pv unhalt"),
    (9, "kvm pv tlb flush"),
    (11, "kvm pv send ipi"),
    (12, "kvm poll control"),
    (14, "kvm async page fault interrupts"),
];

/// The name of a feature; its place when it has none here.
pub(crate) fn name(function: u32, index: u32, register: Register, bit: u32) -> String {
    let names = match (function, index, register) {
        (1, 0, Register::Ecx) => LEAF_1_ECX,
        (1, 0, Register::Edx) => LEAF_1_EDX,
        (7, 0, Register::Ebx) => LEAF_7_EBX,
        (7, 0, Register::Ecx) => LEAF_7_ECX,
        (7, 0, Register::Edx) => LEAF_7_EDX,
        (0xd, 1, Register::Eax) => LEAF_D_1_EAX,
        (0x8000_0001, 0, Register::Ecx) => EXTENDED_1_ECX,
        (0x8000_0001, 0, Register::Edx) => EXTENDED_1_EDX,
        (0x8000_0007, 0, Register::Edx) => EXTENDED_7_EDX,
        (0x4000_0001, 0, Register::Eax) => KVM_EAX,
        _ => &[],
    };
    names.iter().find(|(at, _)| *at == bit).map_or_else(
        || {
            let register = format!("{register:?}").to_uppercase();
            format!("CPUID {function:#x}.{index} {register} bit {bit}")
        },
        |(_, name)| (*name).to_owned(),
    )
}
