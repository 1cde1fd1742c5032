//! The pages that the seal, the descriptor, the bitmap and the map are made of.

use crate::{header::LayerId, layout::PAGE_BYTES};

pub(crate) const CONTENT_BYTES: usize = 4032;
const CONTENT_AT: usize = PAGE_BYTES - CONTENT_BYTES;
pub(crate) const DIGEST_BYTES: usize = 16;

/// A page as it is in a file.
pub(crate) type Raw = [u8; PAGE_BYTES];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageKind {
    Seal,
    Descriptor,
    Bits,
    Runs,
}

impl PageKind {
    fn tag(self) -> [u8; 4] {
        *match self {
            Self::Seal => b"SEAL",
            Self::Descriptor => b"DESC",
            Self::Bits => b"BITS",
            Self::Runs => b"RUNS",
        }
    }
}

/// Which page it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) id: LayerId,
    pub(crate) kind: PageKind,
    pub(crate) number: u64,
}

/// A page that is what it should be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Page<'a> {
    pub(crate) generation: u64,
    /// As much as is in use.
    pub(crate) content: &'a [u8],
}

/// What is at a page's place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found<'a> {
    /// It was never written.
    Nothing,
    Whole(Page<'a>),
    /// Torn, damaged, or another's.
    Broken,
}

pub(crate) fn digest(bytes: &[u8]) -> [u8; DIGEST_BYTES] {
    let mut digest = [0; DIGEST_BYTES];
    digest.copy_from_slice(&blake3::hash(bytes).as_bytes()[..DIGEST_BYTES]);
    digest
}

/// The page of this label; of `content` no more than fits.
pub(crate) fn encode(label: Label, generation: u64, content: &[u8]) -> Box<Raw> {
    let mut page = Box::new([0; PAGE_BYTES]);
    let used = content.len().min(CONTENT_BYTES);
    page[16..32].copy_from_slice(&label.id.0);
    page[32..36].copy_from_slice(&label.kind.tag());
    page[36..40].copy_from_slice(&(used as u32).to_le_bytes());
    page[40..48].copy_from_slice(&label.number.to_le_bytes());
    page[48..56].copy_from_slice(&generation.to_le_bytes());
    page[CONTENT_AT..CONTENT_AT + used].copy_from_slice(&content[..used]);
    let digest = digest(&page[DIGEST_BYTES..]);
    page[..DIGEST_BYTES].copy_from_slice(&digest);
    page
}

pub(crate) fn decode(label: Label, page: &Raw) -> Found<'_> {
    if page.iter().all(|byte| *byte == 0) {
        return Found::Nothing;
    }
    if !crate::FORGED && digest(&page[DIGEST_BYTES..]) != page[..DIGEST_BYTES] {
        return Found::Broken;
    }
    let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap_or_default());
    let used = word(32) >> 32;
    let generation = word(48);
    let right = page[16..32] == label.id.0
        && page[32..36] == label.kind.tag()
        && word(40) == label.number
        && generation != 0
        && word(56) == 0
        && used <= CONTENT_BYTES as u64;
    if !right {
        return Found::Broken;
    }
    let (content, rest) = page[CONTENT_AT..].split_at(used as usize);
    if rest.iter().any(|byte| *byte != 0) {
        return Found::Broken;
    }
    Found::Whole(Page {
        generation,
        content,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_itself_and_no_other_and_no_bit_of_it_can_change() {
        let label = Label {
            id: LayerId([7; 16]),
            kind: PageKind::Bits,
            number: 3,
        };
        let page = encode(label, 9, b"content");
        let whole = Page {
            generation: 9,
            content: b"content",
        };
        assert_eq!(decode(label, &page), Found::Whole(whole));
        for other in [
            Label { number: 4, ..label },
            Label {
                kind: PageKind::Runs,
                ..label
            },
            Label {
                id: LayerId([8; 16]),
                ..label
            },
        ] {
            assert_eq!(decode(other, &page), Found::Broken);
        }
        for bit in 0..PAGE_BYTES * 8 {
            let mut flipped = page.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(label, &flipped), Found::Broken, "bit {bit}");
        }
        assert_eq!(decode(label, &[0; PAGE_BYTES]), Found::Nothing);
    }
}
