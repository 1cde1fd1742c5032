use std::{fs::File, os::unix::fs::FileExt};

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{Layout, MIN_MEMORY_BYTES};

const PAGE: u64 = PAGE_BYTES;
const HUGE: u64 = 2 << 20;
/// What of the image is not zero: its parts are mapped rounded out to huge pages, and there are gaps between and behind them.
const DATA: [Range<u64>; 2] = [0..3 * PAGE, 2 * HUGE..3 * HUGE];
/// Both parts and both gaps are touched.
const USED: u64 = 4 * HUGE;

/// An image whose pages have their number in `DATA`, from 1 on; sealed, as a fork's is.
fn image() -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("image", flags).unwrap());
    file.set_len(MIN_MEMORY_BYTES).unwrap();
    for range in DATA {
        for at in pages(&range) {
            let number = at / PAGE + 1;
            file.write_all_at(&number.to_le_bytes(), at).unwrap();
        }
    }
    fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    file
}

fn memory() -> MachineMemory {
    let layout = Layout::new(MIN_MEMORY_BYTES).unwrap();
    MachineMemory::from_image(layout, &image(), &DATA).unwrap()
}

/// By either way to find pages, if the kernel has both.
fn original(memory: &MachineMemory, by_reading: bool) -> Original {
    let mut original = memory.original().unwrap();
    if by_reading {
        original.own_pages = OwnPages::read().unwrap();
    }
    original
}

fn write(memory: &MachineMemory, at: u64, word: u64) {
    memory.guest().write_obj(word, GuestAddress(at)).unwrap();
}

fn read(memory: &MachineMemory, at: u64) -> u64 {
    memory.guest().read_obj(GuestAddress(at)).unwrap()
}

/// The first word of each page that is used.
fn words(memory: &MachineMemory) -> Vec<u64> {
    pages(&(0..USED)).map(|at| read(memory, at)).collect()
}

fn expected() -> Vec<u64> {
    let has = |at: u64| DATA.iter().any(|range| range.contains(&at));
    let word = |at| if has(at) { at / PAGE + 1 } else { 0 };
    pages(&(0..USED)).map(word).collect()
}

#[test]
fn memory_without_an_image_cannot_be_brought_back() {
    let memory = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
    assert!(!memory.has_image());
    assert!(matches!(memory.original(), Err(Error::NoImage)));
}

#[test]
fn what_was_written_is_undone_and_counted() {
    let memory = memory();
    assert!(memory.has_image());
    let mut original = memory.original().unwrap();
    assert_eq!(original.bring_back().unwrap(), BroughtBack::default());
    for _ in 0..3 {
        // In a part, at the end of its page; where a part is zero; in a gap.
        for at in [2 * PAGE - 8, 9 * PAGE, HUGE] {
            write(&memory, at, 7);
        }
        let done = original.bring_back().unwrap();
        assert_eq!((done.dirty_pages, done.own_pages), (3, 3));
        assert_eq!(read(&memory, 2 * PAGE - 8), 0);
        assert_eq!(words(&memory), expected());
    }
}

#[test]
fn a_huge_page_that_was_touched_before_is_not_looked_at_for_ever() {
    let memory = memory();
    // Where nothing is mapped: the host may give a huge page for it.
    for page in 0..9 {
        write(&memory, 8 * HUGE + page * PAGE, 7);
    }
    let mut original = memory.original().unwrap();
    let done = original.bring_back().unwrap();
    assert_eq!((done.dirty_pages, done.own_pages), (9, 0));
    write(&memory, 8 * HUGE, 7);
    let done = original.bring_back().unwrap();
    assert_eq!((done.dirty_pages, done.own_pages), (1, 1));
}

