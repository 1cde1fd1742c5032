//! Encryption at rest: what is sealed, and with which keys. `docs/store-format.md` specifies and argues.

use aes_gcm_siv::aead::{AeadInOut, KeyInit};
use aes_gcm_siv::{Aes256GcmSiv, Nonce, Tag};
use zeroize::Zeroizing;

use crate::error::{Error, Malformed, Result};
use crate::key::Key;
use crate::name::{FileId, fill_random};

pub(crate) const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;

/// Bytes that sealing adds: the nonce before, the tag after.
pub(crate) const OVERHEAD: usize = NONCE_BYTES + TAG_BYTES;

/// BLAKE3's `derive_key` wants a context that no other purpose in the world has.
const CHECK: &str = "dedup store 2026-11-21 key check";
const IDENTITIES: &str = "dedup store 2026-11-21 chunk identities";
const PACKS: &str = "dedup store 2026-11-21 packs";
const SNAPSHOTS: &str = "dedup store 2026-11-21 snapshots";

type Secret = Zeroizing<[u8; 32]>;

/// Something that takes a key in an encrypted store.
#[derive(Clone)]
pub(crate) enum Access<T> {
    /// The store is not encrypted.
    Plain,
    /// It is, and its key is not at hand.
    Locked,
    /// It is, and this is what its key gives.
    Open(T),
}

impl<T> Access<T> {
    /// What the key gives; `None` in a store that is not encrypted.
    ///
    /// # Errors
    ///
    /// [`Error::Key`] when it takes a key that is not at hand.
    pub(crate) fn get(&self) -> Result<Option<&T>> {
        match self {
            Access::Plain => Ok(None),
            Access::Locked => Err(Error::Key("no key was given")),
            Access::Open(opened) => Ok(Some(opened)),
        }
    }

    pub(crate) fn is_locked(&self) -> bool {
        matches!(self, Access::Locked)
    }

    pub(crate) fn map<U>(&self, opened: impl FnOnce(&T) -> U) -> Access<U> {
        match self {
            Access::Plain => Access::Plain,
            Access::Locked => Access::Locked,
            Access::Open(keys) => Access::Open(opened(keys)),
        }
    }
}

/// The keys of a store, each for one purpose.
pub(crate) struct Keys {
    identities: Secret,
    packs: Secret,
    snapshots: Secret,
}

impl Keys {
    /// Derives them. Stores with the same key file have different ones.
    pub(crate) fn new(key: &Key, store: FileId) -> Self {
        Keys {
            identities: derive(IDENTITIES, key, store),
            packs: derive(PACKS, key, store),
            snapshots: derive(SNAPSHOTS, key, store),
        }
    }

    /// The key that identities of chunks are computed with.
    pub(crate) fn identities(&self) -> &[u8; 32] {
        &self.identities
    }

    /// Seals the parts of one pack.
    pub(crate) fn pack(&self, id: FileId) -> Sealer {
        let [key, _] = expand(&self.packs, id);
        Sealer::new(&key)
    }

    /// Seals the parts of one snapshot; `salt` is its own.
    pub(crate) fn snapshot(&self, salt: FileId) -> SnapshotKeys {
        let [key, authenticator] = expand(&self.snapshots, salt);
        SnapshotKeys {
            salt,
            sealer: Sealer::new(&key),
            authenticator,
        }
    }
}

/// Proves the key, and that a store's parameters are those that it was created with, without telling the key.
pub(crate) fn key_check(key: &Key, store: FileId, parameters: &[u8]) -> [u8; 16] {
    let key = derive(CHECK, key, store);
    let mut check = [0; 16];
    check.copy_from_slice(&blake3::keyed_hash(&key, parameters).as_bytes()[..16]);
    check
}

fn derive(context: &str, key: &Key, store: FileId) -> Secret {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    hasher.update(key.bytes()).update(&store.0);
    Zeroizing::new(hasher.finalize().into())
}

/// Two keys for one file.
fn expand(key: &Secret, file: FileId) -> [Secret; 2] {
    let mut both = [Secret::default(), Secret::default()];
    let mut output = blake3::Hasher::new_keyed(key)
        .update(&file.0)
        .finalize_xof();
    for key in &mut both {
        output.fill(&mut **key);
    }
    both
}

