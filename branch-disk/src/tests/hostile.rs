//! Files that somebody made who means no good.

use std::os::unix::fs::FileExt;

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{Error, page};

const SECTORS: u64 = 2000;

/// A disk with a base and two sealed layers; the paths of all three layers.
fn chain(bench: &Bench) -> [PathBuf; 3] {
    let on = Foundation::Raw(bench.path("base"));
    let mut disk = Disk::create(&bench.path("d"), Some(SECTORS * 512), &on, &anything).unwrap();
    let layers = [3, 5].map(|step: u64| {
        for at in (0..SECTORS).step_by(step as usize * 7) {
            let len = step.min(SECTORS - at) as usize * 512;
            write(&mut disk, at * 512, &vec![step as u8; len]);
        }
        sealed(&mut disk).path
    });
    write(&mut disk, 512, &[7; 1024]);
    let [one, two] = layers;
    [one, two, bench.path("d")]
}

/// Uses a disk in every way; what comes of it does not matter.
fn use_it(path: &Path) {
    let rule = |path: &Path| !path.starts_with("/dev") && !path.starts_with("/proc");
    let _ = crate::check(path, &rule);
    for mode in [Mode::Read, Mode::Write] {
        let Ok(mut disk) = Disk::open(path, mode, &rule) else {
            continue;
        };
        let end = disk.bytes();
        for offset in [0, end / 1024 * 512, end.saturating_sub(65536)] {
            let mut bytes = vec![0; (end - offset).min(65536) as usize];
            let _ = disk.read(offset, &mut &mut bytes[..]);
        }
        let _ = disk.info();
        let _ = disk.write(0, &mut &[1; 512][..]);
        let _ = disk.discard(512, 512);
        let _ = disk.flush();
        if let Ok(next) = disk.prepare() {
            let _ = disk.cut(next).map(crate::Cut::finish);
        }
        if let [lowest, .., topmost] = *disk.sealed_layers()
            && let Some(Ok(merged)) = disk
                .merge(lowest, topmost)
                .map(|merge| merge.write(&|| true))
        {
            disk.adopt(&merged);
            let _ = merged.remove_rest();
        }
    }
    let _ = Disk::branch(path, None, &rule);
}

#[derive(Clone, Debug)]
struct Change {
    file: usize,
    page: prop::sample::Index,
    bytes: Vec<(usize, u8)>,
    /// Whether its checksum is made to fit.
    forged: bool,
}

fn change() -> impl Strategy<Value = Change> {
    // Where a page tells something, more than where its content is.
    let at = prop_oneof![0..128usize, 0..4096usize];
    let bytes = vec((at, any::<u8>()), 1..4);
    let forged = prop::bool::weighted(0.8);
    (0..3usize, any::<prop::sample::Index>(), bytes, forged).prop_map(
        |(file, page, bytes, forged)| Change {
            file,
            page,
            bytes,
            forged,
        },
    )
}

fn apply(path: &Path, change: &Change) {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let end = file.metadata().unwrap().len();
    let map_at = crate::layout::Geometry::of(SECTORS * 512).unwrap().map_at();
    // Header, seal, descriptor, the bitmap's pair, and the map's pages.
    let mut pages: Vec<u64> = vec![0, 4096, 8192, 16_384, 20_480];
    pages.extend((map_at..end).step_by(4096));
    let at = *change.page.get(&pages);
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, at).unwrap();
    for (at, byte) in &change.bytes {
        page[*at] = *byte;
    }
    if change.forged && at == 0 {
        let digest = page::digest(&page[..4080]);
        page[4080..].copy_from_slice(&digest);
    } else if change.forged {
        let digest = page::digest(&page[16..]);
        page[..16].copy_from_slice(&digest);
    }
    file.write_all_at(&page, at).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_change_of_a_layer_makes_a_panic(changes in vec(change(), 1..4)) {
        let bench = Bench::in_memory(500);
        let paths = chain(&bench);
        for change in &changes {
            apply(&paths[change.file], change);
        }
        for path in paths {
            use_it(&path);
        }
    }

    #[test]
    fn no_bytes_make_a_panic(bytes in vec(any::<u8>(), 0..9000)) {
        let bench = Bench::in_memory(1);
        let path = bench.path("d");
        std::fs::write(&path, [b"FERMDISK".as_slice(), &bytes].concat()).unwrap();
        use_it(&path);
    }
}

