//! Files for an input, in memory where there is a file system for that.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// A directory of this process's.
pub(crate) struct Scratch(TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        let memory = tempfile::tempdir_in("/dev/shm");
        Self(
            memory
                .or_else(|_| tempfile::tempdir())
                .expect("there is room"),
        )
    }

    pub(crate) fn directory(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Removes all files.
    pub(crate) fn clear(&self) {
        for entry in std::fs::read_dir(self.directory()).expect("it is there") {
            let _ = std::fs::remove_file(entry.expect("it is there").path());
        }
    }
}
