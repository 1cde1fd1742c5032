//! A snapshot in work that comes: what was said of it is put together, in the order in which it has to be said.

use std::{collections::BTreeMap, path::Path};

use saved_state::{Container, HEADER_BYTES, MAX_BODY_BYTES, SnapshotId};

use super::{
    line::PeerError,
    message::{Message, Pages},
    spool::Spool,
};
use crate::{
    Content, Draft, Error, Piece, Saving, Unpublished, granules::bytes_of, table::GRANULE_BYTES,
};

/// The most disks that a snapshot can have: more than a machine can.
const MAX_DISKS: u32 = 64;

/// Where disks are until all has come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spools<'a> {
    pub(crate) directory: &'a Path,
    /// How many bytes all of them may have together.
    pub(crate) bytes: u64,
}

/// What has come of a snapshot. Dropped, it leaves nothing.
#[derive(Debug)]
pub(crate) struct Reception<'a> {
    id: SnapshotId,
    memory_bytes: u64,
    draft: Draft,
    state: Vec<u8>,
    disks: BTreeMap<u32, Spool>,
    /// If disks are kept.
    spools: Option<Spools<'a>>,
    granule: Vec<u8>,
}

/// What a sender said that cannot be, or what the host says.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error(transparent)]
    Here(#[from] Error),
    #[error("the state that was sent {0}")]
    State(String),
}

impl<'a> Reception<'a> {
    /// Of the snapshot `id`, into `draft`, of a machine with so many bytes of memory.
    pub(crate) fn begin(
        id: SnapshotId,
        memory_bytes: u64,
        mut draft: Draft,
        spools: Option<Spools<'a>>,
    ) -> Result<Self, Error> {
        draft.begin_copies(memory_bytes)?;
        Ok(Self {
            id,
            memory_bytes,
            draft,
            state: Vec::new(),
            disks: BTreeMap::new(),
            spools,
            granule: vec![0; GRANULE_BYTES as usize],
        })
    }

    /// Takes what was said; `false` if that was all.
    pub(crate) fn take(&mut self, message: &Message<'_>) -> Result<bool, Refusal> {
        match *message {
            Message::Granule { number, content } if self.state.is_empty() => {
                self.take_memory(number, content)?;
            }
            Message::Granule { number, content } => self.take_disk(number, content)?,
            Message::State(part) if self.disks.is_empty() => self.take_state(part)?,
            Message::Disk { number, bytes } if !self.state.is_empty() => {
                self.begin_disk(number, bytes)?;
            }
            Message::End if !self.state.is_empty() => return Ok(false),
            _ => return Err(PeerError::Nonsense.into()),
        }
        Ok(true)
    }

    fn take_memory(&mut self, number: u32, pages: Pages<'_>) -> Result<(), Refusal> {
        let bytes = bytes_of(number as usize, self.memory_bytes);
        let content = &mut self.granule[..bytes];
        if bytes == 0 || !pages.fill(content) {
            return Err(PeerError::Nonsense.into());
        }
        Ok(self.draft.put(number as usize, content)?)
    }

    fn take_state(&mut self, part: &[u8]) -> Result<(), Refusal> {
        let most = HEADER_BYTES + MAX_BODY_BYTES as usize;
        if self.state.len() + part.len() > most {
            return Err(PeerError::Nonsense.into());
        }
        self.state.extend_from_slice(part);
        Ok(())
    }

    fn begin_disk(&mut self, number: u32, bytes: u64) -> Result<(), Refusal> {
        let next = self.disks.keys().last().is_none_or(|last| number > *last);
        let spools = self.spools.as_mut();
        let spools = spools.filter(|_| next && number < MAX_DISKS);
        let spools = spools.ok_or(PeerError::Nonsense)?;
        let left = spools.bytes.checked_sub(bytes);
        spools.bytes = left.ok_or_else(|| {
            let reason =
                "the machine's disks have more bytes than are received here; raise --max-disks";
            Error::Refused(reason.to_owned())
        })?;
        let name = format!("{}.disk{number}", self.id);
        let disk = Spool::begin(&spools.directory.join(name), bytes)?;
        self.disks.insert(number, disk.ok_or(PeerError::Nonsense)?);
        Ok(())
    }

    fn take_disk(&mut self, number: u32, pages: Pages<'_>) -> Result<(), Refusal> {
        let disk = self.disks.values().last().ok_or(PeerError::Nonsense)?;
        let bytes = disk.granule(number).ok_or(PeerError::Nonsense)?;
        let content = &mut self.granule[..bytes];
        match pages.fill(content) {
            true => Ok(disk.put(number, content)?),
            false => Err(PeerError::Nonsense.into()),
        }
    }

    /// Makes the snapshot of it, of which nothing is to be seen yet.
    pub(crate) fn make(self, saving: &Saving) -> Result<Unpublished, Refusal> {
        let state = Container::from_bytes(&self.state)
            .map_err(|error| Refusal::State(format!("cannot be believed: {error}")))?;
        if state.header.id != self.id || state.header.memory_bytes != self.memory_bytes {
            return Err(Refusal::State("is that of another machine".to_owned()));
        }
        let memory = Memory(self.draft.copied());
        let mut unpublished = self.draft.write(&state, &memory, saving)?;
        for (number, disk) in &self.disks {
            unpublished.write_disk(*number as usize, disk, saving)?;
        }
        Ok(unpublished)
    }
}

/// Memory, all of which was copied.
struct Memory(Vec<Piece>);

impl Content for Memory {
    fn pieces(&self, _: Option<u64>, _: u64) -> std::io::Result<Vec<Piece>> {
        Ok(self.0.clone())
    }

    fn read(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
        Err(std::io::ErrorKind::NotFound.into())
    }
}
