//! The map of a whole chain, as a sealed layer has it.

use std::{io::ErrorKind, os::unix::fs::FileExt};

use crate::{
    error::Error,
    layer::{Descriptor, Layer},
    layout::PAGE_BYTES,
    map::{BOTTOM, Map, Owner, Run},
    media::Media,
    page::{self, CONTENT_BYTES, Found, PageKind},
};

/// Two varints of at most ten bytes each.
const MAX_RUN_BYTES: usize = 20;

/// Writes `map`, the one of `layers`, through `media`, which is the last's file.
pub(crate) fn write(
    layers: &[impl AsRef<Layer>],
    media: &Media,
    map: &Map,
) -> Result<Descriptor, Error> {
    let Some(layer) = layers.last().map(AsRef::as_ref) else {
        return Err(Error::damaged(media.path(), "it has no layers"));
    };
    let depth_of = |owner: Owner| {
        let owner = usize::from(owner).checked_sub(1);
        let layer = owner.and_then(|index| layers.get(index));
        layer.map_or(0, |layer| layer.as_ref().header.depth)
    };
    let geometry = layer.header.geometry;
    let mut content = Vec::with_capacity(CONTENT_BYTES);
    let mut descriptor = Descriptor { pages: 0, runs: 0 };
    let put = |content: &mut Vec<u8>, number: u64| {
        let label = layer.label(PageKind::Runs, number);
        let at = geometry.map_at() + number * PAGE_BYTES as u64;
        media.write(&page::encode(label, 1, content)[..], at)?;
        content.clear();
        Ok::<_, Error>(())
    };
    for run in map.runs(0, geometry.sectors()) {
        if content.len() + MAX_RUN_BYTES > CONTENT_BYTES {
            put(&mut content, descriptor.pages)?;
            descriptor.pages += 1;
        }
        if content.is_empty() {
            content.extend(run.start.to_le_bytes());
        }
        put_varint(&mut content, run.end - run.start);
        put_varint(&mut content, depth_of(run.owner).into());
        descriptor.runs += 1;
    }
    put(&mut content, descriptor.pages)?;
    descriptor.pages += 1;
    Ok(descriptor)
}

/// Reads the map of `layers`' last.
pub(crate) fn load(layers: &[impl AsRef<Layer>], descriptor: Descriptor) -> Result<Map, Error> {
    let mut map = Map::default();
    let Some(layer) = layers.last().map(AsRef::as_ref) else {
        return Ok(map);
    };
    let geometry = layer.header.geometry;
    let damaged = |what| Error::damaged(layer.path(), what);
    let owners: Vec<_> = layers
        .iter()
        .map(|layer| {
            let header = &layer.as_ref().header;
            (header.depth, header.geometry.sectors())
        })
        .collect();
    let mut reader = Reader {
        owners: &owners,
        at: 0,
        end: geometry.sectors(),
        last: None,
        runs: 0,
    };
    for number in 0..descriptor.pages {
        let mut page = [0; PAGE_BYTES];
        let at = number
            .checked_mul(PAGE_BYTES as u64)
            .and_then(|at| at.checked_add(geometry.map_at()))
            .ok_or_else(|| damaged("its map is impossibly long"))?;
        layer
            .media
            .file()
            .read_exact_at(&mut page, at)
            .map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => damaged("its map was cut short"),
                _ => Error::io("read the map of", layer.path())(error),
            })?;
        match page::decode(layer.label(PageKind::Runs, number), &page) {
            Found::Whole(page) => reader.page(page.content, &mut map).map_err(damaged)?,
            Found::Nothing | Found::Broken => return Err(damaged("a page of its map is broken")),
        }
    }
    if reader.at != reader.end {
        return Err(damaged("its map ends too early"));
    }
    if reader.runs != descriptor.runs {
        let what = "its map has more runs than its descriptor says, or fewer";
        return Err(damaged(what));
    }
    Ok(map)
}

/// Where the reading of a map has come to.
struct Reader<'a> {
    /// The depth of each layer, ever greater, and its sectors.
    owners: &'a [(u32, u64)],
    at: u64,
    end: u64,
    /// The depth of the last run's owner.
    last: Option<u32>,
    runs: u64,
}

