//! Where a file has data.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use rustix::io::Errno;

/// What `st_blocks` counts in, on Linux whatever the file system's own blocks are.
const BLOCK_BYTES: u64 = 512;

/// The size of a file or block device, and its parts that are not holes, ascending.
pub(super) fn data_extents(mut file: &File) -> io::Result<(u64, Vec<Range<u64>>)> {
    let size = file.seek(SeekFrom::End(0))?;
    let mut extents = Vec::new();
    // To look for holes takes the kernel as long as to read a good part of the file: not where there are none.
    if file.metadata()?.blocks().saturating_mul(BLOCK_BYTES) >= size {
        extents.push(0..size);
        return Ok((size, extents));
    }
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            // Devices and some file systems do not know holes.
            Err(Errno::INVAL) => at,
            Err(other) => return Err(other.into()),
        };
        let end = match rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start)) {
            Ok(end) => end,
            Err(Errno::INVAL) => size,
            Err(other) => return Err(other.into()),
        };
        extents.push(start..end.min(size));
        at = end;
    }
    Ok((size, extents))
}
