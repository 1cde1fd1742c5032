//! What the kernel tells through files.

use std::{fs, path::PathBuf};

/// A host's `/proc`, `/sys` and `/dev`, which tests put somewhere else.
pub(super) struct Host {
    root: PathBuf,
}

impl Host {
    pub(super) fn real() -> Self {
        Self { root: "/".into() }
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The contents of a file without white space around them; `None` if it is not to be had.
    pub(super) fn read(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// Of a file with lines like `MemAvailable:  1234 kB`: the number after `name`.
    pub(super) fn number(&self, path: &str, name: &str) -> Option<u64> {
        self.read(path)?.lines().find_map(|line| {
            let rest = line.strip_prefix(name)?.strip_prefix(':')?;
            rest.split_ascii_whitespace().next()?.parse().ok()
        })
    }
}

#[cfg(test)]
pub(super) mod fake {
    use super::*;

    /// A host that has these files only, with these contents.
    pub(in crate::doctor) struct Fake {
        dir: tempfile::TempDir,
    }

    impl Fake {
        pub(in crate::doctor) fn new(files: &[(&str, &str)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            for (path, contents) in files {
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, contents).unwrap();
            }
            Self { dir }
        }

        pub(in crate::doctor) fn host(&self) -> Host {
            Host {
                root: self.dir.path().to_owned(),
            }
        }
    }

    #[test]
    fn numbers_are_found_by_their_whole_name() {
        let fake = Fake::new(&[("proc/meminfo", "MemAvailable: 12 kB\nMem: 7\n")]);
        assert_eq!(fake.host().number("proc/meminfo", "Mem"), Some(7));
        assert_eq!(fake.host().number("proc/meminfo", "MemAvailable"), Some(12));
        assert_eq!(fake.host().number("proc/meminfo", "Av"), None);
        assert_eq!(fake.host().number("proc/absent", "Mem"), None);
    }
}