#[test]
fn a_page_that_is_not_written_to_for_long_is_the_images_again() {
    for by_reading in [false, true] {
        let memory = memory();
        let mut original = original(&memory, by_reading);
        for page in 0..100 {
            write(&memory, page * PAGE, 7);
        }
        assert_eq!(original.bring_back().unwrap().dirty_pages, 100);
        for round in 1..=u64::from(KEPT_UNCHANGED) + 2 {
            write(&memory, 50 * PAGE, round);
            let done = original.bring_back().unwrap();
            let looked_at = if round <= u64::from(KEPT_UNCHANGED) {
                100
            } else {
                1
            };
            assert_eq!(
                (done.dirty_pages, done.own_pages),
                (1, looked_at),
                "{round}"
            );
            // Only these: a page of a gap that is read is one more to look at, if there is no scan.
            let words: Vec<u64> = pages(&(0..100 * PAGE))
                .map(|at| read(&memory, at))
                .collect();
            assert_eq!(words, expected()[..100]);
        }
    }
}

#[test]
fn more_pages_than_are_told_of_at_a_time_are_all_found() {
    for by_reading in [false, true] {
        let memory = memory();
        let mut original = original(&memory, by_reading);
        // No two beside each other, so that each is a range of its own.
        let count = 1500;
        for page in 0..count {
            write(&memory, 2 * page * PAGE, 7);
        }
        assert_eq!(original.bring_back().unwrap().dirty_pages, count);
        assert_eq!(words(&memory), expected());
        for page in 0..count {
            assert_ne!(read(&memory, 2 * page * PAGE), 7);
        }
    }
}

#[test]
fn what_was_given_back_is_the_images_again() {
    let memory = memory();
    let mut original = memory.original().unwrap();
    let discarder = memory.discarder();
    for _ in 0..3 {
        discarder.discard(PAGE..3 * PAGE).unwrap();
        discarder.discard(5 * HUGE / 2..4 * HUGE).unwrap();
        assert_eq!(read(&memory, PAGE), 0);
        write(&memory, PAGE, 7);
        let done = original.bring_back().unwrap();
        assert_eq!(done.dirty_pages, 2 + HUGE / 2 / PAGE);
        assert_eq!(words(&memory), expected());
        // It is of the image in the eyes of who saves it, too.
        let populated = memory.populated().unwrap();
        assert!(populated.iter().any(|range| range.contains(&PAGE)));
    }
}

#[test]
fn an_image_in_more_parts_than_there_can_be_mappings_is_mapped_and_brought_back_to() {
    // Those below the hole are looked at: there, an address is an offset, and gaps are left. Behind it, none is.
    const FEW: u64 = crate::HOLE_START / (32 * HUGE);
    let few = (0..FEW).map(|n| n * 32 * HUGE);
    let many = (0..34_000).map(|n| crate::HOLE_START + n * 2 * HUGE);
    let data: Vec<_> = few.clone().chain(many).map(|at| at..at + PAGE).collect();
    let bytes = data.last().unwrap().start + HUGE;
    let Ok(memory) = MachineMemory::zeroed(Layout::new(bytes).unwrap()) else {
        eprintln!("the host has no room for so much, so nothing was tested");
        return;
    };
    let file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    for at in few.clone() {
        file.write_all_at(&[1; 8], at).unwrap();
    }
    memory.map_over(&file, &data).unwrap();
    // Of a part, of what it was rounded out by, and of a gap.
    let used = |at| [at, at + HUGE, at + 16 * HUGE];
    let is_as_in_the_image = || {
        let word = u64::from_ne_bytes([1; 8]);
        few.clone()
            .all(|at| used(at).map(|at| read(&memory, at)) == [word, 0, 0])
    };
    assert!(is_as_in_the_image());
    let mut original = memory.original().unwrap();
    for _ in 0..2 {
        for at in few.clone().flat_map(used) {
            write(&memory, at, 7);
        }
        memory.discarder().discard(0..32 * HUGE + PAGE).unwrap();
        assert_eq!([0, HUGE, 32 * HUGE].map(|at| read(&memory, at)), [0; 3]);
        original.bring_back().unwrap();
        assert!(is_as_in_the_image());
    }
}

