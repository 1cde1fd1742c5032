//! What is saved comes back, however it is written and read.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

mod support;

use dedup::backend::Memory;
use dedup::{Around, CreateOptions, Error, GcOptions, ImageReader, Store, Zeros};
use proptest::prelude::*;
use support::{Random, create, create_options, fill_page, image, load, options, save, touch};

#[test]
fn images_come_back() {
    let store = create(Memory::new());
    for (name, pages) in [("none", 0), ("one", 1), ("block", 1024), ("odd", 3001)] {
        let image = image(pages, 1);
        save(&store, name, &image).unwrap();
        assert!(load(&store, name).unwrap() == image, "{name}");
    }
}

#[test]
fn an_image_that_ends_within_a_chunk_comes_back() {
    let store = create(Memory::new());
    for len in [1, 511, 4095, 4097, (4 << 20) - 1, (4 << 20) + 1] {
        let image = &image(1030, 2)[4096 * 3 / 2..][..len];
        save(&store, &format!("len{len}"), image).unwrap();
        assert!(
            load(&store, &format!("len{len}")).unwrap() == image,
            "{len}"
        );
    }
}

#[test]
fn the_same_image_again_stores_nothing_new() {
    let store = create(Memory::new());
    let image = image(5000, 3);
    let first = save(&store, "first", &image).unwrap();
    let again = save(&store, "again", &image).unwrap();
    assert!(first.pack_bytes > 0 && first.images[0].new_chunks > 1000);
    let stored = again.images[0].new_chunks;
    assert!(stored <= support::left_out(), "{stored}");
    assert_eq!(again.pack_bytes > 0, stored > 0);
    assert_eq!(again.images[0].zero_chunks, first.images[0].zero_chunks);
    assert!(again.snapshot_bytes < 10_000, "{}", again.snapshot_bytes);
    // Also for a process that opens the store later, with nothing of the index in memory.
    let backend = Memory::new();
    save(&create(backend.clone()), "first", &image).unwrap();
    let later = Store::open(
        backend,
        dedup::OpenOptions {
            index_memory: 0,
            ..options()
        },
    )
    .unwrap();
    let stored = save(&later, "again", &image).unwrap().images[0].new_chunks;
    assert!(stored <= support::left_out(), "{stored}");
}

#[test]
fn a_changed_image_stores_the_changes() {
    let store = create(Memory::new());
    let mut image = image(5000, 4);
    save(&store, "before", &image).unwrap();
    touch(&mut image, 100, 5);
    let after = save(&store, "after", &image).unwrap();
    assert!(
        (90..=100).contains(&after.images[0].new_chunks),
        "{}",
        after.images[0].new_chunks
    );
    assert!(load(&store, "after").unwrap() == image);
}

#[test]
fn every_chunk_size_works() {
    for chunk_size in (9..=20).map(|bits| 1 << bits) {
        let create = CreateOptions {
            chunk_size,
            key: support::key(),
            ..CreateOptions::default()
        };
        let store = Store::create(Memory::new(), &create, options()).unwrap();
        let image = image(2500, 6);
        save(&store, "a", &image).unwrap();
        let again = save(&store, "b", &image).unwrap();
        let stored = again.images[0].new_chunks;
        assert!(
            stored <= support::left_out(),
            "{stored}, chunk size {chunk_size}"
        );
        assert!(
            load(&store, "a").unwrap() == image,
            "chunk size {chunk_size}"
        );
    }
    for chunk_size in [0, 256, 4095, 2 << 20] {
        let create = CreateOptions {
            chunk_size,
            key: None,
            ..CreateOptions::default()
        };
        assert!(matches!(
            Store::create(Memory::new(), &create, options()),
            Err(Error::Parameter(_))
        ));
    }
}

