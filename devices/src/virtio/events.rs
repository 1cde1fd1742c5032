//! Notifications and other events of one device, on the event loop.

use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{EventSource, Worker};
use crate::{event_loop::watch, sync::lock};

/// Serves the queues that the guest notifies, and those that the device's sources are about.
pub(crate) struct QueueEvents {
    worker: Arc<Mutex<Worker>>,
    queues: usize,
    /// Of each source, the queues to look at when it is readable and when it is writable.
    routes: Vec<(Option<usize>, Option<usize>)>,
}

impl QueueEvents {
    pub(crate) fn new(worker: Arc<Mutex<Worker>>) -> Self {
        let locked = lock(&worker);
        let queues = locked.queue_count();
        let sources = locked.device.sources();
        let route = |source: &EventSource<'_>| (source.readable, source.writable);
        let routes = sources.iter().map(route).collect();
        drop(sources);
        drop(locked);
        Self {
            worker,
            queues,
            routes,
        }
    }

    fn notified(&self, index: usize) {
        let mut worker = lock(&self.worker);
        // Cleared before the queue is looked at: what comes later signals anew.
        if let Some(event) = worker.shared.notify().get(index) {
            let _ = event.read();
        }
        worker.process(index);
    }

    fn source(&self, index: usize, events: EventSet) {
        let Some((readable, writable)) = self.routes.get(index) else {
            return;
        };
        // An end or an error is found out by reading.
        let readable = readable.filter(|_| events != EventSet::OUT);
        let writable = writable.filter(|_| events.contains(EventSet::OUT));
        let mut worker = lock(&self.worker);
        for queue in readable.iter().chain(&writable) {
            worker.process(*queue);
        }
    }
}

impl MutEventSubscriber for QueueEvents {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let worker = lock(&self.worker);
        let notify = worker.shared.notify();
        for (event, index) in notify.iter().zip(0..) {
            watch(ops, Events::with_data(event, index, EventSet::IN));
        }
        let sources = worker.device.sources();
        for (source, index) in sources.iter().zip(notify.len() as u32..) {
            let mut events = EventSet::EDGE_TRIGGERED;
            if source.readable.is_some() {
                events |= EventSet::IN;
            }
            if source.writable.is_some() {
                events |= EventSet::OUT;
            }
            watch(ops, Events::with_data(&source.descriptor, index, events));
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let index = events.data() as usize;
        match index.checked_sub(self.queues) {
            None => self.notified(index),
            Some(source) => self.source(source, events.event_set()),
        }
    }
}
