//! The store's parameters: the file `config`, and the head of every pack.

use std::ops::RangeInclusive;

use crate::bytes::Cursor;
use crate::error::{Error, Malformed, Result};
use crate::hash::long_digest;
use crate::key::Key;
use crate::name::FileId;
use crate::seal::{self, Access, Keys};

const MAGIC: &[u8; 8] = b"DEDUPSTO";
const VERSION: u32 = 1;

/// Identities are keyed; content is sealed. An encrypted store has both, any other neither.
const FLAGS_ENCRYPTED: u32 = 1 | 1 << 1;

/// Bytes of the fields that the key check covers.
const PARAMETERS: usize = 48;

/// Bytes of chunks in a frame, and in a pack.
const FRAME_BYTES: u32 = 16 << 10;
const PACK_BYTES: u32 = 64 << 20;

/// The chunk size that measured best for memory and disks alike.
pub const DEFAULT_CHUNK_SIZE: u32 = 4096;

/// Levels of zstd that a store can have; zstd has more at both ends.
const LEVELS: RangeInclusive<i32> = -50..=19;

/// Why this one: docs/decisions/store-compression-level.md.
pub const DEFAULT_LEVEL: i32 = 1;

/// How to create a store.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes in a chunk: a power of two from 512 to 1 MiB.
    pub chunk_size: u32,
    /// How hard to compress new frames, as zstd counts it: from −50, the fastest, to 19, the smallest. 0 is not to
    /// compress.
    pub level: i32,
    /// Encrypts the store with this key; its content can then be read and added to only with it.
    pub key: Option<Key>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            chunk_size: DEFAULT_CHUNK_SIZE,
            level: DEFAULT_LEVEL,
            key: None,
        }
    }
}

/// The store's parameters, fixed when it is created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) chunk_size: u32,
    /// zstd's for new frames, or 0: they are not compressed.
    pub(crate) level: i32,
    pub(crate) store_id: FileId,
    /// Proves the key without telling it.
    key_check: Option<[u8; 16]>,
}

impl Config {
    pub(crate) const BYTES: usize = 96;

    pub(crate) fn new(options: &CreateOptions) -> Result<Self> {
        if !valid_chunk_size(options.chunk_size) {
            return Err(Error::Parameter(format!(
                "a chunk size of {} bytes is not possible: use a power of two from 512 to 1048576",
                options.chunk_size
            )));
        }
        if !LEVELS.contains(&options.level) {
            return Err(Error::Parameter(format!(
                "a compression level of {} is not possible: use one from {} to {}",
                options.level,
                LEVELS.start(),
                LEVELS.end()
            )));
        }
        let store_id = FileId::random()?;
        let mut config = Config {
            chunk_size: options.chunk_size,
            level: options.level,
            store_id,
            key_check: None,
        };
        if let Some(key) = &options.key {
            // First any value, because the flags say that there is one.
            config.key_check = Some([0; 16]);
            config.key_check = Some(config.expected_key_check(key));
        }
        Ok(config)
    }

    /// Chunks in a full frame.
    pub(crate) fn frame_chunks(&self) -> u32 {
        (FRAME_BYTES / self.chunk_size).max(1)
    }

    /// Frames in a full pack.
    pub(crate) fn pack_frames(&self) -> u32 {
        PACK_BYTES / (self.chunk_size * self.frame_chunks())
    }

    /// Slots in a full pack.
    pub(crate) fn pack_slots(&self) -> u32 {
        self.frame_chunks() * self.pack_frames()
    }

