//! Saves and loads made-up guest memories and says how fast it was and what they cost.
//!
//! `cargo run --release --example measure [DIRECTORY [MIB | FILE...]]`: a store in DIRECTORY (by default `/dev/shm`),
//! and in it FILEs, or twelve images of 256 MiB that are made up: one guest at four times, four boots with different
//! work, four forks of one snapshot. Real images are measured by the product's own bench; made-up ones only show the
//! order of magnitude. With `MEASURE_KEY` in the environment the store is encrypted.

use std::path::PathBuf;
use std::time::Instant;

use dedup::{CreateOptions, Key, OpenOptions, Result, Store, Zeros};

const PAGE: usize = 4096;

/// A generator of numbers that look random.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

/// A page that zstd -1 brings to about three tenths, as it does with a guest's: runs of zeros, of a few values,
/// of pointers, of noise.
fn fill(page: &mut [u8], seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let dictionary: [u64; 24] = std::array::from_fn(|_| random.next());
    let (mut run, mut kind) = (0, 0);
    for word in page.chunks_exact_mut(8) {
        let value = random.next();
        if run == 0 {
            run = value >> 32 & 15;
            kind = value >> 60;
        } else {
            run -= 1;
        }
        let word_is = match kind {
            0..=5 => 0,
            6..=12 => dictionary[(kind * 2 + value % 2) as usize % 24],
            13..=14 => 0xFFFF_8880_0000_0000 | (value & 0x00FF_FFFF),
            _ => value,
        };
        word.copy_from_slice(&word_is.to_le_bytes());
    }
}

/// The page kinds of an image; equal seeds are equal pages.
fn image(seeds: &[u64]) -> Vec<u8> {
    let mut image = vec![0; seeds.len() * PAGE];
    for (page, &seed) in image
        .chunks_exact_mut(PAGE)
        .zip(seeds)
        .filter(|(_, seed)| **seed != 0)
    {
        fill(page, seed);
    }
    image
}

/// Changes runs of pages, a share of `part` in 1,000.
fn change(seeds: &mut [u64], random: &mut Random, part: usize) {
    let mut left = seeds.len() * part / 1000;
    while left > 0 {
        let run = (1 + random.next() as usize % 16).min(left);
        let at = random.next() as usize % (seeds.len() - run);
        seeds[at..at + run]
            .iter_mut()
            .for_each(|seed| *seed = random.next() | 1);
        left -= run;
    }
}

fn images(pages: usize) -> Vec<Vec<u8>> {
    let mut random = Random(88_172_645_463_325_252);
    let shared: Vec<u64> = (0..pages).map(|_| random.next() | 1).collect();
    let boot = |random: &mut Random, zeros: usize| -> Vec<u64> {
        // Of what is not zero, two fifths are pages that other boots have too, mostly in the same order.
        let mut seeds: Vec<u64> = shared.clone();
        change(&mut seeds, random, 900);
        let used = pages * (1000 - zeros) / 1000;
        seeds[used..].fill(0);
        seeds
    };
    let mut all = Vec::new();
    let mut guest = boot(&mut random, 150);
    for _ in 0..4 {
        all.push(guest.clone());
        change(&mut guest, &mut random, 60);
    }
    for zeros in [370, 300, 200, 60] {
        all.push(boot(&mut random, zeros));
    }
    let base = all[1].clone();
    for _ in 0..4 {
        let mut fork = base.clone();
        change(&mut fork, &mut random, 100);
        all.push(fork);
    }
    all.iter().map(|seeds| image(seeds)).collect()
}

