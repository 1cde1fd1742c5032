//! What an image is written to granule by granule, in any order, and each as often as one likes.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{
    Content, Piece, Saving,
    table::GRANULE_BYTES,
    transfer::{granules_of, on_all_cores},
};

/// An image that is zeros at first.
pub(crate) trait Granules: Sync {
    /// How long it is.
    fn bytes(&self) -> u64;

    /// Has these granules be this content.
    ///
    /// # Errors
    ///
    /// What the host says, or that the snapshot is not wanted any more.
    fn put(&self, batch: &[(usize, &[u8])], saving: &Saving) -> io::Result<()>;

    /// Has this granule be zeros.
    ///
    /// # Errors
    ///
    /// As of [`Granules::put`].
    fn erase(&self, granule: usize, saving: &Saving) -> io::Result<()>;
}

/// How long a granule of an image of so many bytes is.
pub(crate) fn bytes_of(granule: usize, image_bytes: u64) -> usize {
    let start = granule as u64 * GRANULE_BYTES;
    image_bytes.saturating_sub(start).min(GRANULE_BYTES) as usize
}

/// Has the image be `content`, which knows what of it was put here before.
pub(crate) fn save(
    image: &impl Granules,
    content: &impl Content,
    saving: &Saving,
) -> io::Result<()> {
    let pieces = content.pieces(None, GRANULE_BYTES)?;
    let granules = |is: fn(&Piece) -> bool| {
        let mut at = 0;
        let ranges = pieces.iter().filter_map(|piece| {
            let start = at;
            at += piece.bytes();
            is(piece).then_some(start..at)
        });
        granules_of(&ranges.collect::<Vec<_>>())
    };
    let data = granules(|piece| matches!(piece, Piece::Data(_)));
    let copied = granules(|piece| matches!(piece, Piece::Copied(_)));
    let mut is_zero = vec![true; image.bytes().div_ceil(GRANULE_BYTES) as usize];
    for granule in data.iter().chain(&copied) {
        is_zero[*granule] = false;
    }
    for granule in (0..is_zero.len()).filter(|granule| is_zero[*granule]) {
        image.erase(granule, saving)?;
    }
    saving.begin(data.len() as u64 * GRANULE_BYTES);
    let read = |offset, buffer: &mut [u8]| content.read(offset, buffer).map(|()| true);
    write(image, &data, read, saving).map(drop)
}

/// Writes these granules, as `read` has them, on all cores. Each is copied first, so that what is kept of it agrees with itself even if
/// the guest should write meanwhile. One of which `read` says that it has none stays what it is. Returns how many were written.
pub(crate) fn write(
    image: &impl Granules,
    granules: &[usize],
    read: impl Fn(u64, &mut [u8]) -> io::Result<bool> + Sync,
    saving: &Saving,
) -> io::Result<u64> {
    let written = AtomicU64::new(0);
    on_all_cores(granules, |buffer, batch| {
        let mut had: Vec<(usize, &[u8])> = Vec::with_capacity(batch.len());
        for (granule, content) in batch.iter().zip(buffer.chunks_mut(GRANULE_BYTES as usize)) {
            let content = &mut content[..bytes_of(*granule, image.bytes())];
            if read(*granule as u64 * GRANULE_BYTES, content)? {
                had.push((*granule, content));
            }
        }
        written.fetch_add(had.len() as u64, Ordering::Relaxed);
        image.put(&had, saving)?;
        saving.advance(batch.len() as u64 * GRANULE_BYTES)
    })?;
    Ok(written.into_inner())
}