#[test]
fn every_level_works() {
    for level in [-50, -10, 0, 19] {
        let create = CreateOptions {
            level,
            ..create_options()
        };
        let store = Store::create(Memory::new(), &create, options()).unwrap();
        let (one, other) = (image(1500, 21), image(1500, 22));
        save(&store, "one", &one).unwrap();
        save(&store, "other", &other).unwrap();
        let again = save(&store, "again", &one).unwrap();
        let stored = again.images[0].new_chunks;
        assert!(stored <= support::left_out(), "{stored}, level {level}");
        store.rm("other").unwrap();
        assert!(store.gc(&GcOptions::default()).unwrap().bytes_freed > 0);
        assert!(load(&store, "one").unwrap() == one, "{level}");
        let report = store.fsck().unwrap();
        assert!(report.problems.is_empty(), "{level}: {report:?}");
    }
}

#[test]
fn several_images_and_a_manifest_make_a_snapshot() {
    let store = create(Memory::new());
    let (memory, disk) = (image(1500, 7), image(800, 8));
    let mut writer = store.writer("vm", None).unwrap();
    for (name, image) in [("memory", &memory), ("disk0", &disk)] {
        let mut writer = writer.image(name).unwrap();
        writer.write(image).unwrap();
        writer.finish().unwrap();
    }
    assert!(matches!(writer.image("memory"), Err(Error::ImageTaken(_))));
    writer.set_manifest(b"cpus: 2".to_vec());
    writer.commit().unwrap();

    assert_eq!(store.manifest("vm").unwrap(), b"cpus: 2");
    assert!(load(&store, "vm").unwrap() == memory);
    let mut loaded = vec![0xAA; disk.len()];
    store
        .image("vm", "disk0")
        .unwrap()
        .load_into(&mut loaded, Zeros::Write)
        .unwrap();
    assert!(loaded == disk);
    assert!(matches!(store.image("vm", "disk1"), Err(Error::NoImage(_))));
}

#[test]
fn files_come_back_with_their_holes() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create_dir(dir.path().join("store"), &create_options(), options()).unwrap();
    let file = std::fs::File::create(dir.path().join("sparse")).unwrap();
    let size = (1 << 30) + (4 << 20) + 777;
    file.set_len(size).unwrap();
    // Within a block, across the end of what is loaded at a time, and at the file's end.
    let data = image(300, 9);
    let places = [300 << 20, (1 << 30) - 100 * 4096, size - 5000];
    for at in places {
        let len = data.len().min((size - at) as usize);
        file.write_all_at(&data[..len], at).unwrap();
    }
    let saved = store
        .save_file("sparse", dir.path().join("sparse"))
        .unwrap();
    assert_eq!(saved.images[0].size, size);
    store
        .load_file("sparse", dir.path().join("loaded"))
        .unwrap();
    let loaded = std::fs::File::open(dir.path().join("loaded")).unwrap();
    assert_eq!(loaded.metadata().unwrap().len(), size);
    assert!(loaded.metadata().unwrap().blocks() * 512 < 4 << 20);
    for at in places {
        let len = data.len().min((size - at) as usize);
        let mut found = vec![0; len];
        loaded.read_exact_at(&mut found, at).unwrap();
        assert!(found == data[..len], "at {at}");
    }
    assert!(matches!(
        store.save_file("absent", dir.path().join("absent")),
        Err(Error::Io { .. })
    ));
}

/// More than are open at a time, of all lengths, and what they are called.
fn many_files(dir: &std::path::Path) -> Vec<(String, std::path::PathBuf)> {
    let files = (0..70u64).map(|number| {
        let name = format!("{number}");
        let path = dir.join(&name);
        let pages = image(if number == 3 { 5000 } else { 20 }, number / 2);
        std::fs::write(&path, &pages[..pages.len() - number as usize * 300]).unwrap();
        (name, path)
    });
    files.collect()
}

