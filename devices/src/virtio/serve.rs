//! One bounded round over a queue.

use std::time::{Duration, Instant};

use memory::GuestMemory;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::{DriverError, Progress};

/// A round ends after so many chains,
const ROUND_CHAINS: usize = 64;
/// or once it has taken so long: a driver that keeps a queue full shares the loop with the others.
const ROUND_TIME: Duration = Duration::from_millis(10);

/// What has become of one chain.
pub(crate) enum Outcome {
    /// It is done with, and so many bytes were written to it.
    Used(u32),
    /// It is the device's until [`Handler::finish`] gives it back, in this round or a later one.
    Kept,
    /// As that, and it is the last of this round. The device looks at the queue again by itself.
    KeptLast,
    /// It stays available, and so do those after it. The device looks at the queue again by itself.
    Later,
}

/// What serves the chains of a round.
pub(crate) trait Handler<'m> {
    /// Serves the next of `queue` that was [`Outcome::Kept`] over the end of an earlier round, if one is to be served before those
    /// that are available: its head, and what has become of it.
    fn handle_kept(&mut self, _queue: &Queue) -> Option<Result<(u16, Outcome), DriverError>> {
        None
    }

    /// Serves one that is available.
    fn handle(&mut self, chain: DescriptorChain<&'m GuestMemory>) -> Result<Outcome, DriverError>;

    /// The round ends: finishes those that were [`Outcome::Kept`] until then, and returns the head of each and the bytes written.
    fn finish(&mut self) -> Vec<(u16, u32)>;
}

/// A handler that keeps nothing.
struct AtOnce<F>(F);

impl<'m, F> Handler<'m> for AtOnce<F>
where
    F: FnMut(DescriptorChain<&'m GuestMemory>) -> Result<Outcome, DriverError>,
{
    fn handle(&mut self, chain: DescriptorChain<&'m GuestMemory>) -> Result<Outcome, DriverError> {
        (self.0)(chain)
    }

    fn finish(&mut self) -> Vec<(u16, u32)> {
        Vec::new()
    }
}

/// Hands the available chains of `queue` to `handle`, which returns the bytes it has written.
///
/// The round is bounded even if the driver changes the ring while it is read, from another vCPU or by
/// having the device write there.
pub(crate) fn serve<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    mut handle: impl FnMut(DescriptorChain<&'m GuestMemory>) -> Result<u32, DriverError>,
) -> Result<Progress, DriverError> {
    serve_until_later(queue, memory, |chain| handle(chain).map(Outcome::Used))
}

/// As [`serve`], but ends when `handle` cannot go on.
pub(crate) fn serve_until_later<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    handle: impl FnMut(DescriptorChain<&'m GuestMemory>) -> Result<Outcome, DriverError>,
) -> Result<Progress, DriverError> {
    serve_round(queue, memory, &mut AtOnce(handle))
}

/// As [`serve_until_later`], with chains that are given back at the end of the round, also when it ends with an error: the driver
/// has asked for them before it broke a rule.
pub(crate) fn serve_round<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    handler: &mut impl Handler<'m>,
) -> Result<Progress, DriverError> {
    let mut used = 0;
    let served = serve_chains(queue, memory, handler, &mut used);
    let mut given_back = Ok(());
    for (head, written) in handler.finish() {
        given_back = given_back.and(queue.add_used(memory, head, written));
        used += 1;
    }
    let more = served?;
    given_back?;
    // Asked in every round, so that what the queue counts for it never spans two rounds: that count
    // is not saved.
    let interrupt = used > 0 && queue.needs_notification(memory)?;
    Ok(Progress {
        interrupt,
        more,
        ..Progress::default()
    })
}

/// Hands available chains to `handler` within the bounds of a round, and counts those that it is done with. Returns whether
/// there may be more.
fn serve_chains<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    handler: &mut impl Handler<'m>,
    used: &mut usize,
) -> Result<bool, DriverError> {
    let start = Instant::now();
    queue.disable_notification(memory)?;
    for _ in 0..ROUND_CHAINS {
        let Some((head, outcome)) = serve_next(queue, memory, handler)? else {
            if queue.enable_notification(memory)? {
                continue;
            }
            return Ok(false);
        };
        match outcome {
            Outcome::Used(written) => {
                queue.add_used(memory, head, written)?;
                *used += 1;
            }
            Outcome::Kept => {}
            Outcome::KeptLast => return Ok(false),
            Outcome::Later => {
                queue.go_to_previous_position();
                return Ok(false);
            }
        }
        if start.elapsed() > ROUND_TIME {
            return Ok(true);
        }
    }
    Ok(true)
}

