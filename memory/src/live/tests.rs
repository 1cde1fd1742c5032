use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{Discarder, Layout, MIN_MEMORY_BYTES, PAGE_BYTES};

fn always() -> io::Result<()> {
    Ok(())
}

const PAGE: u64 = PAGE_BYTES;
const BYTES: u64 = MIN_MEMORY_BYTES + 3 * PAGE;

const FROM_BASE: Elsewhere = Elsewhere {
    base: true,
    copies: false,
};

/// What each page begins with, where that is not zero.
type Content = BTreeMap<u64, u64>;

struct Machine {
    memory: MachineMemory,
    tracker: Tracker,
    discarder: Discarder,
    content: Content,
    /// What can be built on.
    base: Option<Content>,
    /// What was copied last, since there was a cut.
    copies: Option<Content>,
}

/// A cut that is being read.
struct Saving {
    at_cut: AtCut,
    elsewhere: Elsewhere,
    /// What may be taken from there.
    copies: Content,
    parts: Vec<Part>,
    content: Content,
    /// The page that is read next.
    at: u64,
}

impl Machine {
    fn new() -> Self {
        let memory = MachineMemory::zeroed(Layout::new(BYTES).unwrap()).unwrap();
        Self {
            tracker: memory.track().unwrap(),
            discarder: memory.discarder(),
            memory,
            content: Content::new(),
            base: None,
            copies: None,
        }
    }

    fn write(&mut self, page: u64, value: u64) {
        let gpa = GuestAddress(page * PAGE);
        self.memory.guest().write_obj(value, gpa).unwrap();
        self.content.insert(page, value);
    }

    fn discard(&mut self, pages: Range<u64>) {
        let gpas = pages.start * PAGE..pages.end * PAGE;
        self.discarder.discard(gpas).unwrap();
        self.content.retain(|page, _| !pages.contains(page));
    }

    /// Copies at most so many granules that are not copied yet.
    fn copy(&mut self, count: usize, building: bool) {
        if self.copies.is_none() {
            self.tracker.begin_copies().unwrap();
        }
        let copies = self.copies.get_or_insert_default();
        let building = building && self.base.is_some();
        for offset in self
            .tracker
            .to_copy(building, &always)
            .unwrap()
            .iter()
            .take(count)
        {
            let bytes = GRANULE_BYTES.min(BYTES - offset) as usize;
            let mut content = vec![0; bytes];
            assert!(self.tracker.copy(*offset, &mut content).unwrap());
            for (page, content) in (offset / PAGE..).zip(content.chunks(PAGE as usize)) {
                let value = u64::from_ne_bytes(*content.first_chunk().unwrap());
                copies.insert(page, value);
            }
        }
    }

    fn cut(&mut self, elsewhere: Elsewhere) -> Saving {
        let copies = self.copies.take();
        let elsewhere = Elsewhere {
            base: elsewhere.base && self.base.is_some(),
            copies: elsewhere.copies && copies.is_some(),
        };
        let at_cut = self.tracker.cut(elsewhere).unwrap();
        Saving {
            parts: at_cut.parts(),
            at_cut,
            elsewhere,
            copies: copies.unwrap_or_default(),
            content: self.content.clone(),
            at: 0,
        }
    }

    fn finish(&mut self, mut saving: Saving, outcome: Outcome) {
        if outcome == Outcome::NewBase {
            saving.check(u64::MAX, self.base.as_ref());
        }
        self.base = match outcome {
            Outcome::NewBase => Some(saving.content),
            Outcome::SameBase => self.base.take(),
            Outcome::NoBase => None,
        };
        saving.at_cut.finish(outcome);
    }
}

impl Saving {
    /// Compares so many pages more.
    fn check(&mut self, pages: u64, base: Option<&Content>) {
        let end = self.at.saturating_add(pages).min(BYTES / PAGE);
        let mut start = 0;
        for part in &self.parts {
            let stop = start + part.bytes / PAGE;
            for page in start.max(self.at)..stop.min(end) {
                let expected = self.content.get(&page).copied().unwrap_or(0);
                let found = match part.kind {
                    PartKind::Zeros => 0,
                    PartKind::InBase => {
                        assert!(self.elsewhere.base);
                        base.unwrap().get(&page).copied().unwrap_or(0)
                    }
                    PartKind::Copied => {
                        assert!(self.elsewhere.copies);
                        *self.copies.get(&page).unwrap()
                    }
                    PartKind::Data => {
                        let mut content = [0; PAGE as usize];
                        self.at_cut.read(page * PAGE, &mut content).unwrap();
                        u64::from_ne_bytes(*content.first_chunk().unwrap())
                    }
                };
                assert_eq!(found, expected, "page {page}, {:?}", part.kind);
            }
            start = stop;
        }
        assert_eq!(start, BYTES / PAGE);
        self.at = end;
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64),
    Discard(Range<u64>),
    Arm,
    ExpectWrite(Range<u64>),
    Copy { count: usize, building: bool },
    Cut(Elsewhere),
    Read(u64),
    Finish(Outcome),
}

