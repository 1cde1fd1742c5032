//! Identities of chunks and digests of files.

use blake3::IncrementCounter;
use blake3::platform::{MAX_SIMD_DEGREE, Platform};
use xxhash_rust::xxh64::Xxh64;
use zeroize::Zeroizing;

use crate::bytes::to_hex;

/// The chunk size for which hashing is batched.
const BATCHED: usize = 4096;

/// Input bytes that BLAKE3 hashes into one leaf.
const LEAF: usize = 1024;

/// BLAKE3's flags and initial value, from section 2 of its specification.
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const KEYED_HASH: u8 = 1 << 4;
const IV: [u32; 8] = [
    0x6A09_E667,
    0xBB67_AE85,
    0x3C6E_F372,
    0xA54F_F53A,
    0x510E_527F,
    0x9B05_688C,
    0x1F83_D9AB,
    0x5BE0_CD19,
];

/// What a chunk is: the first 24 bytes of its BLAKE3 hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ChunkId(pub(crate) [u8; ChunkId::BYTES]);

impl ChunkId {
    pub(crate) const BYTES: usize = 24;

    /// The part of the identity that the index sorts by: a number of 48 bits.
    pub(crate) fn prefix(&self) -> u64 {
        let [a, b, c, d, e, f, ..] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }
}

impl std::fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&to_hex(&self.0))
    }
}

/// A digest that guards against accidents.
pub(crate) fn digest(parts: &[&[u8]]) -> [u8; 16] {
    truncated(parts)
}

/// A digest of full length, for the one file that everything else depends on.
pub(crate) fn long_digest(bytes: &[u8]) -> [u8; 32] {
    truncated(&[bytes])
}

/// A digest that guards a single frame or block against accidents: XXH64, since every reading of a page waits for it.
pub(crate) fn short_digest(parts: &[&[u8]]) -> u64 {
    if GUESSED {
        return 0;
    }
    let mut hasher = Xxh64::new(0);
    for part in parts {
        hasher.update(part);
    }
    hasher.digest()
}

/// A fuzzer does not guess digests: there all are 0, so that it comes to what is behind them.
#[allow(unexpected_cfgs, reason = "`fuzzing` is set by cargo-fuzz alone")]
const GUESSED: bool = cfg!(fuzzing);

fn truncated<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    if GUESSED {
        return [0; N];
    }
    let hash = match parts {
        [whole] => blake3::hash(whole),
        _ => {
            let mut hasher = blake3::Hasher::new();
            for part in parts {
                hasher.update(part);
            }
            hasher.finalize()
        }
    };
    let mut bytes = [0; N];
    bytes.copy_from_slice(&hash.as_bytes()[..N]);
    bytes
}

/// Computes identities, with the store's key where there is one.
#[derive(Clone)]
pub(crate) struct Identifier {
    key: Option<Zeroizing<[u8; 32]>>,
    /// The key as BLAKE3 takes it, or its initial value.
    words: Zeroizing<[u32; 8]>,
    flags: u8,
    platform: Platform,
}

impl Identifier {
    pub(crate) fn new(key: Option<&[u8; 32]>) -> Self {
        let words = key.map_or(IV, blake3::platform::words_from_le_bytes_32);
        let flags = if key.is_some() { KEYED_HASH } else { 0 };
        Identifier {
            key: key.copied().map(Zeroizing::new),
            words: Zeroizing::new(words),
            flags,
            platform: Platform::detect(),
        }
    }

    /// The identity of one chunk, by BLAKE3's public interface.
    pub(crate) fn identify(&self, chunk: &[u8]) -> ChunkId {
        let hash = match &self.key {
            Some(key) => blake3::keyed_hash(key, chunk),
            None => blake3::hash(chunk),
        };
        let mut id = [0; ChunkId::BYTES];
        id.copy_from_slice(&hash.as_bytes()[..ChunkId::BYTES]);
        ChunkId(id)
    }

    /// Appends the identities of `chunks`, which all have the same size, in their order.
    pub(crate) fn identify_all(&self, chunks: &[&[u8]], ids: &mut Vec<ChunkId>) {
        for group in chunks.chunks(MAX_SIMD_DEGREE) {
            let mut pages: [&[u8; BATCHED]; MAX_SIMD_DEGREE] = [&[0; BATCHED]; MAX_SIMD_DEGREE];
            let all_pages = group
                .iter()
                .zip(&mut pages)
                .all(|(chunk, page)| (*chunk).try_into().map(|array| *page = array).is_ok());
            if all_pages {
                self.identify_pages(&pages, group.len(), ids);
            } else {
                ids.extend(group.iter().map(|chunk| self.identify(chunk)));
            }
        }
    }

