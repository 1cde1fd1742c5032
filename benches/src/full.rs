//! What guests have in common that fill their memory first.

/// Where the four parameters lie in the code, behind the jump over them.
const PARAMETERS_AT: usize = 8;

/// The beginning of such a guest, of which the first parameter is where memory ends and the last whether it goes to CPL 3 first. They
/// are at the labels 2 to 5. It goes on behind this with a number in RBX by which no word is like another, the end of memory in RBP, and,
/// if it is to, at CPL 3.
macro_rules! fill {
    () => {
        concat!(
            "jmp 10f\n",
            ".balign 8\n",
            "2: .quad 0\n",
            "3: .quad 0\n",
            "4: .quad 0\n",
            "5: .quad 0\n",
            "10:\n",
            "mov esp, 0x80000\n",
            "cmp qword ptr [rip + 5b], 0\n",
            "je 20f\n",
            // Page tables down to the directories of the first 4 GiB, which lie one behind the other, become the user's as well.
            "mov rdi, cr3\n",
            "and rdi, -4096\n",
            "or qword ptr [rdi], 4\n",
            "mov rdi, [rdi]\n",
            "and rdi, -4096\n",
            "or qword ptr [rdi], 4\n",
            "or qword ptr [rdi + 8], 4\n",
            "or qword ptr [rdi + 16], 4\n",
            "or qword ptr [rdi + 24], 4\n",
            "mov rdi, [rdi]\n",
            "and rdi, -4096\n",
            "mov ecx, 2048\n",
            "11:\n",
            "or qword ptr [rdi + rcx * 8 - 8], 4\n",
            "dec ecx\n",
            "jnz 11b\n",
            "mov rax, cr3\n",
            "mov cr3, rax\n",
            // IOPL 3: the console may be written to at CPL 3.
            "push 0x3002\n",
            "popfq\n",
            // sysexit makes flat 64-bit segments with selectors behind this one.
            "mov ecx, 0x174\n",
            "mov eax, 0x10\n",
            "xor edx, edx\n",
            "wrmsr\n",
            "lea rdx, [rip + 20f]\n",
            "mov rcx, rsp\n",
            ".byte 0x48, 0x0f, 0x35\n",
            // From 4 MiB on, no word is like another.
            "20:\n",
            "mov rbp, [rip + 2b]\n",
            "mov edi, 0x400000\n",
            "movabs rbx, 0x9e3779b97f4a7c15\n",
            "xor eax, eax\n",
            "21:\n",
            "add rax, rbx\n",
            "mov [rdi], rax\n",
            "add rdi, 8\n",
            "cmp rdi, rbp\n",
            "jb 21b\n",
        )
    };
}

pub(crate) use fill;

/// `code`, which begins with [`fill`], with its parameters.
pub(crate) fn with_parameters(code: &[u8], parameters: [u64; 4]) -> Vec<u8> {
    let parameters = parameters.map(u64::to_le_bytes).concat();
    let mut code = code.to_vec();
    code[PARAMETERS_AT..PARAMETERS_AT + parameters.len()].copy_from_slice(&parameters);
    code
}
