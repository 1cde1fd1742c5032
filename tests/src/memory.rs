//! What a machine takes of the host.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use anyhow::{Context, Result};

use crate::http::Machine;

/// Memory of the host's that the machine's process takes, in bytes: its share of what it has in common with others.
///
/// # Errors
///
/// When the process is gone.
pub fn pss(machine: Machine) -> Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps_rollup", machine.pid))?;
    let line = smaps.lines().find_map(|line| line.strip_prefix("Pss:"));
    let value = line.context("the process says nothing of its memory")?;
    let kib: u64 = value.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

/// Bytes that a file takes on its disk: without its holes.
///
/// # Errors
///
/// When it is not there.
pub fn taken(file: impl AsRef<Path>) -> Result<u64> {
    Ok(fs::metadata(file)?.blocks() * 512)
}