    /// Hashes up to [`MAX_SIMD_DEGREE`] pages side by side: BLAKE3's tree of four leaves and three
    /// parents, level by level. Gives the digests of [`Identifier::identify`].
    ///
    /// `pages` is a row of that length of which the first `count` count: what is behind them fills lanes up.
    fn identify_pages(
        &self,
        pages: &[&[u8; BATCHED]; MAX_SIMD_DEGREE],
        count: usize,
        ids: &mut Vec<ChunkId>,
    ) {
        let lanes = self.lanes(count);
        let mut leaves = [[[0u8; 32]; MAX_SIMD_DEGREE]; BATCHED / LEAF];
        for (counter, out) in leaves.iter_mut().enumerate() {
            let mut inputs: [&[u8; LEAF]; MAX_SIMD_DEGREE] = [&[0; LEAF]; MAX_SIMD_DEGREE];
            for (input, page) in inputs.iter_mut().zip(pages).take(lanes) {
                *input = &page.as_chunks().0[counter];
            }
            self.platform.hash_many(
                &inputs[..lanes],
                &self.words,
                counter as u64,
                IncrementCounter::No,
                self.flags,
                CHUNK_START,
                CHUNK_END,
                out.as_flattened_mut(),
            );
        }
        let [a, b, c, d] = &leaves;
        let left = self.join(a, b, lanes, 0);
        let right = self.join(c, d, lanes, 0);
        let roots = self.join(&left, &right, lanes, ROOT);
        ids.extend(roots[..count].iter().map(|root| {
            let mut id = [0; ChunkId::BYTES];
            id.copy_from_slice(&root[..ChunkId::BYTES]);
            ChunkId(id)
        }));
    }

    /// How many lanes to hash `count` pages in. BLAKE3 takes what does not fill them by halves, down to one lane alone, and a half takes
    /// more than half the time: 15 pages 13 µs, where 16 take 7. So they are filled up, by pages whose hashes nobody looks at.
    fn lanes(&self, count: usize) -> usize {
        let degree = self.platform.simd_degree();
        let rest = match count % degree {
            0 => 0,
            rest => rest.next_power_of_two(),
        };
        (count / degree * degree + rest).min(MAX_SIMD_DEGREE)
    }

    /// The parents of two rows of nodes.
    fn join(
        &self,
        left: &[[u8; 32]; MAX_SIMD_DEGREE],
        right: &[[u8; 32]; MAX_SIMD_DEGREE],
        count: usize,
        extra_flags: u8,
    ) -> [[u8; 32]; MAX_SIMD_DEGREE] {
        let mut blocks = [[0u8; 64]; MAX_SIMD_DEGREE];
        for ((block, left), right) in blocks.iter_mut().zip(left).zip(right) {
            block[..32].copy_from_slice(left);
            block[32..].copy_from_slice(right);
        }
        let inputs = blocks.each_ref();
        let mut out = [[0u8; 32]; MAX_SIMD_DEGREE];
        self.platform.hash_many(
            &inputs[..count],
            &self.words,
            0,
            IncrementCounter::No,
            self.flags | PARENT | extra_flags,
            0,
            0,
            out.as_flattened_mut(),
        );
        out
    }
}

/// Whether every byte is zero. Stops at the first block that is not.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<128>();
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// The plain path is the oracle of the batched one.
        #[test]
        fn batched_identities_are_blake3(
            key: Option<[u8; 32]>,
            seeds in prop::collection::vec(any::<u64>(), 1..40),
        ) {
            let pages: Vec<Vec<u8>> = seeds.iter().map(|seed| {
                let mut page = vec![0; BATCHED];
                blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut page);
                page
            }).collect();
            let slices: Vec<&[u8]> = pages.iter().map(Vec::as_slice).collect();
            let identifier = Identifier::new(key.as_ref());
            let mut batched = Vec::new();
            identifier.identify_all(&slices, &mut batched);
            let plain: Vec<ChunkId> = slices.iter().map(|page| identifier.identify(page)).collect();
            prop_assert_eq!(batched, plain);
        }
    }

    #[test]
    fn chunks_of_other_sizes_take_the_plain_path() {
        let identifier = Identifier::new(None);
        let chunks = [[1u8; 512], [2; 512]];
        let mut ids = Vec::new();
        identifier.identify_all(&[&chunks[0], &chunks[1]], &mut ids);
        assert_eq!(
            ids,
            [
                identifier.identify(&chunks[0]),
                identifier.identify(&chunks[1])
            ]
        );
    }

    #[test]
    fn a_single_set_bit_is_not_zero() {
        let mut bytes = vec![0; 4096 + 5];
        assert!(is_zero(&bytes));
        for position in [0, 127, 128, 4095, 4096, 4100] {
            bytes[position] = 1;
            assert!(!is_zero(&bytes), "byte {position}");
            bytes[position] = 0;
        }
    }
}