/// Serves one chain, if there is one: its head, and what has become of it.
fn serve_next<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
    handler: &mut impl Handler<'m>,
) -> Result<Option<(u16, Outcome)>, DriverError> {
    if let Some(kept) = handler.handle_kept(queue) {
        return kept.map(Some);
    }
    let Some(chain) = take_chain(queue, memory)? else {
        return Ok(None);
    };
    let head = chain.head_index();
    Ok(Some((head, handler.handle(chain)?)))
}

/// Takes the next chain that is available, if there is one.
///
/// # Errors
///
/// Also when the driver makes more available than the queue has entries, while the device has not given them back: a state with
/// more in use would not be believed, and so that driver's machine could not be restored.
pub(crate) fn take_chain<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
) -> Result<Option<DescriptorChain<&'m GuestMemory>>, DriverError> {
    let in_use = queue.next_avail().wrapping_sub(queue.next_used());
    let Some(chain) = queue.iter(memory)?.next() else {
        return Ok(None);
    };
    if in_use >= queue.size() {
        queue.go_to_previous_position();
        return Err(DriverError::TooManyBuffers(queue.size()));
    }
    Ok(Some(chain))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::driver;

    const AVAILABLE_INDEX: GuestAddress = GuestAddress(0x2002);

    fn queue(memory: &GuestMemory, available: u16) -> Queue {
        let mut queue = Queue::new(256).unwrap();
        queue.set_desc_table_address(Some(0x1000), None);
        queue.set_avail_ring_address(Some(0x2000), None);
        queue.set_used_ring_address(Some(0x3000), None);
        queue.set_ready(true);
        memory.write_obj(available, AVAILABLE_INDEX).unwrap();
        queue
    }

    #[test]
    fn a_round_ends_after_so_many_chains_and_the_next_goes_on() {
        let memory = driver::memory();
        let mut queue = queue(&memory, ROUND_CHAINS as u16 + 1);
        let round = serve(&mut queue, &memory, |_| Ok(0)).unwrap();
        assert!(round.more && round.interrupt);
        assert_eq!(usize::from(queue.next_used()), ROUND_CHAINS);
        let round = serve(&mut queue, &memory, |_| Ok(0)).unwrap();
        assert!(!round.more && round.interrupt);
        let round = serve(&mut queue, &memory, |_| Ok(0)).unwrap();
        assert!(!round.more && !round.interrupt);
    }

    #[test]
    fn a_round_ends_although_there_is_always_more() {
        let memory = driver::memory();
        let mut queue = queue(&memory, 1);
        let mut available = 1u16;
        let round = serve(&mut queue, &memory, |_| {
            available += 1;
            memory.write_obj(available, AVAILABLE_INDEX).unwrap();
            Ok(0)
        });
        assert!(round.unwrap().more);
        assert_eq!(usize::from(queue.next_used()), ROUND_CHAINS);
    }

    #[test]
    fn what_has_to_wait_stays_available() {
        let memory = driver::memory();
        let mut queue = queue(&memory, 3);
        let mut room = 1;
        let round = serve_until_later(&mut queue, &memory, |_| {
            room -= 1;
            Ok(if room < 0 {
                Outcome::Later
            } else {
                Outcome::Used(0)
            })
        })
        .unwrap();
        assert!(!round.more && round.interrupt);
        assert_eq!((queue.next_avail(), queue.next_used()), (1, 1));
    }

    #[test]
    fn no_more_is_taken_than_the_queue_has_entries() {
        struct Keeps;
        impl<'m> Handler<'m> for Keeps {
            fn handle(
                &mut self,
                _: DescriptorChain<&'m GuestMemory>,
            ) -> Result<Outcome, DriverError> {
                Ok(Outcome::Kept)
            }
            fn finish(&mut self) -> Vec<(u16, u32)> {
                Vec::new()
            }
        }
        let memory = driver::memory();
        let mut queue = queue(&memory, 2);
        queue.set_size(2);
        let mut round = || serve_round(&mut queue, &memory, &mut Keeps);
        assert!(!round().unwrap().more);
        memory.write_obj(3u16, AVAILABLE_INDEX).unwrap();
        for _ in 0..2 {
            assert!(matches!(round(), Err(DriverError::TooManyBuffers(2))));
        }
        assert_eq!((queue.next_avail(), queue.next_used()), (2, 0));
    }

    #[test]
    fn a_round_ends_after_so_much_time() {
        let memory = driver::memory();
        let mut queue = queue(&memory, 2);
        let round = serve(&mut queue, &memory, |_| {
            let start = Instant::now();
            while start.elapsed() <= ROUND_TIME {}
            Ok(0)
        });
        assert!(round.unwrap().more);
        assert_eq!(queue.next_used(), 1);
    }
}
