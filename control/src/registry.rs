//! Where the VMMs that live are written down: a directory that only its owner can enter, with one
//! record per process. Whoever may read it may speak to them.

use std::{
    collections::HashSet,
    env, fs,
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustix::{
    fs::{FlockOperation, flock},
    rand::{GetRandomFlags, getrandom},
};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{Console, Origin, ProcessId, Secret, spawn::is_full};

/// Names the directory, if set.
pub const RUN_DIR_VARIABLE: &str = "FERMATA_RUN_DIR";

/// A record is read up to this length. It has three paths and a command line.
const MAX_RECORD_BYTES: u64 = 1 << 20;

/// What the names of logs and consoles end with.
const LOG: &str = "log";
const CONSOLE: &str = "console";

/// How long a VMM may have a log and a console and no record yet: until its machine is made. With many at once, that takes time.
const UNRECORDED: Duration = Duration::from_secs(60);

/// What is added to the name of a console that grew too long, to put it aside.
const PUT_ASIDE: &str = "1";

/// Why the registry cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The directory is open to others, who would learn the secrets, or belongs to them.
    #[error(
        "{} must be a directory of this user that nobody else can enter; make it one \
         (chmod 700) or set {RUN_DIR_VARIABLE} to another", .0.display()
    )]
    Exposed(PathBuf),
    /// The directory or a record cannot be made, read, or written.
    #[error("cannot use {} as the registry of VMs; set {RUN_DIR_VARIABLE} to another directory", path.display())]
    Io {
        /// What was to be used.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl RegistryError {
    /// Whether the directory's file system, or what this user may have of it, is full.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_full(source))
    }
}

/// What is known of a VMM that lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The VMM's process.
    #[serde(flatten)]
    pub process: ProcessId,
    /// Loopback port of its control service.
    pub port: u16,
    /// What it demands of its clients.
    pub secret: Secret,
    /// Where its machine came from.
    pub origin: Origin,
    /// Where its console goes.
    pub console: Console,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
}

/// The directory of records.
#[derive(Clone, Debug)]
pub struct Registry {
    dir: PathBuf,
}

impl Registry {
    /// The directory that is used unless another is asked for: `$FERMATA_RUN_DIR`, else
    /// `$XDG_RUNTIME_DIR/fermata`, else `/run/fermata` for root and `/tmp/fermata-<uid>` for others.
    pub fn default_dir() -> PathBuf {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        let uid = rustix::process::geteuid();
        if let Some(dir) = set(RUN_DIR_VARIABLE) {
            dir.into()
        } else if uid.is_root() {
            "/run/fermata".into()
        } else if let Some(dir) = set("XDG_RUNTIME_DIR") {
            Path::new(&dir).join("fermata")
        } else {
            format!("/tmp/fermata-{}", uid.as_raw()).into()
        }
    }

    /// The registry in `dir`, which is made if it is not there. A relative path is meant from the directory that this process works in.
    ///
    /// # Errors
    ///
    /// [`RegistryError`].
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, RegistryError> {
        let named = dir.into();
        // VMMs, which are told of it, work in a directory of their own.
        let dir = std::path::absolute(&named).map_err(|source| RegistryError::Io {
            path: named,
            source,
        })?;
        let registry = Self { dir };
        registry.prepare().map_err(|e| registry.error(e))?;
        // Not followed: in a directory like /tmp, a link may have been put there by anybody.
        let found = fs::symlink_metadata(&registry.dir).map_err(|e| registry.error(e))?;
        let own = found.uid() == rustix::process::geteuid().as_raw();
        if found.is_dir() && own && found.mode() & 0o077 == 0 {
            Ok(registry)
        } else {
            Err(RegistryError::Exposed(registry.dir))
        }
    }

    fn prepare(&self) -> io::Result<()> {
        if let Some(parent) = self.dir.parent() {
            fs::create_dir_all(parent)?;
        }
        match fs::DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes `record` down until the guard is dropped. A process that ends without dropping it is
    /// forgotten by the next [`Registry::list`].
    ///
    /// # Errors
    ///
    /// [`RegistryError::Io`].
    pub fn register(&self, record: &Record) -> Result<Registration, RegistryError> {
        let path = self.path_of(record.process.pid);
        let write = || -> io::Result<()> {
            // Made with mode 0600; renamed into place whole.
            let mut file = tempfile::NamedTempFile::new_in(&self.dir)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(|e| self.error(e))?;
        Ok(Registration { path })
    }

    /// The VMMs that live, by process id. Records of those that do not are removed.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Io`] when the directory cannot be read; a record that cannot be is skipped.
    pub fn list(&self) -> Result<Vec<Record>, RegistryError> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(|e| self.error(e))? {
            let path = entry.map_err(|e| self.error(e))?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                records.extend(living(&path));
            }
        }
        records.sort_by_key(|record| record.process.pid);
        Ok(records)
    }

