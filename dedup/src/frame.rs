//! Frames: some chunks, compressed together. The unit of reading.

use zstd::bulk::{Compressor, Decompressor};

use crate::bytes::Cursor;
use crate::error::{Error, Malformed, Result};
use crate::hash::short_digest;
use crate::seal::{NONCE_BYTES, OVERHEAD, Sealer};

/// Bytes before a frame's payload.
pub(crate) const HEADER_BYTES: usize = 20;

/// Bytes of the header that a sealed payload is bound to: all but its length and digest.
const CONTEXT: std::ops::Range<usize> = 0..8;

const MAGIC: u8 = 0xF5;

/// What the payload is, under its seal where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Codec {
    Raw = 0,
    Zstd = 1,
}

/// Added to the codec of a sealed payload.
const SEALED: u8 = 2;

/// What a frame says about itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    codec: Codec,
    sealed: bool,
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
        let [kind] = cursor.array()?;
        let codec = match kind & !SEALED {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            _ => return Err(Malformed("a frame has an unknown codec")),
        };
        let (slots, number, payload_len, digest) =
            (cursor.u16()?, cursor.u32()?, cursor.u32()?, cursor.u64()?);
        Ok(Header {
            codec,
            sealed: kind & SEALED != 0,
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
    /// None where frames are not compressed.
    compressor: Option<Compressor<'static>>,
    decoder: Decoder,
    stored: Vec<u8>,
    check: Vec<u8>,
}

impl Encoder {
    /// One that compresses at this level of zstd, or not at all at 0.
    pub(crate) fn new(level: i32) -> Result<Self> {
        let compressor = match level {
            0 => None,
            level => Some(Compressor::new(level).map_err(Error::io("set up zstd"))?),
        };
        Ok(Encoder {
            compressor,
            decoder: Decoder::new()?,
            stored: Vec::new(),
            check: Vec::new(),
        })
    }

    /// The stored form of a frame; if it is compressed or sealed, decoded again and compared before it is given out. In
    /// an encrypted store, `sealer` is the pack's.
    pub(crate) fn encode<'e>(
        &'e mut self,
        number: u32,
        slots: u16,
        plain: &'e [u8],
        sealer: Option<&Sealer>,
    ) -> Result<Encoded<'e>> {
        // Nonce and tag are on both sides.
        let (overhead, body_at) = sealer.map_or((0, 0), |_| (OVERHEAD, NONCE_BYTES));
        let room = overhead + zstd::zstd_safe::compress_bound(plain.len());
        if self.stored.len() < room {
            self.stored.resize(room, 0);
        }
        let compressed = match &mut self.compressor {
            None => None,
            Some(compressor) => Some(
                compressor
                    .compress_to_buffer(plain, &mut self.stored[body_at..])
                    .map_err(Error::io("compress a frame"))?,
            ),
        };
        let (codec, body_len) = match compressed.filter(|&len| len < plain.len()) {
            Some(len) => (Codec::Zstd, len),
            None => (Codec::Raw, plain.len()),
        };
        let payload_len = body_len + overhead;
        let sealed = if sealer.is_some() { SEALED } else { 0 };
        let mut head = [0; HEADER_BYTES];
        head[..2].copy_from_slice(&[MAGIC, codec as u8 | sealed]);
        head[2..4].copy_from_slice(&slots.to_le_bytes());
        head[4..8].copy_from_slice(&number.to_le_bytes());
        head[8..12].copy_from_slice(&(payload_len as u32).to_le_bytes());
        // What is neither compressed nor sealed is not copied either, and there is nothing to decode.
        let is_plain = codec == Codec::Raw && sealer.is_none();
        let payload = if is_plain {
            plain
        } else {
            if codec == Codec::Raw {
                self.stored[body_at..][..plain.len()].copy_from_slice(plain);
            }
            if let Some(sealer) = sealer {
                sealer.seal_in_place(&head[CONTEXT], &mut self.stored[..payload_len])?;
            }
            &self.stored[..payload_len]
        };
        let digest = short_digest(&[&head[..12], payload]);
        head[12..].copy_from_slice(&digest.to_le_bytes());
        if !is_plain {
            self.check.resize(plain.len(), 0);
            let decoded =
                self.decoder
                    .decode_payload(codec, &head, payload, sealer, &mut self.check);
            if decoded.is_err() || self.check != plain {
                return Err(Error::EncodeCheck);
            }
        }
        Ok(Encoded { head, payload })
    }
}

/// The stored form of a frame.
pub(crate) struct Encoded<'e> {
    head: [u8; HEADER_BYTES],
    payload: &'e [u8],
}

impl Encoded<'_> {
    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        HEADER_BYTES + self.payload.len()
    }

    pub(crate) fn append_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head);
        out.extend_from_slice(self.payload);
    }

    pub(crate) fn to_vec(&self) -> Vec<u8> {
        [&self.head, self.payload].concat()
    }
}

/// Checks all that can be checked of a stored frame without decoding it; gives its header.
pub(crate) fn check(stored: &[u8]) -> Result<Header, Malformed> {
    let header = Header::parse(stored)?;
    if stored.len() as u64 != header.stored_len() {
        return Err(Malformed("a frame has another length than its header says"));
    }
    let (head, payload) = stored.split_at(HEADER_BYTES);
    if short_digest(&[&head[..12], payload]) != header.digest {
        return Err(Malformed("a frame's digest does not match"));
    }
    Ok(header)
}

