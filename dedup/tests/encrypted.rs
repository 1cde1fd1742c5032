//! Encryption at rest: what others see, what they can do, and the other suites again over an encrypted store.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]
#![allow(
    clippy::duplicate_mod,
    reason = "each suite has its `support`, which asks where it is"
)]

mod support;

#[path = "encrypted/forged.rs"]
mod forged;

// Their `support::key` gives a key here.
#[path = "annotations.rs"]
mod annotations;
#[path = "concurrent.rs"]
mod concurrent;
#[path = "damage.rs"]
mod damage;
#[path = "durability.rs"]
mod durability;
#[path = "faults.rs"]
mod faults;
#[path = "gc.rs"]
mod gc;
#[path = "images.rs"]
mod images;
#[path = "killed.rs"]
mod killed;

use std::collections::HashSet;
use std::sync::Arc;

use dedup::backend::{Area, Files, Memory};
use dedup::{CreateOptions, Error, GcOptions, Key, OpenOptions, Store, Zeros};
use support::{Random, fill_page, image, load, save, touch};

fn key(byte: u8) -> Option<Key> {
    Some(Key::from([byte; 32]))
}

fn options(key: Option<Key>) -> OpenOptions {
    OpenOptions {
        key,
        threads: 2,
        ..OpenOptions::default()
    }
}

/// A new encrypted store.
fn create(backend: Memory) -> Store {
    let create = CreateOptions {
        key: key(1),
        ..CreateOptions::default()
    };
    Store::create(backend, &create, options(None)).unwrap()
}

fn reopen(files: Files) -> Store {
    Store::open(Memory::with_files(files), options(key(1))).unwrap()
}

/// Saves a snapshot with a manifest.
fn save_with_manifest(store: &Store, name: &str, image: &[u8], manifest: &[u8]) {
    let mut writer = store.writer(name, None).unwrap();
    let mut memory = writer.image("memory").unwrap();
    memory.write(image).unwrap();
    memory.finish().unwrap();
    writer.set_manifest(manifest.to_vec());
    writer.commit().unwrap();
}

#[test]
fn a_store_opens_only_with_its_key() {
    let backend = Memory::new();
    let store = create(backend.clone());
    save(&store, "a", &image(50, 5)).unwrap();
    let open = |key| Store::open(backend.clone(), options(key)).map_err(|error| error.to_string());
    assert!(load(&open(key(1)).unwrap(), "a").unwrap() == image(50, 5));
    assert!(open(key(2)).map(drop).unwrap_err().contains("another key"));
    assert!(open(None).map(drop).unwrap_err().contains("no key"));

    let plain = Memory::new();
    Store::create(plain.clone(), &CreateOptions::default(), options(None)).unwrap();
    let refused = Store::open(plain, options(key(1))).map_err(|error| error.to_string());
    assert!(refused.map(drop).unwrap_err().contains("not encrypted"));
}

#[test]
fn nothing_of_the_content_is_in_any_file() {
    // Pages that compress, pages that do not, and text.
    let mut content = vec![0; 64 * 4096];
    let mut random = Random::new(1);
    for (number, page) in content.chunks_mut(4096).enumerate() {
        match number % 3 {
            0 => fill_page(page, random.next()),
            1 => page
                .chunks_mut(8)
                .for_each(|word| word.copy_from_slice(&random.next().to_le_bytes())),
            _ => page.chunks_mut(32).enumerate().for_each(|(at, line)| {
                let text = format!("line {at:5} of page {number:5}: secret");
                line.copy_from_slice(&text.as_bytes()[..32]);
            }),
        }
    }
    let manifest = b"{\"cpus\": 2, \"kernel\": \"a secret path, long enough\"}";
    let secrets = |run: &[u8]| -> HashSet<[u8; 16]> {
        run.windows(16)
            .map(|window| window.try_into().unwrap())
            // Runs of one byte are in any file.
            .filter(|window: &[u8; 16]| window.iter().any(|byte| *byte != window[0]))
            .collect()
    };
    let secrets: HashSet<[u8; 16]> = secrets(&content)
        .union(&secrets(manifest))
        .copied()
        .collect();
    let leaks = |files: &Files| -> Vec<String> {
        let leaks = files.iter().filter(|(_, file)| {
            file.windows(16)
                .any(|window| secrets.contains::<[u8; 16]>(window.try_into().unwrap()))
        });
        leaks.map(|((area, name), _)| area.path(name)).collect()
    };

    // In a plain store the test finds what it looks for.
    let plain = Memory::new();
    let store = Store::create(plain.clone(), &CreateOptions::default(), options(None)).unwrap();
    save_with_manifest(&store, "a", &content, manifest);
    assert!(leaks(&plain.files()).len() >= 2);

    let backend = Memory::new();
    let store = create(backend.clone());
    save_with_manifest(&store, "a", &content, manifest);
    let mut child = content.clone();
    touch(&mut child, 3, 2);
    save_with_manifest(&store, "b", &child, manifest);
    store.tag("a", "gold").unwrap();
    store
        .snapshot("b")
        .unwrap()
        .annotate("note", manifest)
        .unwrap();
    assert_eq!(leaks(&backend.files()), Vec::<String>::new());
    // Also what a collection writes anew.
    child[..60 * 4096].fill(0);
    save_with_manifest(&store, "c", &child, manifest);
    store.rm("a").unwrap();
    store.rm("b").unwrap();
    assert!(store.gc(&GcOptions::default()).unwrap().packs_shrunk > 0);
    assert_eq!(leaks(&backend.files()), Vec::<String>::new());
    assert!(load(&store, "c").unwrap() == child);
    assert_eq!(store.manifest("c").unwrap(), manifest);
}

