//! A sealed layer that is not here, made of what somebody else has kept of it.

use std::{io, path::Path, sync::Arc};

use crate::{
    LayerId, Rule,
    bits::Bits,
    convert::{Copied, copy},
    create::{Draft, absolute},
    error::Error,
    header::{Header, Parent},
    layer::Layer,
    layout::{Geometry, SECTOR_BYTES},
    media::Lock,
    seal::Seal,
};

/// Makes the layer `id`, sealed, at `path`, of a disk of `bytes` and of the content that `read` gives: it is called with an
/// offset and with a buffer to fill. The layer stands on nothing. It is durable when it gets its name, and whole.
///
/// # Errors
///
/// [`Error`]; [`Error::Exists`] when there is anything at `path`.
pub fn rebuild(
    path: &Path,
    id: LayerId,
    bytes: u64,
    read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    rule: &Rule<'_>,
) -> Result<Copied, Error> {
    let path = absolute(path)?;
    if !rule(&path) {
        return Err(Error::NotAllowed { path });
    }
    let geometry = Geometry::of(bytes).ok_or(Error::Size(bytes))?;
    let header = Header {
        id,
        geometry,
        depth: 1,
        below: 0,
        parent: Parent::Nothing,
    };
    // Of those that others are at work on, one gets the name. What a crash has left of another is nobody's.
    crate::name::sweep(&path);
    let draft = Draft::of_its_own(&path, &header)?;
    draft.lock(Lock::Shared)?;
    let layer = Arc::new(Layer::open(draft.path(), true, Lock::Not)?);
    let mut bits = Bits::none(geometry);
    let write = |offset: u64, mut data: &[u8]| {
        let sector = offset / SECTOR_BYTES;
        bits.set(sector, sector + data.len() as u64 / SECTOR_BYTES);
        layer.media.drain(&mut data, geometry.data_at() + offset)
    };
    let copied = copy(bytes, Ok, read, write).map_err(Error::io("rebuild", &path))?;
    let draft_path = draft.path().to_owned();
    Seal::new(vec![Arc::clone(&layer)], layer, draft_path, bits).finish()?;
    draft.publish(&path)?;
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Disk, Foundation, Mode, anything, check};

    const BYTES: u64 = 3 << 20;

    fn content() -> Vec<u8> {
        let mut content: Vec<u8> = (0..BYTES).map(|at| (at / 700) as u8).collect();
        content[1 << 20..2 << 20].fill(0);
        content
    }

    #[test]
    fn a_layer_that_was_lost_is_what_it_was_and_others_can_stand_on_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let mut disk = Disk::create(&path, Some(BYTES), &Foundation::Nothing, &anything).unwrap();
        disk.write(0, &mut &content()[..]).unwrap();
        let layer = disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap();
        drop(disk);
        std::fs::remove_file(&layer.path).unwrap();

        let elsewhere = directory.path().join("elsewhere");
        let kept = content();
        let read = |offset: u64, piece: &mut [u8]| {
            piece.copy_from_slice(&kept[offset as usize..][..piece.len()]);
            Ok(())
        };
        let copied = rebuild(&elsewhere, layer.id, BYTES, read, &anything).unwrap();
        assert!(copied.data_bytes < BYTES);
        let again = rebuild(&elsewhere, layer.id, BYTES, read, &anything);
        assert!(matches!(again, Err(Error::Exists { .. })));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
        check(&elsewhere, &anything).unwrap();
        for mode in [Mode::Read, Mode::Write] {
            let read_only = mode == Mode::Read;
            let disk = match mode {
                Mode::Read => Disk::open(&elsewhere, mode, &anything).unwrap(),
                Mode::Write => Disk::branch(&elsewhere, Some(layer.id), &anything).unwrap(),
            };
            assert_eq!(disk.read_only(), read_only);
            let mut found = vec![0; BYTES as usize];
            disk.read(0, &mut &mut found[..]).unwrap();
            assert!(found == content());
        }
    }

    #[test]
    fn neither_who_was_killed_nor_who_is_at_work_is_in_the_way() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let id = LayerId([1; 16]);
        for draft in [id, LayerId([2; 16])] {
            std::fs::write(crate::name::draft(&path, draft), "half of it").unwrap();
        }
        let nothing = |_, _: &mut [u8]| Ok(());
        let mut first = None;
        let read = |offset, _: &mut [u8]| {
            if offset == 0 {
                first = Some(rebuild(&path, id, BYTES, nothing, &anything));
            }
            Ok(())
        };
        let second = rebuild(&path, id, BYTES, read, &anything);
        first.unwrap().unwrap();
        assert!(matches!(second, Err(Error::Exists { .. })), "{second:?}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_read_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let read = |offset, _: &mut [u8]| match offset {
            0 => Ok(()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        };
        let failed = rebuild(&path, LayerId([1; 16]), BYTES, read, &anything);
        assert!(matches!(failed, Err(Error::Io { .. })), "{failed:?}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let nothing = |_, _: &mut [u8]| Ok(());
        let crooked = rebuild(&path, LayerId([1; 16]), BYTES + 1, nothing, &anything);
        assert!(matches!(crooked, Err(Error::Size(_))));
        let forbidden = rebuild(&path, LayerId([1; 16]), BYTES, nothing, &|_| false);
        assert!(matches!(forbidden, Err(Error::NotAllowed { .. })));
    }
}
