//! A layer's header.

use std::{fmt, path::PathBuf};

use crate::{
    layout::{Geometry, PAGE_BYTES, SECTOR_BYTES},
    page::{self, DIGEST_BYTES, Raw},
};

const MAGIC: [u8; 8] = *b"FERMDISK";
/// Of a layer that stands on the one of the depth before its own, as nearly all do.
const VERSION: u32 = 1;
/// Of one that does not, and says on which.
const VERSION_WITH_GAP: u32 = 2;
/// The greatest depth that version 1 knows.
const MAX_DEPTH_1: u32 = 1000;
const BELOW_AT: usize = 96;
const PATH_AT: usize = 128;
/// The longest path of a parent, in bytes.
pub(crate) const MAX_PATH_BYTES: usize = 3584;
const DIGEST_AT: usize = PAGE_BYTES - DIGEST_BYTES;

/// What a layer is known by, wherever it lies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(pub [u8; 16]);

impl LayerId {
    /// An id that no layer had before.
    pub(crate) fn random() -> std::io::Result<Self> {
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(id))
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A raw image as it was when a layer was put on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawBase {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) device: u64,
    pub(crate) inode: u64,
    /// Nanoseconds since the Unix epoch.
    pub(crate) modified_ns: u64,
}

/// What a layer stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Parent {
    Nothing,
    Raw(RawBase),
    Layer {
        path: PathBuf,
        id: LayerId,
        bytes: u64,
    },
}

impl Parent {
    /// Bytes of what is below.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Raw(base) => base.bytes,
            Self::Layer { bytes, .. } => *bytes,
        }
    }
}

/// What the first page of a layer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) id: LayerId,
    pub(crate) geometry: Geometry,
    /// From 1.
    pub(crate) depth: u32,
    /// The depth of the layer that it stands on; 0 when there is none. What is between the two has been merged into this.
    pub(crate) below: u32,
    pub(crate) parent: Parent,
}

/// Why a page is no header.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NoHeader {
    Magic,
    Version(u32),
    Damaged(&'static str),
}

impl Header {
    /// `None` if the parent's path does not fit.
    pub(crate) fn encode(&self) -> Option<Box<Raw>> {
        let mut page: Box<Raw> = Box::new([0; PAGE_BYTES]);
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        let kind = match &self.parent {
            Parent::Nothing => 0u32,
            Parent::Raw(_) => 1,
            Parent::Layer { .. } => 2,
        };
        put(0, &MAGIC);
        let version = self.version();
        put(8, &version.to_le_bytes());
        if version == VERSION_WITH_GAP {
            put(BELOW_AT, &self.below.to_le_bytes());
        }
        put(12, &kind.to_le_bytes());
        put(16, &self.id.0);
        put(32, &self.geometry.bytes().to_le_bytes());
        put(40, &self.depth.to_le_bytes());
        let path = match &self.parent {
            Parent::Nothing => None,
            Parent::Raw(base) => {
                put(72, &base.device.to_le_bytes());
                put(80, &base.inode.to_le_bytes());
                put(88, &base.modified_ns.to_le_bytes());
                Some(&base.path)
            }
            Parent::Layer { path, id, .. } => {
                put(48, &id.0);
                Some(path)
            }
        };
        put(64, &self.parent.bytes().to_le_bytes());
        if let Some(path) = path {
            let path = path.to_str()?.as_bytes();
            if path.is_empty() || path.len() > MAX_PATH_BYTES {
                return None;
            }
            put(44, &(path.len() as u32).to_le_bytes());
            put(PATH_AT, path);
        }
        let digest = page::digest(&page[..DIGEST_AT]);
        page[DIGEST_AT..].copy_from_slice(&digest);
        Some(page)
    }

    /// The oldest that has room for what there is to say.
    fn version(&self) -> u32 {
        if self.below + 1 == self.depth && self.depth <= MAX_DEPTH_1 {
            VERSION
        } else {
            VERSION_WITH_GAP
        }
    }

