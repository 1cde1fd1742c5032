//! The least ELF executable: <https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html>.

use zerocopy::{
    Immutable, IntoBytes,
    little_endian::{U16, U32, U64},
};

/// Guest-physical address that the code is loaded and entered at.
pub(crate) const LOAD_ADDRESS: u64 = 0x10_0000;

/// 64 bits, little-endian, version 1.
const IDENT: [u8; 16] = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0";
const EXECUTABLE: u16 = 2;
const X86_64: u16 = 62;
const VERSION: u32 = 1;
const LOADABLE: u32 = 1;
const READ_WRITE_EXECUTE: u32 = 7;
const PAGE_BYTES: u64 = 4096;

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    ident: [u8; 16],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U64,
    program_headers_at: U64,
    section_headers_at: U64,
    flags: U32,
    header_bytes: U16,
    program_header_bytes: U16,
    program_headers: U16,
    section_header_bytes: U16,
    section_headers: U16,
    section_names: U16,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ProgramHeader {
    kind: U32,
    flags: U32,
    offset: U64,
    virtual_address: U64,
    physical_address: U64,
    file_bytes: U64,
    memory_bytes: U64,
    alignment: U64,
}

/// An executable whose one segment is `code`, entered at its first byte.
pub(crate) fn executable(code: &[u8]) -> Vec<u8> {
    let headers = size_of::<Header>() + size_of::<ProgramHeader>();
    let header = Header {
        ident: IDENT,
        kind: EXECUTABLE.into(),
        machine: X86_64.into(),
        version: VERSION.into(),
        entry: LOAD_ADDRESS.into(),
        program_headers_at: (size_of::<Header>() as u64).into(),
        section_headers_at: 0.into(),
        flags: 0.into(),
        header_bytes: (size_of::<Header>() as u16).into(),
        program_header_bytes: (size_of::<ProgramHeader>() as u16).into(),
        program_headers: 1.into(),
        section_header_bytes: 0.into(),
        section_headers: 0.into(),
        section_names: 0.into(),
    };
    let segment = ProgramHeader {
        kind: LOADABLE.into(),
        flags: READ_WRITE_EXECUTE.into(),
        offset: (headers as u64).into(),
        virtual_address: LOAD_ADDRESS.into(),
        physical_address: LOAD_ADDRESS.into(),
        file_bytes: (code.len() as u64).into(),
        memory_bytes: (code.len() as u64).into(),
        alignment: PAGE_BYTES.into(),
    };
    [header.as_bytes(), segment.as_bytes(), code].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_lies_where_the_headers_say() {
        let file = executable(b"code");
        assert_eq!(size_of::<Header>(), 64);
        assert_eq!(size_of::<ProgramHeader>(), 56);
        let offset = u64::from_le_bytes(file[72..80].try_into().unwrap());
        assert_eq!(&file[offset as usize..], b"code");
    }
}
