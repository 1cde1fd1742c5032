//! The disks that are measured: all full, so that nobody wins by holes.

use std::{
    ffi::OsStr,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use testbed::environment;

use crate::chain;

/// The size of each.
pub(super) const DISK_MIB: usize = 128;

/// Their files.
#[derive(Debug)]
pub struct Disks {
    /// A raw image each, for fermata, and for QEMU at two settings.
    pub(super) raw: [PathBuf; 3],
    /// The head of a disk that branches, on a raw image as full as the others.
    pub(super) branch: PathBuf,
    /// A qcow2 without a base.
    pub(super) qcow2: PathBuf,
    /// The heads of two disks with the same content in small extents: in one layer, and in many.
    pub(super) chains: [PathBuf; 2],
}

impl Disks {
    /// Makes them in `scratch`, each with the same bytes.
    ///
    /// # Errors
    ///
    /// When a file cannot be written, or one of the programs that make the last two is missing.
    pub fn make(scratch: &Path) -> Result<Self> {
        let of = |name: &str| scratch.join(name);
        let (base, branch, qcow2) = (of("base.raw"), of("branch.disk"), of("qemu.qcow2"));
        fill(&base)?;
        let raw = ["fermata.raw", "threads.raw", "io_uring.raw"].map(of);
        for image in &raw {
            std::fs::copy(&base, image)
                .with_context(|| format!("cannot write {}", image.display()))?;
        }
        let program = environment::path(environment::BIN)?;
        run(Command::new(program)
            .args(["disk", "create"])
            .arg(&branch)
            .arg("--base")
            .arg(&base))?;
        run(Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args([base.as_os_str(), OsStr::new(&qcow2)]))?;
        let chains = ["flat.disk", "deep.disk"].map(of);
        for (path, depth) in chains.iter().zip([1, chain::DEPTH]) {
            chain::disk(path, (DISK_MIB as u64) << 20, depth, chain::SMALL)
                .with_context(|| format!("cannot make {}", path.display()))?;
        }
        Ok(Self {
            raw,
            branch,
            qcow2,
            chains,
        })
    }
}

/// Bytes that are neither zero nor alike, so that no program leaves any out.
fn fill(path: &Path) -> Result<()> {
    let context = || format!("cannot write {}", path.display());
    let mut file = File::create(path).with_context(context)?;
    let mut block = vec![0u8; 1 << 20];
    for mib in 0..DISK_MIB {
        for (at, word) in block.chunks_exact_mut(8).enumerate() {
            let number = ((mib << 20) + 8 * at) as u64;
            word.copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        }
        file.write_all(&block).with_context(context)?;
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
