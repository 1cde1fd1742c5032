//! Blocks of one image or of several, on all threads.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Writer;
use super::parent::Parent;
use super::session::{BlockAt, Session};
use super::worker::{Block, EncodedBlock, Source, Worker, packs_of};
use crate::error::{Error, Result};
use crate::recipe::{BLOCK_CHUNKS, Place};

/// What there is to do for a block.
pub(super) enum Work<'a> {
    Encode {
        source: Source<'a>,
        kept: Option<&'a [bool]>,
    },
    Zeros {
        chunks: u64,
    },
    Keep,
}

/// A block of an image in work.
pub(super) struct Task<'a> {
    pub(super) at: BlockAt,
    /// The parent's image, if there is one.
    pub(super) parent: Option<&'a Parent>,
    pub(super) work: &'a Work<'a>,
}

/// Does all of the tasks, each by whichever thread is free; gives their blocks in order.
pub(super) fn encode_all(writer: &Writer, tasks: &[Task<'_>]) -> Result<Vec<EncodedBlock>> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let done: Mutex<Vec<(usize, EncodedBlock)>> = Mutex::new(Vec::with_capacity(tasks.len()));
    let work_on = || -> Result<()> {
        let mut worker = writer.take_worker()?;
        let mut mine = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(task) = tasks.get(number) else {
                break;
            };
            let encoded = encode(&mut worker, &writer.session, task);
            mine.push((
                number,
                encoded.inspect_err(|_| failed.store(true, Ordering::Relaxed))?,
            ));
        }
        writer.return_worker(worker);
        done.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .append(&mut mine);
        Ok(())
    };
    let threads = writer.session.shared.threads.min(tasks.len());
    crate::threads::on(threads, work_on)?;
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_unstable_by_key(|(number, _)| *number);
    Ok(done.into_iter().map(|(_, block)| block).collect())
}

fn encode(worker: &mut Worker, session: &Session, task: &Task<'_>) -> Result<EncodedBlock> {
    let (at, block) = (task.at, task.at.block as usize);
    let parent = task.parent.filter(|parent| parent.block_chunks(block) > 0);
    match *task.work {
        Work::Zeros { chunks } => Ok(EncodedBlock {
            stored: Vec::new(),
            packs: Vec::new(),
            zero_chunks: chunks,
            new_chunks: 0,
        }),
        Work::Encode { source, kept } => {
            let kept = kept.filter(|kept| kept.contains(&true));
            encode_source(worker, session, parent, at, source, kept)
        }
        Work::Keep => {
            let kept = [true; BLOCK_CHUNKS];
            let Some(parent) = parent else {
                unreachable!("`keep` has checked that there is one")
            };
            let (form, places) = parent.block(session, block, &mut worker.coder)?;
            let all: Option<Vec<Place>> = places.iter().copied().collect();
            match all.filter(|_| parent.has_same_numbers()) {
                Some(places) => {
                    check_there(session, &places)?;
                    Ok(EncodedBlock {
                        packs: packs_of(&places, session.shared.config.pack_slots()),
                        zero_chunks: places.iter().filter(|place| place.is_zero()).count() as u64,
                        new_chunks: 0,
                        stored: session.seal_block(at, form)?,
                    })
                }
                None => {
                    let zeros = vec![0; BLOCK_CHUNKS * session.shared.config.chunk_size as usize];
                    let source = Source::Bytes(&zeros);
                    encode_source(worker, session, Some(parent), at, source, Some(&kept))
                }
            }
        }
    }
}

/// Encodes a block of which some chunks may be kept.
fn encode_source(
    worker: &mut Worker,
    session: &Session,
    parent: Option<&Parent>,
    at: BlockAt,
    source: Source<'_>,
    kept: Option<&[bool]>,
) -> Result<EncodedBlock> {
    let looked_for = |worker: &mut Worker, parent| {
        let block = Block {
            at,
            source,
            kept: None,
            parent,
        };
        worker.encode(session, &block)
    };
    let Some(parent) = parent else {
        return looked_for(worker, None);
    };
    let (_, places) = match parent.block(session, at.block as usize, &mut worker.coder) {
        // What cannot be read was to be a guess alone.
        Err(_) if kept.is_none() => {
            return looked_for(worker, None);
        }
        other => other?,
    };
    let guesses: Vec<Place> = places
        .iter()
        .map(|place| place.unwrap_or(Place::ZERO))
        .collect();
    let guesses = Some(guesses.as_slice());
    let (Some(kept), Source::Bytes(bytes)) = (kept, source) else {
        return looked_for(worker, guesses);
    };
    let is_kept = |at: usize| kept.get(at) == Some(&true);
    let kept_places: Vec<Place> = (places.iter().enumerate())
        .filter(|(at, _)| is_kept(*at))
        .filter_map(|(_, place)| *place)
        .collect();
    check_there(session, &kept_places)?;
    // Chunks that a collection is about to take are still there to be read: store them again.
    let mut kept = kept.to_vec();
    let mut bytes = std::borrow::Cow::Borrowed(bytes);
    let chunk_size = session.shared.config.chunk_size as usize;
    for number in (0..kept.len())
        .filter(|&number| kept[number] && places[number].is_none())
        .collect::<Vec<_>>()
    {
        let end = ((number + 1) * chunk_size).min(bytes.len());
        let chunk = &mut bytes.to_mut()[number * chunk_size..end];
        let offset = (at.block as usize * BLOCK_CHUNKS + number) as u64 * chunk_size as u64;
        parent.reader().read_at(offset, chunk)?;
        kept[number] = false;
    }
    let block = Block {
        at,
        source: Source::Bytes(&bytes),
        kept: Some(&kept),
        parent: guesses,
    };
    worker.encode(session, &block)
}

/// Checks that chunks which are to be referred to unseen are there.
fn check_there(session: &Session, places: &[Place]) -> Result<()> {
    let pack_slots = session.shared.config.pack_slots();
    let mut looked_at = None;
    for (pack, slot) in places.iter().filter_map(|place| place.get(pack_slots)) {
        let ids = match &looked_at {
            Some((number, ids)) if *number == pack => ids,
            _ => &looked_at.insert((pack, session.ids(pack))).1,
        };
        if ids.as_ref().and_then(|ids| ids.get(slot)).is_none() {
            return Err(Error::Damaged {
                file: "the parent".into(),
                what: "a chunk that is to be kept is not there; save without a parent instead",
            });
        }
    }
    Ok(())
}
