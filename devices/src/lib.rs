//! The devices a machine emulates, the bus they answer on and the loop they work in.
//!
//! Devices never see KVM. An exit reaches them through a [`Bus`], an interrupt leaves them through
//! an [`InterruptLine`] that is implemented above, and virtio notifications come in through eventfds
//! that the kernel may signal without an exit. What a device does on its own, it does on the
//! [`EventLoop`], which can be quiesced: then nothing here changes guest memory or itself.
//!
//! Everything that has state is a [`Device`] and saves itself into one section; the guest and the
//! section are hostile alike, so neither may panic a device.

mod acpi_pm;
mod bus;
#[cfg(test)]
mod conformance;
mod console_input;
mod device;
mod event_loop;
mod i8042;
mod metrics;
mod random;
mod rate_limit;
pub mod rtc;
mod run_port;
pub mod serial;
mod sync;
pub mod virtio;

pub use acpi_pm::{AcpiPm, SLEEP_TYPE_S5};
pub use bus::{Bus, BusDevice, Overlap};
pub use console_input::{ConsoleInput, InputPort};
pub use device::{Device, Error, GuestRequest, InterruptLine, OnGuestRequest};
pub use event_loop::{EventLoop, EventLoopError, InHand, LoopThread, Quiesced, THREAD_NAME};
pub use i8042::I8042;
pub use metrics::{Counter, Metrics};
pub use rate_limit::{RateLimit, SavedRateLimit, StoppedClock};
pub use rtc::Rtc;
pub use run_port::{RUN_PORTS, Run, RunPort};
pub use serial::Serial;
