//! The images that the store is measured with: made once, then kept beside the test bed's other files.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::cache;
use testbed::job::Job;

use super::debian;
use crate::ground::Ground;

/// What `benches::images` calls them.
const FIRST_DISK: &str = "before.disk";
const DISK: &str = "FERMATA_BENCH_DISK";

/// Emulated guests take a quarter of an hour for the longest of them.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// The directory with all images. What is missing is made; sets that were complete stay as they are.
pub(super) fn ensure(ground: &Ground) -> Result<PathBuf> {
    let directory = cache::directory()?.join("store-images");
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let disk = directory.join(FIRST_DISK);
    if !disk.exists() {
        debian::make_disk(&disk)?;
    }
    let program = ground.program("store-images")?;
    for set in missing(program, &directory)? {
        let job = Job::new([program.as_os_str(), OsStr::new("make"), OsStr::new(&set)]);
        let status = ground
            .run(job.env(DISK, &disk).timeout(TIMEOUT).echo())?
            .status;
        if status != 0 {
            bail!("the images of {set} were not made: status {status}; what went wrong is above");
        }
        collect(&ground.share, &directory)?;
    }
    Ok(directory)
}

fn missing(program: &Path, directory: &Path) -> Result<Vec<String>> {
    let output = Command::new(program)
        .arg("missing")
        .arg(directory)
        .output()
        .context("cannot run store-images")?;
    if !output.status.success() {
        bail!("store-images failed: {}", output.status);
    }
    let names = String::from_utf8(output.stdout).context("its output is not UTF-8")?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// Moves what was made to where it is kept. Files that are not finished have other names.
fn collect(share: &Path, directory: &Path) -> Result<()> {
    for entry in std::fs::read_dir(share).context("cannot list the share")? {
        let path = entry.context("cannot list the share")?.path();
        let finished = path
            .extension()
            .is_some_and(|end| end == "memory" || end == "disk" || end == "pages");
        if let (true, Some(name)) = (finished, path.file_name()) {
            std::fs::rename(&path, directory.join(name))
                .with_context(|| format!("cannot move {}", path.display()))?;
        }
    }
    Ok(())
}
