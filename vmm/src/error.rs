//! Why a machine could not do as it was asked, and whose fault that is.

use std::path::PathBuf;

use control::{Failure, FailureKind, NetAttachment};

use crate::{boot, nets, vcpus, vsocks};

/// An error of a machine. Its text says what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Size(#[from] memory::InvalidSize),
    #[error(
        "the machine has {guest_mib} MiB of memory, but this host only {host_mib}; give it less, or use a larger host"
    )]
    HostTooSmall { guest_mib: u64, host_mib: u64 },
    #[error("this host lacks CPU features that the guest uses: {}; restore it on a host that has them", .0.join(", "))]
    MissingFeatures(Vec<String>),
    #[error("a machine can have {max} disks, network and vsock devices, balloons and virtio consoles together; leave some out", max = crate::device_set::MAX_DEVICES)]
    TooManyDevices,
    #[error(
        "a CPU with {bits} bits of physical address cannot reach {mib} MiB of memory; give the machine less, or a CPU with all that the host has"
    )]
    NoAddressBits { mib: u64, bits: u32 },
    #[error(
        "the snapshot's machine has {has} network devices, and {named} were named; name no more than it has"
    )]
    NoSuchNet { has: usize, named: usize },
    #[error(
        "network device {number} of the snapshot's machine ({}) is not attached because a state file says so; name the TAP device that it is to have",
        place_of(.was.as_ref())
    )]
    NetNotNamed {
        number: usize,
        was: Option<NetAttachment>,
    },
    #[error(
        "network device {number} is on TAP device {tap}, which one machine can have; name one for each fork, like --net tap={tap}-{{n}}"
    )]
    TapOfAnother { number: usize, tap: String },
    #[error("{0:?} cannot be saved as text; give the network socket a path in UTF-8")]
    NetPath(PathBuf),
    #[error(
        "a balloon of {target_mib} MiB does not fit into a machine of {memory_mib} MiB; ask for less"
    )]
    BalloonTooLarge { target_mib: u64, memory_mib: u64 },
    #[error("the machine has no balloon; boot one with --balloon")]
    NoBalloon,
    #[error("the snapshot's machine has no vsock device that could be changed; leave it out")]
    NoVsock,
    #[error(
        "the snapshot's vsock device has its socket at {path}, outside of what this server serves; restore it on the command line"
    )]
    VsockOutside { path: String },
    #[error(
        "the disk {path} was written to after the snapshot was taken; restore the copy of it that belongs to the snapshot"
    )]
    DiskChanged { path: String },
    #[error(
        "the snapshot's disk {path} lies outside of what this server serves; move it into the tree and boot from there"
    )]
    DiskOutside { path: String },
    #[error(
        "the snapshot's machine has {vcpus} vCPUs and {mib} MiB, more than this server gives; raise its limits"
    )]
    TooLarge { vcpus: u32, mib: u64 },
    #[error(
        "the snapshot's disk {} is not here; name a directory in which it is made as the snapshot has it, with --disks DIRECTORY",
        path.display()
    )]
    DiskNotHere { path: PathBuf },
    #[error(
        "a layer of the disk is not here; bring it back, or, if the snapshot is in a store, restore it from there with --disks DIRECTORY and fork that machine"
    )]
    LayerNotHere(#[source] branch_disk::Error),
    #[error("the saved state of the disk {path} is impossible; take another copy of the snapshot")]
    DiskState { path: String },
    #[error(transparent)]
    Branch(#[from] branch_disk::Error),
    #[error("the machine has {has} disks, numbered from 0, and none with number {index}")]
    NoSuchDisk { index: u32, has: usize },
    #[error(
        "the request changes nothing of the disk; name a size, or a limit such as bytes_per_second"
    )]
    NothingToChange,
    #[error(
        "forks would all write to the disk {path}, which is a raw image; let it branch (`fermata disk create {path}.disk --base {path}`), or attach it read-only (`ro`)"
    )]
    SharedDisk { path: String },
    #[error(
        "the machine has no snapshot mapped that it could go back to; fork one that has (`fermata fork`), or restore it from its two files, and without huge pages"
    )]
    NothingToGoBackTo,
    #[error(
        "the machine writes to the disk {path}, which is a raw image, and that cannot be undone; let it branch (`fermata disk create {path}.disk --base {path}`), or attach it read-only (`ro`)"
    )]
    NotUndone { path: String },
    #[error(
        "the machine could not be reset and has ended, for it is in no known state; fork or restore its snapshot again: {0}"
    )]
    ResetFailed(#[source] Box<Error>),
    #[error(
        "the last of so many runs would have a number of more than 32 bits; ask for fewer, or begin with a lower one"
    )]
    RunNumber,
    #[error("the errand does not follow the one before it; install all programs from one release")]
    OutOfTurn,
    #[error("a fork needs a hot image to begin on, and none came with it; use `fermata fork`")]
    NoImage,
    #[error(
        "the memory for a hot image cannot be opened at {path}: {source}; run the machine and who forks it as one user"
    )]
    ImageOpen {
        path: String,
        source: std::io::Error,
    },
    #[error(
        "{path} is not an empty memfd that can be sealed, and is not written to; use `fermata fork`"
    )]
    NoMemfd { path: String },
    #[error(
        "a machine that does not go on has nothing written beside it; leave the way out, take pre-copy, or let it go on"
    )]
    NothingGoesOn,
    #[error(
        "only a snapshot that the guest goes on beside can be slowed; leave the limit out, or let the machine go on and be saved by copy-on-write, or by pre-copy"
    )]
    NothingBeside,
    #[error(
        "the guest would stand still for longer than it may until its memory is read, so there is no snapshot and it goes on; allow more, take pre-copy, or wait until it writes less"
    )]
    StandsTooLong,
    #[error("the snapshot was cancelled; nothing of it is kept")]
    Cancelled,
    #[error(transparent)]
    Lost(#[from] snapshot::Lost),
    #[error(
        "memory of huge pages that the host has reserved does not come on demand; leave one of the two out"
    )]
    HugeOnDemand,
    #[error(
        "a snapshot has to wait until all of the machine's memory and disks have come from its store, of which nothing has come for {still} s; ask again when the store is faster"
    )]
    NothingComes { still: u64 },
    #[error(
        "the disk grows when all of the machine's memory and disks have come from its store; ask again then, or with `fermata resume` first if it stands still for lost memory"
    )]
    GrowsLater,
    #[error("who asked for the snapshot has gone away")]
    NobodyWaits,
    #[error("the guest is ending; there is nothing to save or to reset")]
    GuestEnds,
    #[error("the disk {path} cannot be made durable: {source}")]
    DiskSync {
        path: String,
        source: std::io::Error,
    },
    #[error("the console cannot be opened: {0}; check the path and its permissions")]
    Console(std::io::Error),
    #[error("the host's clock or random numbers are not to be had: {0}")]
    Host(std::io::Error),
    #[error(
        "what the guest writes to cannot be followed: {0}; take the snapshot with `--copy stop-and-copy`, for which nothing is followed"
    )]
    Tracking(std::io::Error),
    #[error("the machine's memory cannot be made what it was: {0}; restore it in a new process")]
    BringBack(std::io::Error),
    #[error(
        "no thread can be had: {0}; raise the host's limit of threads (`ulimit -u`, `TasksMax`)"
    )]
    Thread(std::io::Error),
    #[error("the thread that did the work has panicked; its log says why")]
    Panicked,
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Boot(#[from] boot::Error),
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    #[error(transparent)]
    Vcpus(#[from] vcpus::Error),
    #[error(transparent)]
    Device(#[from] devices::Error),
    #[error(transparent)]
    EventLoop(#[from] devices::EventLoopError),
    #[error(transparent)]
    Bus(#[from] devices::Overlap),
    #[error(transparent)]
    State(#[from] saved_state::Error),
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
}

impl Error {
    fn kind(&self) -> FailureKind {
        use hypervisor::Error as Kvm;
        match self {
            Self::Size(_) | Self::TooManyDevices | Self::NoAddressBits { .. } => {
                FailureKind::BadRequest
            }
            Self::TapOfAnother { .. } => FailureKind::BadRequest,
            Self::NoSuchNet { .. } | Self::NetNotNamed { .. } | Self::NetPath(_) => {
                FailureKind::BadRequest
            }
            Self::BalloonTooLarge { .. } => FailureKind::BadRequest,
            Self::NoBalloon => FailureKind::NotFound,
            Self::NoVsock | Self::VsockOutside { .. } => FailureKind::BadRequest,
            Self::HostTooSmall { .. } => FailureKind::BadRequest,
            Self::DiskSync { .. } => FailureKind::Host,
            Self::DiskOutside { .. } | Self::TooLarge { .. } => FailureKind::BadRequest,
            Self::DiskState { .. } => FailureKind::NotASnapshot,
            Self::DiskNotHere { .. } => FailureKind::NotFound,
            Self::Branch(e) | Self::LayerNotHere(e) => branch_kind(e),
            Self::NoSuchDisk { .. } => FailureKind::NotFound,
            Self::NothingToChange => FailureKind::BadRequest,
            Self::NothingGoesOn | Self::NothingBeside => FailureKind::BadRequest,
            Self::SharedDisk { .. } | Self::NoImage | Self::NoMemfd { .. } | Self::OutOfTurn => {
                FailureKind::BadRequest
            }
            Self::ImageOpen { .. } => FailureKind::Host,
            Self::RunNumber => FailureKind::BadRequest,
            Self::NothingToGoBackTo | Self::NotUndone { .. } => FailureKind::WrongState,
            Self::ResetFailed(error) => error.kind(),
            Self::DiskChanged { .. }
            | Self::GuestEnds
            | Self::GrowsLater
            | Self::NobodyWaits
            | Self::Cancelled
            | Self::StandsTooLong => FailureKind::WrongState,
            Self::Lost(_) | Self::NothingComes { .. } => FailureKind::Host,
            Self::HugeOnDemand => FailureKind::BadRequest,
            Self::Console(e) if io_kind(e) == FailureKind::NoSpace => FailureKind::NoSpace,
            Self::Console(_)
            | Self::Host(_)
            | Self::Tracking(_)
            | Self::BringBack(_)
            | Self::Thread(_)
            | Self::Panicked
            | Self::Memory(_) => FailureKind::Host,
            Self::Boot(e) => boot_kind(e),
            Self::MissingFeatures(_) => FailureKind::NotASnapshot,
            Self::Hypervisor(Kvm::VcpuCount(_)) => FailureKind::BadRequest,
            // CPUs that cannot be had here.
            Self::Hypervisor(
                Kvm::CpuLevel { .. }
                | Kvm::TemplateBits { .. }
                | Kvm::TemplateLeaf(_)
                | Kvm::TemplateMsr(_),
            ) => FailureKind::BadRequest,
            Self::Hypervisor(
                Kvm::SavedSize { .. }
                | Kvm::OtherVcpu { .. }
                | Kvm::Msr { .. }
                | Kvm::TscRate { .. },
            ) => FailureKind::NotASnapshot,
            Self::Hypervisor(_) | Self::Vcpus(_) | Self::EventLoop(_) => FailureKind::Host,
            Self::Device(e) => device_kind(e),
            Self::Bus(_) => FailureKind::Internal,
            Self::State(_) => FailureKind::NotASnapshot,
            Self::Snapshot(e) => snapshot_kind(e),
        }
    }
}

/// What a network device was attached to.
fn place_of(attachment: Option<&NetAttachment>) -> String {
    attachment.map_or("on a descriptor".to_owned(), |was| format!("on {was}"))
}

fn boot_kind(error: &boot::Error) -> FailureKind {
    match error {
        boot::Error::Read { source, .. } => io_kind(source),
        boot::Error::NotAKernel { .. }
        | boot::Error::TooLittleMemory { .. }
        | boot::Error::CommandLine(_) => FailureKind::BadRequest,
        boot::Error::Memory(_) => FailureKind::Internal,
    }
}

fn device_kind(error: &devices::Error) -> FailureKind {
    use devices::virtio::block::DiskError;
    match error {
        devices::Error::Section(_) | devices::Error::Impossible { .. } => FailureKind::NotASnapshot,
        devices::Error::Disk(DiskError::Open { source, .. }) => io_kind(source),
        devices::Error::Disk(DiskError::InUse { .. }) => FailureKind::WrongState,
        devices::Error::Disk(DiskError::Grow { source, .. }) => io_kind(source),
        devices::Error::Disk(DiskError::Branch(error)) => branch_kind(error),
        devices::Error::Disk(_) => FailureKind::BadRequest,
        devices::Error::Net(error) => nets::kind(error),
        devices::Error::Vsock(error) => vsocks::kind(error),
        devices::Error::EventFd(_) => FailureKind::Host,
        devices::Error::QueueSize(_) => FailureKind::Internal,
    }
}

fn branch_kind(error: &branch_disk::Error) -> FailureKind {
    use branch_disk::Error as Branch;
    match error {
        Branch::Io { source, .. } => io_kind(source),
        Branch::NotThere { .. } => FailureKind::NotFound,
        Branch::InUse { .. }
        | Branch::Sealed { .. }
        | Branch::NotSealed { .. }
        | Branch::BaseChanged { .. }
        | Branch::OtherLayer { .. }
        | Branch::Exists { .. }
        | Branch::TooDeep { .. } => FailureKind::WrongState,
        _ => FailureKind::BadRequest,
    }
}

fn snapshot_kind(error: &snapshot::Error) -> FailureKind {
    use snapshot::Error as Snapshot;
    match error {
        Snapshot::SamePath(_) | Snapshot::NoFileName(_) | Snapshot::NotAFile(_) => {
            FailureKind::BadRequest
        }
        Snapshot::NoSpace { .. } => FailureKind::NoSpace,
        Snapshot::NotFound { .. } => FailureKind::NotFound,
        Snapshot::Io { source, .. } | Snapshot::NotKept { source, .. } => io_kind(source),
        Snapshot::State { .. }
        | Snapshot::Memory { .. }
        | Snapshot::StoredState { .. }
        | Snapshot::WorkingSet { .. }
        | Snapshot::NotAMachine { .. } => FailureKind::NotASnapshot,
        Snapshot::NeedsStore { .. } | Snapshot::NotSealed | Snapshot::NotOnDemand { .. } => {
            FailureKind::BadRequest
        }
        Snapshot::GuestMemory(_) | Snapshot::Read(_) | Snapshot::Thread(_) => FailureKind::Host,
        Snapshot::Store { cause, .. } => store_kind(cause),
        Snapshot::Peer { cause, .. } => peer_kind(cause),
        Snapshot::NameTaken(_) => FailureKind::WrongState,
        Snapshot::Sender(_) | Snapshot::Refused(_) => FailureKind::Host,
    }
}

fn peer_kind(error: &snapshot::PeerError) -> FailureKind {
    use snapshot::{PeerError, Why};
    match error {
        PeerError::Refused { why, .. } => match why {
            Why::BadRequest => FailureKind::BadRequest,
            Why::NameTaken => FailureKind::WrongState,
            Why::NoSpace => FailureKind::NoSpace,
            Why::Other => FailureKind::Host,
        },
        PeerError::Stream(_) | PeerError::Undecided | PeerError::Nonsense => FailureKind::Host,
    }
}

fn store_kind(error: &snapshot::StoreError) -> FailureKind {
    use snapshot::StoreError as Store;
    match error {
        // Clients name snapshots, and no stores.
        Store::NoStore | Store::LostConfig(_) => FailureKind::Host,
        Store::NoSnapshot(_) => FailureKind::NotFound,
        Store::NameTaken(_) | Store::Busy(_) => FailureKind::WrongState,
        Store::Name(_) | Store::Ambiguous(_) | Store::Parameter(_) => FailureKind::BadRequest,
        Store::Damaged { .. } | Store::NoImage(_) => FailureKind::NotASnapshot,
        Store::NoSpace(_) => FailureKind::NoSpace,
        _ => FailureKind::Host,
    }
}

fn io_kind(error: &std::io::Error) -> FailureKind {
    match error.kind() {
        std::io::ErrorKind::NotFound => FailureKind::NotFound,
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => FailureKind::NoSpace,
        std::io::ErrorKind::IsADirectory | std::io::ErrorKind::NotADirectory => {
            FailureKind::BadRequest
        }
        _ => FailureKind::Host,
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            kind: error.kind(),
            message: error.with_causes(),
        }
    }
}

impl Error {
    /// Its text and those of its causes that it does not have in its own: nobody is told of them but by this.
    pub(crate) fn with_causes(&self) -> String {
        let mut message = self.to_string();
        let causes = std::iter::successors(std::error::Error::source(self), |cause| cause.source());
        for cause in causes.map(ToString::to_string) {
            if !message.contains(&cause) {
                message = format!("{message}: {cause}");
            }
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_tells_each_cause_once() {
        let cause = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let path = std::path::PathBuf::from("/d");
        let branch = branch_disk::Error::Io {
            doing: "open",
            path: path.clone(),
            source: cause(),
        };
        let all = [
            Error::LayerNotHere(branch_disk::Error::Io {
                doing: "open",
                path: path.clone(),
                source: cause(),
            }),
            Error::Branch(branch),
            devices::Error::Disk(devices::virtio::block::DiskError::Grow {
                path: "/d".to_owned(),
                source: cause(),
            })
            .into(),
        ];
        for error in all {
            let Failure { message, .. } = error.into();
            let told = message.matches(&cause().to_string()).count();
            assert_eq!(told, 1, "{message}");
            assert!(message.contains("/d"), "{message}");
        }
    }
}
