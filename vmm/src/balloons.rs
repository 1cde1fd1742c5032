//! A machine's balloon.

use std::{sync::Arc, time::Duration};

use control::{BalloonChange, BalloonConfig, BalloonStatistics, BalloonStatus};
use devices::virtio::balloon::{Balloon, BalloonControl, BalloonOptions, SavedBalloon};
use memory::MachineMemory;
use saved_state::{Container, SavedState};

use crate::error::Error;

/// Pages of a balloon in a MiB, whatever the guest's pages are.
const PAGES_A_MIB: u64 = 256;
const PAGE_BYTES: u64 = 4096;

/// How long a guest may take to tell its statistics to who asks; Linux takes some milliseconds.
const STATISTICS_BOUND: Duration = Duration::from_secs(1);

/// What a balloon of a machine that is booted is made with.
pub(crate) fn options(
    config: &BalloonConfig,
    memory: &MachineMemory,
) -> Result<BalloonOptions, Error> {
    let BalloonConfig {
        target_mib,
        deflate_on_oom,
        free_page_reporting,
        statistics_interval_s,
    } = *config;
    Ok(BalloonOptions {
        target_pages: pages(target_mib, memory.layout().bytes() >> 20)?,
        deflate_on_oom,
        free_page_reporting,
        statistics_interval_s,
    })
}

/// What the balloon of a saved machine has to be made with, if it has one.
pub(crate) fn saved(container: &Container) -> Result<Option<BalloonOptions>, Error> {
    let mut sections = container.sections();
    let section = sections.find(|section| section.kind == SavedBalloon::KIND);
    let saved: Option<SavedBalloon> = section.map(|section| section.decode()).transpose()?;
    Ok(saved.map(|saved| saved.options()))
}

/// Makes the device.
pub(crate) fn open(options: BalloonOptions, memory: &MachineMemory) -> Result<Balloon, Error> {
    let balloon = Balloon::new(options, memory.discarder());
    Ok(balloon.map_err(devices::Error::EventFd)?)
}

/// Changes a balloon of a machine of `memory_mib`.
pub(crate) fn change(
    control: &BalloonControl,
    change: BalloonChange,
    memory_mib: u64,
) -> Result<(), Error> {
    let BalloonChange {
        target_mib,
        statistics_interval_s,
    } = change;
    // All of it is checked before any of it is done.
    let target = target_mib.map(|mib| pages(mib, memory_mib)).transpose()?;
    if let Some(target) = target {
        control.set_target(target);
    }
    if let Some(seconds) = statistics_interval_s {
        control.set_statistics_interval(seconds);
    }
    Ok(())
}

/// How it stands with a balloon, with statistics that its guest is asked for if it `runs`. This waits for the guest.
pub(crate) fn status(control: &Arc<BalloonControl>, runs: bool) -> BalloonStatus {
    let status = if runs {
        control.ask(STATISTICS_BOUND)
    } else {
        control.status()
    };
    let statistics = status.statistics.map(|(age, values)| BalloonStatistics {
        age_ms: age.as_millis() as u64,
        values: values
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    });
    BalloonStatus {
        driver: status.driver,
        target_mib: u64::from(status.target_pages) / PAGES_A_MIB,
        actual_bytes: u64::from(status.actual_pages) * PAGE_BYTES,
        statistics_interval_s: status.statistics_interval_s,
        statistics,
    }
}

/// Pages of a balloon of `mib` in a machine of `memory_mib`.
fn pages(mib: u64, memory_mib: u64) -> Result<u32, Error> {
    let pages = (mib <= memory_mib).then(|| u32::try_from(mib * PAGES_A_MIB).ok());
    pages.flatten().ok_or(Error::BalloonTooLarge {
        target_mib: mib,
        memory_mib,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use control::{Failure, FailureKind};
    use memory::Layout;

    use super::*;

    #[test]
    fn a_balloon_is_no_larger_than_the_machine() {
        let memory = MachineMemory::zeroed(Layout::new(64 << 20).unwrap()).unwrap();
        let balloon = open(BalloonOptions::default(), &memory).unwrap();
        let control = balloon.control();
        let to = |mib| BalloonChange {
            target_mib: Some(mib),
            statistics_interval_s: Some(7),
        };
        change(control, to(64), 64).unwrap();
        for mib in [65, u64::MAX] {
            let other = BalloonChange {
                statistics_interval_s: Some(8),
                ..to(mib)
            };
            let refused = change(control, other, 64).unwrap_err();
            assert_eq!(Failure::from(refused).kind, FailureKind::BadRequest);
        }
        // Nothing of what was refused was done.
        let status = status(control, true);
        assert_eq!((status.target_mib, status.statistics_interval_s), (64, 7));
        assert_eq!((status.actual_bytes, status.driver), (0, false));
    }
}
