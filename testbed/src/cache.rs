//! Where everything built or left behind by the test bed lies: `testbed` in cargo's target directory.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

/// The directory of the workspace that this crate is part of.
#[must_use]
pub fn workspace() -> &'static Path {
    let testbed = Path::new(env!("CARGO_MANIFEST_DIR"));
    testbed.parent().unwrap_or(testbed)
}

/// Cargo's target directory: `CARGO_TARGET_DIR`, else `target` in the workspace.
#[must_use]
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .and_then(|target| std::path::absolute(target).ok())
        .unwrap_or_else(|| workspace().join("target"))
}

/// The test bed's own directory, made when missing.
///
/// # Errors
/// When it cannot be made.
pub fn directory() -> Result<PathBuf> {
    let directory = target().join("testbed");
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    directory
        .canonicalize()
        .with_context(|| format!("cannot resolve {}", directory.display()))
}

/// Writes `bytes` to `path` so that other processes see the old file or the new one, never a part.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let context = || format!("cannot write {}", path.display());
    let parent = path.parent().with_context(context)?;
    let mut file = temporary_file_in(parent)?;
    file.write_all(bytes).with_context(context)?;
    file.persist(path).with_context(context)?;
    Ok(())
}

/// A file that is gone unless it is persisted, readable for all like any file made in the usual way.
pub(crate) fn temporary_file_in(directory: &Path) -> Result<NamedTempFile> {
    tempfile::Builder::new()
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(directory)
        .with_context(|| format!("cannot make a file in {}", directory.display()))
}