/// One of those where something is different: in a few granules of a few blocks, and at the end.
fn any_page() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..40u64,
        510..530u64,
        1536..1556u64,
        BYTES / PAGE - 5..BYTES / PAGE,
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    let outcome = prop_oneof![
        4 => Just(Outcome::NewBase),
        1 => Just(Outcome::SameBase),
        1 => Just(Outcome::NoBase),
    ];
    prop_oneof![
        8 => (any_page(), 1..u64::MAX).prop_map(|(page, value)| Step::Write(page, value)),
        2 => (any_page(), 1..40u64).prop_map(|(page, count)| Step::Discard(page..page + count)),
        1 => Just(Step::Discard(0..512)),
        2 => Just(Step::Arm),
        2 => (any_page(), 1..20u64).prop_map(|(page, count)| Step::ExpectWrite(page..page + count)),
        3 => (1..40usize, any::<bool>()).prop_map(|(count, building)| Step::Copy { count, building }),
        3 => any::<[bool; 2]>().prop_map(|[base, copies]| Step::Cut(Elsewhere { base, copies })),
        3 => prop_oneof![1..60u64, 400..600u64].prop_map(Step::Read),
        2 => outcome.prop_map(Step::Finish),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_cut_is_what_memory_was_whatever_happens_meanwhile(
        steps in proptest::collection::vec(any_step(), 1..80),
    ) {
        let mut machine = Machine::new();
        let mut saving: Option<Saving> = None;
        for step in steps {
            match (step, &mut saving) {
                (Step::Write(page, value), _) => machine.write(page, value),
                (Step::Discard(pages), _) => machine.discard(pages),
                (Step::Arm, None) => drop(machine.tracker.arm(&always).unwrap()),
                (Step::ExpectWrite(pages), _) => {
                    let image = pages.start * PAGE..pages.end * PAGE;
                    machine.tracker.expect_write(&image).unwrap();
                }
                (Step::Copy { count, building }, None) => machine.copy(count, building),
                (Step::Copy { .. }, Some(_)) => {
                    prop_assert!(machine.tracker.begin_copies().is_err());
                    prop_assert!(machine.tracker.copy(0, &mut [0; GRANULE_BYTES as usize]).is_err());
                }
                (Step::Cut(elsewhere), None) => saving = Some(machine.cut(elsewhere)),
                (Step::Cut(elsewhere), Some(_)) => {
                    prop_assert!(machine.tracker.cut(elsewhere).is_err());
                }
                (Step::Read(pages), Some(saving)) => saving.check(pages, machine.base.as_ref()),
                (Step::Finish(outcome), Some(_)) => {
                    machine.finish(saving.take().unwrap(), outcome);
                }
                // It does nothing if there is nothing to do.
                (Step::Arm, Some(_)) => drop(machine.tracker.arm(&always)),
                (Step::Read(_) | Step::Finish(_), None) => {}
            }
        }
        for (page, value) in &machine.content {
            let found: u64 = machine.memory.guest().read_obj(GuestAddress(page * PAGE)).unwrap();
            prop_assert_eq!(found, *value);
        }
    }
}

#[test]
fn what_a_guest_never_touched_costs_nothing_and_what_is_unchanged_is_in_the_base() {
    let mut machine = Machine::new();
    for page in 0..600 {
        machine.write(page, page + 1);
    }
    let armed = machine.tracker.arm(&always).unwrap();
    assert_eq!((armed.rounds, armed.left_bytes), (1, 0));
    let cut = machine.cut(FROM_BASE);
    assert_eq!(cut.at_cut.protected_bytes(), 0);
    let bytes = |cut: &Saving, kind| -> u64 {
        let parts = cut.parts.iter().filter(|part| part.kind == kind);
        parts.map(|part| part.bytes).sum()
    };
    assert_eq!(bytes(&cut, PartKind::Data), 2 * BLOCK_BYTES);
    assert_eq!(bytes(&cut, PartKind::Zeros), BYTES - 2 * BLOCK_BYTES);
    machine.finish(cut, Outcome::NewBase);
    let populated = machine.memory.populated().unwrap();
    assert_eq!(populated, std::slice::from_ref(&(0..2 * BLOCK_BYTES)));

    machine.write(3, 7);
    machine.write(5 * 512, 7);
    let cut = machine.cut(FROM_BASE);
    assert_eq!(cut.at_cut.protected_bytes(), GRANULE_BYTES + BLOCK_BYTES);
    assert_eq!(bytes(&cut, PartKind::Data), GRANULE_BYTES + BLOCK_BYTES);
    assert_eq!(
        bytes(&cut, PartKind::InBase),
        2 * BLOCK_BYTES - GRANULE_BYTES
    );
    machine.finish(cut, Outcome::NewBase);
}

