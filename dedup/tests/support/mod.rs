//! Images and stores for tests.
#![allow(dead_code, unreachable_pub, reason = "not every test uses all of it")]

pub mod hooked;

use dedup::backend::Backend;
use dedup::{CreateOptions, Key, OpenOptions, Result, Saved, Store, Zeros};

/// The key of the stores that tests create: there is one where a suite is a part of `encrypted.rs`.
pub fn key() -> Option<Key> {
    module_path!()
        .starts_with("encrypted::")
        .then(|| Key::from([0xE5; 32]))
}

/// Chunks of which a store may not know that it has them: what a full bucket of the index has left out, of which there are 3 in
/// 10,000. Which are full goes by the identities, and those of an encrypted store are others each time.
pub fn left_out() -> u64 {
    if key().is_some() { 8 } else { 0 }
}

/// How tests create their stores.
pub fn create_options() -> CreateOptions {
    CreateOptions {
        key: key(),
        ..CreateOptions::default()
    }
}

/// Two threads always, so that tests do the same everywhere.
pub fn options() -> OpenOptions {
    OpenOptions {
        key: key(),
        threads: 2,
        ..OpenOptions::default()
    }
}

/// A new store.
pub fn create(backend: impl Backend) -> Store {
    Store::create(backend, &create_options(), options()).unwrap()
}

/// A generator of numbers that look random; always the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// Fills a page with something that compresses as memory does.
pub fn fill_page(page: &mut [u8], seed: u64) {
    let mut random = Random::new(seed);
    for word in page.chunks_mut(16) {
        let value = random.next();
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&value.to_le_bytes()[..4]);
        bytes[8] = (value >> 60) as u8;
        word.copy_from_slice(&bytes[..word.len()]);
    }
}

/// An image of `pages` pages: a third zeros, some repeated, the rest unique to the seed.
pub fn image(pages: usize, seed: u64) -> Vec<u8> {
    let mut image = vec![0; pages * 4096];
    let mut random = Random::new(seed);
    for page in image.chunks_mut(4096) {
        match random.below(9) {
            0..3 => {}
            3 => fill_page(page, random.below(10) as u64),
            _ => fill_page(page, random.next()),
        }
    }
    image
}

/// Changes some pages.
pub fn touch(image: &mut [u8], pages: usize, seed: u64) {
    let mut random = Random::new(seed);
    let count = image.len() / 4096;
    for _ in 0..pages {
        let at = random.below(count) * 4096;
        fill_page(&mut image[at..at + 4096], random.next());
    }
}

pub fn save(store: &Store, name: &str, image: &[u8]) -> Result<Saved> {
    let mut writer = store.writer(name, None)?;
    let mut memory = writer.image("memory")?;
    memory.write(image)?;
    memory.finish()?;
    writer.commit()
}

pub fn load(store: &Store, name: &str) -> Result<Vec<u8>> {
    let image = store.image(name, "memory")?;
    let mut memory = vec![0; image.size() as usize];
    image.load_into(&mut memory, Zeros::AlreadyThere)?;
    Ok(memory)
}

pub fn annotate(store: &Store, snapshot: &str, name: &str, content: &[u8]) -> Result<()> {
    store.snapshot(snapshot)?.annotate(name, content)
}

pub fn annotation(store: &Store, snapshot: &str, name: &str) -> Result<Option<Vec<u8>>> {
    store.snapshot(snapshot)?.annotation(name)
}
