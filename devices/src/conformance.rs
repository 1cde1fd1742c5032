//! What every device promises, tested on every device.
//!
//! A device joins by implementing [`Subject`] in its tests and naming it in [`conforms!`].

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use proptest::{collection::vec, prelude::*};
use saved_state::{Kind, SavedState, Section};

use crate::{BusDevice, Device, GuestRequest, InterruptLine, OnGuestRequest, sync::lock};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A device under test and what is behind it. The backing is that of one device at a time.
pub(crate) trait Subject {
    type Device: Device;
    /// What it saves.
    type Saved: SavedState;
    /// Addresses that the device answers for.
    const SPAN: u64;

    fn new() -> Self;
    /// A device as it is before the guest runs.
    fn fresh(&self) -> Self::Device;
    /// Brings the device into a state that differs from a fresh one in as much as possible.
    fn work(&self, device: &mut Self::Device);
    /// Lets the device do what it does on its own after a restore.
    fn go_on(&self, device: &mut Self::Device) {
        device.resume();
    }
}

/// Tests that `$subject` conforms, in a module `$name`.
macro_rules! conforms {
    ($name:ident, $subject:ty) => {
        mod $name {
            use crate::conformance::*;
            type It = $subject;

            #[test]
            fn a_restored_device_saves_what_it_was_restored_from() {
                restored_saves_the_same::<It>();
            }

            #[test]
            fn a_device_that_was_in_use_saves_what_it_was_restored_from_again() {
                used_saves_the_same::<It>();
            }

            #[test]
            fn a_device_is_restored_from_every_version_that_can_be_read() {
                every_version_is_restored::<It>();
            }

            #[test]
            fn a_section_of_another_kind_or_version_is_refused() {
                foreign_is_refused::<It>();
            }

            #[test]
            fn a_section_that_was_cut_or_appended_to_is_refused() {
                cut_is_refused::<It>();
            }

            #[test]
            fn a_flipped_bit_never_makes_a_device_that_panics() {
                flipped_never_panics::<It>();
            }

            #[test]
            fn a_random_section_never_makes_a_device_that_panics() {
                random_never_panics::<It>();
            }

            #[test]
            fn whatever_a_hostile_guest_does_can_be_saved_and_restored() {
                hostile_guest_can_be_saved::<It>();
            }
        }
    };
}
pub(crate) use conforms;

const INSTANCE: u32 = 3;

fn worked<S: Subject>(subject: &S) -> Section {
    let mut device = subject.fresh();
    subject.work(&mut device);
    device.save(INSTANCE).unwrap()
}

pub(crate) fn restored_saves_the_same<S: Subject>() {
    let subject = S::new();
    let fresh = subject.fresh().save(INSTANCE).unwrap();
    let section = worked(&subject);
    assert_ne!(section, fresh, "the work left no trace to save");
    let mut device = subject.fresh();
    assert_eq!(section.kind, device.kind());
    assert_eq!(section.instance, INSTANCE);
    device.restore(&section).unwrap();
    assert_eq!(device.save(INSTANCE).unwrap(), section);
    subject.go_on(&mut device);
}

/// Of a state in which it had a driver at work, and of one in which it had none.
pub(crate) fn used_saves_the_same<S: Subject>() {
    let subject = S::new();
    let sections = [worked(&subject), subject.fresh().save(INSTANCE).unwrap()];
    proptest!(|(accesses in accesses(S::SPAN), works: bool, which in 0usize..2)| {
        let mut device = subject.fresh();
        let section = &sections[which];
        device.restore(section).unwrap();
        if works && which == 1 {
            subject.work(&mut device);
        }
        for access in accesses {
            perform(&mut device, access);
        }
        device.restore(section).unwrap();
        assert_eq!(device.save(INSTANCE).unwrap(), *section);
        if which == 0 {
            subject.go_on(&mut device);
        }
    });
}

/// What an older version had is all there. That it was encoded like this, the golden files say.
pub(crate) fn every_version_is_restored<S: Subject>() {
    let subject = S::new();
    let as_of = |section: &Section, version| {
        let state = section.decode::<S::Saved>().unwrap();
        golden::section(INSTANCE, &state, version)
    };
    let newest = worked(&subject);
    for version in 1..=S::Saved::VERSION {
        let section = as_of(&newest, version);
        let mut device = subject.fresh();
        device.restore(&section).unwrap();
        assert_eq!(as_of(&device.save(INSTANCE).unwrap(), version), section);
        subject.go_on(&mut device);
    }
}

pub(crate) fn foreign_is_refused<S: Subject>() {
    let subject = S::new();
    let section = worked(&subject);
    let kind = Kind(*b"????");
    let version = section.version + 1;
    for foreign in [
        Section {
            kind,
            ..section.clone()
        },
        Section {
            version: 0,
            ..section.clone()
        },
        Section { version, ..section },
    ] {
        assert!(subject.fresh().restore(&foreign).is_err(), "{foreign:?}");
    }
}

