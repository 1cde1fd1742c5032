//! A backend that fails on purpose.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Area, Backend, Draft, Entry, Lease, Lock, Publish, ReadAt};

/// What fails, and how.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// How many operations that write (append, sync, publish, remove, lease) succeed before.
    pub after_writes: u64,
    /// How many fail then; `u64::MAX` for all.
    pub times: u64,
    /// The error.
    pub kind: io::ErrorKind,
}

/// Passes everything on to another backend, except for a [`Fault`].
#[derive(Clone, Debug)]
pub struct Faulty<B> {
    inner: B,
    plan: Arc<Plan>,
}

#[derive(Debug)]
struct Plan {
    fault: Fault,
    writes: AtomicU64,
}

impl Plan {
    /// Counts an operation that writes.
    fn write(&self) -> io::Result<()> {
        let before = self.writes.fetch_add(1, Ordering::Relaxed);
        let failing = before >= self.fault.after_writes
            && before - self.fault.after_writes < self.fault.times;
        if failing {
            Err(self.fault.kind.into())
        } else {
            Ok(())
        }
    }
}

impl<B: Backend> Faulty<B> {
    /// Wraps `inner`.
    pub fn new(inner: B, fault: Fault) -> Self {
        Faulty {
            inner,
            plan: Arc::new(Plan {
                fault,
                writes: AtomicU64::new(0),
            }),
        }
    }

    /// How many operations that write there were, failed ones included.
    pub fn writes(&self) -> u64 {
        self.plan.writes.load(Ordering::Relaxed)
    }
}

impl<B: Backend> Backend for Faulty<B> {
    fn list(&self, area: Area) -> io::Result<Vec<Entry>> {
        self.inner.list(area)
    }

    fn open(&self, area: Area, name: &str) -> io::Result<Arc<dyn ReadAt>> {
        self.inner.open(area, name)
    }

    fn draft(&self) -> io::Result<Box<dyn Draft>> {
        self.plan.write()?;
        Ok(Box::new(FaultyDraft {
            inner: self.inner.draft()?,
            plan: self.plan.clone(),
        }))
    }

    fn remove(&self, area: Area, name: &str) -> io::Result<()> {
        self.plan.write()?;
        self.inner.remove(area, name)
    }

    fn sync(&self, area: Area) -> io::Result<()> {
        self.plan.write()?;
        self.inner.sync(area)
    }

    fn lease(&self) -> io::Result<Box<dyn Lease>> {
        self.plan.write()?;
        Ok(Box::new(FaultyLease {
            inner: self.inner.lease()?,
            plan: self.plan.clone(),
        }))
    }

    fn leases(&self) -> io::Result<Vec<Vec<u8>>> {
        self.inner.leases()
    }

    fn clear_dead(&self) -> io::Result<u64> {
        self.inner.clear_dead()
    }

    fn try_lock(&self, lock: Lock) -> io::Result<Option<Box<dyn Send>>> {
        self.inner.try_lock(lock)
    }
}

struct FaultyDraft {
    inner: Box<dyn Draft>,
    plan: Arc<Plan>,
}

impl Draft for FaultyDraft {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.plan.write()?;
        self.inner.append(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.plan.write()?;
        self.inner.sync()
    }

    fn publish(self: Box<Self>, area: Area, name: &str, how: Publish) -> io::Result<()> {
        self.plan.write()?;
        self.inner.publish(area, name, how)
    }
}

struct FaultyLease {
    inner: Box<dyn Lease>,
    plan: Arc<Plan>,
}

impl Lease for FaultyLease {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.plan.write()?;
        self.inner.append(bytes)
    }
}
