//! Coding the places of 1,024 chunks.

use zstd::bulk::{Compressor, Decompressor};

use super::Place;
use crate::bytes::{Cursor, put_varint, unzigzag, zigzag};
use crate::error::{Error, Malformed, Result};
use crate::seal::OVERHEAD;

/// Chunks in a block. Small enough that decoding one is a fraction of decoding a frame.
pub(crate) const BLOCK_CHUNKS: usize = 1024;

/// Bounds a plain block: each run takes a length of at most 2 bytes and a start of at most 10.
const MAX_PLAIN_BYTES: usize = 32 << 10;

/// Bounds a stored block: its kind, what there is at most, under a seal.
pub(crate) const MAX_STORED_BYTES: u32 = (1 + MAX_PLAIN_BYTES + OVERHEAD) as u32;

const PLAIN: u8 = 0;
const ZSTD: u8 = 1;

/// The blocks are small and read often: take the better ratio.
const LEVEL: i32 = 3;

/// Encodes and decodes blocks; keeps its buffers between them.
pub(crate) struct BlockCoder {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
    plain: Vec<u8>,
}

impl BlockCoder {
    pub(crate) fn new() -> Result<Self> {
        let failed = || Error::io("set up zstd");
        Ok(BlockCoder {
            compressor: Compressor::new(LEVEL).map_err(failed())?,
            decompressor: Decompressor::new().map_err(failed())?,
            plain: Vec::new(),
        })
    }

    /// The stored form of a block, empty when all of it is zeros.
    pub(crate) fn encode(&mut self, places: &[Place]) -> Result<Vec<u8>> {
        if places.iter().all(|place| place.is_zero()) {
            return Ok(Vec::new());
        }
        let runs = places.chunk_by(|a, b| {
            if a.is_zero() {
                b.is_zero()
            } else {
                b.0 == a.0 + 1
            }
        });
        let (mut count, mut lengths, mut starts) = (0, Vec::new(), Vec::new());
        let mut end = 0;
        for run in runs {
            count += 1;
            let (start, len) = (run[0].0, run.len() as u64);
            put_varint(&mut lengths, len * 2 + u64::from(start > 0));
            if start > 0 {
                put_varint(&mut starts, zigzag(start.wrapping_sub(end) as i64));
                end = start + len;
            }
        }
        self.plain.clear();
        put_varint(&mut self.plain, count);
        self.plain.extend_from_slice(&lengths);
        self.plain.extend_from_slice(&starts);
        let compressed = self
            .compressor
            .compress(&self.plain)
            .map_err(Error::io("compress a recipe"))?;
        let (form, bytes) = if compressed.len() < self.plain.len() {
            (ZSTD, &compressed)
        } else {
            (PLAIN, &self.plain)
        };
        let mut stored = Vec::with_capacity(1 + bytes.len());
        stored.push(form);
        stored.extend_from_slice(bytes);
        Ok(stored)
    }

    /// Decodes a block of `places.len()` chunks. Every place lies in one of `packs` packs.
    pub(crate) fn decode(
        &mut self,
        stored: &[u8],
        packs: u32,
        pack_slots: u32,
        places: &mut [Place],
    ) -> Result<(), Malformed> {
        match stored.split_first() {
            None => {
                places.fill(Place::ZERO);
                Ok(())
            }
            Some((&PLAIN, plain)) => decode_plain(plain, packs, pack_slots, places),
            Some((&ZSTD, compressed)) => {
                self.plain.resize(MAX_PLAIN_BYTES, 0);
                let len = self
                    .decompressor
                    .decompress_to_buffer(compressed, &mut self.plain[..])
                    .map_err(|_| Malformed("a block does not decompress"))?;
                decode_plain(&self.plain[..len], packs, pack_slots, places)
            }
            Some(_) => Err(Malformed("a block has an unknown form")),
        }
    }
}

