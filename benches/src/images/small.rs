//! Small guests, as a course has them: busybox, all files in memory.

use anyhow::Result;

use super::worker::{Bench, Guest};
use super::{COURSE, COURSE_SNAPSHOTS, CourseWriter};
use crate::Files;

const INIT: &str = include_str!("../../../resources/bench/small-init");

/// Keeps the memory of a small guest at four times, ten lessons apart.
///
/// # Errors
///
/// When the guest does not come up or does not do its work.
pub fn small(bench: &Bench) -> Result<()> {
    println!("A small guest at four times");
    let mut guest = bench.boot(&Guest {
        init: INIT,
        disks: &[],
    })?;
    for number in 1..=4 {
        guest.keep_memory(&format!("small-{number}"))?;
        if number < 4 {
            for _ in 0..10 {
                guest.order("lesson")?;
            }
        }
    }
    Ok(())
}

/// Saves a small guest 150 times, a lesson apart, and keeps what changed from one to the next.
///
/// # Errors
///
/// When the guest does not come up or does not do its work.
pub fn course(bench: &Bench) -> Result<()> {
    println!("A small guest, {COURSE_SNAPSHOTS} times");
    let mut guest = bench.boot(&Guest {
        init: INIT,
        disks: &[],
    })?;
    let files = Files::in_directory(bench.scratch("").as_path());
    let mut writer = CourseWriter::create(&bench.scratch("course.pages"))?;
    for number in 0..COURSE_SNAPSHOTS {
        if number > 0 {
            guest.order("lesson")?;
        }
        guest.snapshot(&files)?;
        writer.add(&files.memory)?;
    }
    drop(guest);
    writer.finish(&bench.result(COURSE))
}
