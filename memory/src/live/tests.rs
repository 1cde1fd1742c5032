use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{Discarder, Layout, MIN_MEMORY_BYTES, PAGE_BYTES};

const PAGE: u64 = PAGE_BYTES;
const BYTES: u64 = MIN_MEMORY_BYTES + 3 * PAGE;

/// What each page begins with, where that is not zero.
type Content = BTreeMap<u64, u64>;

struct Machine {
    memory: MachineMemory,
    tracker: Tracker,
    discarder: Discarder,
    content: Content,
    /// What can be built on.
    base: Option<Content>,
}

/// A cut that is being read.
struct Saving {
    at_cut: AtCut,
    building: bool,
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

    fn cut(&self, building: bool) -> Saving {
        let building = building && self.base.is_some();
        let at_cut = self.tracker.cut(building).unwrap();
        Saving {
            parts: at_cut.parts(),
            at_cut,
            building,
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
                        assert!(self.building);
                        base.unwrap().get(&page).copied().unwrap_or(0)
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
    Cut { building: bool },
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
        3 => any::<bool>().prop_map(|building| Step::Cut { building }),
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
                (Step::Arm, None) => drop(machine.tracker.arm().unwrap()),
                (Step::Cut { building }, None) => saving = Some(machine.cut(building)),
                (Step::Cut { building }, Some(_)) => {
                    prop_assert!(machine.tracker.cut(building).is_err());
                }
                (Step::Read(pages), Some(saving)) => saving.check(pages, machine.base.as_ref()),
                (Step::Finish(outcome), Some(_)) => {
                    machine.finish(saving.take().unwrap(), outcome);
                }
                // It does nothing if there is nothing to do.
                (Step::Arm, Some(_)) => drop(machine.tracker.arm()),
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
    let armed = machine.tracker.arm().unwrap();
    assert_eq!((armed.rounds, armed.left_bytes), (1, 0));
    let cut = machine.cut(true);
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
    let cut = machine.cut(true);
    assert_eq!(cut.at_cut.protected_bytes(), GRANULE_BYTES + BLOCK_BYTES);
    assert_eq!(bytes(&cut, PartKind::Data), GRANULE_BYTES + BLOCK_BYTES);
    assert_eq!(
        bytes(&cut, PartKind::InBase),
        2 * BLOCK_BYTES - GRANULE_BYTES
    );
    machine.finish(cut, Outcome::NewBase);
}

#[test]
fn what_was_read_is_not_set_aside_and_cannot_be_read_again_once_it_is_written_to() {
    let mut machine = Machine::new();
    machine.write(0, 1);
    machine.write(16, 2);
    let mut cut = machine.cut(false);
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
    let cut = machine.cut(false);
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
    machine.tracker.arm().unwrap();
    let shared = &machine.tracker.shared;
    assert!(shared.is_absent(0));
    shared.write(3).unwrap();
    assert!(shared.is_absent(0));
    // Who touches it does not wait for ever.
    machine.write(3 * 16, 2);
    let cut = machine.cut(false);
    machine.finish(cut, Outcome::NewBase);
}

#[test]
fn a_guest_that_writes_over_all_of_its_memory_is_saved_all_the_same() {
    let mut machine = Machine::new();
    let pages = || (0..BYTES / PAGE).step_by((GRANULE_BYTES / PAGE) as usize);
    pages().for_each(|page| machine.write(page, 1));
    let cut = machine.cut(false);
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
        let mut last = [0; 2];
        let mut round = 0;
        // The host decides how far the writers come.
        while round < 60 || last.contains(&0) {
            round += 1;
            if round % 3 != 0 {
                tracker.arm().unwrap();
            }
            let still = held.write().unwrap();
            let cut = tracker.cut(false).unwrap();
            drop(still);
            for (writer, last) in (0..).zip(&mut last) {
                let counts: Vec<u64> = (writer * PAGES..(writer + 1) * PAGES)
                    .map(|page| {
                        let mut content = [0; 8];
                        cut.read(page * PAGE + 128, &mut content).unwrap();
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
        done.store(true, Ordering::Relaxed);
    });
}
