//! What the fuzz targets share: a small store, in which one file is replaced by the fuzzer's bytes, and everything
//! that reads it.
//!
//! `cargo +nightly fuzz run <target>` in `dedup/`. The targets have no corpus in the repository: an empty input stands
//! for the file as the library wrote it, changed inputs come from there by [`changed`].

use std::sync::{Arc, LazyLock};

use dedup::backend::{Area, Files, Memory};
use dedup::{CreateOptions, GcOptions, OpenOptions, Store, Zeros};

static FILES: LazyLock<Files> = LazyLock::new(|| {
    let backend = Memory::new();
    let store = Store::create(backend.clone(), &CreateOptions::default(), options()).expect("memory does not fail");
    let image: Vec<u8> = (0..20 * 4096u32).map(|at| (at / 4096 % 7) as u8 * (at % 251) as u8).collect();
    for name in ["a", "b"] {
        let mut writer = store.writer(name, None).expect("the name is free");
        let mut memory = writer.image("memory").expect("the name is free");
        memory.write(&image).expect("memory does not fail");
        memory.finish().expect("memory does not fail");
        writer.commit().expect("memory does not fail");
    }
    store.tag("a", "tag").expect("memory does not fail");
    backend.files()
});

fn options() -> OpenOptions {
    OpenOptions { threads: 1, ..OpenOptions::default() }
}

/// The bytes that a fuzzer's input stands for: with an even first byte the input itself, with an odd one the library's
/// own file with changes of three bytes each (where: two, what: one).
fn changed(original: &[u8], input: &[u8]) -> Vec<u8> {
    match input.split_first() {
        Some((kind, bytes)) if kind % 2 == 0 => bytes.to_vec(),
        Some((_, changes)) => {
            let mut bytes = original.to_vec();
            for change in changes.chunks_exact(3) {
                let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % bytes.len().max(1);
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
    let mut files = FILES.clone();
    let existing = files.iter().find(|((of, _), _)| *of == area).map(|(key, file)| (key.clone(), file.clone()));
    let (key, original) = existing.unwrap_or_else(|| {
        let list = [b"DEDUPCON".as_slice(), &[1, 0, 0, 0, 0, 0, 0, 0], &[7; 16], &[0; 16]].concat();
        ((area, "0".repeat(32)), Arc::new(list))
    });
    files.insert(key, Arc::new(changed(&original, input)));
    let Ok(store) = Store::open(Memory::with_files(files), options()) else { return };
    let _ = store.log();
    let _ = store.stat();
    let _ = store.show("tag");
    let _ = store.manifest("a");
    let _ = store.diff("a", "b");
    for name in ["a", "b"] {
        // An image may say that it is large, and be so, being all zeros.
        let image = store.image(name, "memory").ok().filter(|image| image.size() < 1 << 24);
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
