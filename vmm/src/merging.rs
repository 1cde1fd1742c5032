//! Layers of a machine's disks become fewer, beside it.
//!
//! Each snapshot ends a layer of each disk that was written to. What is in a store, or with a peer, has the content of its disks there, and needs its layers
//! no more; those that lie one on the other become one (`docs/decisions/layers-become-one.md`).

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use branch_disk::{Disk, LayerId, Merge, Merged, ToKeep};
use devices::virtio::block::SharedDisk;

use crate::{
    beside::beside_guest,
    disks::{AttachedDisk, lock},
    stored_disks::StoredAs,
};

/// As many layers in a row, none of which but the topmost is needed by itself, become fewer.
const MANY: usize = 64;

/// How long the end of a machine waits for a merge that is not wanted any more, and how often it looks.
const END_BOUND: Duration = Duration::from_secs(10);
const END_INTERVAL: Duration = Duration::from_millis(2);

/// The layers of a machine's disks.
pub(crate) struct Merging {
    disks: Vec<OfDisk>,
    /// Those of snapshots that need them.
    needed: HashSet<LayerId>,
    /// Cleared when the machine ends.
    wanted: Arc<AtomicBool>,
    at_work: Option<JoinHandle<Vec<Merged>>>,
    /// What is done. A round of requests that a device had begun before may still read the old files.
    done: Vec<Merged>,
}

struct OfDisk {
    /// The topmost of the layers that were there before the machine.
    found: Option<LayerId>,
    /// How many layers it had when it was last tried to make them fewer.
    tried: usize,
}

/// A disk some of whose layers are to become one.
struct Task {
    number: usize,
    disk: SharedDisk,
    merge: Merge,
}

impl Merging {
    /// Of a machine that is made.
    pub(crate) fn new(disks: &[AttachedDisk]) -> Self {
        let of_disk = |disk: &AttachedDisk| {
            let branch = disk.branch.as_ref();
            let topmost = branch.and_then(|branch| lock(branch).sealed_layers().last().copied());
            OfDisk {
                found: topmost,
                tried: 0,
            }
        };
        Self {
            disks: disks.iter().map(of_disk).collect(),
            needed: HashSet::new(),
            wanted: Arc::new(AtomicBool::new(true)),
            at_work: None,
            done: Vec::new(),
        }
    }

    /// There may be a snapshot that needs these layers.
    pub(crate) fn need(&mut self, layers: impl IntoIterator<Item = LayerId>) {
        self.needed.extend(layers);
    }

    /// There is to be a snapshot that has no content of its disks: layers that were there before the machine, and may be merged by who made
    /// them, are to stay for it.
    pub(crate) fn keep_found(&self, disks: &[AttachedDisk]) {
        for (attached, of_disk) in disks.iter().zip(&self.disks) {
            let Some(branch) = &attached.branch else {
                continue;
            };
            let disk = lock(branch);
            // What is only read may itself be sealed.
            let own = disk.id().filter(|_| attached.config.read_only);
            let layers = of_disk.found.into_iter().chain(own);
            let to_keep: Vec<_> = layers.filter_map(|layer| disk.to_keep(layer)).collect();
            // Its device may need it.
            drop(disk);
            let kept = to_keep.into_iter().try_for_each(ToKeep::keep);
            if let Err(error) = kept {
                // It may be where nobody may write, and nobody merges.
                tracing::warn!(
                    "who merges layers could remove one that the snapshot needs: {}",
                    error.with_cause()
                );
            }
        }
    }

    /// Begins to merge what has become many, unless that is being done. `last` is what the machine was last in a store, from which
    /// the next snapshot is told. The machine has been held since this was last called, or since it was made.
    pub(crate) fn look(&mut self, disks: &[AttachedDisk], last: Option<&StoredAs>) {
        if self.is_at_work() {
            return;
        }
        // Nobody has read the files of these since the machine was held.
        let done = std::mem::take(&mut self.done);
        if let Some(thread) = self.at_work.take() {
            self.done = thread.join().unwrap_or_default();
        }
        let tasks = self.tasks(disks, last);
        if done.is_empty() && tasks.is_empty() {
            return;
        }
        let wanted = Arc::clone(&self.wanted);
        let merge = move || {
            // Files that have no name any more end here, which may take a while.
            drop(done);
            let merge = |task: Task| task.run(&|| wanted.load(Ordering::Relaxed));
            tasks.into_iter().filter_map(merge).collect()
        };
        match thread::Builder::new()
            .name("merger".to_owned())
            .spawn(merge)
        {
            Ok(thread) => self.at_work = Some(thread),
            Err(error) => tracing::warn!("layers of disks stay as many as they are: {error}"),
        }
    }

    fn is_at_work(&self) -> bool {
        let thread = self.at_work.as_ref();
        thread.is_some_and(|thread| !thread.is_finished())
    }