/// Decodes frames.
pub(crate) struct Decoder {
    decompressor: Decompressor<'static>,
    /// What was under a seal.
    opened: Vec<u8>,
}

impl Decoder {
    pub(crate) fn new() -> Result<Self> {
        Ok(Decoder {
            decompressor: Decompressor::new().map_err(Error::io("set up zstd"))?,
            opened: Vec::new(),
        })
    }

    /// Decodes a stored frame to the beginning of `plain`, after checking its digest; gives its header. With a
    /// `sealer`, which is the pack's, the frame must be sealed, and without one it must not be.
    pub(crate) fn decode(
        &mut self,
        stored: &[u8],
        chunk_size: u32,
        sealer: Option<&Sealer>,
        plain: &mut [u8],
    ) -> Result<Header, Malformed> {
        let header = check(stored)?;
        if header.sealed != sealer.is_some() {
            return Err(Malformed("a frame is sealed, or is not, unlike its store"));
        }
        let (head, payload) = stored.split_at(HEADER_BYTES);
        let len = usize::from(header.slots) * chunk_size as usize;
        let plain = plain
            .get_mut(..len)
            .ok_or(Malformed("a frame has too many chunks"))?;
        self.decode_payload(header.codec, head, payload, sealer, plain)?;
        Ok(header)
    }

    fn decode_payload(
        &mut self,
        codec: Codec,
        head: &[u8],
        payload: &[u8],
        sealer: Option<&Sealer>,
        plain: &mut [u8],
    ) -> Result<(), Malformed> {
        let body = match sealer {
            None => payload,
            Some(sealer) => {
                sealer.open(&head[CONTEXT], payload, &mut self.opened)?;
                &self.opened
            }
        };
        let filled = match codec {
            Codec::Raw if body.len() == plain.len() => {
                plain.copy_from_slice(body);
                true
            }
            Codec::Raw => false,
            Codec::Zstd => {
                self.decompressor.decompress_to_buffer(body, plain).ok() == Some(plain.len())
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
    use crate::key::Key;
    use crate::name::FileId;
    use crate::seal::Keys;
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

    fn sealer(pack: u8) -> Sealer {
        let keys = Keys::new(&Key::from([1; 32]), FileId([2; 16]));
        keys.pack(FileId([pack; 16]))
    }

    proptest! {
        #[test]
        fn frames_come_back(
            slots in 0u16..=128, number: u32, seed: u64, noise: bool, sealed: bool,
            level in prop::sample::select(vec![1, 0, -10]),
        ) {
            let plain = plain(slots, seed, noise);
            let sealer = sealed.then(|| sealer(3));
            let (sealer, overhead) = (sealer.as_ref(), if sealed { OVERHEAD } else { 0 });
            let stored = Encoder::new(level).unwrap().encode(number, slots, &plain, sealer).unwrap().to_vec();
            prop_assert!(stored.len() <= HEADER_BYTES + overhead + plain.len());
            let mut decoded = vec![0; plain.len()];
            let header = Decoder::new().unwrap().decode(&stored, CHUNK, sealer, &mut decoded).unwrap();
            prop_assert_eq!((header.slots, header.number), (slots, number));
            prop_assert_eq!(decoded, plain);
        }

        #[test]
        fn a_flipped_bit_is_found(
            slots in 1u16..=8, noise: bool, sealed: bool, position: prop::sample::Index,
            level in prop::sample::select(vec![1, 0]),
        ) {
            let plain = plain(slots, 3, noise);
            let sealer = sealed.then(|| sealer(3));
            let sealer = sealer.as_ref();
            let mut stored = Encoder::new(level).unwrap().encode(5, slots, &plain, sealer).unwrap().to_vec();
            let bit = position.index(stored.len() * 8);
            stored[bit / 8] ^= 1 << (bit % 8);
            let mut decoded = vec![0; plain.len()];
            prop_assert!(Decoder::new().unwrap().decode(&stored, CHUNK, sealer, &mut decoded).is_err());
        }
    }

    /// A forger can compute digests, but not seal.
    fn with_new_digest(mut stored: Vec<u8>) -> Vec<u8> {
        let digest = short_digest(&[&stored[..12], &stored[HEADER_BYTES..]]);
        stored[12..HEADER_BYTES].copy_from_slice(&digest.to_le_bytes());
        stored
    }

    #[test]
    fn a_sealed_frame_is_of_one_pack_and_number() {
        let (plain, mine) = (plain(4, 1, false), sealer(3));
        let mut encoder = Encoder::new(1).unwrap();
        let stored = encoder.encode(5, 4, &plain, Some(&mine)).unwrap().to_vec();
        let decode = |stored: &[u8], sealer: Option<&Sealer>| {
            let mut decoded = vec![0; plain.len()];
            let mut decoder = Decoder::new().unwrap();
            decoder
                .decode(stored, CHUNK, sealer, &mut decoded)
                .map(drop)
        };
        assert!(decode(&with_new_digest(stored.clone()), Some(&mine)).is_ok());
        assert!(decode(&stored, Some(&sealer(4))).is_err());
        assert!(decode(&stored, None).is_err());
        // The codec, the slots, the number: whatever the header says is bound.
        for (at, value) in [(1, 2), (2, 3), (4, 6)] {
            let mut forged = stored.clone();
            forged[at] = value;
            assert!(decode(&with_new_digest(forged), Some(&mine)).is_err());
        }
        let open = encoder.encode(5, 4, &plain, None).unwrap().to_vec();
        assert!(decode(&open, Some(&mine)).is_err());
    }
}