#[test]
fn files_that_are_saved_together_are_what_each_is_alone() {
    let dir = tempfile::tempdir().unwrap();
    let files = many_files(dir.path());
    let store = create(Memory::new());
    let together = |name: &str, parent: Option<&str>| {
        let named: Vec<_> = files.iter().map(|(n, path)| (&**n, &**path)).collect();
        let mut writer = store.writer(name, parent).unwrap();
        let stats = writer.images_from_files(&named).unwrap();
        assert!(
            stats
                .iter()
                .map(|s| &s.name)
                .eq(files.iter().map(|(n, _)| n))
        );
        writer.commit().unwrap()
    };
    let saved = together("together", None);
    assert!(saved.images[3].new_chunks > 1000);
    // What the others have already is stored once.
    let (first, same) = (&saved.images[40], &saved.images[41]);
    assert!(first.new_chunks + same.new_chunks <= 21 + support::left_out());
    let again = together("again", Some("together"));
    let new: u64 = again.images.iter().map(|image| image.new_chunks).sum();
    assert!(new <= support::left_out(), "{new}");
    for snapshot in ["together", "again"] {
        for (name, path) in &files {
            let image = store.image(snapshot, name).unwrap();
            let bytes = std::fs::read(path).unwrap();
            let mut loaded = vec![0; bytes.len()];
            assert_eq!(image.size(), bytes.len() as u64);
            image.read_at(0, &mut loaded).unwrap();
            assert!(loaded == bytes, "{name} of {snapshot}");
        }
    }
}

#[test]
fn of_files_that_cannot_be_saved_together_nothing_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let files = many_files(dir.path());
    let store = create(Memory::new());
    let absent = dir.path().join("absent");
    let path = files[0].1.as_path();
    let mut writer = store.writer("bad", None).unwrap();
    writer.images_from_files(&[("one", path)]).unwrap();
    let refused = writer.images_from_files(&[("two", path), ("two", path)]);
    assert!(matches!(refused, Err(Error::ImageTaken(name)) if name == "two"));
    let refused = writer.images_from_files(&[("one", path)]);
    assert!(matches!(refused, Err(Error::ImageTaken(name)) if name == "one"));
    // A name that is refused leaves what there is as it was.
    writer.commit().unwrap();
    let pipe = dir.path().join("pipe");
    let (fifo, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, fifo, mode, 0).unwrap();
    for bad in [absent.as_path(), dir.path(), &pipe] {
        let mut writer = store.writer("worse", None).unwrap();
        let mut named: Vec<_> = files.iter().map(|(n, path)| (&**n, &**path)).collect();
        named.push(("bad", bad));
        let refused = writer.images_from_files(&named);
        assert!(matches!(
            refused,
            Err(Error::Io { .. } | Error::Parameter(_))
        ));
        assert!(writer.commit().is_err(), "of a part there is no snapshot");
    }
    assert_eq!(store.list().unwrap().snapshots.len(), 1);
}

#[test]
fn a_child_keeps_what_it_did_not_change() {
    let store = create(Memory::new());
    let mut image = image(9000, 10);
    save(&store, "parent", &image).unwrap();
    let mut parent = "parent".to_owned();
    for generation in 0..4 {
        let mut writer = store
            .writer(&format!("child{generation}"), Some(&parent))
            .unwrap();
        let mut memory = writer.image("memory").unwrap();
        let mut random = Random::new(generation);
        let mut at = 0;
        while at < 9000 {
            let keep = random.below(2500).min(9000 - at);
            memory.keep(keep as u64 * 4096).unwrap();
            at += keep;
            let change = random.below(5).min(9000 - at);
            for page in image[at * 4096..(at + change) * 4096].chunks_mut(4096) {
                fill_page(page, random.next());
                memory.write(page).unwrap();
            }
            at += change;
        }
        memory.finish().unwrap();
        let saved = writer.commit().unwrap();
        assert!(saved.images[0].new_chunks < 100);
        parent = saved.name;
        assert!(
            load(&store, &parent).unwrap() == image,
            "generation {generation}"
        );
    }
    let log = store.log().unwrap();
    let parents: Vec<_> = log
        .iter()
        .filter(|entry| entry.facts.parent.is_some())
        .collect();
    assert_eq!((log.len(), parents.len()), (5, 4));
}

