//! What is saved: the content of memory and disks at a machine's cut.

use std::io;

use dedup::{ImageStats, Writer};
use memory::{AtCut, MachineMemory, PartKind};

use crate::{Error, Saving, image_file::ImageFile};

/// What some bytes are, for who saves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// So many bytes are as they are in the parent.
    Kept(u64),
    /// So many bytes are zeros.
    Zeros(u64),
    /// So many bytes are as they were copied last ([`Draft::copy`](crate::Draft::copy)).
    Copied(u64),
    /// So many bytes have to be read.
    Data(u64),
}

impl Piece {
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Self::Kept(bytes) | Self::Zeros(bytes) | Self::Copied(bytes) | Self::Data(bytes) => {
                bytes
            }
        }
    }
}

/// Content at the machine's cut, which does not change any more.
pub trait Content: Sync {
    /// Its pieces, one behind the other. Those that are kept begin and end at multiples of `unit` bytes, or at the end of all.
    /// `parent` is its size in the parent, if that can be built on; without one nothing is [`Piece::Kept`].
    ///
    /// # Errors
    ///
    /// What the host says.
    fn pieces(&self, parent: Option<u64>, unit: u64) -> io::Result<Vec<Piece>>;

    /// Fills `buffer` with what is at `offset`. Each byte that has to be read is read once.
    ///
    /// # Errors
    ///
    /// What the host says.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// Of a machine that stands still until all of it is read.
impl Content for MachineMemory {
    fn pieces(&self, _: Option<u64>, _: u64) -> io::Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut at = 0;
        for range in self.populated()? {
            pieces.push(Piece::Zeros(range.start - at));
            pieces.push(Piece::Data(range.end - range.start));
            at = range.end;
        }
        pieces.push(Piece::Zeros(self.layout().bytes() - at));
        Ok(pieces)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_image(offset, buffer)
    }
}

/// Of a machine that goes on.
impl Content for AtCut {
    fn pieces(&self, parent: Option<u64>, unit: u64) -> io::Result<Vec<Piece>> {
        let pieces: Vec<Piece> = self
            .parts()
            .into_iter()
            .map(|part| match part.kind {
                PartKind::InBase => Piece::Kept(part.bytes),
                PartKind::Zeros => Piece::Zeros(part.bytes),
                PartKind::Copied => Piece::Copied(part.bytes),
                PartKind::Data => Piece::Data(part.bytes),
            })
            .collect();
        let keeps = pieces.iter().any(|piece| matches!(piece, Piece::Kept(_)));
        if keeps && !(parent == Some(self.bytes()) && AtCut::UNIT_BYTES.is_multiple_of(unit)) {
            return Err(io::Error::other(
                "what did not change is in no snapshot that this one can be built on",
            ));
        }
        Ok(pieces)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        AtCut::read(self, offset, buffer)
    }
}

/// Saves it as the image `name`. What was copied is in `copies`.
pub(crate) fn write(
    writer: &mut Writer,
    unit: u64,
    name: &str,
    content: &impl Content,
    copies: Option<&ImageFile>,
    saving: &Saving,
) -> Result<ImageStats, Error> {
    let failed = || Error::store(name);
    let mut image = writer.image(name).map_err(failed())?;
    let pieces = content
        .pieces(image.parent_size(), unit)
        .map_err(Error::Read)?;
    let data = pieces.iter().map(|piece| match piece {
        Piece::Copied(bytes) | Piece::Data(bytes) => *bytes,
        Piece::Kept(_) | Piece::Zeros(_) => 0,
    });
    saving.begin(data.sum());
    let mut at = 0;
    for piece in pieces {
        let written = match piece {
            Piece::Kept(bytes) => image.keep(bytes),
            Piece::Zeros(bytes) => image.skip_zeros(bytes),
            Piece::Copied(bytes) => image.write_with(bytes, |offset, buffer| {
                let copies = copies.ok_or(io::ErrorKind::NotFound)?;
                copies.read(at + offset, buffer)?;
                saving.pass(buffer.len() as u64)
            }),
            Piece::Data(bytes) => image.write_with(bytes, |offset, buffer| {
                content.read(at + offset, buffer)?;
                saving.advance(buffer.len() as u64)
            }),
        };
        written.map_err(failed())?;
        at += piece.bytes();
    }
    image.finish().map_err(failed())
}
