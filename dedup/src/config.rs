//! The store's parameters: the file `config`, and the head of every pack.

use crate::bytes::Cursor;
use crate::error::{Error, Malformed, Result};
use crate::name::FileId;

const MAGIC: &[u8; 8] = b"DEDUPSTO";
const VERSION: u32 = 1;
const FLAG_KEYED: u32 = 1;

/// Bytes of chunks in a frame, and in a pack.
const FRAME_BYTES: u32 = 64 << 10;
const PACK_BYTES: u32 = 64 << 20;

/// The chunk size that measured best for memory and disks alike.
pub const DEFAULT_CHUNK_SIZE: u32 = 4096;

/// How to create a store.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes in a chunk: a power of two from 512 to 1 MiB.
    pub chunk_size: u32,
    /// Makes identities depend on this key; the store then opens only with it.
    pub key: Option<[u8; 32]>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            chunk_size: DEFAULT_CHUNK_SIZE,
            key: None,
        }
    }
}

/// The store's parameters, fixed when it is created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) chunk_size: u32,
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
        let store_id = FileId::random()?;
        let key_check = options.key.map(|key| key_check(&key, store_id));
        Ok(Config {
            chunk_size: options.chunk_size,
            store_id,
            key_check,
        })
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

    /// Checks the key that somebody wants to open the store with.
    pub(crate) fn check_key(&self, key: Option<&[u8; 32]>) -> Result<()> {
        match (self.key_check, key) {
            (None, None) => Ok(()),
            (Some(check), Some(key)) if key_check(key, self.store_id) == check => Ok(()),
            (Some(_), Some(_)) => Err(Error::Key("this is another key")),
            (Some(_), None) => Err(Error::Key("no key was given")),
            (None, Some(_)) => Err(Error::Parameter(
                "a key was given, but the store has none: open it without".into(),
            )),
        }
    }

    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let flags = if self.key_check.is_some() {
            FLAG_KEYED
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
            0,
        ] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&self.store_id.0);
        bytes.extend_from_slice(&self.key_check.unwrap_or_default());
        let hash = blake3::hash(&bytes);
        let mut encoded = [0; Self::BYTES];
        encoded[..64].copy_from_slice(&bytes);
        encoded[64..].copy_from_slice(hash.as_bytes());
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
        let whole =
            bytes.len() == Self::BYTES && blake3::hash(&bytes[..64]).as_bytes() == &bytes[64..];
        if !whole {
            return Err(Malformed("digest does not match").in_file(file));
        }
        let flags = cursor.u32().map_err(damaged)?;
        if flags & !FLAG_KEYED != 0 {
            return Err(Error::UnknownFlags { flags });
        }
        let chunk_size = cursor.u32().map_err(damaged)?;
        if !valid_chunk_size(chunk_size) {
            return Err(Malformed("impossible chunk size").in_file(file));
        }
        let (frame_chunks, pack_frames, zero) =
            (|| Ok((cursor.u32()?, cursor.u32()?, cursor.u32()?)))().map_err(damaged)?;
        let store_id = FileId(cursor.array().map_err(damaged)?);
        let key_check = cursor.array().map_err(damaged)?;
        let config = Config {
            chunk_size,
            store_id,
            key_check: (flags & FLAG_KEYED != 0).then_some(key_check),
        };
        if (version, frame_chunks, pack_frames, zero)
            != (VERSION, config.frame_chunks(), config.pack_frames(), 0)
        {
            return Err(Malformed("fields contradict each other").in_file(file));
        }
        Ok(config)
    }
}

fn valid_chunk_size(size: u32) -> bool {
    size.is_power_of_two() && (512..=1 << 20).contains(&size)
}

fn key_check(key: &[u8; 32], store_id: FileId) -> [u8; 16] {
    let mut check = [0; 16];
    check.copy_from_slice(&blake3::keyed_hash(key, &store_id.0).as_bytes()[..16]);
    check
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_config(key: Option<[u8; 32]>) -> Config {
        Config::new(&CreateOptions {
            key,
            ..CreateOptions::default()
        })
        .unwrap()
    }

    #[test]
    fn config_comes_back() {
        for key in [None, Some([7; 32])] {
            let config = some_config(key);
            assert_eq!(Config::parse(&config.encode(), "config").unwrap(), config);
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
        let keyed = some_config(Some([1; 32]));
        assert!(keyed.check_key(Some(&[1; 32])).is_ok());
        assert!(matches!(
            keyed.check_key(Some(&[2; 32])),
            Err(Error::Key(_))
        ));
        assert!(matches!(keyed.check_key(None), Err(Error::Key(_))));
        assert!(some_config(None).check_key(Some(&[1; 32])).is_err());
    }
}