/// By pieces of all sizes, from wherever the image is.
#[test]
fn what_is_read_is_saved_as_what_is_given() {
    let image = image(9001, 12);
    let image = &image[..image.len() - 100];
    for (number, first) in [0, 1, 4096, 5000, 4 << 20, 30 << 20]
        .into_iter()
        .enumerate()
    {
        let store = create(Memory::new());
        let mut writer = store.writer("read", None).unwrap();
        let mut memory = writer.image("memory").unwrap();
        memory.write(&image[..first]).unwrap();
        let rest = &image[first..];
        let (middle, end) = rest.split_at(rest.len() / (number + 1));
        for part in [middle, end] {
            let read = |at: u64, buf: &mut [u8]| {
                buf.copy_from_slice(&part[at as usize..][..buf.len()]);
                Ok(())
            };
            memory.write_with(part.len() as u64, read).unwrap();
        }
        memory.finish().unwrap();
        let read = writer.commit().unwrap();
        let given = save(&store, "given", image).unwrap();
        let stored = given.images[0].new_chunks;
        assert!(stored <= support::left_out(), "{stored}, {first}");
        assert_eq!(given.images[0].zero_chunks, read.images[0].zero_chunks);
        assert!(load(&store, "read").unwrap() == image, "{first}");
    }
}

#[test]
fn what_cannot_be_read_is_not_saved() {
    let store = create(Memory::new());
    let mut writer = store.writer("lost", None).unwrap();
    let mut memory = writer.image("memory").unwrap();
    let fails = |at: u64, _: &mut [u8]| match at {
        0..10_000_000 => Ok(()),
        _ => Err(std::io::Error::other("gone")),
    };
    let error = memory.write_with(64 << 20, fails).unwrap_err();
    assert!(error.to_string().contains("what is to be saved"), "{error}");
    drop(memory);
    assert!(matches!(writer.image("other"), Err(Error::Parameter(_))));
    assert!(matches!(writer.commit(), Err(Error::Parameter(_))));
    assert!(store.log().unwrap().is_empty());
}

#[test]
fn what_cannot_be_kept_is_refused() {
    let store = create(Memory::new());
    save(&store, "parent", &image(10, 11)[..9 * 4096 + 5]).unwrap();
    let mut writer = store.writer("child", Some("parent")).unwrap();
    let mut memory = writer.image("memory").unwrap();
    assert!(matches!(memory.keep(4095), Err(Error::Parameter(_))));
    assert!(matches!(memory.keep(10 * 4096), Err(Error::Parameter(_))));
    assert!(matches!(memory.keep(u64::MAX), Err(Error::Parameter(_))));
    memory.write(&[1]).unwrap();
    assert!(matches!(memory.keep(4096), Err(Error::Parameter(_))));
    drop(memory);
    let mut other = writer.image("other").unwrap();
    assert!(matches!(other.keep(4096), Err(Error::Parameter(_))));
    assert!(matches!(
        store.writer("child", Some("nobody")),
        Err(Error::NoSnapshot(_))
    ));
}

#[test]
fn a_kept_image_may_grow() {
    let store = create(Memory::new());
    let mut image = image(10, 12)[..9 * 4096 + 5].to_vec();
    save(&store, "parent", &image).unwrap();
    let mut writer = store.writer("child", Some("parent")).unwrap();
    let mut memory = writer.image("memory").unwrap();
    memory.keep(image.len() as u64).unwrap();
    memory.write(&[9; 10_000]).unwrap();
    memory.finish().unwrap();
    writer.commit().unwrap();
    image.extend_from_slice(&[9; 10_000]);
    assert!(load(&store, "child").unwrap() == image);
}

#[test]
fn reads_beyond_the_end_are_refused() {
    let store = create(Memory::new());
    save(&store, "a", &image(3, 13)).unwrap();
    let image = store.image("a", "memory").unwrap();
    let mut buf = [0; 2];
    assert!(image.read_at(3 * 4096 - 2, &mut buf).is_ok());
    for offset in [3 * 4096 - 1, u64::MAX - 1, u64::MAX] {
        assert!(matches!(
            image.read_at(offset, &mut buf),
            Err(Error::OutOfRange { .. })
        ));
    }
    assert!(matches!(
        image.load_into(&mut buf, Zeros::Write),
        Err(Error::OutOfRange { .. })
    ));
}