/// Mappings of memory whose pages the kernel may merge with equal ones.
fn mergeable(memory: &MachineMemory) -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut is_within = false;
    let mut count = 0;
    for line in maps.lines() {
        let start = line.split_once('-').map(|(start, _)| start);
        if let Some(Ok(start)) = start.map(|start| u64::from_str_radix(start, 16)) {
            is_within = memory.host().offset(start).is_some();
        }
        let flags = line.strip_prefix("VmFlags:");
        let flagged = flags.is_some_and(|flags| flags.split(' ').any(|flag| flag == "mg"));
        count += usize::from(is_within && flagged);
    }
    count
}

#[test]
fn no_page_of_the_machines_own_becomes_one_that_everybody_shares() {
    // As a process inherits it that is started so.
    #[allow(unsafe_code)]
    // SAFETY: the content of memory does not change.
    let merge =
        |all: libc::c_ulong| unsafe { libc::prctl(libc::PR_SET_MEMORY_MERGE, all, 0, 0, 0) };
    if merge(1) != 0 {
        eprintln!("this kernel merges nothing, so nothing was tested");
        return;
    }
    let memory = memory();
    assert_ne!(mergeable(&memory), 0);
    let mut original = memory.original().unwrap();
    assert_eq!(mergeable(&memory), 0);
    memory.discarder().discard(PAGE..3 * PAGE).unwrap();
    original.bring_back().unwrap();
    assert_eq!(mergeable(&memory), 0);
    merge(0);
}

#[test]
fn memory_whose_writes_are_noticed_is_not_brought_back() {
    let layout = Layout::new(MIN_MEMORY_BYTES).unwrap();
    let memory = MachineMemory::from_image(layout, &image(), &[]).unwrap();
    let mut original = memory.original().unwrap();
    let tracker = match memory.track() {
        Ok(tracker) => tracker,
        // The host does not permit it.
        Err(_) => return,
    };
    original.bring_back().unwrap_err();
    drop(tracker);
    original.bring_back().unwrap();
}

#[derive(Clone, Debug)]
enum Step {
    Write { page: u64, at: u64, word: u64 },
    Read(u64),
    GiveBack { page: u64, pages: u64 },
    BringBack { by: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let page = 0..USED / PAGE;
    prop_oneof![
        8 => (page.clone(), 0..PAGE / 8, any::<u64>())
            .prop_map(|(page, at, word)| Step::Write { page, at: at * 8, word }),
        2 => page.clone().prop_map(Step::Read),
        2 => (page, 1u64..600).prop_map(|(page, pages)| Step::GiveBack { page, pages }),
        3 => (0usize..2).prop_map(|by| Step::BringBack { by }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn memory_is_what_it_was_whatever_was_done_to_it(steps in proptest::collection::vec(step(), 1..80)) {
        let memory = memory();
        let mut originals = [false, true].map(|by_reading| original(&memory, by_reading));
        let all = |memory: &MachineMemory| {
            let mut content = vec![0; USED as usize];
            memory.read_image(0, &mut content).unwrap();
            content
        };
        let first = all(&memory);
        let mut model = first.clone();
        for step in steps {
            match step {
                Step::Write { page, at, word } => {
                    let at = page * PAGE + at;
                    write(&memory, at, word);
                    model[at as usize..at as usize + 8].copy_from_slice(&word.to_le_bytes());
                }
                Step::Read(page) => {
                    read(&memory, page * PAGE);
                }
                Step::GiveBack { page, pages } => {
                    let range = page * PAGE..((page + pages) * PAGE).min(USED);
                    memory.discarder().discard(range.clone()).unwrap();
                    model[range.start as usize..range.end as usize].fill(0);
                }
                Step::BringBack { by } => {
                    let differs = |page: &u64| {
                        let at = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
                        model[at.clone()] != first[at]
                    };
                    let dirty = (0..USED / PAGE).filter(differs).count() as u64;
                    let done = originals[by].bring_back().unwrap();
                    // What was given back counts although it may have been zero before.
                    prop_assert!(done.dirty_pages >= dirty, "{done:?} {dirty}");
                    model.clone_from(&first);
                    prop_assert!(all(&memory) == model);
                }
            }
        }
        prop_assert!(all(&memory) == model);
    }
}