fn decode_plain(
    plain: &[u8],
    packs: u32,
    pack_slots: u32,
    places: &mut [Place],
) -> Result<(), Malformed> {
    let limit = 1 + u64::from(packs) * u64::from(pack_slots);
    let mut lengths = Cursor::new(plain);
    let runs = lengths.varint()?;
    if runs > places.len() as u64 {
        return Err(Malformed("a block has more runs than chunks"));
    }
    let mut starts = lengths;
    for _ in 0..runs {
        starts.varint()?;
    }
    let (mut rest, mut end) = (places, 0u64);
    for _ in 0..runs {
        let length = lengths.varint()?;
        let len = usize::try_from(length >> 1)
            .ok()
            .filter(|&len| len > 0 && len <= rest.len());
        let (run, after) = std::mem::take(&mut rest)
            .split_at_mut(len.ok_or(Malformed("a run has a wrong length"))?);
        rest = after;
        if length & 1 == 0 {
            run.fill(Place::ZERO);
            continue;
        }
        let start = end.wrapping_add(unzigzag(starts.varint()?) as u64);
        let fits = start
            .checked_add(run.len() as u64)
            .filter(|&end| start > 0 && end <= limit);
        end = fits.ok_or(Malformed("a run is outside of all packs"))?;
        for (place, value) in run.iter_mut().zip(start..) {
            *place = Place(value);
        }
    }
    if !rest.is_empty() {
        return Err(Malformed("a block has too few runs"));
    }
    starts.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PACK_SLOTS: u32 = 16384;
    const PACKS: u32 = 9;

    /// Runs of zeros, of successors, and of anything.
    fn places() -> impl Strategy<Value = Vec<Place>> {
        let limit = u64::from(PACKS * PACK_SLOTS);
        let run = (0u8..3, 1u64..200, 0..limit).prop_map(move |(kind, len, start)| -> Vec<Place> {
            match kind {
                0 => vec![Place::ZERO; len as usize],
                1 => (start..(start + len).min(limit))
                    .map(|value| Place(1 + value))
                    .collect(),
                _ => (0..len)
                    .map(|i| Place(1 + (start + i * 7919) % limit))
                    .collect(),
            }
        });
        prop::collection::vec(run, 1..20).prop_map(|runs| {
            let mut places = runs.concat();
            places.truncate(BLOCK_CHUNKS);
            places
        })
    }

    proptest! {
        #[test]
        fn blocks_come_back(places in places()) {
            let mut coder = BlockCoder::new().unwrap();
            let stored = coder.encode(&places).unwrap();
            let mut decoded = vec![Place(77); places.len()];
            coder.decode(&stored, PACKS, PACK_SLOTS, &mut decoded).unwrap();
            prop_assert_eq!(decoded, places);
        }

        #[test]
        fn any_bytes_give_places_in_range_or_an_error(
            mut stored in prop::collection::vec(any::<u8>(), 0..300),
            form in 0u8..3,
        ) {
            if let Some(first) = stored.first_mut() {
                *first = form;
            }
            let mut decoded = vec![Place::ZERO; BLOCK_CHUNKS];
            let decodes = BlockCoder::new().unwrap().decode(&stored, PACKS, PACK_SLOTS, &mut decoded);
            if decodes.is_ok() {
                let in_range = |place: &Place| place.get(PACK_SLOTS).is_none_or(|(pack, _)| pack < PACKS);
                prop_assert!(decoded.iter().all(in_range));
            }
        }

        #[test]
        fn a_changed_byte_is_in_range_or_an_error(places in places(), at: prop::sample::Index, byte: u8) {
            let mut coder = BlockCoder::new().unwrap();
            let mut stored = coder.encode(&places).unwrap();
            if !stored.is_empty() {
                let at = at.index(stored.len());
                stored[at] = byte;
            }
            let mut decoded = vec![Place::ZERO; places.len()];
            if coder.decode(&stored, PACKS, PACK_SLOTS, &mut decoded).is_ok() {
                let in_range = |place: &Place| place.get(PACK_SLOTS).is_none_or(|(pack, _)| pack < PACKS);
                prop_assert!(decoded.iter().all(in_range));
            }
        }
    }

    #[test]
    fn places_in_a_row_take_a_few_bytes() {
        let mut coder = BlockCoder::new().unwrap();
        let places: Vec<Place> = (0..BLOCK_CHUNKS as u32)
            .map(|slot| Place::new(1, slot, PACK_SLOTS))
            .collect();
        assert!(coder.encode(&places).unwrap().len() < 10);
        assert!(
            coder
                .encode(&[Place::ZERO; BLOCK_CHUNKS])
                .unwrap()
                .is_empty()
        );
    }
}
