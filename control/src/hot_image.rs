//! Hot images, from the side of who has them made: a machine in memory that nobody can change, from which others begin.
//!
//! A VMM writes it, for only a VMM knows machines; who asked for it made the memfd and seals it. What is in it is `snapshot`'s.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create},
    io::Errno,
};
use tokio::time::sleep;

use crate::{
    AfterSnapshot, Client, ClientError, Confinement, Destination, Errand, GuestClock, Parent,
    Record, Shape, SnapshotReport, SnapshotRequest, Source, SpawnError, spawn,
};

/// How long the kernel may be at work with the pages of an image that is to be sealed.
const SEAL_BOUND: Duration = Duration::from_secs(30);
/// Before it is asked again. It has waited itself, for some 150 ms.
const SEAL_AGAIN: Duration = Duration::from_millis(20);

/// Why there is no hot image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host has no memory for it, or no memfd.
    #[error("the memory for a hot image cannot be had; the host is out of memory or files")]
    Host(#[source] Errno),
    /// The machine did not save itself into it.
    #[error(transparent)]
    Machine(#[from] ClientError),
    /// The process that was to make it failed.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
}

/// A hot image. It is there as long as this or a machine that began on it.
#[derive(Debug)]
pub struct HotImage {
    memory: OwnedFd,
    parent: Parent,
    shape: Shape,
}

impl HotImage {
    /// That of a machine that runs or is held, which stands still while its memory is copied. It goes on if it ran, and its clocks
    /// have done `clock` meanwhile; if it was held, it stays so.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; the machine goes on if it ran.
    pub async fn of_machine(
        record: &Record,
        clock: GuestClock,
    ) -> Result<(Self, SnapshotReport), ImageError> {
        let memory = create()?;
        // The control channel passes no descriptors. The machine's process, of the same user, finds it where this one has it.
        let path = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
        let client = Client::connect(record.port, &record.secret).await?;
        let request = SnapshotRequest::new(
            Destination::Image { path: path.into() },
            AfterSnapshot::AsBefore(clock),
        );
        let report = client.snapshot(request).await?;
        let pid = record.process.pid;
        let shape = Shape {
            vcpus: record.vcpus,
            memory_mib: record.memory_mib,
        };
        let image = Self::sealed(memory, Parent::Machine { pid }, shape).await?;
        Ok((image, report))
    }

    /// That of a saved machine, within `confinement` if that is given, all of which is verified by a process of `program` that ends
    /// then. Its log is in `registry`.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; no process is left behind.
    pub async fn of_saved(
        program: &Path,
        registry: &Path,
        source: Source,
        confinement: Option<Confinement>,
        deadline: Duration,
    ) -> Result<Self, ImageError> {
        let memory = create()?;
        let errand = Errand::Image {
            of: source.clone(),
            confinement,
        };
        let making = spawn::make_image(program, registry, &errand, memory.as_fd(), deadline);
        let shape = making.await?;
        Self::sealed(memory, Parent::Saved(source), shape).await
    }

    /// Whose it is.
    pub fn parent(&self) -> &Parent {
        &self.parent
    }

    /// The size of the machine.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    async fn sealed(memory: OwnedFd, parent: Parent, shape: Shape) -> Result<Self, ImageError> {
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK;
        let begun = Instant::now();
        // The kernel refuses while it holds a page of it for work of its own, such as moving it (mm/memfd.c).
        while let Err(refused) = fcntl_add_seals(&memory, seals) {
            if refused != Errno::BUSY || begun.elapsed() > SEAL_BOUND {
                return Err(ImageError::Host(refused));
            }
            sleep(SEAL_AGAIN).await;
        }
        Ok(Self {
            memory,
            parent,
            shape,
        })
    }
}

impl AsFd for HotImage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

fn create() -> Result<OwnedFd, ImageError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let make = |flags| memfd_create("fermata-hot-image", flags);
    // A host may refuse what could become a program (`vm.memfd_noexec`), and one before Linux 6.3 has no word for what cannot.
    make(flags | MemfdFlags::NOEXEC_SEAL)
        .or_else(|_| make(flags))
        .map_err(ImageError::Host)
}
