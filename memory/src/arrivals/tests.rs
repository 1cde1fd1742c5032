use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{GuestMemory, Layout, MIN_MEMORY_BYTES};

const HUGE: u64 = 2 << 20;
const PAGE: u64 = PAGE_BYTES;

/// Memory of which `data` comes; none where the host does not permit it.
fn arriving(data: &[Range<u64>]) -> Option<(MachineMemory, Arrivals)> {
    let layout = Layout::new(MIN_MEMORY_BYTES).unwrap();
    match MachineMemory::zeroed(layout).unwrap().arriving(data) {
        Ok(both) => Some(both),
        Err(Error::Userfault(e)) => {
            eprintln!("there is no userfaultfd here, so nothing was tested: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn byte(guest: &GuestMemory, at: u64) -> u8 {
    guest.read_obj(GuestAddress(at)).unwrap()
}

fn write(guest: &GuestMemory, at: u64, value: u8) {
    guest.write_obj(value, GuestAddress(at)).unwrap();
}

/// What the page at `offset` has in the image.
fn content(offset: u64) -> u8 {
    (offset / PAGE % 251 + 1) as u8
}

/// Brings pages that are wanted, one at a time, until it is stopped; counts them.
fn bring(arrivals: &Arrivals, count: &AtomicU64) {
    while let Some(offsets) = arrivals.wanted().unwrap() {
        for offset in offsets {
            count.fetch_add(1, Ordering::SeqCst);
            if arrivals.is_missing(&(offset..offset + PAGE)) {
                let page = [content(offset); PAGE as usize];
                arrivals.put(offset, &page).unwrap();
            } else {
                arrivals.release(offset).unwrap();
            }
        }
    }
}

#[test]
fn who_touches_a_page_waits_until_it_is_there() {
    let Some((memory, arrivals)) = arriving(&[HUGE..3 * HUGE; 1]) else {
        return;
    };
    let guest = memory.guest();
    let count = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| bring(&arrivals, &count));
        // Read, written to, and by the kernel.
        assert_eq!(byte(guest, HUGE + 5), content(HUGE));
        write(guest, HUGE + PAGE, 99);
        assert_eq!(byte(guest, HUGE + PAGE), 99);
        assert_eq!(byte(guest, HUGE + PAGE + 1), content(HUGE + PAGE));
        let mut file = tempfile::tempfile().unwrap();
        let at = GuestAddress(2 * HUGE);
        guest
            .write_all_volatile_to(at, &mut file, PAGE as usize)
            .unwrap();
        let mut found = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut found, 7).unwrap();
        assert_eq!(found, [content(2 * HUGE)]);
        // Where nothing comes, nobody is asked.
        assert_eq!(byte(guest, 0), 0);
        assert_eq!(count.load(Ordering::SeqCst), 3);
        arrivals.stop();
    });
}

#[test]
fn what_is_there_is_not_put_again_and_what_is_zero_is_zero() {
    let Some((memory, arrivals)) = arriving(&[0..HUGE; 1]) else {
        return;
    };
    let guest = memory.guest();
    let ones = [1; 4 * PAGE as usize];
    assert_eq!(arrivals.put(PAGE, &ones[..PAGE as usize]).unwrap(), PAGE);
    write(guest, PAGE, 7);
    // Around it, and not over it.
    assert_eq!(arrivals.put(0, &ones).unwrap(), 3 * PAGE);
    let bytes = [0, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE].map(|at| byte(guest, at));
    assert_eq!(bytes, [1, 7, 1, 1, 1]);
    assert_eq!(arrivals.put_zeros(&(2 * PAGE..8 * PAGE)).unwrap(), 4 * PAGE);
    assert_eq!([3 * PAGE, 4 * PAGE].map(|at| byte(guest, at)), [1, 0]);
    assert!(!arrivals.is_missing(&(0..8 * PAGE)) && arrivals.is_missing(&(0..9 * PAGE)));
}

#[test]
fn once_everything_has_come_memory_is_like_any_other() {
    let Some((memory, arrivals)) = arriving(&[0..HUGE, 4 * HUGE..5 * HUGE]) else {
        return;
    };
    let refused = memory.populated().unwrap_err().to_string();
    assert!(refused.contains("come"), "{refused}");
    arrivals.put(0, &[1; PAGE as usize]).unwrap();
    arrivals.complete().unwrap();
    // Nobody brings this any more, and nobody waits.
    assert_eq!(
        [0, PAGE, 4 * HUGE].map(|at| byte(memory.guest(), at)),
        [1, 0, 0]
    );
    assert_eq!(memory.populated().unwrap().first().unwrap().start, 0);
    memory.discarder().discard(0..PAGE).unwrap();
    assert_eq!(byte(memory.guest(), 0), 0);
    // Too late, and no harm.
    arrivals.put_zeros(&(8 * PAGE..9 * PAGE)).unwrap();
}

#[test]
fn who_waits_goes_on_when_everything_has_come() {
    let Some((memory, arrivals)) = arriving(&[0..HUGE; 1]) else {
        return;
    };
    let guest = memory.guest();
    thread::scope(|scope| {
        let waits = scope.spawn(|| byte(guest, 9 * PAGE));
        assert_eq!(arrivals.wanted().unwrap(), Some(vec![9 * PAGE]));
        assert!(!waits.is_finished());
        arrivals.complete().unwrap();
        assert_eq!(waits.join().unwrap(), 0);
    });
}

