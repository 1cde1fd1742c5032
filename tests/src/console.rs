//! What guests print.

use std::path::PathBuf;

use anyhow::Result;

use crate::wait;

/// A serial console that is written to a file.
#[derive(Clone, Debug)]
pub struct Console {
    path: PathBuf,
}

/// What the Linux guest of the role `counter` prints to show that nothing was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Digest of what a process holds in its memory.
    pub process: String,
    /// Digest of a file in memory.
    pub memory: String,
    /// Digest of a file on the disk, or `none`.
    pub disk: String,
    /// The CPUs that made progress since the last time.
    pub cpus: String,
}

impl Console {
    /// The console in the file at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Everything printed so far; empty before the file is there.
    pub fn text(&self) -> String {
        let bytes = std::fs::read(&self.path).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits for a complete line in which `find` finds something, and returns the first that it finds.
    ///
    /// # Errors
    ///
    /// When that does not come.
    pub fn first<T>(&self, what: &str, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        wait::until(what, || complete_lines(&self.text()).find_map(&find))
            .map_err(|e| e.context(format!("the console says {:?}", self.tail())))
    }

    /// The last thing found in a complete line so far.
    pub fn last<T>(&self, find: impl Fn(&str) -> Option<T>) -> Option<T> {
        complete_lines(&self.text()).filter_map(find).last()
    }

    fn tail(&self) -> String {
        let text = self.text();
        let start = text.len().saturating_sub(2000);
        text.get(start..).unwrap_or(&text).to_owned()
    }
}

/// The lines that have ended.
fn complete_lines(text: &str) -> impl Iterator<Item = &str> {
    let end = text.rfind('\n').map_or(0, |at| at + 1);
    text[..end].lines().map(|line| line.trim_end_matches('\r'))
}

/// The number in a line like `fermata-guest: count 12 cpu 1`.
pub fn count(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("fermata-guest: count ")?;
    rest.split(' ').next()?.parse().ok()
}

/// What a line like `fermata-guest: verify process=… memory=… disk=… cpus=…` says.
pub fn verified(line: &str) -> Option<Verified> {
    let (_, rest) = line.split_once("fermata-guest: verify ")?;
    let field = |name: &str| {
        let mut fields = rest.split(' ').filter_map(|field| field.split_once('='));
        fields
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.to_owned())
    };
    Some(Verified {
        process: field("process")?,
        memory: field("memory")?,
        disk: field("disk")?,
        cpus: field("cpus")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_that_have_ended_count() {
        let text = "fermata-guest: count 1 cpu 0\r\nfermata-guest: count 2 cpu 1\r\nfermata-guest: count 3";
        assert_eq!(
            complete_lines(text).filter_map(count).collect::<Vec<_>>(),
            [1, 2]
        );
    }

    #[test]
    fn a_verification_is_read_whole_or_not_at_all() {
        let line = "fermata-guest: verify process=a memory=b disk=none cpus=0,1";
        let expected = Verified {
            process: "a".into(),
            memory: "b".into(),
            disk: "none".into(),
            cpus: "0,1".into(),
        };
        assert_eq!(verified(line), Some(expected));
        assert_eq!(verified("fermata-guest: verify process=a memory=b"), None);
    }
}
