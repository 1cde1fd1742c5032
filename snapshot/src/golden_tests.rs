//! What is around the sections, and what is beside them, is in bytes what its golden file says.

use saved_state::{Container, CpuIdentity, FORMAT_VERSION, Header, Kind, Section, SnapshotId};

use crate::{
    reference::{self, Reference},
    table::{self, Footer, Table},
};

const ID: SnapshotId = SnapshotId([7; 16]);
const MEMORY_BYTES: u64 = 192 << 10;

#[test]
fn a_state_file_is_as_in_its_golden_file() {
    let mut container = Container::new(Header {
        id: ID,
        release: "0.1.0".to_owned(),
        created_unix_ns: 1_700_000_000_000_000_001,
        host_cpu: CpuIdentity {
            vendor: "AuthenticAMD".to_owned(),
            signature: 0x00b0_0f21,
            brand: "AMD EPYC".to_owned(),
        },
        vcpus: 2,
        memory_bytes: MEMORY_BYTES,
    });
    for instance in 0..2 {
        let section = Section {
            kind: Kind(*b"LAMP"),
            instance,
            version: 3,
            payload: vec![4, 5, 6],
        };
        container.insert(section).unwrap();
    }
    let bytes = container.to_bytes();
    golden::check("state-file", FORMAT_VERSION, &[&bytes]);
    assert_eq!(Container::from_bytes(&bytes), Ok(container));
}

/// Its table and its footer, which are behind the image.
#[test]
fn the_end_of_a_memory_file_is_as_in_its_golden_file() {
    let digests = [b"content".as_slice(), &[0; 8], b"another"].map(table::digest);
    let table = Table {
        digests: digests.to_vec(),
    };
    let table_bytes = table.to_bytes();
    let footer = Footer::new(ID, MEMORY_BYTES, &table_bytes);
    let footer_bytes = footer.to_bytes();
    let end = [&table_bytes, footer_bytes.as_slice()].concat();
    golden::check("memory-file", table::VERSION, &[end]);
    assert_eq!(Footer::from_bytes(&footer_bytes), Ok(footer));
    assert_eq!(Table::from_bytes(&table_bytes, &footer), Some(table));
}

#[test]
fn a_reference_is_as_in_its_golden_file() {
    let reference = Reference {
        id: ID,
        memory_bytes: MEMORY_BYTES,
        store: [8; 16],
        stored: [9; 16],
    };
    let bytes = reference.to_bytes();
    golden::check("reference", reference::VERSION, &[bytes]);
    assert_eq!(Reference::from_bytes(&bytes), Ok(reference));
}
