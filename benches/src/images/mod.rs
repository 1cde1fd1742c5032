//! The images that the store is measured with: memories of real guests that did real work, and a disk of theirs.
//!
//! The program `store-images` makes them; `docs/benchmarks.md` says what each is.

mod course;
mod debian;
mod small;
mod sparse;
mod worker;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use course::{Course, CourseWriter};
pub use debian::{DISK, boot, life};
pub use small::{course, small};
pub use worker::Bench;

/// Memory of every guest, in MiB.
pub const MEMORY_MIB: u64 = 256;

/// The disk that guests start with. Made from packages by `cargo xtask bench store`, not by guests.
pub const FIRST_DISK: &str = "before.disk";

/// The same disk after one of them has installed packages.
pub const SECOND_DISK: &str = "after.disk";

/// Snapshots of one course.
pub const COURSE_SNAPSHOTS: usize = 150;

/// They, as what changed from one to the next.
pub const COURSE: &str = "course.pages";

/// What is made together, in one go or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// A Debian guest at four times, four forks of it as it was at the first, and its disk at the end.
    Life,
    /// A boot of the same Debian, with one kind of work.
    Boot(&'static str),
    /// A small guest at four times.
    Small,
    /// A small guest that is saved 150 times.
    Course,
}

impl Set {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Life,
        Self::Boot("json"),
        Self::Boot("sorting"),
        Self::Boot("packing"),
        Self::Boot("scanning"),
        Self::Small,
        Self::Course,
    ];

    /// Its name on the command line.
    pub fn name(self) -> String {
        match self {
            Self::Life => "life".into(),
            Self::Boot(work) => format!("boot-{work}"),
            Self::Small => "small".into(),
            Self::Course => "course".into(),
        }
    }

    /// The set of this name.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn named(name: &str) -> Result<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|set| set.name() == name)
            .with_context(|| format!("there is no set {name}"))
    }

    /// The files that it consists of.
    pub fn files(self) -> Vec<String> {
        let four = |what: &str| (1..=4).map(|n| memory(&format!("{what}-{n}"))).collect();
        match self {
            Self::Life => {
                let mut files: Vec<_> = four("life");
                files.extend::<Vec<_>>(four("fork"));
                files.push(SECOND_DISK.into());
                files
            }
            Self::Boot(_) => vec![memory(&self.name())],
            Self::Small => four("small"),
            Self::Course => vec![COURSE.into()],
        }
    }

    /// Whether all of its files are in `directory`.
    pub fn is_in(self, directory: &Path) -> bool {
        self.files()
            .iter()
            .all(|file| directory.join(file).exists())
    }
}

/// The images that all systems are measured with: twelve memories, then two disks.
pub fn measured(directory: &Path) -> Vec<PathBuf> {
    let sets = Set::ALL.into_iter();
    let of_debian = sets.filter(|set| matches!(set, Set::Life | Set::Boot(_)));
    let files = of_debian.flat_map(Set::files);
    let (mut disks, mut files): (Vec<_>, Vec<_>) = files.partition(|file| file == SECOND_DISK);
    disks.push(FIRST_DISK.into());
    files.sort_unstable();
    files.append(&mut disks);
    files.iter().map(|file| directory.join(file)).collect()
}

/// The name of the file with the memory of `machine`.
fn memory(machine: &str) -> String {
    format!("{machine}.memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_twelve_memories_and_two_disks() {
        let files = measured(Path::new("/"));
        let ending = |end: &str| {
            let files = files.iter();
            files
                .filter(|file| file.extension().is_some_and(|e| e == end))
                .count()
        };
        assert_eq!((ending("memory"), ending("disk")), (12, 2));
    }

    #[test]
    fn sets_are_found_by_their_names() {
        for set in Set::ALL {
            assert_eq!(Set::named(&set.name()).unwrap(), set);
        }
        assert!(Set::named("none").is_err());
    }
}