    /// The VMM with process id `pid`.
    ///
    /// # Errors
    ///
    /// Those of [`Registry::list`].
    pub fn find_pid(&self, pid: u32) -> Result<Option<Record>, RegistryError> {
        Ok(living(&self.path_of(pid)))
    }

    /// The VMM whose control service is on port `port`.
    ///
    /// # Errors
    ///
    /// Those of [`Registry::list`].
    pub fn find_port(&self, port: u16) -> Result<Option<Record>, RegistryError> {
        Ok(self.list()?.into_iter().find(|record| record.port == port))
    }

    /// Removes the oldest logs and consoles that VMMs left here, all but the newest `keep`; those of
    /// VMMs that live stay, or that may not have come to their record yet.
    pub(crate) fn prune(&self, keep: usize) -> Result<(), RegistryError> {
        let mut in_use = HashSet::new();
        for record in self.list()? {
            in_use.insert(self.log_of(record.process.pid));
            if let Console::File(path) = record.console {
                in_use.insert(path);
            }
        }
        let mut left: Vec<_> = fs::read_dir(&self.dir)
            .map_err(|e| self.error(e))?
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let path = entry.path();
                let owner = match path.extension()? {
                    kind if kind == PUT_ASIDE => path.with_extension(""),
                    kind if kind == LOG || kind == CONSOLE => path.clone(),
                    _ => return None,
                };
                if is_log_of_the_living(&path) {
                    return None;
                }
                let written = entry.metadata().ok()?.modified().ok()?;
                let left = !in_use.contains(&owner) && is_old(written) && !is_open(&owner);
                left.then_some((written, path))
            })
            .collect();
        left.sort();
        for (_, path) in left.iter().rev().skip(keep) {
            // Gone already is as good.
            let _ = fs::remove_file(path);
        }
        Ok(())
    }

    /// The log of the VMM with process id `pid`.
    pub fn log_of(&self, pid: u32) -> PathBuf {
        self.dir.join(pid.to_string()).with_extension(LOG)
    }

    /// A file for the console of a VMM that is to be started.
    ///
    /// # Errors
    ///
    /// When the kernel has no random numbers.
    pub fn new_console(&self) -> io::Result<PathBuf> {
        let mut name = [0; 8];
        getrandom(&mut name, GetRandomFlags::empty())?;
        Ok(self.dir.join(hex::encode(name)).with_extension(CONSOLE))
    }

    fn path_of(&self, pid: u32) -> PathBuf {
        self.dir.join(format!("{pid}.json"))
    }

    fn error(&self, source: io::Error) -> RegistryError {
        RegistryError::Io {
            path: self.dir.clone(),
            source,
        }
    }
}

/// Whether a VMM that wrote this has ended, if it has no record.
fn is_old(written: SystemTime) -> bool {
    // A clock that was set back makes it stay a while longer.
    written.elapsed().is_ok_and(|age| age > UNRECORDED)
}

/// The process that a file is named after.
fn owner(path: &Path) -> Option<u32> {
    path.file_stem()?.to_str()?.parse().ok()
}

fn lives(pid: u32) -> bool {
    // What cannot be told is taken for life.
    !matches!(ProcessId::alive(pid), Ok(None))
}

/// Whether this is the log of a process that lives, which may be one that has no machine yet.
fn is_log_of_the_living(path: &Path) -> bool {
    owner(path).is_some_and(lives)
}

/// Whether a VMM has this console open, though it may have no record yet: its machine can take hours to load.
fn is_open(console: &Path) -> bool {
    let Ok(file) = fs::File::open(console) else {
        return false;
    };
    flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
}

/// Has a console file be kept for as long as its VMM has it open.
pub fn keep_console(file: &fs::File) {
    // Where there are no locks, it is kept while it is young, and once there is a record.
    let _ = flock(file, FlockOperation::NonBlockingLockShared);
}

/// Keeps a record in place.
#[derive(Debug)]
#[must_use = "the record is removed when this is dropped"]
pub struct Registration {
    path: PathBuf,
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "the record of this VMM could not be removed");
        }
    }
}