    pub(crate) fn decode(page: &Raw) -> Result<Self, NoHeader> {
        if page[..8] != MAGIC {
            return Err(NoHeader::Magic);
        }
        if !crate::FORGED && page::digest(&page[..DIGEST_AT]) != page[DIGEST_AT..] {
            return Err(NoHeader::Damaged("the checksum of its header is wrong"));
        }
        let half = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap_or_default());
        let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap_or_default());
        let id = |at: usize| LayerId(page[at..at + 16].try_into().unwrap_or_default());
        let depth = half(40);
        let below = match half(8) {
            VERSION => depth.saturating_sub(1),
            VERSION_WITH_GAP => half(BELOW_AT),
            0 => {
                return Err(NoHeader::Damaged(
                    "its format version is 0, which never was one",
                ));
            }
            newer => return Err(NoHeader::Version(newer)),
        };
        let path_len = half(44) as usize;
        if path_len > MAX_PATH_BYTES {
            return Err(NoHeader::Damaged("its parent's path is too long"));
        }
        let path = str::from_utf8(&page[PATH_AT..PATH_AT + path_len])
            .map_err(|_| NoHeader::Damaged("its parent's path is not text"))?;
        if path.contains('\0') {
            return Err(NoHeader::Damaged("its parent's path has a NUL in it"));
        }
        let path = PathBuf::from(path);
        let parent = match half(12) {
            0 => Parent::Nothing,
            1 => Parent::Raw(RawBase {
                path,
                bytes: word(64),
                device: word(72),
                inode: word(80),
                modified_ns: word(88),
            }),
            2 => Parent::Layer {
                path,
                id: id(48),
                bytes: word(64),
            },
            _ => return Err(NoHeader::Damaged("its parent is of no known kind")),
        };
        let geometry = Geometry::of(word(32));
        let geometry = geometry.ok_or(NoHeader::Damaged("there can be no disk of its size"))?;
        let header = Self {
            id: id(16),
            geometry,
            depth,
            below,
            parent,
        };
        header.plausible()?;
        // One way to write each header, so that no byte of it goes unread.
        let again = header
            .encode()
            .ok_or(NoHeader::Damaged("its parent has no name"))?;
        if again[..DIGEST_AT] != page[..DIGEST_AT] {
            return Err(NoHeader::Damaged("its header has bytes that mean nothing"));
        }
        Ok(header)
    }

    fn plausible(&self) -> Result<(), NoHeader> {
        let on_a_layer = matches!(self.parent, Parent::Layer { .. });
        if self.below >= self.depth || on_a_layer != (self.below > 0) {
            return Err(NoHeader::Damaged("its depth is impossible"));
        }
        let below = self.parent.bytes();
        if !below.is_multiple_of(SECTOR_BYTES) {
            let what = "its parent's size is no multiple of a sector's";
            return Err(NoHeader::Damaged(what));
        }
        if below > self.geometry.bytes() {
            return Err(NoHeader::Damaged("it is smaller than its parent"));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn header(parent: Parent) -> Header {
        let below = match parent {
            Parent::Layer { .. } => 6,
            _ => 0,
        };
        Header {
            id: LayerId([3; 16]),
            geometry: Geometry::of(1 << 30).unwrap(),
            depth: below + 1,
            below,
            parent,
        }
    }

    /// The last two have gaps below them.
    fn all() -> [Header; 5] {
        let raw = RawBase {
            path: "/images/base.raw".into(),
            bytes: 1 << 29,
            device: 1,
            inode: 2,
            modified_ns: 3,
        };
        let layer = Parent::Layer {
            path: "web.disk.x.layer".into(),
            id: LayerId([4; 16]),
            bytes: 1 << 30,
        };
        let gap = |parent| Header {
            depth: 2000,
            ..header(parent)
        };
        [
            header(Parent::Nothing),
            header(Parent::Raw(raw.clone())),
            header(layer.clone()),
            gap(Parent::Raw(raw)),
            gap(layer),
        ]
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        for header in all() {
            assert_eq!(Header::decode(&header.encode().unwrap()), Ok(header));
        }
    }

    #[test]
    fn no_bit_of_a_header_can_change() {
        for header in all() {
            let page = header.encode().unwrap();
            for bit in 0..PAGE_BYTES * 8 {
                let mut flipped = page.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(Header::decode(&flipped).is_err(), "bit {bit}");
            }
        }
    }

    #[test]
    fn a_newer_version_is_told_from_damage_and_an_impossible_header_is_refused() {
        let resealed = |change: &dyn Fn(&mut Raw)| {
            let mut page = all()[2].encode().unwrap();
            change(&mut page);
            let digest = page::digest(&page[..DIGEST_AT]);
            page[DIGEST_AT..].copy_from_slice(&digest);
            Header::decode(&page).unwrap_err()
        };
        assert_eq!(resealed(&|page| page[8] = 3), NoHeader::Version(3));
        assert!(matches!(
            resealed(&|page| page[8] = 0),
            NoHeader::Damaged(what) if what.contains("version")
        ));
        assert!(matches!(
            resealed(&|page| page[64] = 1),
            NoHeader::Damaged(what) if what.contains("multiple")
        ));
        type Change<'a> = &'a dyn Fn(&mut Raw);
        let changes: [(&str, Change<'_>); 10] = [
            ("kind", &|page| page[12] = 9),
            ("size", &|page| page[32] = 1),
            ("depth", &|page| page[40] = 0),
            ("path", &|page| page[44..46].copy_from_slice(&[0xff; 2])),
            ("a NUL in a path", &|page| page[PATH_AT + 1] = 0),
            ("parent", &|page| page[71] = 1),
            ("spare", &|page| page[100] = 1),
            ("a gap without its version", &|page| page[96] = 3),
            ("its version without a gap", &|page| {
                (page[8], page[96]) = (2, 6)
            }),
            ("on nothing, above a layer", &|page| page[8] = 2),
        ];
        for (what, change) in changes {
            assert!(matches!(resealed(change), NoHeader::Damaged(_)), "{what}");
        }
    }
}
