//! Disks and networks of Linux guests, on fermata and on QEMU.
//!
//! One machine of each monitor runs all the time, with a TAP device and all its disks. What is measured is measured
//! in one of them and then in the other, again and again, while the other idles.

mod archive;
mod disks;
mod fio;
mod iperf;
mod machines;
mod pss;
mod worker;

use std::path::Path;

use anyhow::Result;

use crate::{Bench, Figures};
pub use disks::Disks;
use machines::Machines;
pub use pss::measure as measure_idle;

/// What is measured, in which guests, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Whether disks are.
    pub disks: bool,
    /// Whether network devices are.
    pub nets: bool,
    /// Of each guest.
    pub vcpus: u32,
    /// How often each is measured.
    pub runs: u32,
    /// How long one of fio's jobs takes, in seconds.
    pub fio: u32,
    /// How long one direction of iperf3 takes, in seconds.
    pub iperf: u32,
}

impl Plan {
    fn has(self, place: Place) -> bool {
        match place {
            Place::Disk { .. } | Place::Chain { .. } => self.disks,
            Place::Net => self.nets,
        }
    }
}

/// What one machine has that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A disk: its serial number in the guest, and its name in the results.
    Disk {
        serial: &'static str,
        setting: &'static str,
    },
    /// A disk in small extents, by the same; it is only read.
    Chain {
        serial: &'static str,
        setting: &'static str,
    },
    /// The network device.
    Net,
}

/// Boots both machines, with their disks below `scratch`, and measures what `plan` says, and once before for nothing.
///
/// # Errors
///
/// When a machine does not come up, or a program in it fails.
pub fn measure(scratch: &Path, plan: Plan, figures: &mut Figures) -> Result<()> {
    let disks = Disks::make(scratch)?;
    let machines = Machines::boot(scratch, &disks, plan.vcpus)?;
    let mut ignored = Figures::default();
    for run in 0..=plan.runs {
        println!("disks and networks, run {run} of {}", plan.runs);
        let figures = if run == 0 {
            &mut ignored
        } else {
            &mut *figures
        };
        for (system, place) in machines.order(run) {
            if !plan.has(place) {
                continue;
            }
            let worker = machines.worker(system);
            let mut disk = |serial, setting, jobs| -> Result<()> {
                for (bench, figure) in fio::run(worker, serial, jobs, plan.fio)? {
                    figures.add(bench, system, setting, figure);
                }
                Ok(())
            };
            match place {
                Place::Disk { serial, setting } => disk(serial, setting, &fio::BOTH_WAYS)?,
                Place::Chain { serial, setting } => disk(serial, setting, &fio::CHAIN)?,
                Place::Net => {
                    for bench in [Bench::TcpToGuest, Bench::TcpFromGuest] {
                        let figure = iperf::run(worker, bench, plan.iperf)?;
                        figures.add(bench, system, "", figure);
                    }
                }
            }
        }
    }
    Ok(())
}
