//! A store in memory: for tests, and for images that need not outlive their process.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Area, Backend, Draft, Entry, Lease, Lock, Publish, ReadAt};

/// The files of a store, by area and name.
pub type Files = BTreeMap<(Area, String), Arc<Vec<u8>>>;

/// A store in memory. Clones are the same store.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    files: Files,
    leases: HashMap<u64, Vec<u8>>,
    next_lease: u64,
    locks: HashSet<Lock>,
}

impl Memory {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that holds these files.
    pub fn with_files(files: Files) -> Self {
        Memory {
            state: Arc::new(Mutex::new(State {
                files,
                ..State::default()
            })),
        }
    }

    /// A copy of all its files.
    pub fn files(&self) -> Files {
        self.state().files.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single call on a map: a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Memory {
    fn list(&self, area: Area) -> io::Result<Vec<Entry>> {
        let state = self.state();
        let files = state.files.iter().filter(|((of, _), _)| *of == area);
        Ok(files
            .map(|((_, name), file)| Entry {
                name: name.clone(),
                size: file.len() as u64,
            })
            .collect())
    }

    fn open(&self, area: Area, name: &str) -> io::Result<Arc<dyn ReadAt>> {
        let state = self.state();
        let file = state
            .files
            .get(&(area, name.to_owned()))
            .ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(MemoryFile(file.clone())))
    }

    fn draft(&self) -> io::Result<Box<dyn Draft>> {
        Ok(Box::new(MemoryDraft {
            store: self.clone(),
            content: Vec::new(),
        }))
    }

    fn remove(&self, area: Area, name: &str) -> io::Result<()> {
        let removed = self.state().files.remove(&(area, name.to_owned()));
        removed
            .map(drop)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync(&self, _area: Area) -> io::Result<()> {
        Ok(())
    }

    fn lease(&self) -> io::Result<Box<dyn Lease>> {
        let mut state = self.state();
        let id = state.next_lease;
        state.next_lease += 1;
        state.leases.insert(id, Vec::new());
        Ok(Box::new(MemoryLease {
            store: self.clone(),
            id,
        }))
    }

    fn leases(&self) -> io::Result<Vec<Vec<u8>>> {
        Ok(self.state().leases.values().cloned().collect())
    }

    fn clear_dead(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn try_lock(&self, lock: Lock) -> io::Result<Option<Box<dyn Send>>> {
        if self.state().locks.insert(lock) {
            Ok(Some(Box::new(MemoryLock {
                store: self.clone(),
                lock,
            })))
        } else {
            Ok(None)
        }
    }
}

struct MemoryFile(Arc<Vec<u8>>);

impl ReadAt for MemoryFile {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let end = start
            .checked_add(buf.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(self.0.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

struct MemoryDraft {
    store: Memory,
    content: Vec<u8>,
}

impl Draft for MemoryDraft {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.content.extend_from_slice(bytes);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn publish(self: Box<Self>, area: Area, name: &str, how: Publish) -> io::Result<()> {
        let key = (area, name.to_owned());
        let mut state = self.store.state();
        if how == Publish::New && state.files.contains_key(&key) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        state.files.insert(key, Arc::new(self.content));
        Ok(())
    }
}

struct MemoryLease {
    store: Memory,
    id: u64,
}

impl Lease for MemoryLease {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Some(lease) = self.store.state().leases.get_mut(&self.id) {
            lease.extend_from_slice(bytes);
        }
        Ok(())
    }
}

impl Drop for MemoryLease {
    fn drop(&mut self) {
        self.store.state().leases.remove(&self.id);
    }
}

struct MemoryLock {
    store: Memory,
    lock: Lock,
}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        self.store.state().locks.remove(&self.lock);
    }
}