    /// Whether the store is encrypted.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.key_check.is_some()
    }

    /// Bytes that sealing adds to each sealed part.
    pub(crate) fn seal_overhead(&self) -> usize {
        if self.is_encrypted() {
            seal::OVERHEAD
        } else {
            0
        }
    }

    /// The keys of the store, if this is its key.
    pub(crate) fn unlock(&self, key: Option<&Key>) -> Result<Access<Keys>> {
        match (self.key_check, key) {
            (None, None) => Ok(Access::Plain),
            (Some(check), Some(key)) if self.expected_key_check(key) == check => {
                Ok(Access::Open(Keys::new(key, self.store_id)))
            }
            (Some(_), Some(_)) => Err(Error::Key("this is another key")),
            (Some(_), None) => Err(Error::Key("no key was given")),
            (None, Some(_)) => Err(Error::Parameter(
                "a key was given, but the store is not encrypted: open it without".into(),
            )),
        }
    }

    fn expected_key_check(&self, key: &Key) -> [u8; 16] {
        seal::key_check(key, self.store_id, &self.encode()[..PARAMETERS])
    }

    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let flags = if self.is_encrypted() {
            FLAGS_ENCRYPTED
        } else {
            0
        };
        let mut bytes = Vec::with_capacity(Self::BYTES);
        bytes.extend_from_slice(MAGIC);
        for field in [
            VERSION,
            flags,
            self.chunk_size,
            self.frame_chunks(),
            self.pack_frames(),
            self.level.cast_unsigned(),
        ] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&self.store_id.0);
        bytes.extend_from_slice(&self.key_check.unwrap_or_default());
        let digest = long_digest(&bytes);
        let mut encoded = [0; Self::BYTES];
        encoded[..64].copy_from_slice(&bytes);
        encoded[64..].copy_from_slice(&digest);
        encoded
    }

    /// Reads a config; `file` is where it comes from.
    pub(crate) fn parse(bytes: &[u8], file: &str) -> Result<Self> {
        let mut cursor = Cursor::new(bytes);
        let damaged = |malformed: Malformed| malformed.in_file(file);
        cursor
            .expect(MAGIC, "not a store's config")
            .map_err(damaged)?;
        // Before the digest: a newer version may have another layout.
        let version = cursor.u32().map_err(damaged)?;
        if version > VERSION {
            return Err(Error::NewerStore {
                found: version,
                supported: VERSION,
            });
        }
        let whole = bytes.len() == Self::BYTES && long_digest(&bytes[..64]) == bytes[64..];
        if !whole {
            return Err(Malformed("digest does not match").in_file(file));
        }
        let flags = cursor.u32().map_err(damaged)?;
        if ![0, FLAGS_ENCRYPTED].contains(&flags) {
            return Err(Error::UnknownFlags { flags });
        }
        let chunk_size = cursor.u32().map_err(damaged)?;
        if !valid_chunk_size(chunk_size) {
            return Err(Malformed("impossible chunk size").in_file(file));
        }
        let (frame_chunks, pack_frames, level) =
            (|| Ok((cursor.u32()?, cursor.u32()?, cursor.u32()?)))().map_err(damaged)?;
        let level = level.cast_signed();
        if !LEVELS.contains(&level) {
            return Err(Malformed("impossible compression level").in_file(file));
        }
        let store_id = FileId(cursor.array().map_err(damaged)?);
        let key_check = cursor.array().map_err(damaged)?;
        let config = Config {
            chunk_size,
            level,
            store_id,
            key_check: (flags != 0).then_some(key_check),
        };
        if (version, frame_chunks, pack_frames)
            != (VERSION, config.frame_chunks(), config.pack_frames())
        {
            return Err(Malformed("fields contradict each other").in_file(file));
        }
        Ok(config)
    }
}

fn valid_chunk_size(size: u32) -> bool {
    size.is_power_of_two() && (512..=1 << 20).contains(&size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_config(key: Option<Key>) -> Config {
        Config::new(&CreateOptions {
            level: -7,
            key,
            ..CreateOptions::default()
        })
        .unwrap()
    }

    #[test]
    fn config_comes_back() {
        for key in [None, Some(Key::from([7; 32]))] {
            let config = some_config(key);
            assert_eq!(Config::parse(&config.encode(), "config").unwrap(), config);
        }
    }

    #[test]
    fn levels_that_zstd_does_not_have_are_refused() {
        for level in [i32::MIN, -51, 20, i32::MAX] {
            let options = CreateOptions {
                level,
                ..CreateOptions::default()
            };
            assert!(matches!(Config::new(&options), Err(Error::Parameter(_))));
            let mut config = some_config(None);
            config.level = level;
            let parsed = Config::parse(&config.encode(), "config");
            assert!(matches!(parsed, Err(Error::Damaged { .. })), "{level}");
        }
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let bytes = some_config(None).encode();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Config::parse(&damaged, "config").is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let mut bytes = some_config(None).encode();
        bytes[8] = 2;
        assert!(matches!(
            Config::parse(&bytes, "config"),
            Err(Error::NewerStore {
                found: 2,
                supported: 1
            })
        ));
    }

    #[test]
    fn only_the_right_key_opens() {
        let key = |byte| Key::from([byte; 32]);
        let encrypted = some_config(Some(key(1)));
        assert!(matches!(
            encrypted.unlock(Some(&key(1))),
            Ok(Access::Open(_))
        ));
        assert!(matches!(
            encrypted.unlock(Some(&key(2))),
            Err(Error::Key(_))
        ));
        assert!(matches!(encrypted.unlock(None), Err(Error::Key(_))));
        let plain = some_config(None);
        assert!(matches!(
            plain.unlock(Some(&key(1))),
            Err(Error::Parameter(_))
        ));
        assert!(matches!(plain.unlock(None), Ok(Access::Plain)));
    }

    /// Somebody who can write to the store cannot make it another one: the digest has no key, the key check has.
    #[test]
    fn changed_parameters_do_not_open() {
        let key = Key::from([1; 32]);
        let mut config = some_config(Some(key.clone()));
        config.chunk_size = 512;
        let config = Config::parse(&config.encode(), "config").unwrap();
        assert!(matches!(config.unlock(Some(&key)), Err(Error::Key(_))));
    }
}