pub(crate) fn cut_is_refused<S: Subject>() {
    let subject = S::new();
    let mut section = worked(&subject);
    let payload = section.payload.clone();
    for len in 0..payload.len() {
        section.payload = payload[..len].to_vec();
        assert!(subject.fresh().restore(&section).is_err(), "cut at {len}");
    }
    section.payload = [payload.as_slice(), &[0]].concat();
    assert!(subject.fresh().restore(&section).is_err(), "appended to");
}

/// Restores `section` and, if that is accepted, uses the device.
fn restore_and_use<S: Subject>(subject: &S, section: &Section) {
    let mut device = subject.fresh();
    if device.restore(section).is_ok() {
        subject.go_on(&mut device);
        for offset in 0..S::SPAN.min(0x200) {
            device.read(offset, &mut [0]);
            device.write(offset, &[0xa5]);
            device.read(offset, &mut [0; 4]);
            device.write(offset, &[0xa5; 4]);
        }
        subject.go_on(&mut device);
        device.save(INSTANCE).unwrap();
    }
}

pub(crate) fn flipped_never_panics<S: Subject>() {
    let subject = S::new();
    let section = worked(&subject);
    for bit in 0..section.payload.len() * 8 {
        let mut flipped = section.clone();
        flipped.payload[bit / 8] ^= 1 << (bit % 8);
        restore_and_use(&subject, &flipped);
    }
}

pub(crate) fn random_never_panics<S: Subject>() {
    let subject = S::new();
    let template = worked(&subject);
    proptest!(|(payload in vec(any::<u8>(), 0..2 * template.payload.len()))| {
        restore_and_use(&subject, &Section { payload, ..template.clone() });
    });
}

/// One access of a guest.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    offset: u64,
    write: bool,
    data: Vec<u8>,
}

/// Accesses inside of `span` addresses of the widths that exits have.
fn accesses(span: u64) -> impl Strategy<Value = Vec<Access>> {
    let width = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    let offset = prop_oneof![0..span.min(0x110), 0..span];
    let access = (offset, any::<bool>(), vec(any::<u8>(), 8), width).prop_map(
        move |(offset, write, mut data, width)| {
            data.truncate(width.min((span - offset) as usize));
            Access {
                offset,
                write,
                data,
            }
        },
    );
    vec(access, 0..64)
}

fn perform(device: &mut dyn BusDevice, access: Access) {
    let Access {
        offset,
        write,
        mut data,
    } = access;
    if write {
        device.write(offset, &data);
    } else {
        device.read(offset, &mut data);
    }
}

pub(crate) fn hostile_guest_can_be_saved<S: Subject>() {
    let subject = S::new();
    proptest!(|(accesses in accesses(S::SPAN))| {
        let section = {
            let mut device = subject.fresh();
            subject.work(&mut device);
            for access in accesses {
                perform(&mut device, access);
            }
            device.save(INSTANCE).unwrap()
        };
        let mut device = subject.fresh();
        device.restore(&section).unwrap();
        assert_eq!(device.save(INSTANCE).unwrap(), section);
    });
}

/// Devices without state promise less: a hostile guest does not make them panic.
#[test]
fn devices_without_state_never_panic() {
    let requests = Requests::default();
    proptest!(|(reset_accesses in accesses(5), power_accesses in accesses(2), run_accesses in accesses(4))| {
        let mut reset = crate::I8042::new(requests.callback());
        let mut power = crate::AcpiPm::new(requests.callback());
        let run = Arc::new(crate::Run::default());
        run.begin(std::num::NonZeroU32::MIN);
        let mut port = crate::RunPort::new(run);
        for access in reset_accesses {
            perform(&mut reset, access);
        }
        for access in power_accesses {
            perform(&mut power, access);
        }
        for access in run_accesses {
            perform(&mut port, access);
        }
    });
}

/// Remembers what the guest has asked for.
#[derive(Default)]
pub(crate) struct Requests(Arc<Mutex<Vec<GuestRequest>>>);

impl Requests {
    pub(crate) fn callback(&self) -> OnGuestRequest {
        let taken = Arc::clone(&self.0);
        Arc::new(move |request| lock(&taken).push(request))
    }

    pub(crate) fn taken(&self) -> Vec<GuestRequest> {
        lock(&self.0).clone()
    }
}

/// An interrupt line that counts its edges.
#[derive(Debug, Default)]
pub(crate) struct Line {
    edges: AtomicU64,
    unseen: Mutex<u64>,
    edge: Condvar,
}

impl Line {
    pub(crate) fn edges(&self) -> u64 {
        self.edges.load(Ordering::Relaxed)
    }

    /// Waits for an edge that no earlier wait has seen.
    pub(crate) fn wait(&self) {
        let (mut unseen, waited) = self
            .edge
            .wait_timeout_while(lock(&self.unseen), PATIENCE, |unseen| *unseen == 0)
            .unwrap();
        assert!(!waited.timed_out(), "no interrupt");
        *unseen -= 1;
    }
}

impl InterruptLine for Line {
    fn trigger(&self) -> io::Result<()> {
        self.edges.fetch_add(1, Ordering::Relaxed);
        *lock(&self.unseen) += 1;
        self.edge.notify_all();
        Ok(())
    }
}
