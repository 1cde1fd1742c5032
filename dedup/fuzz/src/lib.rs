//! What the fuzz targets share: two small stores, one of them encrypted, in which one file is replaced by the fuzzer's
//! bytes, and everything that reads it.
//!
//! Digests are not checked in a fuzzer's build, so that it comes to what is behind them; seals are.

use std::sync::{Arc, LazyLock};

use dedup::backend::{Area, Files, Memory};
use dedup::{CreateOptions, GcOptions, Key, OpenOptions, Store, Zeros};

static PLAIN: LazyLock<Files> = LazyLock::new(|| some_store(None));
static ENCRYPTED: LazyLock<Files> = LazyLock::new(|| some_store(Some(key())));

fn key() -> Key {
    Key::from([7; 32])
}

fn options(key: Option<Key>) -> OpenOptions {
    OpenOptions {
        key,
        threads: 1,
        ..OpenOptions::default()
    }
}

/// The files of a store that has every kind but a condemned list, and then one of those.
fn some_store(key: Option<Key>) -> Files {
    let backend = Memory::new();
    let create = CreateOptions {
        key,
        ..CreateOptions::default()
    };
    let store =
        Store::create(backend.clone(), &create, options(None)).expect("memory does not fail");
    let image: Vec<u8> = (0..20 * 4096u32)
        .map(|at| ((at / 4096 % 7) * (at % 251)) as u8)
        .collect();
    for name in ["a", "b"] {
        let mut writer = store.writer(name, None).expect("the name is free");
        let mut memory = writer.image("memory").expect("the name is free");
        memory.write(&image).expect("memory does not fail");
        memory.finish().expect("memory does not fail");
        writer.set_manifest(b"{\"cpus\": 2}".to_vec());
        writer.commit().expect("memory does not fail");
    }
    store.tag("a", "tag").expect("memory does not fail");
    let snapshot = store.snapshot("a").expect("it is there");
    snapshot
        .annotate("note", b"learned later")
        .expect("memory does not fail");
    let mut files = backend.files();
    let list = [
        b"DEDUPCON".as_slice(),
        &[1, 0, 0, 0, 0, 0, 0, 0],
        &[7; 16],
        &[0; 16],
    ]
    .concat();
    files.insert((Area::Condemned, "0".repeat(32)), Arc::new(list));
    files
}

/// The first file of an area: the one that a target replaces.
fn original(files: &Files, area: Area) -> ((Area, String), Arc<Vec<u8>>) {
    let (key, file) = files
        .iter()
        .find(|((of, _), _)| *of == area)
        .expect("there is one of each kind");
    (key.clone(), file.clone())
}

/// Which store an input is for, and with a key or without: the first byte's bits 1 and 2.
const ENCRYPTED_STORE: u8 = 1 << 1;
const WITHOUT_KEY: u8 = 1 << 2;

/// Writes inputs to begin with: the library's own files, in each way to give them.
pub fn write_seeds(area: Area) {
    fuzz_harness::write_seeds(seeds(area));
}

fn seeds(area: Area) -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for kind in [0, ENCRYPTED_STORE, ENCRYPTED_STORE | WITHOUT_KEY] {
        let files = if kind & ENCRYPTED_STORE == 0 {
            &*PLAIN
        } else {
            &*ENCRYPTED
        };
        let (_, file) = original(files, area);
        seeds.push([&[kind], file.as_slice()].concat());
        // Changes of the last bytes, where trailers are, and of the first.
        let end = (file.len() as u16).saturating_sub(20).to_le_bytes();
        seeds.push(vec![kind | 1, end[0], end[1], 1]);
        seeds.push(vec![kind | 1, 12, 0, 0xFF, 40, 0, 1]);
    }
    seeds
}

/// The bytes that a fuzzer's input stands for: with an even first byte the input itself, with an odd one the library's
/// own file with changes of three bytes each (where: two, what: one).
fn changed(original: &[u8], input: &[u8]) -> Vec<u8> {
    match input.split_first() {
        Some((kind, bytes)) if kind % 2 == 0 => bytes.to_vec(),
        Some((_, changes)) => {
            let mut bytes = original.to_vec();
            for change in changes.chunks_exact(3) {
                let at =
                    usize::from(u16::from_le_bytes([change[0], change[1]])) % bytes.len().max(1);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = change[2];
                }
            }
            bytes
        }
        None => original.to_vec(),
    }
}

/// Replaces the first file of an area and uses the store in every way. Nothing may panic.
pub fn run(area: Area, input: &[u8]) {
    let kind = input.first().copied().unwrap_or(0);
    let encrypted = kind & ENCRYPTED_STORE != 0;
    let mut files = if encrypted {
        ENCRYPTED.clone()
    } else {
        PLAIN.clone()
    };
    let (name, original) = original(&files, area);
    files.insert(name, Arc::new(changed(&original, input)));
    let backend = Memory::with_files(files);
    let opened = if kind & WITHOUT_KEY != 0 {
        Store::open_without_key(backend, options(None))
    } else {
        Store::open(backend, options(encrypted.then(key)))
    };
    let Ok(store) = opened else { return };
    let _ = store.log();
    let _ = store.stat();
    let _ = store.show("tag");
    let _ = store.manifest("a");
    let _ = store.diff("a", "b");
    if let Ok(snapshot) = store.snapshot("a") {
        let _ = snapshot.annotation("note");
        let _ = snapshot.annotate("note", b"again");
    }
    for name in ["a", "b"] {
        // An image may say that it is large, and be so, being all zeros.
        let image = store
            .image(name, "memory")
            .ok()
            .filter(|image| image.size() < 1 << 24);
        if let Some(image) = image {
            let mut memory = vec![0; image.size() as usize];
            let _ = image.load_into(&mut memory, Zeros::Write);
            let _ = image.read_at(image.size() / 2, &mut [0; 9000]);
        }
    }
    let _ = store.fsck();
    if let Ok(mut writer) = store.writer("c", Some("a")) {
        if let Ok(mut memory) = writer.image("memory") {
            let _ = memory.keep(8192);
            let _ = memory.write(&[5; 50_000]);
            let _ = memory.finish();
        }
        let _ = writer.commit();
    }
    let _ = store.gc(&GcOptions::default());
    let _ = store.repair();
}
