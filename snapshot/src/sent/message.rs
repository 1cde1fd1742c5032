//! What is said: `docs/peer-protocol.md`, *Messages*.

use memory::PAGE_BYTES;
use peer::Stream;
use saved_state::SnapshotId;

use super::line::PeerError;
use crate::table::{GRANULE_BYTES, is_zero};

const PAGE: usize = PAGE_BYTES as usize;
const HEAD_BYTES: usize = 5;
const GRANULE_HEAD_BYTES: usize = 6;
/// The most that a message has behind its head.
const MAX_CONTENT: usize = GRANULE_HEAD_BYTES + GRANULE_BYTES as usize;
const MAX_NAME: usize = 255;
const MAX_TEXT: usize = 4096;
/// The most of a state that one message has.
pub(crate) const STATE_PART: usize = GRANULE_BYTES as usize;

mod kind {
    pub(super) const BEGIN: u8 = 1;
    pub(super) const READY: u8 = 2;
    pub(super) const GRANULE: u8 = 3;
    pub(super) const STATE: u8 = 4;
    pub(super) const DISK: u8 = 5;
    pub(super) const END: u8 = 6;
    pub(super) const WORKING: u8 = 7;
    pub(super) const SAVED: u8 = 8;
    pub(super) const FAILED: u8 = 9;
    pub(super) const MADE: u8 = 10;
    pub(super) const KEEP: u8 = 11;
}

/// Why a peer does not keep a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Why {
    /// It does not take such a one.
    BadRequest = 1,
    /// It has one of that name.
    NameTaken = 2,
    /// It has no room.
    NoSpace = 3,
    /// Anything else.
    Other = 4,
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    Begin {
        id: SnapshotId,
        memory_bytes: u64,
        name: &'a str,
    },
    Ready {
        keeps_disks: bool,
    },
    /// A granule of the image that is being sent.
    Granule {
        number: u32,
        content: Pages<'a>,
    },
    State(&'a [u8]),
    Disk {
        number: u32,
        bytes: u64,
    },
    End,
    Working,
    Made,
    Keep,
    Saved {
        new_bytes: u64,
        /// In a store.
        id: Option<[u8; 16]>,
        name: &'a str,
    },
    Failed {
        why: Why,
        text: &'a str,
    },
}

/// Pages of a granule that are not zeros: bit 0 is the first page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pages<'a> {
    pub(crate) which: u16,
    /// To be sent: the whole granule. That has come: those pages alone, one behind the other.
    bytes: &'a [u8],
}

impl<'a> Pages<'a> {
    /// Those of a granule with this content.
    pub(crate) fn of(granule: &'a [u8]) -> Self {
        let pages = granule.chunks(PAGE).enumerate();
        let which = pages
            .filter(|(_, page)| !is_zero(page))
            .fold(0, |which, (number, _)| which | 1 << number);
        Self {
            which,
            bytes: granule,
        }
    }

    /// Fills `granule` with what has come; `false` if that is not for a granule of this length.
    pub(crate) fn fill(&self, granule: &mut [u8]) -> bool {
        let mut rest = self.bytes;
        let pages = granule.len().div_ceil(PAGE);
        if u32::from(self.which) >> pages != 0 {
            return false;
        }
        for (number, page) in granule.chunks_mut(PAGE).enumerate() {
            if self.which >> number & 1 == 0 {
                page.fill(0);
                continue;
            }
            let Some((content, later)) = rest.split_at_checked(page.len()) else {
                return false;
            };
            page.copy_from_slice(content);
            rest = later;
        }
        rest.is_empty()
    }
}

impl<'a> Message<'a> {
    /// Sends it, at the latest with the next flush.
    pub(crate) fn send(
        &self,
        stream: &mut Stream,
        wanted: &dyn Fn() -> bool,
    ) -> Result<(), PeerError> {
        let (kind, head, body): (u8, Vec<u8>, &[u8]) = match *self {
            Self::Begin {
                id,
                memory_bytes,
                name,
            } => {
                let head = [&id.0[..], &memory_bytes.to_le_bytes()].concat();
                (kind::BEGIN, head, name.as_bytes())
            }
            Self::Ready { keeps_disks } => (kind::READY, vec![keeps_disks.into()], &[]),
            Self::Granule { number, content } => {
                return send_granule(stream, number, content, wanted);
            }
            Self::State(part) => (kind::STATE, Vec::new(), part),
            Self::Disk { number, bytes } => {
                let head = [&number.to_le_bytes()[..], &bytes.to_le_bytes()].concat();
                (kind::DISK, head, &[])
            }
            Self::End => (kind::END, Vec::new(), &[]),
            Self::Working => (kind::WORKING, Vec::new(), &[]),
            Self::Made => (kind::MADE, Vec::new(), &[]),
            Self::Keep => (kind::KEEP, Vec::new(), &[]),
            Self::Saved {
                new_bytes,
                id,
                name,
            } => {
                let head = [&new_bytes.to_le_bytes()[..], &id.unwrap_or_default()].concat();
                (kind::SAVED, head, name.as_bytes())
            }
            Self::Failed { why, text } => {
                let fits = (0..=text.len().min(MAX_TEXT)).rev();
                let fits = fits.into_iter().find(|at| text.is_char_boundary(*at));
                let text = &text.as_bytes()[..fits.unwrap_or(0)];
                (kind::FAILED, vec![why as u8], text)
            }
        };
        stream.send(&message_head(kind, head.len() + body.len()), wanted)?;
        stream.send(&head, wanted)?;
        Ok(stream.send(body, wanted)?)
    }

