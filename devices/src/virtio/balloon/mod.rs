//! The virtio memory balloon (virtio 1.3, section 5.5): a guest gives pages back to its host.
//!
//! It puts as many into the balloon as the host asks for, and takes them out again when the host asks for fewer; on its own, it
//! reports what is free at the moment. Either way the pages are discarded: the host has their memory, and the next
//! snapshot has holes there. A guest may name what it likes, as often as it likes: it loses nothing but its own content.
//!
//! Pages are discarded on the event loop alone, which stands still while a snapshot copies memory: none that has not been
//! copied yet can become zero under the copy.

mod control;
mod metrics;
mod pages;
mod state;
mod statistics;
#[cfg(test)]
mod tests;

use std::{io, ops::Range, os::fd::AsFd, sync::Arc};

use memory::{Discarder, GuestMemory};
use saved_state::{Kind, SavedState, Section};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::{DescriptorChain, Queue, QueueT};

use super::{
    DriverError, EventSource, Progress, SavedTransport, VirtioDevice,
    buffers::Buffers,
    serve::{serve, take_chain},
};
use crate::{Error, Metrics};
use control::take;
pub use control::{BalloonControl, BalloonStatus};
use metrics::BalloonMetrics;
pub use state::SavedBalloon;
pub use statistics::Statistics;

const QUEUE_ENTRIES: u16 = 128;

// Feature bits (virtio 1.3, 5.5.3), which virtio-bindings lacks. Not offered are MUST_TELL_HOST, for a page is there again as
// soon as it is touched; FREE_PAGE_HINT (docs/decisions/free-pages.md); and PAGE_POISON: a guest that fills its free pages
// with something then reports none.
const STATISTICS_QUEUE: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_REPORTING: u64 = 1 << 5;

// Queues (virtio 1.3, 5.5.2). The one for hints is not there, and Linux numbers those that are there.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const REPORTING: usize = 3;

/// Where in the configuration space, of `num_pages` and `actual` (virtio 1.3, 5.5.4), the driver writes how many pages are in
/// the balloon.
const ACTUAL: Range<usize> = 4..8;

/// What one round takes of the queue for statistics: a driver has one buffer there.
const ROUND_STATISTICS: usize = 16;

/// How much of one report is acted upon, so that the time it takes is bounded. Linux reports at most 128 MiB in one.
const REPORT_BYTES: u64 = 1 << 30;

/// How a balloon is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonOptions {
    /// Pages, of 4 KiB, that are to be in it.
    pub target_pages: u32,
    /// Whether the guest may take pages out when it has no others left.
    pub deflate_on_oom: bool,
    /// Whether the guest may report free pages.
    pub free_page_reporting: bool,
    /// Seconds between two times that the guest is asked for statistics; 0 if it is asked on demand only.
    pub statistics_interval_s: u32,
}

/// A balloon.
pub struct Balloon {
    deflate_on_oom: bool,
    free_page_reporting: bool,
    discarder: Discarder,
    control: Arc<BalloonControl>,
    /// The buffer for statistics that the driver waits to have back, to fill it anew; by its head.
    statistics_buffer: Option<u16>,
    /// The guest has not been asked for statistics that somebody wants.
    statistics_due: bool,
    /// What the driver can read of the configuration space.
    shown: [u32; 2],
    metrics: Arc<BalloonMetrics>,
}

impl Balloon {
    /// A balloon for the memory that `discarder` is of.
    ///
    /// # Errors
    ///
    /// When the host has no descriptors left.
    pub fn new(options: BalloonOptions, discarder: Discarder) -> io::Result<Self> {
        let BalloonOptions {
            target_pages,
            deflate_on_oom,
            free_page_reporting,
            statistics_interval_s,
        } = options;
        let control = BalloonControl::new()?;
        control.set_target(target_pages);
        control.set_statistics_interval(statistics_interval_s);
        Ok(Self {
            deflate_on_oom,
            free_page_reporting,
            discarder,
            control: Arc::new(control),
            statistics_buffer: None,
            statistics_due: false,
            shown: [target_pages, 0],
            metrics: Arc::default(),
        })
    }

