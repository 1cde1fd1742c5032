//! Frames: some chunks, compressed together. The unit of reading.

use zstd::bulk::{Compressor, Decompressor};

use crate::bytes::Cursor;
use crate::error::{Error, Malformed, Result};
use crate::hash::short_digest;

/// Bytes before a frame's payload.
pub(crate) const HEADER_BYTES: usize = 20;

const MAGIC: u8 = 0xF5;

/// Larger than level 1 is 1 to 7 % of size for half the speed.
const LEVEL: i32 = 1;

/// What the payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Codec {
    Raw = 0,
    Zstd = 1,
}

/// What a frame says about itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    codec: Codec,
    /// Chunks in the frame.
    pub(crate) slots: u16,
    /// The frame's number in its pack.
    pub(crate) number: u32,
    payload_len: u32,
    digest: u64,
}

impl Header {
    /// Reads the beginning of a stored frame.
    pub(crate) fn parse(stored: &[u8]) -> Result<Self, Malformed> {
        let mut cursor = Cursor::new(stored);
        cursor.expect(&[MAGIC], "not a frame")?;
        let codec = match cursor.array()? {
            [0] => Codec::Raw,
            [1] => Codec::Zstd,
            _ => return Err(Malformed("a frame has an unknown codec")),
        };
        let (slots, number, payload_len, digest) =
            (cursor.u16()?, cursor.u32()?, cursor.u32()?, cursor.u64()?);
        Ok(Header {
            codec,
            slots,
            number,
            payload_len,
            digest,
        })
    }

    /// The size of the stored frame.
    pub(crate) fn stored_len(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.payload_len)
    }
}

/// Encodes frames; keeps its buffers between them.
pub(crate) struct Encoder {
    compressor: Compressor<'static>,
    decoder: Decoder,
    stored: Vec<u8>,
    check: Vec<u8>,
}

impl Encoder {
    pub(crate) fn new() -> Result<Self> {
        let compressor = Compressor::new(LEVEL).map_err(Error::io("set up zstd"))?;
        Ok(Encoder {
            compressor,
            decoder: Decoder::new()?,
            stored: Vec::new(),
            check: Vec::new(),
        })
    }

    /// The stored form of a frame, decoded again and compared before it is given out.
    pub(crate) fn encode(&mut self, number: u32, slots: u16, plain: &[u8]) -> Result<&[u8]> {
        let bound = HEADER_BYTES + zstd::zstd_safe::compress_bound(plain.len());
        if self.stored.len() < bound {
            self.stored.resize(bound, 0);
        }
        let compressed = self
            .compressor
            .compress_to_buffer(plain, &mut self.stored[HEADER_BYTES..])
            .map_err(Error::io("compress a frame"))?;
        let (codec, payload_len) = if compressed < plain.len() {
            (Codec::Zstd, compressed)
        } else {
            (Codec::Raw, plain.len())
        };
        let (head, payload) = self.stored[..HEADER_BYTES + payload_len].split_at_mut(HEADER_BYTES);
        if codec == Codec::Raw {
            payload.copy_from_slice(plain);
        }
        head[..2].copy_from_slice(&[MAGIC, codec as u8]);
        head[2..4].copy_from_slice(&slots.to_le_bytes());
        head[4..8].copy_from_slice(&number.to_le_bytes());
        head[8..12].copy_from_slice(&(payload_len as u32).to_le_bytes());
        let digest = short_digest(&[&head[..12], payload]);
        head[12..].copy_from_slice(&digest.to_le_bytes());

        self.check.resize(plain.len(), 0);
        let decoded = self.decoder.decode_payload(codec, payload, &mut self.check);
        if decoded.is_err() || self.check != plain {
            return Err(Error::EncodeCheck);
        }
        Ok(&self.stored[..HEADER_BYTES + payload_len])
    }
}

/// Decodes frames.
pub(crate) struct Decoder {
    decompressor: Decompressor<'static>,
}

impl Decoder {
    pub(crate) fn new() -> Result<Self> {
        Ok(Decoder {
            decompressor: Decompressor::new().map_err(Error::io("set up zstd"))?,
        })
    }

    /// Decodes a stored frame to the beginning of `plain`, after checking its digest; gives its header.
    pub(crate) fn decode(
        &mut self,
        stored: &[u8],
        chunk_size: u32,
        plain: &mut [u8],
    ) -> Result<Header, Malformed> {
        let header = Header::parse(stored)?;
        if stored.len() as u64 != header.stored_len() {
            return Err(Malformed("a frame has another length than its header says"));
        }
        let (head, payload) = stored.split_at(HEADER_BYTES);
        if short_digest(&[&head[..12], payload]) != header.digest {
            return Err(Malformed("a frame's digest does not match"));
        }
        let len = usize::from(header.slots) * chunk_size as usize;
        let plain = plain
            .get_mut(..len)
            .ok_or(Malformed("a frame has too many chunks"))?;
        self.decode_payload(header.codec, payload, plain)?;
        Ok(header)
    }

    fn decode_payload(
        &mut self,
        codec: Codec,
        payload: &[u8],
        plain: &mut [u8],
    ) -> Result<(), Malformed> {
        let filled = match codec {
            Codec::Raw if payload.len() == plain.len() => {
                plain.copy_from_slice(payload);
                true
            }
            Codec::Raw => false,
            Codec::Zstd => {
                self.decompressor.decompress_to_buffer(payload, plain).ok() == Some(plain.len())
            }
        };
        if filled {
            Ok(())
        } else {
            Err(Malformed("a frame does not decode"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CHUNK: u32 = 512;

    fn plain(slots: u16, seed: u64, noise: bool) -> Vec<u8> {
        let mut plain = vec![seed as u8; usize::from(slots) * CHUNK as usize];
        if noise {
            blake3::Hasher::new()
                .update(&seed.to_le_bytes())
                .finalize_xof()
                .fill(&mut plain);
        }
        plain
    }

    proptest! {
        #[test]
        fn frames_come_back(slots in 0u16..=128, number: u32, seed: u64, noise: bool) {
            let plain = plain(slots, seed, noise);
            let stored = Encoder::new().unwrap().encode(number, slots, &plain).unwrap().to_vec();
            prop_assert!(stored.len() <= HEADER_BYTES + plain.len());
            let mut decoded = vec![0; plain.len()];
            let header = Decoder::new().unwrap().decode(&stored, CHUNK, &mut decoded).unwrap();
            prop_assert_eq!((header.slots, header.number), (slots, number));
            prop_assert_eq!(decoded, plain);
        }

        #[test]
        fn a_flipped_bit_is_found(slots in 1u16..=8, noise: bool, position: prop::sample::Index) {
            let plain = plain(slots, 3, noise);
            let mut stored = Encoder::new().unwrap().encode(5, slots, &plain).unwrap().to_vec();
            let bit = position.index(stored.len() * 8);
            stored[bit / 8] ^= 1 << (bit % 8);
            let mut decoded = vec![0; plain.len()];
            prop_assert!(Decoder::new().unwrap().decode(&stored, CHUNK, &mut decoded).is_err());
        }
    }
}