    /// Receives the next one into `buffer`.
    pub(crate) fn receive(
        stream: &mut Stream,
        buffer: &'a mut Vec<u8>,
        wanted: &dyn Fn() -> bool,
    ) -> Result<Self, PeerError> {
        let mut head = [0; HEAD_BYTES];
        stream.receive(&mut head, wanted)?;
        let [kind, a, b, c, d] = head;
        let bytes = u32::from_le_bytes([a, b, c, d]) as usize;
        if bytes > MAX_CONTENT {
            return Err(PeerError::Nonsense);
        }
        buffer.resize(bytes, 0);
        stream.receive(buffer, wanted)?;
        Self::parse(kind, buffer).ok_or(PeerError::Nonsense)
    }

    fn parse(kind: u8, content: &'a [u8]) -> Option<Self> {
        let mut rest = content;
        let message = match kind {
            kind::BEGIN => Self::Begin {
                id: SnapshotId(take(&mut rest)?),
                memory_bytes: u64::from_le_bytes(take(&mut rest)?),
                name: text(&mut rest, MAX_NAME)?,
            },
            kind::READY => Self::Ready {
                keeps_disks: match take(&mut rest)? {
                    [0] => false,
                    [1] => true,
                    _ => return None,
                },
            },
            kind::GRANULE => Self::Granule {
                number: u32::from_le_bytes(take(&mut rest)?),
                content: Pages {
                    which: u16::from_le_bytes(take(&mut rest)?),
                    bytes: std::mem::take(&mut rest),
                },
            },
            kind::STATE => Self::State(std::mem::take(&mut rest)),
            kind::DISK => Self::Disk {
                number: u32::from_le_bytes(take(&mut rest)?),
                bytes: u64::from_le_bytes(take(&mut rest)?),
            },
            kind::END => Self::End,
            kind::WORKING => Self::Working,
            kind::MADE => Self::Made,
            kind::KEEP => Self::Keep,
            kind::SAVED => Self::Saved {
                new_bytes: u64::from_le_bytes(take(&mut rest)?),
                id: Some(take(&mut rest)?).filter(|id| *id != [0; 16]),
                name: text(&mut rest, MAX_NAME)?,
            },
            kind::FAILED => Self::Failed {
                why: match take(&mut rest)? {
                    [1] => Why::BadRequest,
                    [2] => Why::NameTaken,
                    [3] => Why::NoSpace,
                    [4] => Why::Other,
                    _ => return None,
                },
                text: text(&mut rest, MAX_TEXT)?,
            },
            _ => return None,
        };
        rest.is_empty().then_some(message)
    }
}

fn message_head(kind: u8, content_bytes: usize) -> [u8; HEAD_BYTES] {
    // No content is longer than MAX_CONTENT.
    let [a, b, c, d] = (content_bytes as u32).to_le_bytes();
    [kind, a, b, c, d]
}

fn send_granule(
    stream: &mut Stream,
    number: u32,
    Pages { which, bytes }: Pages<'_>,
    wanted: &dyn Fn() -> bool,
) -> Result<(), PeerError> {
    let pages = || {
        let pages = bytes.chunks(PAGE).enumerate();
        pages.filter_map(|(at, page)| (which >> at & 1 != 0).then_some(page))
    };
    let content_bytes = GRANULE_HEAD_BYTES + pages().map(<[u8]>::len).sum::<usize>();
    stream.send(&message_head(kind::GRANULE, content_bytes), wanted)?;
    stream.send(&number.to_le_bytes(), wanted)?;
    stream.send(&which.to_le_bytes(), wanted)?;
    for page in pages() {
        stream.send(page, wanted)?;
    }
    Ok(())
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*taken)
}