/// The record in `path` if its process lives. One whose process does not is removed.
fn living(path: &Path) -> Option<Record> {
    let read = || -> io::Result<Option<Record>> {
        let mut json = Vec::new();
        fs::File::open(path)?
            .take(MAX_RECORD_BYTES)
            .read_to_end(&mut json)?;
        let record: Record = match serde_json::from_slice(&json) {
            Ok(record) => record,
            // Torn by a crash of the host, or of another release: with its VMM gone, it is of use to nobody.
            Err(_) if owner(path).is_some_and(|pid| !lives(pid)) => {
                fs::remove_file(path)?;
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        if record.process.is_alive()? {
            return Ok(Some(record));
        }
        fs::remove_file(path)?;
        Ok(None)
    };
    match read() {
        Ok(record) => record,
        // Its process has just removed it, or another reader has.
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            warn!(path = %path.display(), %error, "a record of a VMM cannot be read");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::Source;

    fn record(port: u16) -> Record {
        Record {
            process: ProcessId::current().unwrap(),
            port,
            secret: Secret::random().unwrap(),
            origin: Origin::Restore(Source::files("/s", "/m")),
            console: Console::Terminal,
            vcpus: 2,
            memory_mib: 256,
        }
    }

    #[test]
    fn a_record_is_found_while_its_guard_lives() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path().join("run")).unwrap();
        let written = record(4000);
        let guard = registry.register(&written).unwrap();
        let file = registry.path_of(written.process.pid);
        assert_eq!(fs::metadata(file).unwrap().mode() & 0o777, 0o600);
        assert_eq!(registry.list().unwrap(), std::slice::from_ref(&written));
        assert_eq!(registry.find_port(4000).unwrap(), Some(written.clone()));
        assert_eq!(registry.find_port(4001).unwrap(), None);
        let pid = written.process.pid;
        assert_eq!(registry.find_pid(pid).unwrap(), Some(written));
        drop(guard);
        assert_eq!(registry.find_pid(pid).unwrap(), None);
        assert_eq!(fs::read_dir(registry.dir()).unwrap().count(), 0);
    }

    #[test]
    fn the_record_of_an_earlier_process_with_the_same_id_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path().join("run")).unwrap();
        let mut stale = record(4000);
        stale.process.start_ticks -= 1;
        std::mem::forget(registry.register(&stale).unwrap());
        assert_eq!(registry.list().unwrap(), []);
        assert_eq!(fs::read_dir(registry.dir()).unwrap().count(), 0);
    }

    #[test]
    fn a_record_that_is_not_one_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path().join("run")).unwrap();
        fs::write(registry.dir().join("1.json"), "{}").unwrap();
        // Of a process that there is not.
        let torn = registry.path_of(u32::MAX - 1);
        fs::write(&torn, "{").unwrap();
        let guard = registry.register(&record(4000)).unwrap();
        assert_eq!(registry.list().unwrap().len(), 1);
        drop(guard);
        assert!(registry.dir().join("1.json").exists() && !torn.exists());
    }

    #[test]
    fn the_oldest_logs_go_but_not_those_of_the_living() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path().join("run")).unwrap();
        let mut living = record(4000);
        let console = registry.new_console().unwrap();
        living.console = Console::File(console.clone());
        let guard = registry.register(&living).unwrap();
        let log = registry.log_of(living.process.pid);
        let aside = console.with_extension("console.1");
        // Of processes that there are not.
        let log_of = |nth| registry.log_of(u32::MAX - nth);
        let (older, newer) = (log_of(1), log_of(2));
        // Of a process that has no record.
        let waiting = registry.log_of(std::os::unix::process::parent_id());
        // Of one that loads its machine for days.
        let loading = registry.new_console().unwrap();
        let older_aside = registry.dir().join("x.console.1");
        let age = |days: u64| std::time::SystemTime::now() - Duration::from_secs(days * 86_400);
        let files = [
            (&console, 9),
            (&aside, 8),
            (&log, 7),
            (&older_aside, 3),
            (&older, 2),
            (&newer, 1),
            (&waiting, 9),
            (&loading, 9),
        ];
        let new = [3, 4].map(log_of);
        for (path, days) in files {
            let file = fs::File::create(path).unwrap();
            file.set_modified(age(days)).unwrap();
        }
        for path in &new {
            fs::File::create(path).unwrap();
        }
        let open = fs::File::open(&loading).unwrap();
        keep_console(&open);
        registry.prune(1).unwrap();
        let left: Vec<_> = files.map(|(path, _)| path.exists()).into();
        assert_eq!(left, [true, true, true, false, false, true, true, true]);
        drop(open);
        registry.prune(1).unwrap();
        assert!(!loading.exists());
        assert!(new.iter().all(|path| path.exists()));
        drop(guard);
    }

    #[test]
    fn a_relative_directory_is_the_same_to_who_works_elsewhere() {
        let here = env::current_dir().unwrap();
        let dir = tempfile::tempdir_in(&here).unwrap();
        let relative = dir.path().strip_prefix(&here).unwrap().join("run");
        let registry = Registry::open(&relative).unwrap();
        assert_eq!(registry.dir(), here.join(&relative));
        assert!(Registry::open("").is_err());
    }

    #[test]
    fn a_directory_that_others_can_enter_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o750)).unwrap();
        let refused = Registry::open(dir.path());
        assert!(matches!(refused, Err(RegistryError::Exposed(_))));
        let link = dir.path().join("link");
        let own = dir.path().join("own");
        Registry::open(&own).unwrap();
        std::os::unix::fs::symlink(&own, &link).unwrap();
        let refused = Registry::open(&link);
        assert!(matches!(refused, Err(RegistryError::Exposed(_))));
    }
}