    fn tasks(&mut self, disks: &[AttachedDisk], last: Option<&StoredAs>) -> Vec<Task> {
        let mut tasks = Vec::new();
        for (number, (attached, of_disk)) in disks.iter().zip(&mut self.disks).enumerate() {
            let branch = attached.branch.as_ref();
            let Some(disk) = branch.filter(|_| !attached.config.read_only) else {
                continue;
            };
            let stays = last.and_then(|last| *last.layers.get(number)?);
            let stays = |id: &LayerId| Some(*id) == stays || self.needed.contains(id);
            let held = lock(disk);
            let layers = held.sealed_layers().len();
            match of_disk.tried {
                // It has failed, and would again.
                tried if (tried..tried + MANY).contains(&layers) => continue,
                _ => of_disk.tried = 0,
            }
            for merge in merges(&held, of_disk.found, &stays) {
                of_disk.tried = layers;
                tasks.push(Task {
                    number,
                    disk: Arc::clone(disk),
                    merge,
                });
            }
        }
        tasks
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        self.wanted.store(false, Ordering::Relaxed);
        let begun = Instant::now();
        while self.is_at_work() {
            if begun.elapsed() > END_BOUND {
                tracing::warn!("layers that are being merged are left as they are");
                return;
            }
            thread::sleep(END_INTERVAL);
        }
    }
}

impl Task {
    fn run(self, wanted: &(dyn Fn() -> bool + Sync)) -> Option<Merged> {
        let Self {
            number,
            disk,
            merge,
        } = self;
        // Only this: the disk waits for what is done with the result.
        let merged = match beside_guest(|| Ok(merge.write(wanted)?)) {
            Ok(merged) => merged,
            // They go on as they are.
            Err(error) => {
                tracing::warn!(
                    disk = number,
                    "layers of a disk stay as many as they are: {}",
                    error.with_causes()
                );
                return None;
            }
        };
        let adopted = lock(&disk).adopt(&merged);
        match merged.remove_rest() {
            Ok(rest) => tracing::info!(
                disk = number,
                adopted,
                removed = rest.removed.len(),
                kept = rest.kept.len(),
                "layers of a disk have become one"
            ),
            Err(error) => tracing::warn!(
                disk = number,
                "layers that were merged stay: {}",
                error.with_cause()
            ),
        }
        Some(merged)
    }
}

/// What of a disk's chain above the layer `found` is to be merged. Those that `stays` says are needed may be the topmost of what is.
fn merges(disk: &Disk, found: Option<LayerId>, stays: &dyn Fn(&LayerId) -> bool) -> Vec<Merge> {
    let sealed = disk.sealed_layers();
    let ours = match found {
        None => &sealed[..],
        Some(found) => match sealed.iter().position(|id| *id == found) {
            Some(at) => &sealed[at + 1..],
            // It was reset to something else.
            None => &[],
        },
    };
    let many = ours.split_inclusive(stays).filter(|row| row.len() >= MANY);
    let many = many.filter_map(|row| {
        let whole = disk.merge(*row.first()?, *row.last()?)?;
        let from = worth(&whole.allocated_bytes().ok()?);
        disk.merge(*row.get(from)?, *row.last()?)
    });
    many.collect()
}