#[test]
fn every_byte_that_is_damaged_is_noticed_or_means_nothing() {
    let bench = Bench::in_memory(500);
    let [_, layer, head] = chain(&bench);
    let content = all(&Disk::open(&head, Mode::Read, &anything).unwrap());
    let map_at = crate::layout::Geometry::of(SECTORS * 512).unwrap().map_at();
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&layer)
        .unwrap();
    for page in [0, 4096, 8192, map_at] {
        for at in (page..page + 4096).step_by(37) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            if let Ok(disk) = Disk::open(&head, Mode::Read, &anything) {
                assert!(all(&disk) == content, "byte {at}");
            }
            file.write_all_at(&byte, at).unwrap();
        }
    }
    assert!(all(&Disk::open(&head, Mode::Read, &anything).unwrap()) == content);
}

/// Changes a byte of the first page of the layer's bitmap, and leaves it as a host does that crashes in its first write.
fn tear(layer: &Path) {
    let file = std::fs::OpenOptions::new().write(true).open(layer).unwrap();
    file.write_all_at(&[0xee; 16], 16_384 + 64).unwrap();
    file.write_all_at(&[0; 4096], 20_480).unwrap();
}

#[test]
fn a_torn_bitmap_is_damage_in_a_sealed_layer() {
    for mapped in [true, false] {
        let bench = Bench::in_memory(500);
        let [_, layer, head] = chain(&bench);
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&layer)
            .unwrap();
        if !mapped {
            file.write_all_at(&[0; 4096], crate::layout::DESCRIPTOR_AT)
                .unwrap();
        }
        let content = all(&Disk::open(&layer, Mode::Read, &anything).unwrap());
        tear(&layer);
        let damaged = |what: &str, done: Result<(), Error>| {
            let error = done.expect_err(what).to_string();
            let said = format!("{} is damaged: a page of its bitmap", layer.display());
            assert!(error.starts_with(&said), "{what}: {error}");
        };
        let open = |path| Disk::open(path, Mode::Read, &anything);
        damaged("the layer", open(&layer).map(drop));
        for path in [&layer, &head] {
            let checked = crate::check(path, &anything).unwrap();
            assert_eq!(checked.problems.len(), 1, "{checked:?}");
            assert!(checked.problems[0].contains("a page of its bitmap"));
        }
        // What stands on it reads its map, if it has one, and that is right.
        let branch = Disk::branch(&layer, None, &anything);
        if mapped {
            assert!(all(&branch.unwrap()) == content);
            let disk = open(&head).unwrap();
            damaged("info", disk.info().map(drop));
        } else {
            damaged("a branch", branch.map(drop));
            damaged("the head", open(&head).map(drop));
        }
    }
}

#[test]
fn a_torn_bitmap_of_a_head_is_what_a_crash_leaves_and_its_seal_mends_it() {
    let bench = Bench::in_memory(500);
    let mut disk = bench.on_base("d");
    for byte in 1..3 {
        write(&mut disk, 0, &[byte; 512]);
        disk.flush().unwrap();
        drop(disk);
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(bench.path("d"))
            .unwrap();
        // The page that was written last.
        let at = 16_384 + 4096 * u64::from(byte - 1);
        file.write_all_at(&[0xee; 16], at + 64).unwrap();
        sound(&bench.path("d"));
        disk = bench.open("d");
        write(&mut disk, 512 * u64::from(byte), &[byte; 512]);
    }
    drop(disk);
    let disk = bench.open("d");
    assert_eq!(disk.info().unwrap().layers[0].owned_bytes, 1536);
    drop(disk);
    tear(&bench.path("d"));
    // Nothing is written to it: what was torn is torn as it is sealed.
    let disk = &mut bench.open("d");
    let layer = sealed(disk);
    sound(&layer.path);
    assert_eq!(all(disk), bench.base);
}

#[test]
fn a_file_cut_short_is_refused() {
    let bench = Bench::in_memory(500);
    for path in chain(&bench) {
        let whole = std::fs::read(&path).unwrap();
        for len in [0, 100, 4096, 16_384, 65_536, whole.len() - 4097] {
            let cut = bench.path("cut");
            std::fs::write(&cut, &whole[..len]).unwrap();
            assert!(Disk::open(&cut, Mode::Read, &anything).is_err(), "{len}");
        }
    }
}

#[test]
fn a_pipe_and_a_directory_are_no_disks() {
    let bench = Bench::in_memory(1);
    let pipe = bench.path("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    for path in [pipe, bench.path(".")] {
        assert!(Disk::open(&path, Mode::Read, &anything).is_err());
        assert!(Disk::create(&bench.path("d"), None, &Foundation::Raw(path), &anything).is_err());
    }
}
