//! The fixed header of a state file, readable without decoding anything else.

use std::fmt;

use crate::{
    Error, FORGED,
    cursor::{Cursor, put_text},
};

/// The first eight bytes of every state file.
pub const MAGIC: [u8; 8] = *b"FERMATA\x1a";

/// The version of the container's layout that this release writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Bytes of the header, its checksum included.
pub const HEADER_BYTES: usize = 256;

const CHECKSUM_BYTES: usize = 32;
const RELEASE_BYTES: usize = 32;
const VENDOR_BYTES: usize = 12;
const BRAND_BYTES: usize = 48;

/// Names one snapshot; its state file and its memory file carry the same one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SnapshotId(pub [u8; 16]);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotId({self})")
    }
}

/// The CPU that the machine was saved on, for people to read; what the guest needs is in its CPUID
/// section.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuIdentity {
    /// CPUID leaf 0: `GenuineIntel`, `AuthenticAMD`.
    pub vendor: String,
    /// CPUID leaf 1, EAX: family, model, stepping.
    pub signature: u32,
    /// CPUID leaves 0x80000002 to 4.
    pub brand: String,
}

/// What can be known of a state file before any of it is decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The snapshot this file belongs to.
    pub id: SnapshotId,
    /// The release of fermata that wrote it, like `0.1.0`.
    pub release: String,
    /// When the machine was cut, in nanoseconds since the Unix epoch.
    pub created_unix_ns: u64,
    /// The CPU that it was saved on.
    pub host_cpu: CpuIdentity,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
}

/// What the header says of the bytes that follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Body {
    pub(crate) bytes: u64,
    pub(crate) sections: u32,
    pub(crate) checksum: [u8; CHECKSUM_BYTES],
}

impl Header {
    pub(crate) fn to_bytes(&self, body: Body) -> Vec<u8> {
        let Self {
            id,
            release,
            created_unix_ns,
            host_cpu,
            vcpus,
            memory_bytes,
        } = self;
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&body.sections.to_le_bytes());
        put_text::<RELEASE_BYTES>(&mut out, release);
        out.extend_from_slice(&id.0);
        out.extend_from_slice(&created_unix_ns.to_le_bytes());
        out.extend_from_slice(&memory_bytes.to_le_bytes());
        out.extend_from_slice(&vcpus.to_le_bytes());
        out.extend_from_slice(&host_cpu.signature.to_le_bytes());
        put_text::<VENDOR_BYTES>(&mut out, &host_cpu.vendor);
        put_text::<BRAND_BYTES>(&mut out, &host_cpu.brand);
        out.extend_from_slice(&body.bytes.to_le_bytes());
        out.extend_from_slice(&body.checksum);
        out.resize(HEADER_BYTES - CHECKSUM_BYTES, 0);
        let checksum = blake3::hash(&out);
        out.extend_from_slice(checksum.as_bytes());
        out
    }

    /// Reads the header at the front of a state file; `bytes` may be the whole file or its first
    /// [`HEADER_BYTES`].
    ///
    /// # Errors
    ///
    /// [`Error::NotAStateFile`], [`Error::UnknownFormat`], [`Error::DamagedHeader`], or
    /// [`Error::WrongLength`] when not even the header is there.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        Ok(Self::parse(bytes)?.0)
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<(Self, Body), Error> {
        if !bytes.starts_with(&MAGIC) {
            return Err(Error::NotAStateFile);
        }
        let header = bytes
            .first_chunk::<HEADER_BYTES>()
            .ok_or(Error::WrongLength {
                expected: HEADER_BYTES as u64,
                found: bytes.len() as u64,
            })?;
        let (fields, checksum) = header.split_at(HEADER_BYTES - CHECKSUM_BYTES);
        if !FORGED && blake3::hash(fields).as_bytes() != checksum {
            return Err(Error::DamagedHeader);
        }
        let mut cursor = Cursor::new(&fields[MAGIC.len()..]);
        let format = cursor.u32()?;
        let sections = cursor.u32()?;
        let release = cursor.text::<RELEASE_BYTES>();
        if format > FORMAT_VERSION {
            return Err(Error::UnknownFormat {
                found: format,
                // Whatever is a text to a later release.
                release: release.unwrap_or_else(|_| "a newer one".to_owned()),
            });
        }
        if format == 0 {
            return Err(Error::Malformed("there is no format version 0"));
        }
        let release = release?;
        let id = SnapshotId(cursor.array()?);
        let created_unix_ns = cursor.u64()?;
        let memory_bytes = cursor.u64()?;
        let vcpus = cursor.u32()?;
        let host_cpu = CpuIdentity {
            signature: cursor.u32()?,
            vendor: cursor.text::<VENDOR_BYTES>()?,
            brand: cursor.text::<BRAND_BYTES>()?,
        };
        let body = Body {
            bytes: cursor.u64()?,
            sections,
            checksum: cursor.array()?,
        };
        if cursor.rest().iter().any(|&byte| byte != 0) {
            return Err(Error::Malformed("its header has bytes that mean nothing"));
        }
        let header = Self {
            id,
            release,
            created_unix_ns,
            host_cpu,
            vcpus,
            memory_bytes,
        };
        Ok((header, body))
    }
}
