//! Checking that everything in a store is what it was written to be, and repairing what is not.

mod packs;
mod repair;
mod snapshots;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::annotation;
use crate::backend::{Area, Backend, Lock};
use crate::error::{Error, Malformed, Result};
use crate::facts::SnapshotId;
use crate::index::Segment;
use crate::marks::Slots;
use crate::name::FileId;
use crate::protect;
use crate::refs;
use crate::store::{Shared, Store};

pub use repair::repair_config;

/// What a check found.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Report {
    /// Packs checked.
    pub packs: u64,
    /// Chunks decoded and hashed; or, when `digests_only`, in frames whose digests match.
    pub chunks: u64,
    /// Snapshots checked.
    pub snapshots: u64,
    /// Whether only digests were checked, because the store is encrypted and no key was given.
    pub digests_only: bool,
    /// What is wrong, by file; nothing when all is well.
    pub problems: Vec<Problem>,
    /// What a repair did.
    pub repaired: Vec<String>,
}

impl Report {
    /// Adds what [`repair_config`] found and put right, without which the store could not be opened.
    #[must_use]
    pub fn after_config(mut self, restored: Option<Problem>) -> Self {
        if let Some(problem) = restored {
            self.problems.insert(0, problem);
            self.repaired
                .insert(0, "restored config from a pack".into());
        }
        self
    }
}

/// A file with something wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Problem {
    /// The file, as `area/name`.
    pub file: String,
    /// What is wrong with it.
    pub what: String,
    /// Names of the snapshots that cannot be read in full because of it.
    pub snapshots: Vec<String>,
}

/// What is known about the packs: for each the slots that are whole, and what is wrong.
#[derive(Default)]
struct Packs {
    whole: BTreeMap<FileId, Slots>,
    problems: BTreeMap<FileId, String>,
    chunks: u64,
}

/// A check in work.
struct Check<'a> {
    shared: &'a Shared,
    packs: Packs,
    /// Packs that snapshots refer to and that are not there.
    missing: HashSet<FileId>,
    /// Snapshots that damaged or missing packs hit.
    hit: BTreeMap<FileId, BTreeSet<String>>,
    /// Problems with files that are no packs.
    problems: BTreeSet<Problem>,
    snapshots: u64,
    /// Snapshots and annotations that cannot be read, but are not damaged: of a newer release, or on a failing disk.
    unreadable: BTreeSet<String>,
}

impl Store {
    /// Reads every byte of the store and checks it. Others may save and load at the same time. Without the key of an
    /// encrypted store, digests are checked and nothing is decoded.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] while a collection or repair runs; a list cannot be made. Damage is no error but in the report.
    pub fn fsck(&self) -> Result<Report> {
        let _lock = match lock(&*self.shared.backend) {
            // Where nothing can be written, nothing is collected either.
            Err(Error::ReadOnly(_)) => None,
            other => Some(other?),
        };
        Ok(Check::run(&self.shared)?.report())
    }

    /// Checks the store as [`Store::fsck`] and then repairs it: keeps everything that is whole, and moves what
    /// it cannot read into `damaged/`. The report is of the check; check again to see what remains.
    ///
    /// # Errors
    ///
    /// As [`Store::fsck`]; [`Error::Key`]; the store cannot be written.
    pub fn repair(&self) -> Result<Report> {
        self.shared.keys.get()?;
        let _lock = lock(&*self.shared.backend)?;
        let check = Check::run(&self.shared)?;
        let repaired = repair::repair(&check)?;
        self.shared.frames.clear();
        Ok(Report {
            repaired,
            ..check.report()
        })
    }
}

fn lock(backend: &dyn Backend) -> Result<Box<dyn Send>> {
    let lock = backend
        .try_lock(Lock::Gc)
        .map_err(Error::io("lock the store for a check"))?;
    lock.ok_or(Error::Busy("a collection, check or repair"))
}

impl<'a> Check<'a> {
    fn new(shared: &'a Shared) -> Self {
        Check {
            shared,
            packs: Packs::default(),
            missing: HashSet::new(),
            hit: BTreeMap::new(),
            problems: BTreeSet::new(),
            snapshots: 0,
            unreadable: BTreeSet::new(),
        }
    }

