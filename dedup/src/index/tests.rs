use super::*;
use crate::backend::Memory;
use crate::config::CreateOptions;

fn config() -> Config {
    Config::new(&CreateOptions::default()).unwrap()
}

fn entry(number: u64) -> Entry {
    let mut id = [0; ChunkId::BYTES];
    id.copy_from_slice(&blake3::hash(&number.to_le_bytes()).as_bytes()[..ChunkId::BYTES]);
    let pack = FileId([(number / 16384) as u8; 16]);
    Entry {
        id: ChunkId(id),
        pack,
        slot: (number % 16384) as u32,
    }
}

fn found(view: &View, numbers: impl Iterator<Item = u64>) -> usize {
    let (mut bucket, mut hints) = (EMPTY_BUCKET, Vec::new());
    numbers
        .filter(|&number| {
            let Entry { id, pack, slot } = entry(number);
            view.find(&id, &mut bucket, &mut hints);
            hints.contains(&Hint { pack, slot })
        })
        .count()
}

#[test]
fn what_was_added_is_found_in_memory_and_on_disk() {
    for memory in [0, u64::MAX] {
        let (backend, config, index) = (Memory::new(), config(), Index::new(memory));
        index
            .add(&backend, &config, (0..50_000).map(entry).collect())
            .unwrap();
        // Full buckets leave out a few.
        assert!(found(&index.view(), 0..50_000) >= 49_950);
        assert_eq!(found(&index.view(), 50_000..60_000), 0);
    }
}

#[test]
fn segments_of_like_size_become_one_and_lose_nothing() {
    let (backend, config, index) = (Memory::new(), config(), Index::new(1 << 20));
    for part in 0..40 {
        index
            .add(
                &backend,
                &config,
                (part * 1000..(part + 1) * 1000).map(entry).collect(),
            )
            .unwrap();
    }
    assert!(backend.list(Area::Index).unwrap().len() <= 4);
    assert!(found(&index.view(), 0..40_000) >= 39_900);
}

#[test]
fn who_opens_later_finds_the_same() {
    let (backend, config) = (Memory::new(), config());
    Index::new(0)
        .add(&backend, &config, (0..1000).map(entry).collect())
        .unwrap();
    let index = Index::new(0);
    assert_eq!(found(&index.view(), 0..1000), 0);
    index.refresh(&backend, &config).unwrap();
    assert_eq!(found(&index.view(), 0..1000), 1000);
}

#[test]
fn compaction_forgets_what_is_gone() {
    let (backend, config, index) = (Memory::new(), config(), Index::new(0));
    index
        .add(&backend, &config, (0..1000).map(entry).collect())
        .unwrap();
    index
        .compact(&backend, &config, |_, slot| slot >= 100)
        .unwrap();
    assert_eq!(found(&index.view(), 0..100), 0);
    assert_eq!(found(&index.view(), 100..1000), 900);
}

#[test]
fn a_held_lock_delays_merging_but_not_adding() {
    let (backend, config, index) = (Memory::new(), config(), Index::new(0));
    let lock = backend.try_lock(Lock::Index).unwrap();
    for part in 0..3 {
        index
            .add(
                &backend,
                &config,
                (part * 1000..(part + 1) * 1000).map(entry).collect(),
            )
            .unwrap();
    }
    assert_eq!(backend.list(Area::Index).unwrap().len(), 3);
    assert_eq!(found(&index.view(), 0..3000), 3000);
    drop(lock);
    index.add(&backend, &config, Vec::new()).unwrap();
    assert_eq!(backend.list(Area::Index).unwrap().len(), 1);
    assert_eq!(found(&index.view(), 0..3000), 3000);
}

/// One that is much smaller than all others does not keep those from each other.
#[test]
fn segments_of_like_size_are_merged_beside_a_small_one() {
    let (backend, config, index) = (Memory::new(), config(), Index::new(0));
    let mut first = 0;
    for size in [100, 4000, 4500, 5000, 5500] {
        let entries = (first..first + size).map(entry).collect();
        index.add(&backend, &config, entries).unwrap();
        first += size;
        assert_eq!(found(&index.view(), 0..first) as u64, first);
    }
    let segments = backend.list(Area::Index).unwrap().len();
    assert!(segments <= 2, "{segments} segments");
}

