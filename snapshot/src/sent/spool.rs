//! A disk that comes, in a file without a name until all is there.

use std::{io, ops::Range, os::unix::fs::FileExt, path::Path};

use crate::{
    Content, Error, Piece, durable::Pending, granules::bytes_of, table::GRANULE_BYTES,
    transfer::data_of,
};

/// Disks are of whole sectors.
const SECTOR_BYTES: u64 = 512;

/// A disk of which some has come. Dropped, it is gone.
#[derive(Debug)]
pub(crate) struct Spool {
    file: Pending,
    bytes: u64,
}

impl Spool {
    /// Begins one of so many bytes, which are zeros, in a file that has this name at most where there are no nameless ones; `None` if no
    /// disk has so many.
    pub(crate) fn begin(place: &Path, bytes: u64) -> Result<Option<Self>, Error> {
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) || bytes > i64::MAX as u64 {
            return Ok(None);
        }
        let file = Pending::create(place)?;
        let sized = file.file().set_len(bytes);
        sized.map_err(Error::io("write", place))?;
        Ok(Some(Self { file, bytes }))
    }

    /// How long the granule of this number is, if it has one.
    pub(crate) fn granule(&self, number: u32) -> Option<usize> {
        Some(bytes_of(number as usize, self.bytes)).filter(|bytes| *bytes > 0)
    }

    /// Has the granule of this number be `content`.
    pub(crate) fn put(&self, number: u32, content: &[u8]) -> Result<(), Error> {
        let start = u64::from(number) * GRANULE_BYTES;
        let written = self.file.file().write_all_at(content, start);
        written.map_err(Error::io("write", self.file.target()))
    }

    fn data(&self) -> io::Result<Vec<Range<u64>>> {
        data_of(self.file.file(), self.bytes)
    }
}

impl Content for Spool {
    fn pieces(&self, _: Option<u64>, _: u64) -> io::Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut at = 0;
        for range in self.data()? {
            pieces.push(Piece::Zeros(range.start - at));
            pieces.push(Piece::Data(range.end - range.start));
            at = range.end;
        }
        pieces.push(Piece::Zeros(self.bytes - at));
        Ok(pieces)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.file().read_exact_at(buffer, offset)
    }
}
