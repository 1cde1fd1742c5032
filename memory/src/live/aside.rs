//! What a guest has written over since a cut, until it is saved.

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::host_file;

/// Content by its offset in the memory image, in memory of the host that is taken only for what is there.
#[derive(Debug)]
pub(crate) struct Aside(File);

impl Aside {
    /// With room for an image of so many bytes.
    pub(crate) fn new(bytes: u64) -> io::Result<Self> {
        host_file("fermata-aside", bytes).map(Self)
    }

    pub(crate) fn put(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        self.0.write_all_at(content, offset)
    }

    pub(crate) fn read(&self, offset: u64, content: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(content, offset)
    }

    /// Gives all of it back to the host.
    pub(crate) fn clear(&self) -> io::Result<()> {
        let bytes = self.0.metadata()?.len();
        self.0.set_len(0)?;
        self.0.set_len(bytes)
    }
}