/// Processor time of all threads so far, in seconds: on a busy machine it says more than the clock.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Runs something on `bytes` bytes and says how fast it was.
fn timed<T>(what: &str, bytes: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let result = work()?;
    let (wall, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let megabytes = bytes as f64 / 1e6;
    println!(
        "{what:<14} {:>6.0} MB/s ({wall:.3} s), {:>6.0} MB/s per core",
        megabytes / wall,
        megabytes / cpu
    );
    Ok(result)
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> dedup::Error {
    move |source| dedup::Error::Io {
        what: what.into(),
        source,
    }
}

/// What the primitives take of one image: the least that a save or load of new pages can cost.
fn bounds(image: &[u8]) -> Result<()> {
    let bytes = image.len() as u64;
    let mut zstd = zstd::bulk::Compressor::new(1).map_err(io("set up zstd"))?;
    let frames = timed("zstd -1 alone", bytes, || {
        let frames = image.chunks(64 << 10).map(|frame| zstd.compress(frame));
        frames
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(io("compress"))
    })?;
    let mut zstd = zstd::bulk::Decompressor::new().map_err(io("set up zstd"))?;
    let mut plain = vec![0; 64 << 10];
    timed("and back", bytes, || {
        let mut decode = |frame: &Vec<u8>| zstd.decompress_to_buffer(frame, &mut plain).map(drop);
        frames
            .iter()
            .try_for_each(&mut decode)
            .map_err(io("decompress"))
    })?;
    timed("BLAKE3 alone", bytes, || {
        for page in image.chunks(PAGE) {
            std::hint::black_box(blake3::hash(page));
        }
        Ok(())
    })
}

/// The key of the store, where it is to be encrypted.
fn key() -> Option<Key> {
    std::env::var_os("MEASURE_KEY").map(|_| Key::from([7; 32]))
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let root =
        PathBuf::from(args.next().unwrap_or_else(|| "/dev/shm".into())).join("dedup-measure");
    let args: Vec<String> = args.collect();
    let made_up = match args.as_slice() {
        [] => Some(256),
        [first, ..] => first.parse::<usize>().ok(),
    };
    let images = match made_up {
        Some(mib) => images((mib << 20) / PAGE),
        None => {
            let read = |path| std::fs::read(path).map_err(io("read an image"));
            args.iter().map(read).collect::<Result<_>>()?
        }
    };
    let total: u64 = images.iter().map(|image| image.len() as u64).sum();
    let _ = std::fs::remove_dir_all(&root);
    let create = CreateOptions {
        key: key(),
        ..CreateOptions::default()
    };
    let store = Store::create_dir(&root, &create, OpenOptions::default())?;
    let save = |name: String, image: &[u8], parent: Option<&str>| -> Result<()> {
        let mut writer = store.writer(&name, parent)?;
        let mut memory = writer.image("memory")?;
        memory.write(image)?;
        memory.finish()?;
        writer.commit().map(drop)
    };
    let load = |number: usize, memory: &mut [u8]| {
        store
            .image(&format!("image{number}"), "memory")?
            .load_into(memory, Zeros::Write)
    };
    let numbered = || images.iter().enumerate();

    timed("save", total, || {
        numbered().try_for_each(|(number, image)| save(format!("image{number}"), image, None))
    })?;
    timed("save again", total, || {
        numbered().try_for_each(|(number, image)| save(format!("again{number}"), image, None))
    })?;
    timed("of a parent", total, || {
        numbered().try_for_each(|(number, image)| {
            let parent = format!("image{number}");
            save(format!("child{number}"), image, Some(&parent))
        })
    })?;
    if made_up.is_none() {
        timed("files again", total, || {
            let mut files = args.iter().enumerate();
            files.try_for_each(|(number, path)| {
                store.save_file(&format!("file{number}"), path).map(drop)
            })
        })?;
        let other = root.join("of-files");
        let store = Store::create_dir(&other, &create, OpenOptions::default())?;
        timed("save files", total, || {
            let mut files = args.iter().enumerate();
            files.try_for_each(|(number, path)| {
                store.save_file(&format!("file{number}"), path).map(drop)
            })
        })?;
        let _ = std::fs::remove_dir_all(other);
    }
    let longest = images.iter().map(Vec::len).max().unwrap_or(0);
    let mut memory = vec![1; longest];
    timed("load", total, || {
        numbered().try_for_each(|(number, image)| load(number, &mut memory[..image.len()]))
    })?;
    for (number, image) in numbered().take(3) {
        let memory = &mut memory[..image.len()];
        timed("load one", image.len() as u64, || load(number, memory))?;
    }
    for (number, image) in numbered() {
        load(number, &mut memory[..image.len()])?;
        assert!(
            memory[..image.len()] == *image,
            "image {number} did not come back"
        );
    }
    bounds(&images[0])?;
    let middle = images.len() / 4;
    read_pages(&root, middle, (images[middle].len() / PAGE) as u64)?;

    println!("{} MiB of images are stored in", total >> 20);
    for area in ["packs", "snapshots", "index"] {
        let files = std::fs::read_dir(root.join(area))
            .into_iter()
            .flatten()
            .flatten();
        let sizes: Vec<u64> = files
            .filter_map(|file| Some(file.metadata().ok()?.len()))
            .collect();
        println!(
            "{area:<10} {:>8} KiB in {} files",
            sizes.iter().sum::<u64>() >> 10,
            sizes.len()
        );
    }
    let _ = std::fs::remove_dir_all(&root);
    Ok(())
}

/// Reads single pages anywhere, without a cache of decoded frames.
fn read_pages(root: &std::path::Path, number: usize, pages: u64) -> Result<()> {
    let store = Store::open_dir(
        root,
        OpenOptions {
            key: key(),
            frame_memory: 0,
            ..OpenOptions::default()
        },
    )?;
    let image = store.image(&format!("image{number}"), "memory")?;
    let mut random = Random(7);
    let mut page = [0; PAGE];
    let mut times = Vec::new();
    for _ in 0..20_000 {
        let at = random.next() % pages * PAGE as u64;
        let start = Instant::now();
        image.read_at(at, &mut page)?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let percentile = |percent: usize| times[times.len() * percent / 100].as_micros();
    println!(
        "read a page    p50 {} µs, p99 {} µs",
        percentile(50),
        percentile(99)
    );
    Ok(())
}
