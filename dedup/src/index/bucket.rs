//! A bucket: 4,096 bytes of keys and values, found by a key's leading bits.

use crate::error::Malformed;
use crate::hash::short_digest;

pub(super) const BUCKET_BYTES: usize = 4096;

/// Entries that fit.
pub(super) const CAPACITY: usize = 370;

/// Entries to plan for. With a random spread of √310 ≈ 17.6 around it, 370 is 3.4 standard deviations away.
pub(super) const MEAN_FILL: u64 = 310;

const KEY_BYTES: usize = 6;
const VALUE_BYTES: usize = 5;
const KEYS_AT: usize = 16;
const VALUES_AT: usize = KEYS_AT + CAPACITY * KEY_BYTES;

/// The first value that does not fit.
pub(super) const VALUE_LIMIT: u64 = 1 << (8 * VALUE_BYTES);

/// Bits of a key.
const KEY_BITS: u32 = 8 * KEY_BYTES as u32;

/// The bucket for a key of 48 bits. Ascending keys have ascending buckets.
pub(super) fn bucket_of(key: u64, buckets: u64) -> u64 {
    ((u128::from(key) * u128::from(buckets)) >> KEY_BITS) as u64
}

/// How far into its bucket a key should be, as keys are spread evenly: a fraction of 2³².
pub(super) fn depth_of(key: u64, buckets: u64) -> u64 {
    let in_bucket = (u128::from(key) * u128::from(buckets)) & ((1 << KEY_BITS) - 1);
    (in_bucket >> (KEY_BITS - 32)) as u64
}

/// The bytes of a bucket.
#[derive(Clone, Copy)]
pub(super) struct Bucket<'a>(pub(super) &'a [u8; BUCKET_BYTES]);

impl<'a> Bucket<'a> {
    /// The number of entries, however damaged the bucket is.
    fn count(self) -> usize {
        usize::from(u16::from_le_bytes([self.0[8], self.0[9]])).min(CAPACITY)
    }

    fn key(self, position: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[2..].copy_from_slice(&self.0[KEYS_AT + position * KEY_BYTES..][..KEY_BYTES]);
        u64::from_be_bytes(bytes)
    }

    fn value(self, position: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..VALUE_BYTES]
            .copy_from_slice(&self.0[VALUES_AT + position * VALUE_BYTES..][..VALUE_BYTES]);
        u64::from_le_bytes(bytes)
    }

    /// The values under a key. `depth` is its [`depth_of`]: from there the key is a few steps away, in one or two of
    /// the processor's cache lines where halving would touch four.
    pub(super) fn find(self, key: u64, depth: u64) -> impl Iterator<Item = u64> + 'a {
        let count = self.count();
        let mut at = ((depth * count as u64) >> 32) as usize;
        while at < count && self.key(at) < key {
            at += 1;
        }
        while at > 0 && self.key(at - 1) >= key {
            at -= 1;
        }
        let from = (at..count).take_while(move |&position| self.key(position) == key);
        from.map(move |position| self.value(position))
    }

    /// Keys and values, ascending by key.
    pub(super) fn iter(self) -> impl Iterator<Item = (u64, u64)> + 'a {
        (0..self.count()).map(move |position| (self.key(position), self.value(position)))
    }

    /// Checks the digest.
    pub(super) fn check(self) -> Result<(), Malformed> {
        let expected = u64::from_le_bytes(*self.0.first_chunk().unwrap_or(&[0; 8]));
        if short_digest(&[&self.0[8..]]) == expected {
            Ok(())
        } else {
            Err(Malformed("a bucket's digest does not match"))
        }
    }
}

/// Encodes entries, which are ascending by key; those that do not fit are left out. Gives how many are in.
pub(super) fn encode(entries: &[(u64, u64)], out: &mut [u8; BUCKET_BYTES]) -> usize {
    let kept = &entries[..entries.len().min(CAPACITY)];
    out.fill(0);
    out[8..10].copy_from_slice(&(kept.len() as u16).to_le_bytes());
    for (position, (key, value)) in kept.iter().enumerate() {
        out[KEYS_AT + position * KEY_BYTES..][..KEY_BYTES].copy_from_slice(&key.to_be_bytes()[2..]);
        out[VALUES_AT + position * VALUE_BYTES..][..VALUE_BYTES]
            .copy_from_slice(&value.to_le_bytes()[..VALUE_BYTES]);
    }
    let digest = short_digest(&[&out[8..]]);
    out[..8].copy_from_slice(&digest.to_le_bytes());
    kept.len()
}