/// The rest, if it is a text of at most so many bytes, in one line: it is shown to people.
fn text<'a>(bytes: &mut &'a [u8], at_most: usize) -> Option<&'a str> {
    let text = std::str::from_utf8(std::mem::take(bytes)).ok()?;
    let fits = text.len() <= at_most && !text.contains(char::is_control);
    fits.then_some(text)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use proptest::prelude::*;

    use super::*;

    fn pair() -> (Stream, Stream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let connecting =
            std::thread::spawn(move || Stream::connect(&address, &[1; 32], &|| true).unwrap());
        let accepted: TcpStream = listener.accept().unwrap().0;
        let here = Stream::accept(accepted, &[1; 32]).unwrap();
        (connecting.join().unwrap(), here)
    }

    #[test]
    fn each_message_is_what_was_said() {
        let (mut there, mut here) = pair();
        let messages = [
            Message::Begin {
                id: SnapshotId([3; 16]),
                memory_bytes: 64 << 20,
                name: "ärger",
            },
            Message::Ready { keeps_disks: true },
            Message::State(&[1, 2, 3]),
            Message::State(&[]),
            Message::Disk {
                number: 2,
                bytes: 1 << 40,
            },
            Message::End,
            Message::Working,
            Message::Made,
            Message::Keep,
            Message::Saved {
                new_bytes: 7,
                id: Some([9; 16]),
                name: "name",
            },
            Message::Saved {
                new_bytes: 0,
                id: None,
                name: "",
            },
            Message::Failed {
                why: Why::NoSpace,
                text: "there is no room",
            },
        ];
        let mut buffer = Vec::new();
        for message in messages {
            message.send(&mut there, &|| true).unwrap();
            there.flush(&|| true).unwrap();
            let heard = Message::receive(&mut here, &mut buffer, &|| true).unwrap();
            assert_eq!(heard, message);
        }
        let long = "ü".repeat(MAX_TEXT);
        let message = Message::Failed {
            why: Why::Other,
            text: &long,
        };
        message.send(&mut there, &|| true).unwrap();
        there.flush(&|| true).unwrap();
        let heard = Message::receive(&mut here, &mut buffer, &|| true).unwrap();
        assert!(matches!(heard, Message::Failed { text, .. } if text.len() == MAX_TEXT));
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for (kind, content) in [
            (0, &[][..]),
            (12, &[]),
            (kind::MADE, &[0]),
            (kind::KEEP, &[0]),
            (kind::BEGIN, &[0; 23]),
            (kind::READY, &[2]),
            (kind::READY, &[]),
            (kind::GRANULE, &[0; 5]),
            (kind::DISK, &[0; 13]),
            (kind::END, &[0]),
            (kind::WORKING, &[0]),
            (kind::SAVED, &[0; 20]),
            (kind::FAILED, &[]),
            (kind::FAILED, &[5]),
            (kind::FAILED, &[1, 0xff]),
            (kind::FAILED, b"\x01forged\nline"),
        ] {
            assert_eq!(Message::parse(kind, content), None, "{kind} {content:?}");
        }
        let mut name = vec![0; 24];
        name.extend([b'a'; MAX_NAME + 1]);
        assert_eq!(Message::parse(kind::BEGIN, &name), None);
        assert!(Message::parse(kind::BEGIN, &name[..name.len() - 1]).is_some());
    }

    #[test]
    fn pages_that_do_not_fit_the_granule_are_refused() {
        let content = [1; 2 * PAGE];
        let mut granule = [0; 2 * PAGE];
        let fill = |which, bytes, granule: &mut [u8]| Pages { which, bytes }.fill(granule);
        assert!(fill(0b11, &content, &mut granule));
        assert!(!fill(0b1, &content, &mut granule));
        assert!(!fill(0b11, &content[..PAGE], &mut granule));
        assert!(!fill(0b11, &content[..2 * PAGE - 1], &mut granule));
        assert!(!fill(0b100, &content[..PAGE], &mut granule));
        assert!(fill(
            0b11,
            &content[..PAGE + 512],
            &mut granule[..PAGE + 512]
        ));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn a_granule_comes_as_it_was(pages: [Option<u8>; 16], bytes in 1..=GRANULE_BYTES as usize) {
            let (mut there, mut here) = pair();
            let mut granule = vec![0; bytes];
            for (page, first) in granule.chunks_mut(PAGE).zip(pages) {
                page[0] = first.unwrap_or(0);
            }
            let content = Pages::of(&granule);
            let sent = Message::Granule { number: 77, content };
            sent.send(&mut there, &|| true).unwrap();
            there.flush(&|| true).unwrap();
            let mut buffer = Vec::new();
            let heard = Message::receive(&mut here, &mut buffer, &|| true).unwrap();
            let Message::Granule { number: 77, content } = heard else {
                panic!("{heard:?}");
            };
            let mut filled = vec![0xff; bytes];
            prop_assert!(content.fill(&mut filled));
            prop_assert!(filled == granule);
        }
    }
}
