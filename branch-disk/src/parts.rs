//! What of a disk has changed since one of its layers ended.

use crate::{
    Disk, LayerId,
    layout::SECTOR_BYTES,
    map::{BOTTOM, Owner, Run},
};

/// What some bytes of a disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As they were when the layer ended.
    Same,
    /// Zeros that nothing was ever written to.
    Zeros,
    /// Anything else.
    Data,
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Bytes.
    pub len: u64,
    /// What they are.
    pub kind: Kind,
}

impl Disk {
    /// Size of the disk when the layer `id` of its chain ended; `None` when it has no such layer below its head.
    pub fn bytes_at(&self, id: LayerId) -> Option<u64> {
        self.ended(id).map(|(_, bytes)| bytes)
    }

    fn ended(&self, id: LayerId) -> Option<(Owner, u64)> {
        let mut layers = self.layers().iter().zip(1..);
        let (layer, owner) = layers.find(|(layer, _)| layer.header.id == id)?;
        Some((owner, layer.header.geometry.bytes()))
    }

    /// The parts of the disk, one behind the other, neighbours of different kinds, as seen from the layer `since` of its
    /// chain. None is the same as in a layer that the chain does not have. Each but the last is whole `unit`s, which is a multiple
    /// of [`SECTOR_BYTES`]: a unit of which a sector has changed has.
    pub fn parts(&self, since: Option<LayerId>, unit: u64) -> Vec<Part> {
        let since = since.and_then(|id| self.ended(id));
        let unit = unit / SECTOR_BYTES;
        let end = self.bytes() / SECTOR_BYTES;
        let mut parts: Vec<Part> = Vec::new();
        let mut at = 0;
        while at < end {
            let (kind, stop) = self.run_of_a_kind(at, end, since);
            let whole = (stop - at) / unit * unit;
            let (kind, len) = match whole {
                _ if stop == end => (kind, end - at),
                // It changes within the unit.
                0 => (Kind::Data, unit.min(end - at)),
                whole => (kind, whole),
            };
            let len_bytes = len * SECTOR_BYTES;
            match parts.last_mut() {
                Some(last) if last.kind == kind => last.len += len_bytes,
                _ => parts.push(Part {
                    len: len_bytes,
                    kind,
                }),
            }
            at += len;
        }
        parts
    }

    /// What the sector `at` is, and the sector before which that changes, no later than `end`.
    fn run_of_a_kind(&self, at: u64, end: u64, since: Option<(Owner, u64)>) -> (Kind, u64) {
        let (kind, mut stop) = self.run_of_an_owner(at, end, since);
        while stop < end {
            let (next, after) = self.run_of_an_owner(stop, end, since);
            if next != kind {
                break;
            }
            stop = after;
        }
        (kind, stop)
    }

    fn run_of_an_owner(&self, at: u64, end: u64, since: Option<(Owner, u64)>) -> (Kind, u64) {
        let Run { owner, end, .. } = self.map.run_at(at, end);
        let (last, then) = since.unwrap_or((BOTTOM, 0));
        let sectors = then / SECTOR_BYTES;
        if since.is_some() && owner <= last && at < sectors {
            return (Kind::Same, end.min(sectors));
        }
        let base = self.bottom().map_or(0, |base| base.bytes / SECTOR_BYTES);
        match owner {
            BOTTOM if at >= base => (Kind::Zeros, end),
            BOTTOM => (Kind::Data, end.min(base)),
            _ => (Kind::Data, end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Foundation, Mode, anything};

    const UNIT: u64 = 4096;

    fn part(units: u64, kind: Kind) -> Part {
        Part {
            len: units * UNIT,
            kind,
        }
    }

    #[test]
    fn what_was_written_since_a_layer_ended_is_told_by_the_unit() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().join("base");
        std::fs::write(&base, vec![1; 4 * UNIT as usize]).unwrap();
        let path = directory.path().join("disk");
        let on = Foundation::Raw(base);
        let mut disk = Disk::create(&path, Some(10 * UNIT), &on, &anything).unwrap();
        disk.write(6 * UNIT, &mut &[2; UNIT as usize][..]).unwrap();
        let all = [
            (4, Kind::Data),
            (2, Kind::Zeros),
            (1, Kind::Data),
            (3, Kind::Zeros),
        ];
        let all = all.map(|(units, kind)| part(units, kind));
        assert_eq!(disk.parts(None, UNIT), all);
        let monday = disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap();
        assert_eq!(disk.parts(Some(monday.id), UNIT), [part(10, Kind::Same)]);
        assert_eq!(disk.bytes_at(monday.id), Some(10 * UNIT));

        // A sector of one unit, and the last unit.
        disk.write(2 * UNIT + 512, &mut &[3; 512][..]).unwrap();
        disk.write(9 * UNIT, &mut &[3; UNIT as usize][..]).unwrap();
        let changed = [
            (2, Kind::Same),
            (1, Kind::Data),
            (6, Kind::Same),
            (1, Kind::Data),
        ];
        let changed = changed.map(|(units, kind)| part(units, kind));
        assert_eq!(disk.parts(Some(monday.id), UNIT), changed);
        // Of a layer that is not its own, nothing is known.
        let unknown = disk.parts(Some(LayerId([9; 16])), UNIT);
        assert!(unknown.iter().all(|part| part.kind != Kind::Same));
        assert_eq!(disk.bytes_at(LayerId([9; 16])), None);
    }

    #[test]
    fn what_a_disk_has_grown_by_was_not_there_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let mut disk =
            Disk::create(&path, Some(3 * UNIT), &Foundation::Nothing, &anything).unwrap();
        disk.write(0, &mut &[1; 512][..]).unwrap();
        let small = disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap();
        drop(disk);
        let larger = directory.path().join("larger");
        let on = Foundation::Layer(small.path, Some(small.id));
        let disk = Disk::create(&larger, Some(5 * UNIT + 512), &on, &anything).unwrap();
        let parts = disk.parts(Some(small.id), UNIT);
        let grown = Part {
            len: 2 * UNIT + 512,
            kind: Kind::Zeros,
        };
        assert_eq!(parts, [part(3, Kind::Same), grown]);
        drop(disk);
        assert!(Disk::open(&larger, Mode::Read, &anything).is_ok());
    }
}