#[derive(Clone, Debug)]
enum Piece {
    Bytes(usize),
    Zeros(usize),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn pieces_of_any_size_make_the_same_image(
        pieces in prop::collection::vec(
            prop_oneof![
                (1usize..40_000).prop_map(Piece::Bytes),
                (1usize..12 << 20).prop_map(Piece::Bytes),
                (1usize..9 << 20).prop_map(Piece::Zeros),
            ],
            1..6,
        ),
        reads in prop::collection::vec((any::<prop::sample::Index>(), 1usize..200_000), 10),
    ) {
        let source = image(3 << 10, 14);
        let store = create(Memory::new());
        let mut writer = store.writer("a", None).unwrap();
        let mut memory = writer.image("memory").unwrap();
        let mut expected = Vec::new();
        for piece in &pieces {
            match *piece {
                Piece::Bytes(len) => {
                    memory.write(&source[..len]).unwrap();
                    expected.extend_from_slice(&source[..len]);
                }
                Piece::Zeros(len) => {
                    memory.skip_zeros(len as u64).unwrap();
                    expected.resize(expected.len() + len, 0);
                }
            }
        }
        memory.finish().unwrap();
        let stats = writer.commit().unwrap().images.remove(0);
        let zero_chunks = expected.chunks(4096).filter(|chunk| chunk.iter().all(|byte| *byte == 0)).count();
        prop_assert_eq!(stats.zero_chunks, zero_chunks as u64);
        prop_assert!(load(&store, "a").unwrap() == expected);
        let reader = store.image("a", "memory").unwrap();
        for (at, len) in reads {
            let at = at.index(expected.len());
            let len = len.min(expected.len() - at);
            let mut buf = vec![0xAA; len];
            reader.read_at(at as u64, &mut buf).unwrap();
            prop_assert!(buf == expected[at..at + len]);
        }
    }
}