#[test]
fn equal_chunks_meet_within_a_store_and_not_between_stores() {
    let image = image(300, 3);
    let (first, second) = (Memory::new(), Memory::new());
    let store = create(first.clone());
    save(&store, "a", &image).unwrap();
    assert_eq!(save(&store, "b", &image).unwrap().images[0].new_chunks, 0);
    save(&create(second.clone()), "a", &image).unwrap();
    // Of the same key and the same image, nothing is the same: not a key of the index, not a part of a frame.
    let file = |backend: &Memory, of: Area| -> Arc<Vec<u8>> {
        let files = backend.files();
        let (_, file) = files.iter().find(|((area, _), _)| *area == of).unwrap();
        file.clone()
    };
    let keys = |backend: &Memory| -> HashSet<Vec<u8>> {
        let index = file(backend, Area::Index);
        let entries = u16::from_le_bytes([index[8], index[9]]) as usize;
        let keys = index[16..].chunks_exact(6).take(entries);
        keys.map(<[u8]>::to_vec).collect()
    };
    assert!(keys(&first).len() > 100);
    assert!(keys(&first).is_disjoint(&keys(&second)));
    let payload = |backend: &Memory| -> HashSet<Vec<u8>> {
        // Of the first frame, behind the headers of pack and frame.
        let pack = file(backend, Area::Packs);
        pack[140..2000].windows(8).map(<[u8]>::to_vec).collect()
    };
    assert!(payload(&first).is_disjoint(&payload(&second)));
}

#[test]
fn what_takes_no_key_works_without_and_the_rest_says_so() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let kept = image(500, 6);
    save(&store, "kept", &kept).unwrap();
    save(&store, "removed", &image(500, 7)).unwrap();

    let locked = Store::open_without_key(backend.clone(), options(None)).unwrap();
    assert_eq!(locked.log().unwrap().len(), 2);
    locked.tag("kept", "gold").unwrap();
    let report = locked.fsck().unwrap();
    assert!(report.digests_only && report.problems.is_empty() && report.chunks > 0);
    locked.rm("removed").unwrap();
    assert_eq!(locked.stat().unwrap().snapshots, 1);
    let collected = locked.gc(&GcOptions::default()).unwrap();
    assert_eq!((collected.packs_removed, collected.packs_shrunk), (1, 0));

    let refusals = [
        locked.writer("new", None).map(drop),
        locked.image("kept", "memory").map(drop),
        locked.manifest("kept").map(drop),
        locked.diff("kept", "gold").map(drop),
        locked.repair().map(drop),
    ];
    for refused in refusals {
        assert!(matches!(refused, Err(Error::Key(_))), "{refused:?}");
    }
    assert!(load(&store, "kept").unwrap() == kept);
    assert!(!store.fsck().unwrap().digests_only);
}

#[test]
fn a_collection_without_the_key_spares_what_it_cannot_judge() {
    let backend = Memory::new();
    let store = create(backend.clone());
    let base = image(1000, 8);
    save(&store, "base", &base).unwrap();
    let mut child = vec![0; base.len()];
    child[..50 * 4096].copy_from_slice(&base[..50 * 4096]);
    save(&store, "child", &child).unwrap();
    store.rm("base").unwrap();
    let locked = Store::open_without_key(backend, options(None)).unwrap();
    assert_eq!(locked.gc(&GcOptions::default()).unwrap().bytes_freed, 0);
    assert_eq!(store.gc(&GcOptions::default()).unwrap().packs_shrunk, 1);
    let mut loaded = vec![0; child.len()];
    let reader = store.image("child", "memory").unwrap();
    reader.load_into(&mut loaded, Zeros::AlreadyThere).unwrap();
    assert!(loaded == child);
}

#[test]
fn flipped_bits_are_found_without_the_key() {
    let backend = Memory::new();
    let store = create(backend.clone());
    save_with_manifest(&store, "a", &image(30, 9), b"manifest");
    let files = backend.files();
    let in_work = |((area, _), _): &(&(Area, String), &Arc<Vec<u8>>)| {
        matches!(area, Area::Packs | Area::Snapshots)
    };
    for ((area, name), content) in files.iter().filter(in_work) {
        // The bytes that vouch for the facts take the key to be checked.
        let unchecked = match area {
            Area::Snapshots => content.len() - 48 - 32..content.len() - 48,
            _ => 0..0,
        };
        for at in (0..content.len()).filter(|at| !unchecked.contains(at)) {
            let mut damaged = content.to_vec();
            damaged[at] ^= 1 << (at % 8);
            let mut files = files.clone();
            files.insert((*area, name.clone()), Arc::new(damaged));
            let locked = Store::open_without_key(Memory::with_files(files), options(None));
            let report = locked.unwrap().fsck().unwrap();
            let found = report
                .problems
                .iter()
                .find(|problem| problem.file == area.path(name));
            let what = format!("byte {at} of {}", area.path(name));
            assert!(found.is_some(), "{what}: {report:?}");
            assert_eq!(found.unwrap().snapshots, ["a"], "{what}");
        }
    }
}
