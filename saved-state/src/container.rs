//! A container: the sections of one machine under one header and one checksum.

use std::collections::BTreeMap;

use crate::{
    Error, FORGED, Header, Kind, SavedState, Section,
    cursor::Cursor,
    header::{Body, HEADER_BYTES},
};

/// The most bytes a body may have. A machine of 32 vCPUs needs about one MiB.
pub const MAX_BODY_BYTES: u64 = 64 << 20;

/// The most sections a container may have.
pub const MAX_SECTIONS: u32 = 4096;

/// The sections of one saved machine. Each can be taken once; what nobody takes is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// What can be known without decoding a section.
    pub header: Header,
    sections: BTreeMap<(Kind, u32), Section>,
}

impl Container {
    /// An empty container.
    pub fn new(header: Header) -> Self {
        Self {
            header,
            sections: BTreeMap::new(),
        }
    }

    /// Encodes `state` and puts it in.
    ///
    /// # Errors
    ///
    /// [`Error::Encode`] as of [`Section::encode`], [`Error::Malformed`] when this instance of this
    /// kind is there already.
    pub fn put<T: SavedState>(&mut self, instance: u32, state: &T) -> Result<(), Error> {
        self.insert(Section::encode(instance, state)?)
    }

    /// Puts in a section that is encoded already.
    ///
    /// # Errors
    ///
    /// [`Error::Malformed`] when this instance of this kind is there already.
    pub fn insert(&mut self, section: Section) -> Result<(), Error> {
        let key = (section.kind, section.instance);
        match self.sections.insert(key, section) {
            None => Ok(()),
            Some(_) => Err(Error::Malformed("a section is there twice")),
        }
    }

    /// Takes out and decodes instance `instance` of `T`'s kind.
    ///
    /// # Errors
    ///
    /// [`Error::MissingSection`], or as of [`Section::decode`].
    pub fn take<T: SavedState>(&mut self, instance: u32) -> Result<T, Error> {
        self.remove(T::KIND, instance)?.decode()
    }

    /// Takes out a section without decoding it.
    ///
    /// # Errors
    ///
    /// [`Error::MissingSection`].
    pub fn remove(&mut self, kind: Kind, instance: u32) -> Result<Section, Error> {
        self.sections
            .remove(&(kind, instance))
            .ok_or(Error::MissingSection { kind, instance })
    }

    /// A section, which stays in it.
    ///
    /// # Errors
    ///
    /// [`Error::MissingSection`].
    pub fn get(&self, kind: Kind, instance: u32) -> Result<&Section, Error> {
        self.sections
            .get(&(kind, instance))
            .ok_or(Error::MissingSection { kind, instance })
    }

    /// The sections, by kind and instance.
    pub fn sections(&self) -> impl Iterator<Item = &Section> {
        self.sections.values()
    }

    /// Declares that everything has been taken.
    ///
    /// # Errors
    ///
    /// [`Error::Leftover`] names what has not: state that would silently be lost.
    pub fn finish(self) -> Result<(), Error> {
        if self.sections.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = self
            .sections
            .keys()
            .map(|(kind, instance)| format!("{kind} {instance}"))
            .collect();
        Err(Error::Leftover(names.join(", ")))
    }