#[test]
fn what_is_expected_to_be_written_to_takes_no_fault_and_is_saved() {
    let mut machine = Machine::new();
    (0..600).for_each(|page| machine.write(page, page + 1));
    machine.tracker.arm(&always).unwrap();
    let written = || machine.tracker.shared.granules.written();
    assert_eq!(written(), 0);
    machine
        .tracker
        .expect_write(&(17 * PAGE..17 * PAGE + 1))
        .unwrap();
    assert_eq!(written(), 1);
    // There is nothing to write to without a fault.
    let absent = 5 * BLOCK_BYTES..5 * BLOCK_BYTES + 1;
    machine.tracker.expect_write(&absent).unwrap();
    assert_eq!(written(), 1);
    machine.write(18, 7);
    let cut = machine.cut(FROM_BASE);
    assert_eq!(cut.at_cut.protected_bytes(), GRANULE_BYTES);
    machine.finish(cut, Outcome::NewBase);
}

#[test]
fn what_was_read_is_not_set_aside_and_cannot_be_read_again_once_it_is_written_to() {
    let mut machine = Machine::new();
    machine.write(0, 1);
    machine.write(16, 2);
    let mut cut = machine.cut(Elsewhere::default());
    cut.check(16, None);
    machine.write(0, 3);
    machine.write(16, 4);
    let mut content = [0; 8];
    let again = cut.at_cut.read(0, &mut content).unwrap_err();
    assert!(again.to_string().contains("read before"), "{again}");
    cut.at_cut.read(16 * PAGE, &mut content).unwrap();
    assert_eq!(u64::from_ne_bytes(content), 2);
    assert!(cut.at_cut.read(BYTES - 1, &mut [0; 2]).is_err());
}

#[test]
fn a_cut_whose_tracker_is_gone_is_no_longer_believed() {
    let mut machine = Machine::new();
    machine.write(0, 1);
    let cut = machine.cut(Elsewhere::default());
    let Machine {
        memory, tracker, ..
    } = machine;
    drop(tracker);
    // Nobody waits for ever.
    memory.guest().write_obj(2u64, GuestAddress(0)).unwrap();
    assert!(cut.at_cut.read(0, &mut [0; 8]).is_err());
}

#[test]
fn who_was_told_of_a_write_to_a_block_that_is_gone_since_leaves_it_alone() {
    let mut machine = Machine::new();
    machine.write(0, 1);
    machine.discard(0..512);
    machine.tracker.arm(&always).unwrap();
    let shared = &machine.tracker.shared;
    assert!(shared.is_absent(0));
    shared.write(3).unwrap();
    assert!(shared.is_absent(0));
    // Who touches it does not wait for ever.
    machine.write(3 * 16, 2);
    let cut = machine.cut(Elsewhere::default());
    machine.finish(cut, Outcome::NewBase);
}

#[test]
fn a_guest_that_writes_over_all_of_its_memory_is_saved_all_the_same() {
    let mut machine = Machine::new();
    let pages = || (0..BYTES / PAGE).step_by((GRANULE_BYTES / PAGE) as usize);
    pages().for_each(|page| machine.write(page, 1));
    let cut = machine.cut(Elsewhere::default());
    pages().for_each(|page| machine.write(page, 2));
    machine.finish(cut, Outcome::NewBase);
}

#[test]
fn memory_that_is_mapped_from_a_file_is_not_tracked() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(BYTES).unwrap();
    let layout = Layout::new(BYTES).unwrap();
    let data = std::slice::from_ref(&(0..PAGE));
    let memory = MachineMemory::from_image(layout, &file, data).unwrap();
    let refused = memory.track().unwrap_err().to_string();
    assert!(refused.contains("mapped from a memory file"), "{refused}");
}

/// Two rounds of copies, where they belong in the image.
fn copied(tracker: &Tracker) -> Vec<u8> {
    let mut image = vec![0; BYTES as usize];
    tracker.begin_copies().unwrap();
    for _ in 0..2 {
        for offset in tracker.to_copy(false, &always).unwrap() {
            let end = (offset + GRANULE_BYTES).min(BYTES);
            let content = &mut image[offset as usize..end as usize];
            tracker.copy(offset, content).unwrap();
        }
    }
    image
}

