//! Notifications of one device, on the event loop.

use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::Worker;
use crate::{event_loop::watch, sync::lock};

/// Serves the queues that the guest notifies.
pub(crate) struct QueueEvents(Arc<Mutex<Worker>>);

impl QueueEvents {
    pub(crate) fn new(worker: Arc<Mutex<Worker>>) -> Self {
        Self(worker)
    }
}

impl MutEventSubscriber for QueueEvents {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let worker = lock(&self.0);
        for (event, index) in worker.shared.notify().iter().zip(0..) {
            watch(ops, Events::with_data(event, index, EventSet::IN));
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let index = events.data() as usize;
        let mut worker = lock(&self.0);
        // Cleared before the queue is looked at: what comes later signals anew.
        if let Some(event) = worker.shared.notify().get(index) {
            let _ = event.read();
        }
        worker.process(index);
    }
}
