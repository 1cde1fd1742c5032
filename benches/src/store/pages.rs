//! Files of images, and what is in their pages.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;

/// Pages in a frame of the store.
pub(super) const FRAME_PAGES: usize = 4;

/// The files in `directory`, by name.
pub(super) fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let context = || format!("cannot list {}", directory.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(context)? {
        files.push(entry.with_context(context)?.path());
    }
    files.sort_unstable();
    Ok(files)
}

/// Bytes of all files under `path`.
pub(super) fn bytes_under(path: &Path) -> Result<u64> {
    let context = || format!("cannot look at {}", path.display());
    if !path.is_dir() {
        return Ok(path.symlink_metadata().with_context(context)?.len());
    }
    files(path)?.iter().map(|entry| bytes_under(entry)).sum()
}

/// Has the kernel touch this much memory, by a file in `directory`, which must be one in memory. A virtual machine's
/// host takes memory back that lies idle, and a page that it has to find anew costs several times what it does else:
/// who comes first would pay for all.
pub(super) fn warm(directory: &Path, bytes: u64) -> Result<()> {
    let context = || format!("cannot fill memory by {}", directory.display());
    let path = directory.join("warm");
    let mut file = File::create(&path).with_context(context)?;
    let piece = vec![0; 1 << 20];
    let filled = (0..bytes.div_ceil(piece.len() as u64)).try_for_each(|_| file.write_all(&piece));
    std::fs::remove_file(&path).with_context(context)?;
    filled.with_context(context)
}

/// Whether there is nothing but zeros.
pub(super) fn is_zero(page: &[u8]) -> bool {
    // Bytes that are folded by the dozen are compared by the vector; one at a time they would not be.
    let (blocks, rest) = page.as_chunks::<128>();
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// Runs `work` on equal shares of `items`, a thread each, on all CPUs; gives what came of the shares, in order.
pub(super) fn on_all_cpus<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&[T]) -> R + Sync,
) -> Vec<R> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let share = items.len().div_ceil(cpus).max(1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = items
            .chunks(share)
            .map(|share| scope.spawn(|| work(share)))
            .collect();
        let joined = threads.into_iter().map(|thread| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        joined.collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_is_not_zero() {
        let mut page = vec![0; PAGE + 3];
        assert!(is_zero(&page));
        for at in [0, 129, PAGE - 1, PAGE + 2] {
            page[at] = 0x80;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }

    #[test]
    fn warming_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        warm(directory.path(), 3_000_000).unwrap();
        assert_eq!(bytes_under(directory.path()).unwrap(), 0);
    }

    #[test]
    fn shares_come_back_in_order() {
        let items: Vec<u32> = (0..1001).collect();
        let shares = on_all_cpus(&items, <[u32]>::to_vec);
        assert_eq!(shares.concat(), items);
        assert!(on_all_cpus(&[], <[u32]>::len).is_empty());
    }
}
