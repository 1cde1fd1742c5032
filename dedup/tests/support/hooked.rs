//! A store in memory of which a test says what fails, and before what something happens.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use dedup::backend::{Area, Backend, Draft, Entry, Lease, Lock, Memory, Publish, ReadAt};

/// What is about to be done.
#[derive(Debug)]
pub enum Call<'a> {
    List(Area),
    Read(Area, &'a str, Range<u64>),
    Publish(Area, &'a str),
    Remove(Area, &'a str),
}

type Hook = dyn Fn(&Call<'_>) -> io::Result<()> + Send + Sync;

/// Does what memory does, unless the hook fails.
#[derive(Clone)]
pub struct Hooked {
    memory: Memory,
    hook: Arc<Hook>,
}

impl Hooked {
    pub fn new(
        memory: Memory,
        hook: impl Fn(&Call<'_>) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Hooked {
            memory,
            hook: Arc::new(hook),
        }
    }
}

impl Backend for Hooked {
    fn list(&self, area: Area) -> io::Result<Vec<Entry>> {
        (self.hook)(&Call::List(area))?;
        self.memory.list(area)
    }
    fn open(&self, area: Area, name: &str) -> io::Result<Arc<dyn ReadAt>> {
        Ok(Arc::new(HookedFile {
            area,
            name: name.to_owned(),
            inner: self.memory.open(area, name)?,
            hook: self.hook.clone(),
        }))
    }
    fn draft(&self) -> io::Result<Box<dyn Draft>> {
        Ok(Box::new(HookedDraft {
            inner: self.memory.draft()?,
            hook: self.hook.clone(),
        }))
    }
    fn remove(&self, area: Area, name: &str) -> io::Result<()> {
        (self.hook)(&Call::Remove(area, name))?;
        self.memory.remove(area, name)
    }
    fn sync(&self, area: Area) -> io::Result<()> {
        self.memory.sync(area)
    }
    fn lease(&self) -> io::Result<Box<dyn Lease>> {
        self.memory.lease()
    }
    fn leases(&self) -> io::Result<Vec<Vec<u8>>> {
        self.memory.leases()
    }
    fn clear_dead(&self) -> io::Result<u64> {
        self.memory.clear_dead()
    }
    fn try_lock(&self, lock: Lock) -> io::Result<Option<Box<dyn Send>>> {
        self.memory.try_lock(lock)
    }
}

struct HookedFile {
    area: Area,
    name: String,
    inner: Arc<dyn ReadAt>,
    hook: Arc<Hook>,
}

impl ReadAt for HookedFile {
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let range = offset..offset + buf.len() as u64;
        (self.hook)(&Call::Read(self.area, &self.name, range))?;
        self.inner.read_exact_at(buf, offset)
    }
}

struct HookedDraft {
    inner: Box<dyn Draft>,
    hook: Arc<Hook>,
}

impl Draft for HookedDraft {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.inner.append(bytes)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.inner.sync()
    }
    fn publish(self: Box<Self>, area: Area, name: &str, how: Publish) -> io::Result<()> {
        (self.hook)(&Call::Publish(area, name))?;
        self.inner.publish(area, name, how)
    }
}