/// Seals the parts of one file: AES-256-GCM-SIV (RFC 8452) with a random nonce for each.
pub(crate) struct Sealer {
    cipher: Aes256GcmSiv,
}

impl Sealer {
    fn new(key: &Secret) -> Self {
        Sealer {
            cipher: Aes256GcmSiv::new((&**key).into()),
        }
    }

    /// Seals what lies between the first [`NONCE_BYTES`] and the last [`TAG_BYTES`] of `part`, which get nonce and
    /// tag. `context` is what must be the same to open it.
    pub(crate) fn seal_in_place(&self, context: &[u8], part: &mut [u8]) -> Result<()> {
        let too_long = || Error::Parameter("a part is too long to be sealed".into());
        let (nonce, rest) = part
            .split_first_chunk_mut::<NONCE_BYTES>()
            .ok_or_else(too_long)?;
        let (plain, tag) = rest
            .split_last_chunk_mut::<TAG_BYTES>()
            .ok_or_else(too_long)?;
        fill_random(nonce)?;
        let sealed =
            self.cipher
                .encrypt_inout_detached(&Nonce::from(*nonce), context, plain.into());
        *tag = sealed.map_err(|_| too_long())?.into();
        Ok(())
    }

    /// The sealed form of some bytes.
    pub(crate) fn seal(&self, context: &[u8], plain: &[u8]) -> Result<Vec<u8>> {
        let mut part = vec![0; plain.len() + OVERHEAD];
        part[NONCE_BYTES..][..plain.len()].copy_from_slice(plain);
        self.seal_in_place(context, &mut part)?;
        Ok(part)
    }

    /// Opens what was sealed, in `plain`, whose content it replaces.
    pub(crate) fn open(
        &self,
        context: &[u8],
        sealed: &[u8],
        plain: &mut Vec<u8>,
    ) -> Result<(), Malformed> {
        let refused = Malformed("it was not sealed with the store's key, or for another place");
        let (nonce, rest) = sealed.split_first_chunk::<NONCE_BYTES>().ok_or(refused)?;
        let (body, tag) = rest.split_last_chunk::<TAG_BYTES>().ok_or(refused)?;
        plain.clear();
        plain.extend_from_slice(body);
        self.cipher
            .decrypt_inout_detached(
                &Nonce::from(*nonce),
                context,
                plain.as_mut_slice().into(),
                &Tag::from(*tag),
            )
            .map_err(|_| refused)
    }
}

/// Seals the parts of one snapshot.
pub(crate) struct SnapshotKeys {
    pub(crate) salt: FileId,
    sealer: Sealer,
    authenticator: Secret,
}

impl SnapshotKeys {
    pub(crate) fn seal_manifest(&self, manifest: &[u8]) -> Result<Vec<u8>> {
        self.seal(MANIFEST, manifest)
    }

    pub(crate) fn open_manifest(&self, stored: &[u8]) -> Result<Vec<u8>, Malformed> {
        self.open(MANIFEST, stored)
    }

    /// Seals a block of a recipe.
    pub(crate) fn seal_block(&self, image: u32, block: u64, form: &[u8]) -> Result<Vec<u8>> {
        self.seal(&block_context(image, block), form)
    }

    pub(crate) fn open_block(
        &self,
        image: u32,
        block: u64,
        stored: &[u8],
    ) -> Result<Vec<u8>, Malformed> {
        self.open(&block_context(image, block), stored)
    }

    /// Seals an annotation, also one without bytes: nothing else vouches for its length.
    pub(crate) fn seal_annotation(&self, name: &str, content: &[u8]) -> Result<Vec<u8>> {
        self.sealer.seal(&annotation_context(name), content)
    }

    pub(crate) fn open_annotation(&self, name: &str, stored: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut plain = Vec::new();
        self.sealer
            .open(&annotation_context(name), stored, &mut plain)?;
        Ok(plain)
    }

    /// What has no bytes, as a block of zeros, has none when it is sealed: the directory and the facts tell its length
    /// and are vouched for.
    fn seal(&self, context: &[u8], plain: &[u8]) -> Result<Vec<u8>> {
        if plain.is_empty() {
            return Ok(Vec::new());
        }
        self.sealer.seal(context, plain)
    }

