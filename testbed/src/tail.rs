//! Follows a file that somebody else appends to.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result};

/// A file as far as it has been read.
pub(crate) struct Tail {
    file: File,
    seen: Vec<u8>,
}

impl Tail {
    /// Makes the file, empty, and follows it.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path);
        let file = file.with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self {
            file,
            seen: Vec::new(),
        })
    }

    /// Reads what has been added, and copies it to `echo`.
    pub(crate) fn advance(&mut self, echo: Option<impl Write>) -> Result<()> {
        let start = self.seen.len();
        self.file
            .read_to_end(&mut self.seen)
            .context("cannot read a job's output")?;
        if let (Some(mut echo), true) = (echo, start < self.seen.len()) {
            echo.write_all(&self.seen[start..])
                .context("cannot pass output on")?;
            echo.flush().context("cannot pass output on")?;
        }
        Ok(())
    }

    /// All that has been read.
    pub(crate) fn text(self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_is_echoed_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut tail = Tail::create(&path).unwrap();
        let mut writer = File::options().append(true).open(&path).unwrap();
        let mut echo = Vec::new();
        writer.write_all(b"one ").unwrap();
        tail.advance(Some(&mut echo)).unwrap();
        tail.advance(Some(&mut echo)).unwrap();
        writer.write_all(b"two").unwrap();
        tail.advance(Some(&mut echo)).unwrap();
        assert_eq!(echo, b"one two");
        assert_eq!(tail.text(), "one two");
    }
}