/// What an image is, read by parts.
fn by_parts(reader: &ImageReader) -> Vec<u8> {
    let mut image = vec![0; reader.size() as usize];
    let mut part_reader = reader.part_reader().unwrap();
    for part in reader.parts() {
        let put = |at: u64, bytes: &[u8]| {
            image[at as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok::<_, Error>(())
        };
        part_reader.read(part, |_| true, put).unwrap();
    }
    image
}

/// Whether what is around `offset` is what the image has there.
fn is_around(reader: &ImageReader, offset: u64, image: &[u8]) -> bool {
    let (range, found) = match reader.around(offset).unwrap() {
        Around::Zeros(range) => (range.clone(), vec![0; (range.end - range.start) as usize]),
        Around::Data(decoded) => {
            let bytes = decoded.bytes().to_vec();
            (decoded.offset..decoded.offset + bytes.len() as u64, bytes)
        }
    };
    range.contains(&offset) && image[range.start as usize..range.end as usize] == found
}

/// Asserts that what the reader calls data is all that is not zeros, and begins and ends with chunks that are not.
fn is_data(reader: &ImageReader, image: &[u8]) {
    let mut end = 0;
    let chunk = reader.chunk_bytes() as usize;
    let is_zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    for run in reader
        .parts()
        .flat_map(|part| reader.data_in(part).unwrap())
    {
        let (start, before) = (run.start as usize, end);
        end = run.end as usize;
        assert!(before <= start && is_zero(&image[before..start]));
        let chunks = image[start..end].chunks(chunk);
        assert!(chunks.into_iter().all(|chunk| !is_zero(chunk)));
    }
    assert!(is_zero(&image[end..]));
}

#[test]
fn what_is_read_by_parts_and_by_places_is_the_image() {
    for chunk_size in [512, 4096, 8192, 1 << 20] {
        let create = CreateOptions {
            chunk_size,
            key: support::key(),
            ..CreateOptions::default()
        };
        let store = Store::create(Memory::new(), &create, options()).unwrap();
        for (name, pages, less) in [("one", 1, 0), ("block", 1024, 0), ("odd", 3001, 700)] {
            let mut image = image(pages, 7);
            image.truncate(pages * 4096 - less);
            save(&store, name, &image).unwrap();
            let reader = store.image(name, "memory").unwrap();
            assert!(by_parts(&reader) == image, "{name} of {chunk_size}");
            is_data(&reader, &image);
            let chunks = (0..reader.size()).step_by(chunk_size as usize);
            // From anywhere in a chunk.
            for offset in chunks.map(|at| (at + 5).min(reader.size() - 1)) {
                let found = is_around(&reader, offset, &image);
                assert!(found, "{offset} of {name} of {chunk_size}");
            }
        }
    }
}

#[test]
fn parts_of_zeros_are_known_and_what_is_not_wanted_is_not_read() {
    let store = create(Memory::new());
    let mut image = vec![0; 5 * 1024 * 4096];
    for page in [1030, 1031, 3500] {
        fill_page(&mut image[page * 4096..][..4096], page as u64);
    }
    save(&store, "a", &image).unwrap();
    let reader = store.image("a", "memory").unwrap();
    assert_eq!(reader.parts().collect::<Vec<_>>(), [1, 3]);
    assert_eq!(reader.part(1), reader.part_bytes()..2 * reader.part_bytes());
    let mut got = Vec::new();
    let mut part_reader = reader.part_reader().unwrap();
    let wanted = |range: &std::ops::Range<u64>| range.start != 1031 * 4096;
    part_reader
        .read(1, wanted, |at, bytes| {
            got.push((at, bytes.len()));
            Ok::<_, Error>(())
        })
        .unwrap();
    assert_eq!(got, [(1030 * 4096, 4096)]);
    let run = reader.data_in(1).unwrap();
    assert_eq!(run, std::slice::from_ref(&(1030 * 4096..1032 * 4096)));
    assert_eq!(reader.data_in(0).unwrap(), []);
    for beyond in [5, u64::MAX] {
        let read = part_reader.read(beyond, |_| true, |_, _| Ok(()));
        assert!(matches!(read, Err(Error::OutOfRange { .. })));
        let told = reader.data_in(beyond);
        assert!(matches!(told, Err(Error::OutOfRange { .. })));
    }
    assert!(matches!(
        reader.around(image.len() as u64),
        Err(Error::OutOfRange { .. })
    ));
}

#[test]
fn pieces_are_what_the_image_has_there_each_once_and_in_the_order_asked_for() {
    let store = create(Memory::new());
    let image = image(3001, 7);
    save(&store, "a", &image).unwrap();
    let reader = store.image("a", "memory").unwrap();
    let mut random = support::Random::new(5);
    let offsets: Vec<u64> = (0..400).map(|_| random.below(image.len()) as u64).collect();
    let pieces = reader.pieces(&offsets).unwrap();
    assert!(pieces.len() < offsets.len());
    let piece_of = |offset: &u64| {
        let mut found = (0..)
            .zip(&pieces)
            .filter(|(_, piece)| piece.range.contains(offset));
        let (number, _) = found.next().unwrap();
        assert!(found.next().is_none(), "{offset} is in two");
        number
    };
    let mut met: Vec<usize> = Vec::new();
    for number in offsets.iter().map(piece_of) {
        if !met.contains(&number) {
            met.push(number);
        }
    }
    assert!(met.iter().copied().eq(0..pieces.len()));
    // As they are asked for, and as they are stored.
    let mut stored = pieces.clone();
    stored.sort_unstable();
    for pieces in [pieces, stored] {
        let mut part_reader = reader.part_reader().unwrap();
        for piece in pieces {
            let expected = &image[piece.range.start as usize..piece.range.end as usize];
            let read = part_reader.read_piece(&piece).unwrap();
            assert!(read.unwrap_or(&vec![0; expected.len()]) == expected);
        }
    }
    let beyond = reader.pieces(&[0, image.len() as u64]);
    assert!(matches!(beyond, Err(Error::OutOfRange { .. })));
    assert_eq!(reader.pieces(&[]).unwrap(), []);
}