/// From which on layers that take so many bytes, the lowest first, are to become one: the upper half, and those below it
/// that are not much more than all above them. So what is merged again and again grows each time, and every byte is copied
/// only as often as sizes can double.
fn worth(bytes: &[u64]) -> usize {
    let half = bytes.len() / 2;
    let mut above: u64 = bytes[half..].iter().sum();
    let below = bytes[..half].iter().rev();
    let taken_in = below.take_while(|bytes| {
        let fits = **bytes <= above.saturating_mul(2);
        above = above.saturating_add(**bytes);
        fits
    });
    half - taken_in.count()
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Mutex};

    use branch_disk::{Foundation, anything};
    use control::{DiskConfig, DiskFormat, DiskLimits};

    use super::*;

    #[test]
    fn what_is_large_is_not_copied_for_what_is_small() {
        assert_eq!(worth(&[1; 64]), 0);
        let mut bytes = vec![1; 64];
        bytes[0] = 1000;
        assert_eq!(worth(&bytes), 1);
        bytes[0] = 2 * 63;
        assert_eq!(worth(&bytes), 0);
        bytes[20] = 1000;
        assert_eq!(worth(&bytes), 21);
    }

    #[test]
    fn every_byte_is_copied_a_few_times_however_many_snapshots_there_are() {
        let (mut layers, mut copied) = (Vec::new(), 0);
        for snapshots in 1..=10_000u64 {
            layers.push(1);
            if layers.len() >= MANY {
                let one = layers.split_off(worth(&layers)).iter().sum();
                copied += one;
                layers.push(one);
            }
            assert!(layers.len() < MANY);
            let doublings = u64::from(snapshots.ilog2());
            assert!(copied <= snapshots * doublings.max(1));
        }
    }

    fn disk_of(directory: &Path, name: &str, layers: usize) -> Disk {
        let path = directory.join(name);
        let on = Foundation::Nothing;
        let mut disk = Disk::create(&path, Some(1 << 20), &on, &anything).unwrap();
        seal(&mut disk, layers);
        disk
    }

    fn seal(disk: &mut Disk, layers: usize) {
        for layer in 0..layers {
            disk.write(512 * layer as u64, &mut &[1; 512][..]).unwrap();
            disk.cut(disk.prepare().unwrap()).unwrap().finish().unwrap();
        }
    }

    fn attached(directory: &Path, name: &str) -> AttachedDisk {
        let disk = disk_of(directory, name, 0);
        AttachedDisk {
            config: DiskConfig {
                path: disk.path().to_owned(),
                read_only: false,
                format: DiskFormat::Branch,
                serial: None,
                limits: DiskLimits::default(),
            },
            branch: Some(Arc::new(Mutex::new(disk))),
            began_on: None,
            comes: None,
        }
    }

    /// Waits until nothing is being merged.
    fn rest(merging: &Merging) {
        let begun = Instant::now();
        while merging.is_at_work() {
            assert!(begun.elapsed() < Duration::from_secs(60));
            thread::sleep(END_INTERVAL);
        }
    }

    #[test]
    fn old_files_stay_open_until_the_machine_has_been_held_and_one_merge_is_done_at_a_time() {
        let directory = directory();
        let disks = ["one", "two"].map(|name| attached(directory.path(), name));
        let [one, two] = [0, 1].map(|number| disks[number].branch.clone().unwrap());
        let mut merging = Merging::new(&disks);
        merging.look(&disks, None);
        assert!(merging.at_work.is_none());
        seal(&mut lock(&one), MANY);
        merging.look(&disks, None);
        rest(&merging);
        assert_eq!(lock(&one).sealed_layers().len(), 1);
        seal(&mut lock(&two), MANY);
        merging.look(&disks, None);
        assert_eq!(merging.done.len(), 1, "what the first was made of");
        // The second is not done before its disk has it.
        let held = lock(&two);
        // Unless it was faster than this.
        if held.sealed_layers().len() == MANY {
            for _ in 0..3 {
                merging.look(&disks, None);
                assert_eq!(merging.done.len(), 1);
            }
        }
        drop(held);
        rest(&merging);
        merging.look(&disks, None);
        assert_eq!(merging.done.len(), 1, "what the second was made of");
        rest(&merging);
        merging.look(&disks, None);
        assert_eq!(merging.done.len(), 0);
        assert_eq!(lock(&two).sealed_layers().len(), 1);
        let files = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(files, 4);
        // And again.
        seal(&mut lock(&one), MANY - 1);
        merging.look(&disks, None);
        rest(&merging);
        assert_eq!(lock(&one).sealed_layers().len(), 1);
    }

    #[test]
    fn what_failed_is_not_tried_again_at_once() {
        let directory = directory();
        let disks = [attached(directory.path(), "one")];
        let disk = disks[0].branch.clone().unwrap();
        let mut merging = Merging::new(&disks);
        merging.wanted.store(false, Ordering::Relaxed);
        seal(&mut lock(&disk), MANY);
        let mut tried = Vec::new();
        for layers in MANY..=2 * MANY + 1 {
            merging.look(&disks, None);
            if merging.at_work.is_some() {
                tried.push(layers);
                rest(&merging);
                merging.at_work = None;
            }
            seal(&mut lock(&disk), 1);
        }
        assert_eq!(tried, [MANY, 2 * MANY]);
    }

    #[test]
    fn what_a_machine_goes_on_from_stays_for_a_snapshot_without_disks() {
        let directory = directory();
        let mut maker = disk_of(directory.path(), "d", 2);
        let [first, second] = maker.sealed_layers()[..] else {
            panic!("two were sealed")
        };
        let path = directory.path().join(format!("d.{first}.layer"));
        let branch = Disk::branch(&path, Some(first), &anything).unwrap();
        let mut on_it = attached(directory.path(), "unused");
        on_it.branch = Some(Arc::new(Mutex::new(branch)));
        let machine = [on_it];
        Merging::new(&machine).keep_found(&machine);
        drop(machine);
        let merge = maker.merge(first, second).unwrap();
        let merged = merge.write(&|| true).unwrap();
        assert!(maker.adopt(&merged));
        assert!(merged.remove_rest().unwrap().removed.is_empty());
        assert!(path.exists());
    }

    fn directory() -> tempfile::TempDir {
        let memory = tempfile::tempdir_in("/dev/shm");
        memory.or_else(|_| tempfile::tempdir()).unwrap()
    }

    #[test]
    fn needed_layers_and_those_that_were_there_before_are_never_below_the_top() {
        let directory = directory();
        let disk = disk_of(directory.path(), "d", 2 * MANY);
        let sealed = disk.sealed_layers();
        let count = |found, stays: &[LayerId]| {
            let stays = |id: &LayerId| stays.contains(id);
            merges(&disk, found, &stays).len()
        };
        assert_eq!(count(None, &[]), 1);
        assert_eq!(count(Some(sealed[MANY - 1]), &[]), 1);
        assert_eq!(count(Some(sealed[MANY]), &[]), 0);
        assert_eq!(count(None, &[sealed[MANY - 1]]), 2);
        assert_eq!(count(None, &[sealed[MANY / 2], sealed[MANY]]), 0);
        assert_eq!(count(Some(LayerId([7; 16])), &[]), 0);
    }
}