#[test]
fn damage_is_a_miss_and_never_a_panic() {
    let (backend, config) = (Memory::new(), config());
    Index::new(0)
        .add(&backend, &config, (0..300).map(entry).collect())
        .unwrap();
    let (key, intact) = backend.files().pop_first().unwrap();
    for bit in 0..intact.len() * 8 {
        let mut damaged = intact.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let backend = Memory::with_files([(key.clone(), Arc::new(damaged))].into());
        let index = Index::new(0);
        index.refresh(&backend, &config).unwrap();
        let hit = found(&index.view(), (0..300).step_by(50));
        let checked = Segment::open(&backend, &config, &key.1, false).and_then(|segment| {
            (0..segment.buckets()).try_for_each(|bucket| segment.checked_bucket(bucket).map(drop))
        });
        assert!(checked.is_err(), "bit {bit} is not covered");
        assert!(hit <= 6);
    }
}

/// Shows what the index of a large store costs. Run with `cargo test --release -p dedup -- --ignored --nocapture
/// a_hundred_million`; `DEDUP_CHUNKS` is another number.
#[test]
#[ignore = "takes minutes, and 1.4 GB of disk"]
fn a_hundred_million_chunks_fit_in_bounded_memory() {
    use crate::backend::LocalDir;
    use std::time::Instant;
    const PART: u64 = 1 << 20;
    const MEMORY: u64 = 64 << 20;
    let chunks =
        std::env::var("DEDUP_CHUNKS").map_or(100_000_000, |chunks| chunks.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let (backend, config) = (LocalDir::create(dir.path()).unwrap(), config());
    let numbered = |number: u64| {
        let mut entry = entry(number);
        entry.pack.0[..8].copy_from_slice(&(number / 16384).to_le_bytes());
        entry
    };
    let start = Instant::now();
    let index = Index::new(MEMORY);
    for first in (0..chunks).step_by(PART as usize) {
        index
            .add(
                &backend,
                &config,
                (first..(first + PART).min(chunks)).map(numbered).collect(),
            )
            .unwrap();
    }
    println!(
        "{chunks} chunks added and merged in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    let files = backend.list(Area::Index).unwrap();
    let bytes: u64 = files.iter().map(|file| file.size).sum();
    println!(
        "{} segments, {bytes} bytes, {:.2} per chunk",
        files.len(),
        bytes as f64 / chunks as f64
    );
    let start = Instant::now();
    let index = Index::new(MEMORY);
    index.refresh(&backend, &config).unwrap();
    println!("opened in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    let view = index.view();
    let (mut bucket, mut hints) = (EMPTY_BUCKET, Vec::new());
    let step = (chunks / 100_000).max(1);
    let start = Instant::now();
    let mut hit = 0;
    for number in (0..chunks).step_by(step as usize) {
        let Entry { id, pack, slot } = numbered(number);
        view.find(&id, &mut bucket, &mut hints);
        hit += u64::from(hints.contains(&Hint { pack, slot }));
    }
    let looked_up = chunks.div_ceil(step);
    println!(
        "{hit} of {looked_up} found, {:.2} µs each",
        start.elapsed().as_secs_f64() * 1e6 / looked_up as f64
    );
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    println!(
        "{}",
        status
            .lines()
            .find(|line| line.starts_with("VmHWM"))
            .unwrap()
    );
    assert!(hit * 1000 >= looked_up * 999);
    assert!(bytes < chunks * 14 + (1 << 20));
}

/// A merge makes room for as many entries as its segments say that they have.
#[test]
fn more_entries_than_fit_are_refused() {
    let (backend, config) = (Memory::new(), config());
    Index::new(0)
        .add(&backend, &config, (0..1000).map(entry).collect())
        .unwrap();
    let mut files = backend.files();
    let ((_, name), file) = files.iter_mut().next().unwrap();
    let name = name.clone();
    let file = Arc::make_mut(file);
    let trailer = file.len() - 72;
    let entries_at = trailer + 8 + 4 + 4 + 16 + 8;
    let opened = |file: &[u8]| {
        let mut file = file.to_vec();
        let ids = u64::from_le_bytes(file[trailer + 32..trailer + 40].try_into().unwrap());
        let digest = crate::hash::digest(&[&file[ids as usize * BUCKET_BYTES..trailer + 56]]);
        file[trailer + 56..].copy_from_slice(&digest);
        let files = [((Area::Index, name.clone()), Arc::new(file))].into();
        Segment::open(&Memory::with_files(files), &config, &name, false).is_ok()
    };
    assert!(opened(file));
    file[entries_at..entries_at + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    assert!(!opened(file));
}