    /// The container as the bytes of a state file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut body = Vec::new();
        for section in self.sections.values() {
            let Section {
                kind,
                instance,
                version,
                payload,
            } = section;
            body.extend_from_slice(&kind.0);
            body.extend_from_slice(&instance.to_le_bytes());
            body.extend_from_slice(&version.to_le_bytes());
            body.extend_from_slice(&(payload.len() as u64).to_le_bytes());
            body.extend_from_slice(payload);
        }
        let mut out = self.header.to_bytes(Body {
            bytes: body.len() as u64,
            sections: self.sections.len() as u32,
            checksum: *blake3::hash(&body).as_bytes(),
        });
        out.append(&mut body);
        out
    }

    /// Reads a state file. Both checksums are verified before the first section is looked at.
    ///
    /// # Errors
    ///
    /// Those of [`Header::read`]; [`Error::WrongLength`], [`Error::DamagedBody`] and
    /// [`Error::Malformed`] for a body that is not what the header promises.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let (header, body) = Header::parse(bytes)?;
        let rest = &bytes[HEADER_BYTES..];
        if rest.len() as u64 != body.bytes {
            return Err(Error::WrongLength {
                expected: body.bytes.saturating_add(HEADER_BYTES as u64),
                found: bytes.len() as u64,
            });
        }
        if body.bytes > MAX_BODY_BYTES || body.sections > MAX_SECTIONS {
            return Err(Error::Malformed("it is larger than any machine's state"));
        }
        if !FORGED && *blake3::hash(rest).as_bytes() != body.checksum {
            return Err(Error::DamagedBody);
        }
        let mut container = Self::new(header);
        let mut cursor = Cursor::new(rest);
        for _ in 0..body.sections {
            let kind = Kind(cursor.array()?);
            let instance = cursor.u32()?;
            let version = cursor.u16()?;
            let len = usize::try_from(cursor.u64()?)
                .map_err(|_| Error::Malformed("a section is larger than memory"))?;
            container.insert(Section {
                kind,
                instance,
                version,
                payload: cursor.take(len)?.to_vec(),
            })?;
        }
        if !cursor.is_empty() {
            return Err(Error::Malformed("bytes follow the last section"));
        }
        Ok(container)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use versionize::{VersionMap, Versionize, VersionizeResult};
    use versionize_derive::Versionize;

    use super::*;
    use crate::{CpuIdentity, SnapshotId};

    #[derive(Clone, Debug, PartialEq, Versionize)]
    struct Lamp {
        lit: bool,
        colours: Vec<u32>,
    }

    impl SavedState for Lamp {
        const KIND: Kind = Kind(*b"LAMP");
    }

    fn header() -> Header {
        Header {
            id: SnapshotId([7; 16]),
            release: "0.1.0".to_owned(),
            created_unix_ns: 1_700_000_000_000_000_000,
            host_cpu: CpuIdentity {
                vendor: "AuthenticAMD".to_owned(),
                signature: 0x00b0_0f21,
                brand: "AMD EPYC".to_owned(),
            },
            vcpus: 2,
            memory_bytes: 256 << 20,
        }
    }

    fn lamp() -> Lamp {
        Lamp {
            lit: true,
            colours: vec![1, 2, 3],
        }
    }

    fn saved() -> Vec<u8> {
        let mut container = Container::new(header());
        container.put(0, &lamp()).unwrap();
        container.put(1, &lamp()).unwrap();
        container.to_bytes()
    }

    #[test]
    fn what_was_put_in_comes_out() {
        let bytes = saved();
        assert_eq!(Header::read(&bytes[..HEADER_BYTES]).unwrap(), header());
        let mut container = Container::from_bytes(&bytes).unwrap();
        assert_eq!(container.header, header());
        assert_eq!(container.take::<Lamp>(0).unwrap(), lamp());
        assert_eq!(container.take::<Lamp>(1).unwrap(), lamp());
        assert_eq!(
            container.take::<Lamp>(2),
            Err(Error::MissingSection {
                kind: Lamp::KIND,
                instance: 2
            })
        );
        container.finish().unwrap();
    }

    #[test]
    fn a_section_nobody_takes_is_an_error() {
        let mut container = Container::from_bytes(&saved()).unwrap();
        container.take::<Lamp>(0).unwrap();
        assert_eq!(
            container.finish(),
            Err(Error::Leftover("LAMP 1".to_owned()))
        );
    }

    #[test]
    fn bytes_left_over_in_a_section_are_an_error() {
        let mut section = Section::encode(0, &lamp()).unwrap();
        section.payload.push(0);
        assert!(matches!(
            section.decode::<Lamp>(),
            Err(Error::Decode { .. })
        ));
    }

    #[test]
    fn a_newer_section_is_refused_by_version() {
        let mut section = Section::encode(0, &lamp()).unwrap();
        section.version = 2;
        assert_eq!(
            section.decode::<Lamp>(),
            Err(Error::UnknownVersion {
                kind: Lamp::KIND,
                found: 2,
                known: 1
            })
        );
    }

    /// A saved machine with `bytes` in its header, from `at` on, under a right checksum.
    fn with_header(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut file = saved();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        let checksum = blake3::hash(&file[..HEADER_BYTES - 32]);
        file[HEADER_BYTES - 32..HEADER_BYTES].copy_from_slice(checksum.as_bytes());
        file
    }

    #[test]
    fn a_newer_format_is_refused_by_release() {
        let refused = |found, release: &str| {
            Err(Error::UnknownFormat {
                found,
                release: release.to_owned(),
            })
        };
        let newer = with_header(8, &[2]);
        assert_eq!(Container::from_bytes(&newer), refused(2, "0.1.0"));
        // Its text is whatever that release has there.
        let newer = with_header(8, b"\x03\0\0\0\x02\0\0\0\x1b");
        assert_eq!(Container::from_bytes(&newer), refused(3, "a newer one"));
    }

    #[test]
    fn a_header_that_fermata_does_not_write_is_refused() {
        // The version, behind the end of the release, in what is zeros.
        for (at, byte) in [(8, 0), (40, 1), (188, 1), (223, 1)] {
            let file = with_header(at, &[byte]);
            let refused = Container::from_bytes(&file);
            assert!(matches!(refused, Err(Error::Malformed(_))), "{refused:?}");
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let bytes = saved();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            assert!(Container::from_bytes(&damaged).is_err(), "bit in byte {at}");
            assert!(Container::from_bytes(&bytes[..at]).is_err(), "cut at {at}");
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(Container::from_bytes(&longer).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_under_a_right_checksum_never_panic(
            body in proptest::collection::vec(any::<u8>(), 0..512),
            sections in 0u32..8,
        ) {
            let mut bytes = header().to_bytes(Body {
                bytes: body.len() as u64,
                sections,
                checksum: *blake3::hash(&body).as_bytes(),
            });
            bytes.extend_from_slice(&body);
            if let Ok(mut container) = Container::from_bytes(&bytes) {
                let _ = container.take::<Lamp>(0);
            }
        }

        #[test]
        fn arbitrary_payloads_never_panic(payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            let section = Section { kind: Lamp::KIND, instance: 0, version: 1, payload };
            let _ = section.decode::<Lamp>();
        }
    }
}