/// What of a cut is to be taken from copies.
fn copied_parts(cut: &AtCut) -> Vec<Range<u64>> {
    let mut at = 0;
    let parts = cut.parts().into_iter().filter_map(|part| {
        let start = at;
        at += part.bytes;
        (part.kind == PartKind::Copied).then_some(start..at)
    });
    parts.collect()
}

/// Sets it however its scope ends: who fails must not leave others at work.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writers that count in pages of their own, ever up, each page after the one before it: at any instant, no page is
/// ahead of one before it, nor behind it by more than one.
#[test]
fn cuts_under_writers_are_of_one_instant() {
    const PAGES: u64 = 1500;
    let memory = MachineMemory::zeroed(Layout::new(BYTES).unwrap()).unwrap();
    let tracker = memory.track().unwrap();
    let done = AtomicBool::new(false);
    // They stand still for the cut.
    let held = RwLock::new(());
    let write = |writer: u64| {
        let mut count = 0u64;
        while !done.load(Ordering::Relaxed) {
            count += 1;
            for page in writer * PAGES..(writer + 1) * PAGES {
                let _running = held.read().unwrap();
                let gpa = GuestAddress(page * PAGE + 128);
                memory.guest().write_obj(count, gpa).unwrap();
            }
        }
    };
    thread::scope(|scope| {
        for writer in 0..2 {
            scope.spawn(move || write(writer));
        }
        let _at_end = AtEnd(&done);
        let mut last = [0; 2];
        let mut round = 0;
        // The host decides how far the writers come.
        while round < 60 || last.contains(&0) {
            round += 1;
            if round % 3 != 0 {
                tracker.arm(&always).unwrap();
            }
            // While they write.
            let copies = (round % 2 == 0).then(|| copied(&tracker));
            let still = held.write().unwrap();
            let cut = tracker.cut(Elsewhere {
                base: false,
                copies: copies.is_some(),
            });
            let cut = cut.unwrap();
            drop(still);
            let copies = copies.unwrap_or_default();
            let is_copied = copied_parts(&cut);
            for (writer, last) in (0..).zip(&mut last) {
                let counts: Vec<u64> = (writer * PAGES..(writer + 1) * PAGES)
                    .map(|page| {
                        let at = page * PAGE + 128;
                        let mut content = [0; 8];
                        match is_copied.iter().any(|part| part.contains(&at)) {
                            true => content.copy_from_slice(&copies[at as usize..][..8]),
                            false => cut.read(at, &mut content).unwrap(),
                        }
                        u64::from_ne_bytes(content)
                    })
                    .collect();
                assert!(counts.is_sorted_by(|a, b| a >= b), "{counts:?}");
                let (most, least) = (counts[0], counts[counts.len() - 1]);
                assert!(most - least <= 1 && least >= *last, "{most} {least} {last}");
                *last = least;
            }
            cut.finish(Outcome::NoBase);
        }
    });
}

#[test]
fn what_is_written_to_is_copied_again_and_the_rest_is_not() {
    let mut machine = Machine::new();
    for page in 0..512 {
        machine.write(page, page + 1);
    }
    machine.tracker.begin_copies().unwrap();
    let to_copy = |machine: &Machine| machine.tracker.to_copy(false, &always).unwrap();
    let copy = |machine: &Machine, offset: u64| {
        let mut content = vec![0; GRANULE_BYTES as usize];
        machine.tracker.copy(offset, &mut content).unwrap()
    };
    let first = to_copy(&machine);
    assert_eq!(first.len(), 32);
    machine.write(16, 7);
    let copied = first.iter().filter(|offset| copy(&machine, **offset));
    assert_eq!(copied.count(), 31);
    machine.write(3 * 16, 7);
    assert_eq!(to_copy(&machine), [GRANULE_BYTES, 3 * GRANULE_BYTES]);
    // What is not one whole granule is none.
    let mut less = [0; PAGE as usize];
    assert!(machine.tracker.copy(0, &mut less).is_err());
    assert!(machine.tracker.copy(BYTES, &mut []).is_err());
    // Whoever gave up is not taken from.
    machine.tracker.begin_copies().unwrap();
    assert_eq!(to_copy(&machine).len(), 32);
}

#[test]
fn what_is_not_to_go_on_ends_and_can_be_begun_again() {
    let machine = Machine::new();
    let asked = std::cell::Cell::new(0);
    let never = || {
        asked.set(asked.get() + 1);
        Err(io::ErrorKind::Interrupted.into())
    };
    machine.tracker.arm(&never).unwrap_err();
    machine.tracker.to_copy(false, &never).unwrap_err();
    assert_eq!(asked.get(), 2);
    assert_eq!(machine.tracker.arm(&always).unwrap().left_bytes, 0);
}
