//! Boot time, and what an idle VMM takes beside its guest's memory.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use testbed::guest;

use crate::{Bench, Console, Figures, LinuxGuest, Machine, Monitor, cycle::SETTLED};

/// Boots `guest` on `monitor` with its files in `scratch`, and lets it settle.
///
/// # Errors
///
/// When it does not boot, or `/proc` cannot be read.
pub fn measure<M: Monitor>(
    monitor: &M,
    guest: &LinuxGuest,
    scratch: &Path,
    figures: &mut Figures,
) -> Result<()> {
    let directory = tempfile::tempdir_in(scratch).context("cannot make a scratch directory")?;
    let mut console = Console::create(directory.path().join("console"))?;
    let begun = Instant::now();
    let machine = monitor.boot(guest, console.path())?;
    console.wait_for(guest::READY)?;
    figures.add(
        Bench::Boot,
        M::SYSTEM,
        "",
        begun.elapsed().as_secs_f64() * 1e3,
    );
    console.wait_for(SETTLED)?;
    let path = format!("/proc/{}/smaps", machine.pid());
    let maps = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let bytes = beside_the_guest(&maps, guest.mem_mib << 20)?;
    figures.add(Bench::Pss, M::SYSTEM, "", bytes as f64 / f64::from(1 << 20));
    Ok(())
}

/// Bytes of the proportional set size in the text of `/proc/<pid>/smaps` (proc(5)), but for the largest mapping, which
/// must be the guest's memory of so many bytes.
fn beside_the_guest(maps: &str, memory: u64) -> Result<u64> {
    let mut mappings: Vec<(u64, u64)> = Vec::new();
    for line in maps.lines() {
        if let Some(size) = size_of_mapping(line) {
            mappings.push((size, 0));
        } else if let (Some(rest), Some(last)) = (line.strip_prefix("Pss:"), mappings.last_mut()) {
            let kib: u64 = rest
                .trim()
                .trim_end_matches(" kB")
                .parse()
                .with_context(|| format!("{line:?} has no number"))?;
            last.1 = kib << 10;
        }
    }
    let all: u64 = mappings.iter().map(|(_, pss)| pss).sum();
    let (size, pss) = mappings.iter().max().context("it has no mappings")?;
    ensure!(
        *size >= memory && *size < memory + memory / 8,
        "the largest mapping has {size} bytes, and the guest's memory {memory}"
    );
    Ok(all - pss)
}

/// The bytes of a mapping whose first line this is, as in `7f00-7f10 rw-p 00000000 00:00 0`.
fn size_of_mapping(line: &str) -> Option<u64> {
    let (from, to) = line.split_whitespace().next()?.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    number(to)?.checked_sub(number(from)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
00400000-00500000 r-xp 00000000 08:01 7 /usr/bin/vmm-a
Rss:                1024 kB
Pss:                 100 kB
Pss_Dirty:            50 kB
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Pss:               65536 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Pss:                  12 kB
";

    #[test]
    fn all_but_the_guest_s_memory_is_summed_up() {
        assert_eq!(beside_the_guest(MAPS, 256 << 20).unwrap(), 112 << 10);
    }

    #[test]
    fn a_process_without_the_guest_s_memory_is_not_measured() {
        assert!(beside_the_guest(MAPS, 512 << 20).is_err());
        assert!(beside_the_guest(MAPS, 128 << 20).is_err());
        assert!(beside_the_guest("", 1).is_err());
    }
}