impl Reader<'_> {
    fn page(&mut self, content: &[u8], map: &mut Map) -> Result<(), &'static str> {
        let (first, mut rest) = content
            .split_first_chunk()
            .ok_or("a page of its map is too short")?;
        if u64::from_le_bytes(*first) != self.at {
            return Err("its map has a gap");
        }
        while !rest.is_empty() {
            let run = self.run(&mut rest)?;
            if run.owner != BOTTOM {
                map.set(run.start, run.end, run.owner);
            }
        }
        Ok(())
    }

    fn run(&mut self, rest: &mut &[u8]) -> Result<Run, &'static str> {
        let bad = "its map has an impossible run";
        let count = take_varint(rest).ok_or(bad)?;
        let depth = take_varint(rest).and_then(|depth| u32::try_from(depth).ok());
        let depth = depth.ok_or(bad)?;
        let (owner, size) = match depth {
            0 => (BOTTOM, self.end),
            depth => self.owner(depth).ok_or(bad)?,
        };
        let end = self.at.checked_add(count).filter(|end| *end <= self.end);
        let end = end.ok_or(bad)?;
        if count == 0 || end > size || self.last == Some(depth) {
            return Err(bad);
        }
        let start = std::mem::replace(&mut self.at, end);
        self.last = Some(depth);
        self.runs += 1;
        Ok(Run { start, end, owner })
    }

    /// The layer of that depth, or that into which it was merged, and its sectors.
    fn owner(&self, depth: u32) -> Option<(Owner, u64)> {
        let index = self.owners.partition_point(|(of, _)| *of < depth);
        let (_, sectors) = *self.owners.get(index)?;
        Some((Owner::try_from(index + 1).ok()?, sectors))
    }
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return None;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            // No more bytes than needed.
            return (*byte != 0 || shift == 0).then_some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn a_varint_has_one_form() {
        for value in [0, 1, 127, 128, 300, u64::MAX >> 1, u64::MAX] {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            assert_eq!(take_varint(&mut &bytes[..]), Some(value));
            assert_eq!(take_varint(&mut &bytes[..bytes.len() - 1]), None);
        }
        for bytes in [
            &[0x80, 0][..],
            &[0xff; 11],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2],
        ] {
            assert_eq!(take_varint(&mut &*bytes), None, "{bytes:?}");
        }
    }

    /// Of layers of these depths and sectors.
    fn reader(owners: &[(u32, u64)]) -> Reader<'_> {
        Reader {
            owners,
            at: 0,
            end: 100,
            last: None,
            runs: 0,
        }
    }

    fn read(runs: &[u8]) -> Result<(), &'static str> {
        let content = [&[0; 8], runs].concat();
        reader(&[(1, 50), (2, 100)]).page(&content, &mut Map::default())
    }

    #[test]
    fn a_run_that_cannot_be_is_refused() {
        read(&[50, 1, 50, 2]).unwrap();
        for (what, runs) in [
            ("beyond the owner's end", &[51, 1][..]),
            ("beyond the disk's end", &[101, 2]),
            ("nobody's", &[50, 3]),
            ("of nothing", &[0, 1]),
            ("like its neighbour", &[10, 2, 10, 2]),
            ("cut", &[10]),
        ] {
            assert!(read(runs).is_err(), "{what}");
        }
        let later = [&[1, 0, 0, 0, 0, 0, 0, 0][..], &[50, 1]].concat();
        let other = reader(&[(1, 100)]).page(&later, &mut Map::default());
        assert!(other.is_err());
    }

    #[test]
    fn what_was_merged_is_the_layer_s_that_took_it_in() {
        // Layers 2 to 5 are one, and as large as that.
        let owners = [(1, 50), (5, 80), (6, 100)];
        let runs = [10, 1, 10, 2, 10, 5, 10, 3, 40, 6, 20, 0];
        let content = [&[0; 8][..], &runs].concat();
        let mut map = Map::default();
        reader(&owners).page(&content, &mut map).unwrap();
        let found: Vec<_> = map.runs(0, 100).map(|run| (run.end, run.owner)).collect();
        assert_eq!(found, [(10, 1), (40, 2), (80, 3), (100, BOTTOM)]);
        for (what, runs) in [("nobody's", [10, 7]), ("beyond its end", [81, 4])] {
            let content = [&[0; 8][..], &runs].concat();
            let read = reader(&owners).page(&content, &mut Map::default());
            assert!(read.is_err(), "{what}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
            let _ = reader(&[(1, 100)]).page(&bytes, &mut Map::default());
        }
    }
}