    fn run(shared: &'a Shared) -> Result<Self> {
        let backend = &*shared.backend;
        // Snapshots are listed first, so that all their packs are among those that are listed later, unless one is removed and its name
        // taken anew.
        let snapshots = backend
            .list(Area::Snapshots)
            .map_err(Error::file("list the snapshots"))?;
        let mut check = Check::new(shared);
        check.packs = packs::check(shared, &mut check.problems)?;
        for entry in snapshots {
            check.snapshot(&entry.name);
        }
        // Before the snapshots: who sets one has found its snapshot. One that cannot be read has a problem of its own.
        let tags = refs::read_tags(backend)?;
        let snapshots = refs::names_by_id(shared)?;
        check.tags(tags, &snapshots);
        check.annotations(&snapshots)?;
        check.index()?;
        check.condemned()?;
        Ok(check)
    }

    fn report(self) -> Report {
        let mut problems: Vec<Problem> = self.problems.into_iter().collect();
        let mut hit = self.hit;
        for (pack, what) in self.packs.problems {
            let snapshots = hit.remove(&pack).unwrap_or_default().into_iter().collect();
            problems.push(Problem {
                file: Area::Packs.path(&pack.to_string()),
                what,
                snapshots,
            });
        }
        for (pack, snapshots) in hit {
            let what = if self.packs.whole.contains_key(&pack) {
                "chunks that are referred to are not there"
            } else {
                "the pack is missing"
            };
            let file = Area::Packs.path(&pack.to_string());
            problems.push(Problem {
                file,
                what: what.into(),
                snapshots: snapshots.into_iter().collect(),
            });
        }
        Report {
            packs: self.packs.whole.len() as u64,
            chunks: self.packs.chunks,
            snapshots: self.snapshots,
            digests_only: self.shared.keys.is_locked(),
            problems,
            repaired: Vec::new(),
        }
    }

    fn problem(&mut self, area: Area, name: &str, what: impl Into<String>, snapshots: Vec<String>) {
        self.problems.insert(Problem {
            file: area.path(name),
            what: what.into(),
            snapshots,
        });
    }

    fn tags(
        &mut self,
        tags: Vec<(String, Result<Option<SnapshotId>>)>,
        snapshots: &HashMap<SnapshotId, String>,
    ) {
        for (tag, named) in tags {
            let what = match named {
                Ok(Some(id)) if !snapshots.contains_key(&id) => {
                    "it names no snapshot that can be read".to_owned()
                }
                Ok(_) => continue,
                Err(error) => error.of_its_file(),
            };
            self.problem(Area::Tags, &tag, what, Vec::new());
        }
    }

    fn annotations(&mut self, snapshots: &HashMap<SnapshotId, String>) -> Result<()> {
        let files = self
            .shared
            .backend
            .list(Area::Annotations)
            .map_err(Error::file("list the annotations"))?;
        for entry in files {
            let checked = annotation::check_file(self.shared, &entry.name, snapshots);
            if let Err(error) = checked {
                if !matches!(error, Error::Damaged { .. }) {
                    self.unreadable.insert(Area::Annotations.path(&entry.name));
                }
                self.problem(
                    Area::Annotations,
                    &entry.name,
                    error.of_its_file(),
                    Vec::new(),
                );
            }
        }
        Ok(())
    }

    /// Segments may come and go meanwhile: one that is gone is no problem.
    fn index(&mut self) -> Result<()> {
        let backend = &*self.shared.backend;
        for entry in backend
            .list(Area::Index)
            .map_err(Error::file("list the index"))?
        {
            let checked = Segment::open(backend, &self.shared.config, &entry.name, false).and_then(
                |segment| {
                    let mut entries = 0;
                    for bucket in 0..segment.buckets() {
                        entries += segment.checked_bucket(bucket)?.len() as u64;
                    }
                    let fits = entries == segment.entries();
                    if fits {
                        Ok(())
                    } else {
                        Err(Malformed("the number of entries is wrong")
                            .in_file(Area::Index.path(&entry.name)))
                    }
                },
            );
            match checked {
                Err(gone) if gone.is_not_found() => {}
                Err(error) => {
                    self.problem(Area::Index, &entry.name, error.of_its_file(), Vec::new())
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn condemned(&mut self) -> Result<()> {
        let backend = &*self.shared.backend;
        for entry in backend
            .list(Area::Condemned)
            .map_err(Error::file("list what is condemned"))?
        {
            if let Err(error) = protect::read_condemned(backend, &entry.name) {
                self.problem(
                    Area::Condemned,
                    &entry.name,
                    error.of_its_file(),
                    Vec::new(),
                );
            }
        }
        Ok(())
    }
}
