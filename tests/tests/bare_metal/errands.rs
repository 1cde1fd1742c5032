//! What a VMM does that is told by hand what is else told by `fermata` and the server.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, ChildStdout, Command, Stdio},
};

use control::{
    Console, Errand, Exit, FailureKind, GuestClock, HotImage, LaunchSpec, Launched, Origin, Parent,
    Registry, Secret, VsockChange,
};
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};
use system_tests::{bare_metal, programs, server::Server, wait};

use crate::{boot, hear, server};

/// A VMM that is told what to do by hand.
struct ByHand {
    vmm: Child,
    errands: UnixStream,
    /// `None` when nobody reads them any more.
    answers: Option<BufReader<ChildStdout>>,
}

impl ByHand {
    fn start() -> Self {
        let (errands, theirs) = UnixStream::pair().unwrap();
        let mut vmm = Command::new(programs::vmm())
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let answers = vmm.stdout.take().map(BufReader::new);
        Self {
            vmm,
            errands,
            answers,
        }
    }

    /// What it answers to `errand`, with which `image` comes.
    fn give(&mut self, errand: &Errand, image: Option<&impl AsFd>) -> Launched {
        self.tell(errand, image);
        let mut said = String::new();
        let answers = self.answers.as_mut().unwrap();
        answers.read_line(&mut said).unwrap();
        serde_json::from_str(&said).unwrap()
    }

    fn tell(&self, errand: &Errand, image: Option<&impl AsFd>) {
        let line = serde_json::to_string(errand).unwrap() + "\n";
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = image.into_iter().map(AsFd::as_fd).collect();
        if !fds.is_empty() {
            with.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let bytes = [IoSlice::new(line.as_bytes())];
        let sent = sendmsg(&self.errands, &bytes, &mut with, SendFlags::empty()).unwrap();
        assert_eq!(sent, line.len());
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        // It fails when it has ended already.
        let _ = self.vmm.kill();
        self.vmm.wait().unwrap();
    }
}

/// What becomes a fork, with its console in the server's tree.
fn fork_errand(server: &Server) -> Errand {
    Errand::Run(Box::new(LaunchSpec {
        secret: Secret::random().unwrap(),
        origin: Origin::Fork(Parent::Machine { pid: 1 }),
        console: Console::File(server.tree().join("console")),
        registry: server.run_directory(),
        hugepages: false,
        on_demand: false,
        working_set: control::UseWorkingSet::default(),
        paused: false,
        clock: GuestClock::StandStill,
        confinement: None,
        net_changes: Vec::new(),
        disk_directory: None,
        vsock_change: VsockChange::default(),
    }))
}

/// What a VMM answers that is to fork, and is given `image`.
fn answer(server: &Server, image: Option<&OwnedFd>) -> Launched {
    ByHand::start().give(&fork_errand(server), image)
}

#[test]
fn what_is_prepared_for_one_image_becomes_what_another_is() {
    let Some(server) = server() else { return };
    let parent = boot(&server, &bare_metal::witness());
    let registry = Registry::open(server.run_directory()).unwrap();
    let record = registry.find_pid(parent.pid).unwrap().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let image = || {
        hear(&server, parent);
        let making = HotImage::of_machine(&record, GuestClock::StandStill);
        runtime.block_on(making).unwrap().0
    };
    let (earlier, later) = (image(), image());
    let round_after = |prepared: &HotImage, forked: &HotImage| {
        let mut vmm = ByHand::start();
        let ready = vmm.give(&Errand::Prepare(prepared.shape()), Some(prepared));
        assert!(matches!(ready, Launched::Prepared), "{ready:?}");
        let runs = vmm.give(&fork_errand(&server), Some(forked));
        assert!(matches!(runs, Launched::Ready { .. }), "{runs:?}");
        let said = || {
            let text = fs::read_to_string(server.tree().join("console")).ok()?;
            let mut lines = text.lines().filter_map(bare_metal::Testimony::read);
            // It has looked at all of its memory twice by then.
            lines.nth(2)
        };
        let said = wait::until("the fork to say something", said).unwrap();
        drop(vmm);
        fs::remove_file(server.tree().join("console")).unwrap();
        assert!(!said.disturbed, "{said:?}");
        said.round
    };
    let (first, second) = (round_after(&earlier, &earlier), round_after(&later, &later));
    assert!(first < second, "{first} {second}");
    assert_eq!(round_after(&earlier, &later), second);
    assert_eq!(round_after(&later, &earlier), first);
}

#[test]
fn a_machine_that_nobody_waits_for_does_not_begin() {
    let Some(server) = server() else { return };
    let parent = boot(&server, &bare_metal::witness());
    let registry = Registry::open(server.run_directory()).unwrap();
    let record = registry.find_pid(parent.pid).unwrap().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let making = HotImage::of_machine(&record, GuestClock::StandStill);
    let image = runtime.block_on(making).unwrap().0;
    let mut vmm = ByHand::start();
    vmm.answers = None;
    vmm.tell(&fork_errand(&server), Some(&image));
    let ended = || vmm.vmm.try_wait().unwrap();
    let ended = wait::until("the VMM to give up", ended).unwrap();
    assert_eq!(ended.code(), Some(Exit::PowerOff.code().into()));
    let said = fs::read_to_string(server.tree().join("console"));
    assert_eq!(said.unwrap(), "");
}

#[test]
fn what_is_no_sealed_memfd_is_no_image() {
    let Some(server) = server() else { return };
    let refused = |image: Option<&OwnedFd>| match answer(&server, image) {
        Launched::Failed(failure) => {
            assert_ne!(failure.kind, FailureKind::Internal);
            failure.message
        }
        other => panic!("{other:?}"),
    };
    assert!(refused(None).contains("none came with it"));
    let file = server.tree().join("file");
    fs::write(&file, vec![1; 1 << 20]).unwrap();
    let file = OwnedFd::from(File::open(file).unwrap());
    assert!(refused(Some(&file)).contains("not a sealed memfd"));
    let flags = MemfdFlags::ALLOW_SEALING;
    let memfd = memfd_create("test", flags).unwrap();
    assert!(refused(Some(&memfd)).contains("not a sealed memfd"));
    let all = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK;
    fcntl_add_seals(&memfd, all).unwrap();
    assert!(refused(Some(&memfd)).contains("too short"));
    // Nor is a file overwritten that somebody names as the place for one.
    let machine = boot(&server, &bare_metal::spinner());
    let registry = Registry::open(server.run_directory()).unwrap();
    let record = registry.find_pid(machine.pid).unwrap().unwrap();
    let path = server.tree().join("kernel");
    let whole = fs::read(&path).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let refused = runtime.block_on(async {
        let client = control::Client::connect(record.port, &record.secret);
        let request = control::SnapshotRequest::new(
            control::Destination::Image { path: path.clone() },
            control::AfterSnapshot::Halt,
        );
        client.await.unwrap().snapshot(request).await.unwrap_err()
    });
    assert!(
        refused.to_string().contains("is not written to"),
        "{refused}"
    );
    assert!(fs::read(path).unwrap() == whole);
}
