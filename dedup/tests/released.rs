//! Stores of every released version of the format can be read, and saved to.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

use std::path::Path;

use dedup::{CreateOptions, GcOptions, Key, OpenOptions, Store};

const PAGE: usize = 4096;
const MANIFEST: &[u8] = b"a machine of two images";

/// Page `number` of the images of a version, for ever the same: zeros, words, or what no level compresses.
fn page(number: u32) -> Vec<u8> {
    match number % 7 {
        0 | 1 => vec![0; PAGE],
        2 => {
            let mut page = vec![0; PAGE];
            let mut noise = blake3::Hasher::new();
            noise.update(&number.to_le_bytes());
            noise.finalize_xof().fill(&mut page);
            page
        }
        _ => {
            let words = format!("of the page {} these are the words. ", number / 2);
            words.bytes().cycle().take(PAGE).collect()
        }
    }
}

fn pages(numbers: impl IntoIterator<Item = u32>) -> Vec<u8> {
    numbers.into_iter().flat_map(page).collect()
}

/// The images of the snapshot `monday`, the second of which ends within a chunk.
fn monday() -> [(&'static str, Vec<u8>); 2] {
    let mut disk = pages(20..33);
    disk.truncate(12 * PAGE + 100);
    [("memory", pages(0..30)), ("disk", disk)]
}

/// That of `tuesday`, most of which is as on Monday.
fn tuesday() -> Vec<u8> {
    pages((0..10).chain(100..104).chain(14..30))
}

fn options(key: Option<Key>) -> OpenOptions {
    OpenOptions {
        key,
        threads: 1,
        ..OpenOptions::default()
    }
}

fn make(store: &Path, key: Option<Key>) {
    let create = CreateOptions {
        key: key.clone(),
        ..CreateOptions::default()
    };
    let store = Store::create_dir(store, &create, options(key)).unwrap();
    let mut writer = store.writer("monday", None).unwrap();
    for (name, bytes) in monday() {
        let mut image = writer.image(name).unwrap();
        image.write(&bytes).unwrap();
        image.finish().unwrap();
    }
    writer.set_manifest(MANIFEST.to_vec());
    writer.commit().unwrap();
    store.tag("monday", "gold").unwrap();
    let mut writer = store.writer("tuesday", Some("monday")).unwrap();
    let mut image = writer.image("memory").unwrap();
    let (kept, changed) = (10 * PAGE, 4 * PAGE);
    image.keep(kept as u64).unwrap();
    image.write(&tuesday()[kept..kept + changed]).unwrap();
    image.keep((16 * PAGE) as u64).unwrap();
    image.finish().unwrap();
    writer.commit().unwrap();
}

fn is_whole(store: &Path, key: Option<Key>) {
    let store = Store::open_dir(store, options(key)).unwrap();
    assert!(store.fsck().unwrap().problems.is_empty());
    let has = |snapshot: &str, image: &str, bytes: &[u8]| {
        let reader = store.image(snapshot, image).unwrap();
        assert_eq!(reader.size(), bytes.len() as u64);
        let mut loaded = vec![0; bytes.len()];
        reader.read_at(0, &mut loaded).unwrap();
        assert!(loaded == bytes, "{image} of {snapshot}");
    };
    for (name, bytes) in monday() {
        has("gold", name, &bytes);
    }
    has("tuesday", "memory", &tuesday());
    assert_eq!(store.manifest("monday").unwrap(), MANIFEST);
    let parent = store.show("tuesday").unwrap().facts.parent;
    assert_eq!(parent, Some(store.show("gold").unwrap().id));

    // What is in there already is found by a save of today, and a collection keeps it.
    let mut writer = store.writer("wednesday", None).unwrap();
    let mut image = writer.image("memory").unwrap();
    image.write(&tuesday()).unwrap();
    let stats = image.finish().unwrap();
    assert_eq!(stats.new_chunks, 0);
    writer.commit().unwrap();
    store.rm("monday").unwrap();
    store.gc(&GcOptions::default()).unwrap();
    has("wednesday", "memory", &tuesday());
    assert!(store.fsck().unwrap().problems.is_empty());
}

#[test]
fn a_store_of_version_2_is_whole() {
    let kept = golden::tree("store", 2, |directory| make(&directory.join("store"), None));
    is_whole(&kept.path().join("store"), None);
}

#[test]
fn an_encrypted_store_of_version_2_is_whole() {
    let key = || Some(Key::from([0x5c; 32]));
    let kept = golden::tree("encrypted-store", 2, |directory| {
        make(&directory.join("store"), key());
    });
    is_whole(&kept.path().join("store"), key());
}