    /// The host's side of it.
    pub fn control(&self) -> &Arc<BalloonControl> {
        &self.control
    }

    fn inflate(
        &self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<u32, DriverError> {
        let numbers = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.readable;
        self.metrics.inflated_pages.add(pages::count(&numbers));
        for range in pages::named(&numbers) {
            self.discard(range);
        }
        Ok(0)
    }

    fn deflate(
        &self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<u32, DriverError> {
        // Pages come back by themselves when they are touched.
        let numbers = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.readable;
        self.metrics.deflated_pages.add(pages::count(&numbers));
        Ok(0)
    }

    fn report(
        &self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<u32, DriverError> {
        let mut left = REPORT_BYTES;
        for range in pages::buffers(chain, memory)? {
            let bytes = (range.end - range.start).min(left);
            left -= bytes;
            self.metrics.reported_bytes.add(bytes);
            self.discard(range.start..range.start + bytes);
        }
        Ok(0)
    }

    fn discard(&self, gpas: Range<u64>) {
        match self.discarder.discard(gpas) {
            Ok(bytes) => self.metrics.discarded_bytes.add(bytes),
            Err(error) => {
                // The guest has given the pages away whatever becomes of them.
                tracing::debug!(%error, "the host does not take pages back");
                self.metrics.discard_failures.add(1);
            }
        }
    }

    /// Reads what the driver has told, and gives the buffer back if it is to tell more.
    fn statistics(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        self.statistics_due |= self.is_asked_for_statistics();
        let mut used = false;
        let mut more = true;
        queue.disable_notification(memory)?;
        for _ in 0..ROUND_STATISTICS {
            if let Some(chain) = take_chain(queue, memory)? {
                let head = chain.head_index();
                let told = Buffers::of(chain, memory, QUEUE_ENTRIES.into())?.readable;
                self.control.set_statistics(statistics::read(&told));
                self.metrics.statistics.add(1);
                // A driver that has several gets the others back.
                if let Some(earlier) = self.statistics_buffer.replace(head) {
                    queue.add_used(memory, earlier, 0)?;
                    used = true;
                }
            } else if !queue.enable_notification(memory)? {
                more = false;
                break;
            }
        }
        if self.statistics_due
            && let Some(head) = self.statistics_buffer.take()
        {
            queue.add_used(memory, head, 0)?;
            used = true;
            self.statistics_due = false;
        }
        Ok(Progress {
            interrupt: used && queue.needs_notification(memory)?,
            more,
            ..Progress::default()
        })
    }

    /// Whether statistics have been wanted, or due, since this was last asked.
    fn is_asked_for_statistics(&self) -> bool {
        take(&self.control.statistics_wanted) | take(&self.control.statistics_due)
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> Kind {
        SavedBalloon::KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        let mut features = STATISTICS_QUEUE;
        if self.deflate_on_oom {
            features |= DEFLATE_ON_OOM;
        }
        if self.free_page_reporting {
            features |= PAGE_REPORTING;
        }
        features
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_ENTRIES, QUEUE_ENTRIES, QUEUE_ENTRIES, QUEUE_ENTRIES]
    }

    fn config(&self) -> Vec<u8> {
        self.shown
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let mut config = self.config();
        let end = offset.saturating_add(data.len());
        if offset >= ACTUAL.start
            && let Some(written) = config.get_mut(offset..end)
        {
            written.copy_from_slice(data);
        }
        if let Ok(actual) = config[ACTUAL].try_into() {
            self.shown[1] = u32::from_le_bytes(actual);
        }
        self.control.set_actual(self.shown[1]);
    }

    fn take_config_change(&mut self) -> bool {
        let target = self.control.status().target_pages;
        std::mem::replace(&mut self.shown[0], target) != target
    }

    fn sources(&self) -> Vec<EventSource<'_>> {
        let BalloonControl {
            target_changed,
            statistics_wanted,
            statistics_due,
            ..
        } = &*self.control;
        [
            (target_changed.as_fd(), INFLATE),
            (statistics_wanted.as_fd(), STATISTICS),
            (statistics_due.as_fd(), STATISTICS),
        ]
        .map(|(descriptor, queue)| EventSource {
            descriptor,
            readable: Some(queue),
            writable: None,
        })
        .into()
    }

    fn activate(&mut self, _features: u64) {
        self.control.set_driver(true);
    }

    fn reset(&mut self) {
        self.statistics_buffer = None;
        self.shown[1] = 0;
        self.control.set_actual(0);
        self.control.set_driver(false);
        self.control.set_tells(false);
    }

    fn forget_queue(&mut self, index: usize) {
        if index == STATISTICS {
            self.statistics_buffer = None;
            self.control.set_tells(false);
        }
    }

    fn process_queue(
        &mut self,
        index: usize,
        queue: &mut Queue,
        memory: &GuestMemory,
    ) -> Result<Progress, DriverError> {
        match index {
            INFLATE => {
                // Only that the target is another: which one it is, is asked after the round.
                take(&self.control.target_changed);
                serve(queue, memory, |chain| self.inflate(chain, memory))
            }
            DEFLATE => serve(queue, memory, |chain| self.deflate(chain, memory)),
            STATISTICS => self.statistics(queue, memory),
            REPORTING => serve(queue, memory, |chain| self.report(chain, memory)),
            _ => Ok(Progress::default()),
        }
    }

    fn save(
        &self,
        instance: u32,
        transport: SavedTransport,
    ) -> Result<Section, saved_state::Error> {
        let Self {
            deflate_on_oom,
            free_page_reporting,
            discarder: _,
            control,
            statistics_buffer,
            // A restored machine's guest is asked at once.
            statistics_due: _,
            shown: [shown_target, actual_pages],
            metrics: _,
        } = self;
        let BalloonStatus {
            driver: _,
            target_pages,
            actual_pages: _,
            statistics_interval_s,
            // They tell of a guest that has since gone on.
            statistics: _,
        } = control.status();
        // While the machine stands still nobody tells its driver. A restored one's is told at once, of the target as it is now.
        let transport = match target_pages == *shown_target {
            true => transport,
            false => transport.with_config_change(),
        };
        let saved = SavedBalloon {
            deflate_on_oom: *deflate_on_oom,
            free_page_reporting: *free_page_reporting,
            target_pages,
            actual_pages: *actual_pages,
            statistics_interval_s,
            statistics_buffer: statistics_buffer.iter().copied().collect(),
            transport,
        };
        Section::encode(instance, &saved)
    }

    fn restore(&mut self, section: &Section) -> Result<SavedTransport, Error> {
        let SavedBalloon {
            deflate_on_oom,
            free_page_reporting,
            target_pages,
            actual_pages,
            statistics_interval_s,
            statistics_buffer,
            transport,
        } = section.decode()?;
        let impossible = |reason: &str| Error::Impossible {
            kind: SavedBalloon::KIND,
            reason: reason.to_owned(),
        };
        if (deflate_on_oom, free_page_reporting) != (self.deflate_on_oom, self.free_page_reporting)
        {
            return Err(impossible("it offers something else"));
        }
        self.statistics_buffer = match statistics_buffer[..] {
            [] => None,
            // One of a queue that has ended since, or has begun anew, is the driver's. It would be one more than it has.
            [_] if transport.in_use(STATISTICS) == 0 => None,
            [head] if head < QUEUE_ENTRIES => Some(head),
            _ => {
                return Err(impossible(
                    "it has buffers for statistics that it cannot have",
                ));
            }
        };
        self.shown = [target_pages, actual_pages];
        self.control.set_target(target_pages);
        self.control.set_actual(actual_pages);
        self.control.set_statistics_interval(statistics_interval_s);
        self.control.set_tells(self.statistics_buffer.is_some());
        self.statistics_due = true;
        Ok(transport)
    }

    fn metrics(&self) -> Arc<dyn Metrics> {
        Arc::clone(&self.metrics) as _
    }
}