#[test]
fn what_a_guest_gives_back_does_not_come_back() {
    let Some((memory, arrivals)) = arriving(&[0..HUGE; 1]) else {
        return;
    };
    let (guest, discarder) = (memory.guest(), memory.discarder());
    arrivals.put(0, &[1; PAGE as usize]).unwrap();
    // One that is there, and one that is not.
    discarder.discard(0..2 * PAGE).unwrap();
    assert_eq!(arrivals.put(0, &[1; 3 * PAGE as usize]).unwrap(), PAGE);
    let count = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| bring(&arrivals, &count));
        let found = [0, PAGE, 2 * PAGE].map(|at| byte(guest, at));
        assert_eq!(found, [0, 0, 1]);
        arrivals.stop();
    });
    assert_eq!(count.into_inner(), 2);
}

/// Some touch, some bring what nobody touched, and some give back, all at once, for a while.
#[test]
fn everybody_at_once_sees_the_image_or_what_was_written_or_zeros() {
    let Some((memory, arrivals)) = arriving(&[0..MIN_MEMORY_BYTES; 1]) else {
        return;
    };
    let (guest, discarder) = (memory.guest(), memory.discarder());
    let count = AtomicU64::new(0);
    let pages = MIN_MEMORY_BYTES / PAGE;
    thread::scope(|scope| {
        let handler = scope.spawn(|| bring(&arrivals, &count));
        let touch = scope.spawn(|| {
            for page in (0..pages).step_by(3) {
                let at = page * PAGE;
                // Every third of them is given back, sooner or later.
                assert!([content(at), 0].contains(&byte(guest, at)));
                if page % 2 == 0 {
                    write(guest, at + 1, 3);
                }
            }
        });
        let give_back = scope.spawn(|| {
            for page in (0..pages).rev().filter(|page| page % 9 == 0) {
                discarder.discard(page * PAGE..(page + 1) * PAGE).unwrap();
            }
        });
        for page in (0..pages).rev() {
            let at = page * PAGE;
            arrivals.put(at, &[content(at); PAGE as usize]).unwrap();
        }
        touch.join().unwrap();
        give_back.join().unwrap();
        arrivals.complete().unwrap();
        arrivals.stop();
        handler.join().unwrap();
    });
    for page in 0..pages {
        let at = page * PAGE;
        let expected = if page % 9 == 0 { 0 } else { content(at) };
        assert_eq!(byte(guest, at), expected, "page {page}");
    }
}

#[test]
fn a_machine_that_ends_too_soon_shows_no_zeros() {
    let Some((memory, arrivals)) = arriving(&[0..HUGE; 1]) else {
        return;
    };
    let guest = memory.guest().clone();
    let waits = thread::spawn(move || byte(&guest, 0));
    arrivals.wanted().unwrap();
    drop(arrivals);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(50) {
        assert!(!waits.is_finished());
        thread::yield_now();
    }
}

#[test]
fn what_is_still_watched_when_everything_has_come_is_zero_for_who_waits() {
    let Some((memory, arrivals)) = arriving(&[0..HUGE; 1]) else {
        return;
    };
    let guest = memory.guest();
    // As if the kernel had refused the rest.
    arrivals.settled.complete();
    type Bring = fn(&Arrivals) -> io::Result<()>;
    let bring: [(u64, Bring); 3] = [
        (PAGE, |arrivals| {
            arrivals.put_zeros(&(0..4 * PAGE)).map(drop)
        }),
        (5 * PAGE, |arrivals| {
            arrivals.put(5 * PAGE, &[1; PAGE as usize]).map(drop)
        }),
        (7 * PAGE, |arrivals| arrivals.release(7 * PAGE)),
    ];
    for (page, bring) in bring {
        thread::scope(|scope| {
            let waits = scope.spawn(|| byte(guest, page));
            assert_eq!(arrivals.wanted().unwrap(), Some(vec![page]));
            bring(&arrivals).unwrap();
            // It is there, so that who waited is not told of again.
            assert_eq!(arrivals.userfault.zero(&(page..page + PAGE)).unwrap(), 0);
            assert_eq!(waits.join().unwrap(), 0);
        });
    }
}

#[test]
fn who_waits_for_what_is_given_back_meanwhile_looks_again() {
    let Some((memory, arrivals)) = arriving(&[0..HUGE; 1]) else {
        return;
    };
    let (guest, discarder) = (memory.guest(), memory.discarder());
    thread::scope(|scope| {
        let waits = scope.spawn(|| byte(guest, PAGE));
        assert_eq!(arrivals.wanted().unwrap(), Some(vec![PAGE]));
        // Between who was told of it, and who brings it.
        discarder.discard(PAGE..2 * PAGE).unwrap();
        let page = [1; PAGE as usize];
        assert_eq!(arrivals.put(PAGE, &page).unwrap(), 0);
        assert_eq!(arrivals.wanted().unwrap(), Some(vec![PAGE]));
        arrivals.release(PAGE).unwrap();
        assert_eq!(waits.join().unwrap(), 0);
    });
}
