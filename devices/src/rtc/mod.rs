//! The real-time clock: an MC146818 with the 128 bytes of CMOS memory of a PC.
//!
//! It follows the host's realtime clock at a distance that the guest sets by writing the time. It
//! has no interrupt: the alarm's registers and the interrupt enables are kept and never fire.
//!
//! A guest reads the time register by register, and its vCPU may stand still between two of them for longer than any clock warns of
//! its next update. So what it reads in a row is of one instant.

mod calendar;
mod reading;
mod state;
#[cfg(test)]
mod tests;

use std::time::{SystemTime, UNIX_EPOCH};

use saved_state::{Kind, SavedState, Section};

use crate::{BusDevice, Device, Error};
use calendar::Field;
use reading::Reading;
pub use state::SavedRtc;

/// The clock's two ports: index and data.
pub const PORTS: u64 = 2;

const CMOS_BYTES: usize = 128;
/// Bit 7 of the index port masks the NMI; the rest selects the register.
const INDEX_MASK: u8 = 0x7f;

const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;

/// An update is in progress: never, since what is read next is of one instant.
const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// The divider of a 32,768 Hz crystal and the 1,024 Hz rate that firmware leaves behind.
const A_DEFAULT: u8 = 0x26;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
/// The clock stands still while the guest sets it.
const B_SET: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;

/// The host's clock, in seconds since the epoch.
type Now = fn() -> i64;

/// The clock.
pub struct Rtc {
    now: Now,
    index: u8,
    /// The guest's time minus the host's.
    offset_seconds: i64,
    /// The guest's time while [`B_SET`] holds the clock.
    stopped_at: Option<i64>,
    /// The time that the guest is just reading.
    reading: Option<Reading>,
    /// What is behind the registers that do not show the time.
    registers: [u8; CMOS_BYTES],
}

impl Rtc {
    /// A clock that shows the host's time in UTC.
    pub fn new() -> Self {
        Self::with_clock(host_seconds)
    }

    fn with_clock(now: Now) -> Self {
        let mut registers = [0; CMOS_BYTES];
        registers[usize::from(REGISTER_A)] = A_DEFAULT;
        registers[usize::from(REGISTER_B)] = B_24_HOURS;
        Self {
            now,
            index: 0,
            offset_seconds: 0,
            stopped_at: None,
            reading: None,
            registers,
        }
    }

    fn guest_seconds(&self) -> i64 {
        self.stopped_at
            .unwrap_or_else(|| (self.now)().saturating_add(self.offset_seconds))
    }

    fn set_guest_seconds(&mut self, seconds: i64) {
        match &mut self.stopped_at {
            Some(stopped_at) => *stopped_at = seconds,
            None => self.offset_seconds = seconds.saturating_sub((self.now)()),
        }
    }

    fn register(&self, register: u8) -> u8 {
        self.registers[usize::from(register & INDEX_MASK)]
    }

    /// The guest's time of which it reads `field`: that of which it has read others, if there is one.
    fn seconds_to_read(&mut self, field: Field) -> i64 {
        let (now, guest_seconds) = ((self.now)(), self.guest_seconds());
        let goes_on = self
            .reading
            .take()
            .filter(|reading| reading.has(field, now));
        let reading = goes_on.unwrap_or_else(|| Reading::begin(now, guest_seconds));
        self.reading.insert(reading).take(field)
    }

    fn read_data(&mut self) -> u8 {
        if let Some(field) = Field::at(self.index) {
            let seconds = self.seconds_to_read(field);
            return field.read(seconds, self.register(REGISTER_B));
        }
        match self.index {
            REGISTER_A => {
                // A driver looks here before it reads the time.
                self.reading = None;
                self.register(REGISTER_A) & !A_UPDATE_IN_PROGRESS
            }
            // No interrupt ever pends.
            REGISTER_C => 0,
            REGISTER_D => D_VALID,
            register => self.register(register),
        }
    }

    fn write_data(&mut self, value: u8) {
        // It may be the time that is written.
        self.reading = None;
        if let Some(field) = Field::at(self.index) {
            let b = self.register(REGISTER_B);
            if let Some(seconds) = field.write(self.guest_seconds(), value, b) {
                self.set_guest_seconds(seconds);
            }
            return;
        }
        match self.index {
            REGISTER_B => {
                let stop = value & B_SET != 0;
                match self.stopped_at {
                    None if stop => self.stopped_at = Some(self.guest_seconds()),
                    Some(seconds) if !stop => {
                        self.stopped_at = None;
                        self.set_guest_seconds(seconds);
                    }
                    _ => {}
                }
            }
            REGISTER_C | REGISTER_D => return,
            _ => {}
        }
        self.registers[usize::from(self.index & INDEX_MASK)] = value;
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (byte, port) in data.iter_mut().zip(offset..) {
            // The index port cannot be read back.
            *byte = if port == 1 { self.read_data() } else { 0xff };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (byte, port) in data.iter().zip(offset..) {
            match port {
                0 => self.index = byte & INDEX_MASK,
                1 => self.write_data(*byte),
                _ => {}
            }
        }
    }
}

impl Device for Rtc {
    fn kind(&self) -> Kind {
        SavedRtc::KIND
    }

    fn save(&self, instance: u32) -> Result<Section, saved_state::Error> {
        let Self {
            now: _,
            index,
            offset_seconds,
            stopped_at,
            // When a machine goes on that was saved, it is another time.
            reading: _,
            registers,
        } = self;
        let saved = SavedRtc {
            index: *index,
            offset_seconds: *offset_seconds,
            stopped_at: *stopped_at,
            registers: registers.to_vec(),
        };
        Section::encode(instance, &saved)
    }

    fn restore(&mut self, section: &Section) -> Result<(), Error> {
        let SavedRtc {
            index,
            offset_seconds,
            stopped_at,
            registers,
        } = section.decode()?;
        let impossible = |reason: &str| Error::Impossible {
            kind: SavedRtc::KIND,
            reason: reason.to_owned(),
        };
        if index & !INDEX_MASK != 0 {
            return Err(impossible("it selects a register that does not exist"));
        }
        let registers: [u8; CMOS_BYTES] = registers
            .try_into()
            .map_err(|_| impossible("its memory has not 128 bytes"))?;
        if stopped_at.is_some() != (registers[usize::from(REGISTER_B)] & B_SET != 0) {
            return Err(impossible("it stands still without having been stopped"));
        }
        self.index = index;
        self.offset_seconds = offset_seconds;
        self.stopped_at = stopped_at;
        self.reading = None;
        self.registers = registers;
        Ok(())
    }

    /// There is no interrupt to send again.
    fn resume(&mut self) {}

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Before the epoch counts as the epoch.
fn host_seconds() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64)
}
