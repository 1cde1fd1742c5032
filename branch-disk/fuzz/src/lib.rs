//! A chain of three layers on a base, changed as the fuzzer likes, and used in every way. Nothing may panic.
//!
//! Checksums are not checked in a fuzzer's build, so that it comes to what is behind them.

use std::{
    fs::OpenOptions,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use branch_disk::{Disk, Foundation, Mode, anything};
use tempfile::TempDir;

const BYTES: u64 = 256 << 10;
/// Where a file has anything but data, in pages: header, seal, descriptor, bitmap; and behind the data the map.
const MAP_PAGE: u64 = (65_536 + BYTES) / 4096;
const PAGES: [u64; 8] = [0, 1, 2, 4, 5, MAP_PAGE, MAP_PAGE + 1, MAP_PAGE + 2];

struct Original {
    _dir: TempDir,
    files: Vec<(String, Vec<u8>)>,
    layers: [String; 3],
}

static ORIGINAL: LazyLock<Original> = LazyLock::new(original);

fn in_memory() -> TempDir {
    let memory = tempfile::tempdir_in("/dev/shm");
    memory
        .or_else(|_| tempfile::tempdir())
        .expect("there is room")
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn original() -> Original {
    let dir = in_memory();
    let path = |name: &str| dir.path().join(name);
    let fine = "an unchanged disk works";
    std::fs::write(path("base"), vec![1; 64 << 10]).expect(fine);
    let on = Foundation::Raw(path("base"));
    let mut disk = Disk::create(&path("d"), Some(BYTES), &on, &anything).expect(fine);
    let sealed = [3u64, 5].map(|step| {
        for at in (0..BYTES / 512 - step).step_by(step as usize * 3) {
            let data = vec![step as u8; step as usize * 512];
            disk.write(at * 512, &mut &data[..]).expect(fine);
        }
        let next = disk.prepare().expect(fine);
        name(
            &disk
                .cut(next)
                .and_then(branch_disk::Cut::finish)
                .expect(fine)
                .path,
        )
    });
    disk.write(512, &mut &[7; 1024][..]).expect(fine);
    drop(disk);
    let entries = std::fs::read_dir(dir.path()).expect(fine);
    let files = entries
        .map(|entry| {
            let path = entry.expect(fine).path();
            (name(&path), std::fs::read(&path).expect(fine))
        })
        .collect();
    let [one, two] = sealed;
    Original {
        _dir: dir,
        files,
        layers: [one, two, "d".to_owned()],
    }
}

/// Changes of a byte each: which file and page (one byte), where (two), what (one).
pub fn run(input: &[u8]) {
    let dir = in_memory();
    let original = &*ORIGINAL;
    for (name, bytes) in &original.files {
        std::fs::write(dir.path().join(name), bytes).expect("there is room");
    }
    let layers: Vec<PathBuf> = original
        .layers
        .iter()
        .map(|name| dir.path().join(name))
        .collect();
    for change in input.chunks_exact(4) {
        let file = &layers[usize::from(change[0] >> 3) % 3];
        let at = PAGES[usize::from(change[0] & 7)] * 4096;
        let at = at + u64::from(u16::from_le_bytes([change[1], change[2]])) % 4096;
        let file = OpenOptions::new()
            .write(true)
            .open(file)
            .expect("it was written");
        file.write_all_at(&change[3..], at).expect("there is room");
    }
    for layer in layers.iter().rev() {
        use_it(layer, dir.path());
    }
}

fn use_it(path: &Path, dir: &Path) {
    let dir = dir.canonicalize().unwrap_or_default();
    let rule = |path: &Path| path.starts_with(&dir);
    let _ = branch_disk::check(path, &rule);
    for mode in [Mode::Read, Mode::Write] {
        let Ok(mut disk) = Disk::open(path, mode, &rule) else {
            continue;
        };
        let end = disk.bytes();
        for offset in [0, end / 1024 * 512, end.saturating_sub(65_536)] {
            let mut bytes = vec![0; (end - offset).min(65_536) as usize];
            let _ = disk.read(offset, &mut &mut bytes[..]);
        }
        let _ = disk.info();
        let _ = disk.write(0, &mut &[1; 512][..]);
        let _ = disk.discard(512, 512);
        let _ = disk.flush();
        if let Ok(next) = disk.prepare() {
            let _ = disk.cut(next).and_then(branch_disk::Cut::finish);
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
