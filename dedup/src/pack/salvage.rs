//! Getting what is whole out of a pack that cannot be opened.

use super::open::longest_frame;
use crate::backend::ReadAt;
use crate::error::{Error, Result};
use crate::frame::{self, Decoder};
use crate::hash::is_zero;
use crate::name::FileId;
use crate::readable::read_readable;
use crate::store::Shared;

/// Scans the file of the pack `id` for frames, byte by byte where it has to. `found` gets each whole frame: its number, its chunks and
/// for each of them whether it lives (dead slots decode as zeros). What the disk has lost of the file is in no frame.
///
/// # Errors
///
/// [`Error::Key`]; the file cannot be read; `found` fails.
pub(crate) fn salvage(
    shared: &Shared,
    file: &dyn ReadAt,
    id: FileId,
    mut found: impl FnMut(u32, &[u8], &[bool]) -> Result<()>,
) -> Result<()> {
    let config = &shared.config;
    let sealer = shared.keys.get()?.map(|keys| keys.pack(id));
    let mut decoder = Decoder::new()?;
    let mut plain = vec![0; (config.frame_chunks() * config.chunk_size) as usize];
    // A window that always holds the longest frame at its beginning, unless the file ends before.
    let mut window = Vec::new();
    let mut window_at = 0;
    let mut at = 0;
    while at < file.size() {
        let ahead = longest_frame(config) as u64;
        let window_end = window_at + window.len() as u64;
        if window_end < file.size() && at + ahead > window_end {
            window.resize((4 * ahead).min(file.size() - at) as usize, 0);
            read_readable(file, &mut window, at).map_err(Error::file("read a damaged pack"))?;
            window_at = at;
        }
        let rest = &window[(at - window_at) as usize..];
        let header = frame::Header::parse(rest)
            .ok()
            .filter(|header| header.number < config.pack_frames());
        let stored =
            header.and_then(|header| rest.get(..usize::try_from(header.stored_len()).ok()?));
        let decoded = stored.and_then(|stored| {
            decoder
                .decode(stored, config.chunk_size, sealer.as_ref(), &mut plain)
                .ok()
        });
        match decoded {
            Some(header) => {
                let chunks = &plain[..usize::from(header.slots) * config.chunk_size as usize];
                let live: Vec<bool> = chunks
                    .chunks(config.chunk_size as usize)
                    .map(|chunk| !is_zero(chunk))
                    .collect();
                found(header.number, chunks, &live)?;
                at += header.stored_len();
            }
            None => at += 1,
        }
    }
    Ok(())
}
