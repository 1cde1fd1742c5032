//! What the machine counts about itself.

use std::sync::atomic::{AtomicU64, Ordering};

use control::Metric;
use devices::Counter;
use snapshot::{OnDemand, Progress};

/// Exits of all vCPUs, by what they were for.
#[derive(Debug, Default)]
pub(crate) struct ExitCounts {
    pub(crate) port: Counter,
    pub(crate) mmio: Counter,
    pub(crate) kicked: Counter,
}

/// What happened to the machine.
#[derive(Debug, Default)]
pub(crate) struct MachineCounts {
    pub(crate) holds: Counter,
    pub(crate) last_hold_us: Gauge,
    pub(crate) longest_hold_us: Gauge,
    pub(crate) snapshots: Counter,
    pub(crate) failed_snapshots: Counter,
    pub(crate) last_downtime_us: Gauge,
    pub(crate) resets: Counter,
    pub(crate) last_reset_us: Gauge,
}

/// A value that goes up and down.
#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicU64);

impl Gauge {
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(crate) fn set_max(&self, value: u64) {
        self.0.fetch_max(value, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How far the snapshot in work is, or the last one got.
pub(crate) fn saving_metrics(saving: &Progress) -> [Metric; 2] {
    [
        (control::SNAPSHOT_BYTES_DONE, saving.done()),
        (control::SNAPSHOT_BYTES_TOTAL, saving.total()),
    ]
    .map(|(name, value)| Metric {
        name: name.to_owned(),
        label: None,
        value,
    })
}

/// How much of a machine's memory has come that comes on demand, how often somebody waited for some, and what is known of what it
/// touches first.
pub(crate) fn arriving_metrics(arriving: &OnDemand) -> [Metric; 6] {
    let progress = arriving.progress();
    [
        ("fermata_arrived_bytes", progress.done()),
        ("fermata_arriving_total_bytes", progress.total()),
        ("fermata_waits_for_memory_total", arriving.waited_for()),
        ("fermata_working_set_pages", arriving.working_set_pages()),
        ("fermata_working_set_bytes", arriving.working_set_bytes()),
        ("fermata_recorded_pages", arriving.recorded_pages()),
    ]
    .map(|(name, value)| Metric {
        name: name.to_owned(),
        label: None,
        value,
    })
}

impl ExitCounts {
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        let Self { port, mmio, kicked } = self;
        [("port", port), ("mmio", mmio), ("kick", kicked)]
            .map(|(reason, count)| Metric {
                name: "fermata_vcpu_exits_total".to_owned(),
                label: Some(("reason".to_owned(), reason.to_owned())),
                value: count.get(),
            })
            .into()
    }
}

impl MachineCounts {
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        let Self {
            holds,
            last_hold_us,
            longest_hold_us,
            snapshots,
            failed_snapshots,
            last_downtime_us,
            resets,
            last_reset_us,
        } = self;
        [
            ("fermata_holds_total", holds.get()),
            ("fermata_last_hold_microseconds", last_hold_us.get()),
            ("fermata_longest_hold_microseconds", longest_hold_us.get()),
            ("fermata_snapshots_total", snapshots.get()),
            ("fermata_failed_snapshots_total", failed_snapshots.get()),
            ("fermata_last_downtime_microseconds", last_downtime_us.get()),
            ("fermata_resets_total", resets.get()),
            ("fermata_last_reset_microseconds", last_reset_us.get()),
        ]
        .map(|(name, value)| Metric {
            name: name.to_owned(),
            label: None,
            value,
        })
        .into()
    }
}
