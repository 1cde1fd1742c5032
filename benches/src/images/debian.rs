//! Debian guests: systemd, a root on a disk, work of a system in use.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::worker::{Bench, Guest, keep};
use super::{FIRST_DISK, SECOND_DISK};

/// Says where the disk is that guests start with.
pub const DISK: &str = "FERMATA_BENCH_DISK";

const INIT: &str = include_str!("../../../resources/bench/enter-disk");

/// Boots Debian, has it do one kind of `work`, and keeps its memory.
///
/// # Errors
///
/// When the guest does not come up or does not do it.
pub fn boot(bench: &Bench, work: &str) -> Result<()> {
    println!("Debian, a boot for {work}");
    let disk = fresh_disk(bench)?;
    let mut guest = bench.boot(&Guest {
        init: INIT,
        disks: &[disk],
    })?;
    guest.order(&with_seed(work, 0))?;
    guest.keep_memory(&format!("boot-{work}"))
}

/// Follows one Debian guest over four times of its life, and four forks of it as it was at the first.
///
/// # Errors
///
/// When one of them does not come up or does not do its work.
pub fn life(bench: &Bench) -> Result<()> {
    println!("Debian, one guest and its forks");
    let disk = fresh_disk(bench)?;
    let mut guest = bench.boot(&Guest {
        init: INIT,
        disks: std::slice::from_ref(&disk),
    })?;
    guest.order("serve")?;
    let start = guest.freeze(&disk)?;
    keep(bench, &start.files, "life-1")?;

    for (number, work) in (1..).zip(["json", "sorting", "packing", "scanning"]) {
        let mut fork = bench.thaw(&start)?;
        fork.order(&with_seed(work, number))?;
        fork.keep_memory(&format!("fork-{number}"))?;
    }

    let mut guest = bench.thaw(&start)?;
    let years: [&[&str]; 3] = [&["json 9", "sorting"], &["installing"], &["using"]];
    for (number, works) in (2..).zip(years) {
        for work in works {
            guest.order(work)?;
        }
        guest.keep_memory(&format!("life-{number}"))?;
    }
    drop(guest);
    bench.keep_disk(&disk, SECOND_DISK)
}

/// Work that depends on chance takes the seed; the others do not look at it.
fn with_seed(work: &str, seed: u32) -> String {
    format!("{work} {seed}")
}

/// The disk that guests start with, to be written to.
fn fresh_disk(bench: &Bench) -> Result<PathBuf> {
    let pristine = std::env::var_os(DISK).with_context(|| {
        format!(
            "{DISK} does not say where {FIRST_DISK} is: start this by `cargo xtask bench store`"
        )
    })?;
    let disk = bench.scratch("root.disk");
    std::fs::copy(&pristine, &disk).context("cannot copy the guest's disk")?;
    Ok(disk)
}