    fn open(&self, context: &[u8], stored: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut plain = Vec::new();
        if !stored.is_empty() {
            self.sealer.open(context, stored, &mut plain)?;
        }
        Ok(plain)
    }

    /// Vouches for the parts of a snapshot that are not sealed.
    pub(crate) fn authenticate(&self, parts: &[&[u8]]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.authenticator);
        for part in parts {
            hasher.update(part);
        }
        hasher.finalize()
    }
}

const MANIFEST: &[u8] = b"manifest";

fn annotation_context(name: &str) -> Vec<u8> {
    [b"annotation", name.as_bytes()].concat()
}

fn block_context(image: u32, block: u64) -> [u8; 17] {
    let mut context = *b"block............";
    context[5..9].copy_from_slice(&image.to_le_bytes());
    context[9..].copy_from_slice(&block.to_le_bytes());
    context
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(key: u8, store: u8) -> Keys {
        Keys::new(&Key::from([key; 32]), FileId([store; 16]))
    }

    proptest! {
        #[test]
        fn sealed_parts_open_where_they_belong_and_nowhere_else(
            plain in prop::collection::vec(any::<u8>(), 0..600),
            flip: prop::sample::Index,
        ) {
            let sealer = keys(1, 1).pack(FileId([1; 16]));
            let mut sealed = sealer.seal(b"here", &plain).unwrap();
            prop_assert_eq!(sealed.len(), plain.len() + OVERHEAD);
            let mut opened = Vec::new();
            sealer.open(b"here", &sealed, &mut opened).unwrap();
            prop_assert_eq!(&opened, &plain);
            prop_assert!(sealer.open(b"there", &sealed, &mut opened).is_err());
            for other in [
                keys(2, 1).pack(FileId([1; 16])),
                keys(1, 2).pack(FileId([1; 16])),
                keys(1, 1).pack(FileId([2; 16])),
                keys(1, 1).snapshot(FileId([1; 16])).sealer,
            ] {
                prop_assert!(other.open(b"here", &sealed, &mut opened).is_err());
            }
            let bit = flip.index(sealed.len() * 8);
            sealed[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(sealer.open(b"here", &sealed, &mut opened).is_err());
        }

        #[test]
        fn what_is_too_short_is_refused(sealed in prop::collection::vec(any::<u8>(), 0..OVERHEAD)) {
            let sealer = keys(1, 1).pack(FileId([1; 16]));
            prop_assert!(sealer.open(b"", &sealed, &mut Vec::new()).is_err());
        }
    }

    #[test]
    fn equal_parts_are_sealed_differently() {
        let sealer = keys(1, 1).pack(FileId([1; 16]));
        let mut seen = std::collections::HashSet::new();
        for _ in 0..100 {
            assert!(seen.insert(sealer.seal(b"", b"the same").unwrap()));
        }
    }

    #[test]
    fn blocks_are_bound_to_their_image_and_number() {
        let keys = keys(1, 1).snapshot(FileId([3; 16]));
        let sealed = keys.seal_block(1, 2, b"form").unwrap();
        assert_eq!(keys.open_block(1, 2, &sealed).unwrap(), b"form");
        assert!(keys.open_block(2, 1, &sealed).is_err());
        assert!(keys.open_block(1, 3, &sealed).is_err());
        assert!(keys.open_manifest(&sealed).is_err());
        assert!(keys.seal_block(1, 2, &[]).unwrap().is_empty());
    }

    /// The test vector of RFC 8452, C.2, with 8 bytes of plain text and one of associated data.
    #[test]
    fn the_cipher_is_the_one_of_the_specification() {
        let mut key = [0; 32];
        key[0] = 1;
        let (mut nonce, mut plain) = ([0; 12], [2, 0, 0, 0, 0, 0, 0, 0]);
        nonce[0] = 3;
        let cipher = Aes256GcmSiv::new((&key).into());
        let tag = cipher
            .encrypt_inout_detached(&Nonce::from(nonce), &[1], plain.as_mut_slice().into())
            .unwrap();
        assert_eq!(crate::bytes::to_hex(&plain), "1de22967237a8132");
        assert_eq!(
            crate::bytes::to_hex(&tag),
            "91213f267e3b452f02d01ae33e4ec854"
        );
    }
}
