//! A host that crashes: which of what was done to files is on its disk then.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::SECTORS;
use crate::tape::Event;

/// What of a file is on the disk, and what may be.
#[derive(Default)]
pub(super) struct Inode {
    durable: Vec<u8>,
    pending: Vec<(u64, Vec<u8>)>,
}

/// The state that a crash leaves.
#[derive(Default)]
pub(super) struct Host {
    pub(super) inodes: BTreeMap<u64, Inode>,
    names: BTreeMap<PathBuf, u64>,
    pending_names: Vec<Event>,
}

impl Host {
    pub(super) fn take(&mut self, event: &Event) {
        match event {
            Event::Created { inode, bytes } => {
                let durable = vec![0; *bytes as usize];
                self.inodes.insert(
                    *inode,
                    Inode {
                        durable,
                        pending: Vec::new(),
                    },
                );
            }
            Event::Wrote {
                inode,
                offset,
                bytes,
            } => self.pend(*inode, *offset, bytes.clone()),
            Event::Zeroed { inode, offset, len } => {
                self.pend(*inode, *offset, vec![0; *len as usize])
            }
            Event::Synced { inode } => {
                if let Some(inode) = self.inodes.get_mut(inode) {
                    for (offset, bytes) in std::mem::take(&mut inode.pending) {
                        inode.put(offset, &bytes);
                    }
                }
            }
            Event::Linked { .. } | Event::Renamed { .. } | Event::Removed { .. } => {
                self.pending_names.push(event.clone());
            }
            Event::SyncedNames => {
                for event in std::mem::take(&mut self.pending_names) {
                    self.name(&event);
                }
            }
            Event::Told(_) => {}
        }
    }

    fn pend(&mut self, inode: u64, offset: u64, bytes: Vec<u8>) {
        self.inodes
            .entry(inode)
            .or_default()
            .pending
            .push((offset, bytes));
    }

    fn name(&mut self, event: &Event) {
        match event {
            Event::Linked { inode, name } => {
                self.names.insert(name.clone(), *inode);
            }
            Event::Renamed { from, to } => {
                if let Some(inode) = self.names.remove(from) {
                    self.names.insert(to.clone(), inode);
                }
            }
            Event::Removed { name } => {
                self.names.remove(name);
            }
            _ => {}
        }
    }

    /// Some of what is pending reaches the disk, by the sector; of the names, those of the first operations.
    pub(super) fn crash(mut self, dir: &Path, mut random: impl FnMut() -> u32) {
        let names = std::mem::take(&mut self.pending_names);
        let kept = random() as usize % (names.len() + 1);
        for event in &names[..kept] {
            self.name(event);
        }
        let geometry = crate::layout::Geometry::of(SECTORS * 512).unwrap();
        let data = geometry.data_at()..geometry.map_at();
        for inode in self.inodes.values_mut() {
            // Sometimes all or nothing of it.
            let kind = random() % 4;
            for (offset, bytes) in std::mem::take(&mut inode.pending) {
                // Data by the sector; of what is not data, nothing is taken for granted.
                let piece = if data.contains(&offset) { 512 } else { 16 };
                for (piece, at) in bytes.chunks(piece).zip((offset..).step_by(piece)) {
                    if kind == 0 || (kind != 1 && random().is_multiple_of(2)) {
                        inode.put(at, piece);
                    }
                }
            }
        }
        let mut written: BTreeMap<u64, PathBuf> = BTreeMap::new();
        for (name, inode) in &self.names {
            let path = dir.join(name.file_name().unwrap());
            match written.get(inode) {
                Some(other) => std::fs::hard_link(other, &path).unwrap(),
                None => {
                    std::fs::write(&path, &self.inodes[inode].durable).unwrap();
                    written.insert(*inode, path);
                }
            }
        }
    }
}

impl Inode {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset as usize + bytes.len();
        if self.durable.len() < end {
            self.durable.resize(end, 0);
        }
        self.durable[offset as usize..end].copy_from_slice(bytes);
    }
}
