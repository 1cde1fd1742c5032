//! A guest of a few instructions that goes on as many.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use control::{HotImage, Origin, Pool, Prepare, allow_many_files};
use system_tests::bare_metal;

use crate::{
    Bench, Console, Fermata, Machine, Row, System,
    filler::Filler,
    native::{config, to_cpl_3},
    row::percentile,
};

/// How much memory the guest has, in MiB.
const MEMORY_MIB: u64 = 256;
/// How many are forked one after another.
const SINGLE: u32 = 100;
/// So often a guest says that it is there: some 20,000 times a second.
const CYCLES_A_TICK: u64 = 1 << 17;

/// Forks one at a time a guest that has filled its memory and says that it is there, and many at once, as often as `runs` says, a guest that does nothing;
/// each in new processes and in prepared ones, with all files in an empty directory under `scratch`. A fork's time is from the request, with the image made.
///
/// # Errors
///
/// When any of it fails.
pub fn measure(fermata: &Fermata, runs: u32, scratch: &Path) -> Result<Vec<Row>> {
    allow_many_files();
    let directory = tempfile::tempdir_in(scratch).context("cannot make a scratch directory")?;
    let scratch = directory.path();
    let mut rows = one_at_a_time(fermata, scratch)?;
    let image = image(fermata, &bare_metal::halted(), scratch, false)?;
    for (count, pool, runs) in [
        (100, Prepared::Not, runs),
        (100, Prepared::ForSize, runs),
        (100, Prepared::ForImage, runs),
        (500, Prepared::ForSize, 1),
        (500, Prepared::ForImage, 1),
    ] {
        rows.extend(at_once(fermata, &image, count, pool, runs, scratch)?);
    }
    Ok(rows)
}

/// A hot image of the guest `kernel`, once it has printed something if it `speaks`.
fn image(fermata: &Fermata, kernel: &[u8], scratch: &Path, speaks: bool) -> Result<Arc<HotImage>> {
    let path = scratch.join("kernel");
    fs::write(&path, kernel).context("cannot write the guest")?;
    let mut console = Console::create(scratch.join("console"))?;
    let parent = fermata.start(Origin::Boot(config(MEMORY_MIB, &path)), console.path())?;
    if speaks {
        console.wait_for_output()?;
    }
    Ok(Arc::new(fermata.image(&parent)?.0))
}

/// What processes there are beforehand.
#[derive(Clone, Copy, Debug)]
enum Prepared {
    Not,
    /// For any machine of the size.
    ForSize,
    /// For forks of the image.
    ForImage,
}

impl Prepared {
    const ALL: [Self; 3] = [Self::Not, Self::ForSize, Self::ForImage];

    fn name(self) -> &'static str {
        match self {
            Self::Not => "new",
            Self::ForSize => "prepared",
            Self::ForImage => "prepared for the image",
        }
    }

    /// A pool of so many.
    fn pool(self, fermata: &Fermata, count: usize) -> Result<Pool> {
        fermata.pool(match self {
            Self::Not => 0,
            Self::ForSize | Self::ForImage => count,
        })
    }

    fn fill(self, fermata: &Fermata, pool: &Pool, image: &Arc<HotImage>) {
        fermata.fill(
            pool,
            match self {
                Self::Not | Self::ForSize => Prepare::Shape(image.shape()),
                Self::ForImage => Prepare::Image(Arc::clone(image)),
            },
        );
    }
}

fn one_at_a_time(fermata: &Fermata, scratch: &Path) -> Result<Vec<Row>> {
    let filler = Filler {
        memory_bytes: MEMORY_MIB << 20,
        pages_a_tick: 0,
        cycles_a_tick: CYCLES_A_TICK,
        user: to_cpl_3()?,
    };
    let image = image(fermata, &filler.kernel(), scratch, true)?;
    let mut rows = Vec::new();
    for prepared in Prepared::ALL {
        let setting = prepared.name();
        let pool = prepared.pool(fermata, 1)?;
        let (mut said, mut told) = (Vec::new(), Vec::new());
        for _ in 0..SINGLE {
            prepared.fill(fermata, &pool, &image);
            let listener = Console::create(scratch.join("fork0.console"))?.listen();
            let begun = Instant::now();
            let forks = fermata.fork(&pool, &image, 1, scratch)?;
            told.push(ms(begun.elapsed()));
            let heard = listener
                .join()
                .map_err(|_| anyhow!("the listener panicked"))??;
            said.push(ms(heard - begun));
            drop(forks);
        }
        for (bench, bench_p99, times) in [
            (Bench::Fork, Bench::ForkP99, &said),
            (Bench::ForkTold, Bench::ForkToldP99, &told),
        ] {
            rows.extend(row(bench, setting, times));
            rows.extend(row(bench_p99, setting, &[percentile(times, 0.99)]));
        }
    }
    Ok(rows)
}

fn at_once(
    fermata: &Fermata,
    image: &Arc<HotImage>,
    count: u32,
    prepared: Prepared,
    runs: u32,
    scratch: &Path,
) -> Result<Vec<Row>> {
    let pool = prepared.pool(fermata, count as usize)?;
    let (mut times, mut private) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        prepared.fill(fermata, &pool, image);
        let begun = Instant::now();
        let forks = fermata.fork(&pool, image, count, scratch)?;
        times.push(ms(begun.elapsed()));
        for fork in &forks {
            private.push(private_kib(fork.pid())?);
        }
    }
    let bench = if count == 500 {
        Bench::Fork500
    } else {
        Bench::Fork100
    };
    let rows = [
        row(bench, prepared.name(), &times),
        row(
            Bench::ForkPrivate,
            &format!("{count} {}", prepared.name()),
            &private,
        ),
    ];
    Ok(rows.into_iter().flatten().collect())
}

fn row(bench: Bench, setting: &str, figures: &[f64]) -> Option<Row> {
    let row = Row::of(bench, System::Fermata, MEMORY_MIB, figures);
    row.map(|row| row.at(setting))
}

fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

/// What a process has of its own.
fn private_kib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let mut kib = 0;
    for line in text.lines().filter(|line| line.starts_with("Private_")) {
        let number = line.split_whitespace().nth(1);
        kib += number
            .and_then(|number| number.parse::<u64>().ok())
            .with_context(|| format!("{path} has a line {line:?}"))?;
    }
    Ok(kib as f64)
}
