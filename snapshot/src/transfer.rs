//! Memory images granule by granule, on all cores; and how one is read and checked.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use rustix::fs::SeekFrom;

use crate::{
    Error,
    image_file::write_pages,
    table::{GRANULE_BYTES, Table, digest},
};

/// Granules that a thread takes at a time: enough that taking costs nothing, few enough that the
/// last ones are shared.
const BATCH: usize = 16;

/// Reads the ranges `data` of `file`, which is at `path`, to their places in `image`.
pub(crate) fn read_data(
    file: &File,
    path: &Path,
    data: &[Range<u64>],
    image: &mut [u8],
) -> Result<(), Error> {
    for range in data {
        let content = &mut image[range.start as usize..range.end as usize];
        file.read_exact_at(content, range.start)
            .map_err(Error::io("read", path))?;
    }
    Ok(())
}

/// The first granule of `file` that is not what `table` says, if there is one. What is read is written to `copy`, if there is one,
/// at the same places.
pub(crate) fn find_damage(
    file: &File,
    table: &Table,
    memory_bytes: u64,
    copy: Option<&File>,
) -> io::Result<Option<usize>> {
    let data = data_of(file, memory_bytes)?;
    let mut granules = granules_of(&data);
    // A granule that should have data but lies in a hole is damaged as well.
    granules.extend((0..table.digests.len()).filter(|granule| !table.is_hole(*granule)));
    granules.sort_unstable();
    granules.dedup();
    let damaged = AtomicUsize::new(usize::MAX);
    on_all_cores(&granules, |buffer, batch| {
        for granule in batch {
            let start = *granule as u64 * GRANULE_BYTES;
            let content = &mut buffer[..(memory_bytes - start).min(GRANULE_BYTES) as usize];
            file.read_exact_at(content, start)?;
            if table.digests.get(*granule) != Some(&digest(content)) {
                damaged.fetch_min(*granule, Ordering::Relaxed);
            }
            if let Some(copy) = copy {
                write_pages(copy, content, start)?;
            }
        }
        Ok(())
    })?;
    let damaged = damaged.into_inner();
    Ok((damaged != usize::MAX).then_some(damaged))
}

/// The granules that `ranges` touch, ascending, each once.
pub(crate) fn granules_of(ranges: &[Range<u64>]) -> Vec<usize> {
    let mut granules: Vec<usize> = Vec::new();
    for range in ranges {
        let first = (range.start / GRANULE_BYTES) as usize;
        let end = range.end.div_ceil(GRANULE_BYTES) as usize;
        let next = granules.last().map_or(0, |last| last + 1);
        granules.extend(first.max(next)..end);
    }
    granules
}

/// The ranges of `file` below `end` that are no holes.
pub(crate) fn data_of(file: &File, end: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < end {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let stop = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(end);
        if start >= end || stop <= start {
            break;
        }
        ranges.push(start..stop);
        at = stop;
    }
    Ok(ranges)
}

/// Does `work` for `granules` on all cores, batch by batch, each thread with a buffer of a batch. Stops
/// at the first error and returns it.
pub(crate) fn on_all_cores(
    granules: &[usize],
    work: impl Fn(&mut [u8], &[usize]) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let one_thread = || {
        let mut buffer = vec![0; BATCH * GRANULE_BYTES as usize];
        loop {
            let first = next.fetch_add(BATCH, Ordering::Relaxed);
            let batch = granules.get(first..granules.len().min(first + BATCH));
            let Some(batch) = batch.filter(|batch| !batch.is_empty()) else {
                return Ok(());
            };
            if failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            work(&mut buffer, batch).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        }
    };
    thread::scope(|scope| {
        // Those that the host does not give, the others do the work of.
        let threads: Vec<_> = (1..threads.min(granules.len().div_ceil(BATCH)))
            .map_while(|_| thread::Builder::new().spawn_scoped(scope, one_thread).ok())
            .collect();
        let ours = one_thread();
        let theirs = threads.into_iter().map(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a copying thread panicked")))
        });
        theirs.fold(ours, |first, result| first.and(result))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_share_a_granule_name_it_once() {
        let g = GRANULE_BYTES;
        assert_eq!(
            granules_of(&[0..1, 2..3, g - 1..g + 1, 4 * g..5 * g]),
            [0, 1, 4]
        );
    }

    #[test]
    fn the_first_error_is_returned() {
        let granules: Vec<usize> = (0..1000).collect();
        let result = on_all_cores(&granules, |_, batch| match batch.contains(&500) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        });
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn every_granule_is_worked_on_once() {
        let granules: Vec<usize> = (0..1000).collect();
        let seen: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        on_all_cores(&granules, |_, batch| {
            for granule in batch {
                seen[*granule].fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })
        .unwrap();
        assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    }
}
