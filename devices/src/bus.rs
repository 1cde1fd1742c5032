//! Who answers at which port or guest-physical address.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use crate::sync::lock;

/// Something that answers reads and writes. `offset` counts from the start of its range, and
/// `offset + data.len()` never reaches past the range's end.
pub trait BusDevice: Send {
    /// Reads into all of `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Two ranges claim the same address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "bus range {base:#x}+{len:#x} is empty, wraps around or overlaps another; place the device elsewhere"
)]
pub struct Overlap {
    /// First address of the range that was refused.
    pub base: u64,
    /// Its length.
    pub len: u64,
}

struct Entry {
    base: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// A space of addresses, ports or guest-physical, and who answers where.
///
/// It is filled before the vCPUs start and shared by them afterwards; a lookup takes no lock, only
/// the access itself takes the device's.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base; no two overlap.
    entries: Vec<Entry>,
}

impl Bus {
    /// A bus on which nobody answers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer for the `len` addresses from `base` on.
    ///
    /// # Errors
    ///
    /// [`Overlap`] when somebody answers for one of them already, or when there are none.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), Overlap> {
        let refused = Overlap { base, len };
        if len == 0 {
            return Err(refused);
        }
        let last = base.checked_add(len - 1).ok_or(refused)?;
        let at = self.entries.partition_point(|entry| entry.base <= base);
        let before_ends = |entry: &Entry| entry.base + (entry.len - 1) < base;
        let free_before = at == 0 || before_ends(&self.entries[at - 1]);
        let free_after = self.entries.get(at).is_none_or(|next| next.base > last);
        if !(free_before && free_after) {
            return Err(refused);
        }
        self.entries.insert(at, Entry { base, len, device });
        Ok(())
    }

    /// Reads from `address`; false when nobody answers there, and `data` is as it was.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                lock(device).read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes to `address`; false when nobody answers there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                lock(device).write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The device that answers for all of `len` bytes from `address` on, and the offset in its range.
    fn find(&self, address: u64, len: usize) -> Option<(&Mutex<dyn BusDevice>, u64)> {
        let at = self.entries.partition_point(|entry| entry.base <= address);
        let entry = &self.entries[at.checked_sub(1)?];
        let offset = address - entry.base;
        let end = offset.checked_add(len as u64)?;
        (end <= entry.len && offset < entry.len).then_some((&*entry.device, offset))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.entries.iter().map(|e| (e.base, e.len)))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    /// Answers with its offset and remembers the last write.
    #[derive(Default)]
    struct Echo {
        written: Option<(u64, Vec<u8>)>,
    }

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            assert!(data != [0xff], "a bug in a device");
            self.written = Some((offset, data.to_vec()));
        }
    }

    fn echo() -> Arc<Mutex<Echo>> {
        Arc::default()
    }

    #[test]
    fn accesses_reach_the_device_at_their_offset() {
        let mut bus = Bus::new();
        let device = echo();
        bus.insert(0x3f8, 8, device.clone()).unwrap();
        bus.insert(0x60, 5, echo()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x3fb, &mut data));
        assert_eq!(data, [3, 3]);
        assert!(bus.write(0x3ff, &[9]));
        assert_eq!(lock(&device).written, Some((7, vec![9])));
    }

    #[test]
    fn accesses_past_an_end_miss() {
        let mut bus = Bus::new();
        bus.insert(0x10, 4, echo()).unwrap();
        bus.insert(0x14, 4, echo()).unwrap();
        bus.insert(u64::MAX - 3, 4, echo()).unwrap();
        let mut data = [7; 4];
        for address in [0x0e, 0x0f, 0x11, 0x13, 0x15, 0x18, u64::MAX - 2, u64::MAX] {
            assert!(!bus.read(address, &mut data), "{address:#x}");
        }
        assert_eq!(data, [7; 4]);
        assert!(bus.read(0x10, &mut data));
        assert!(bus.read(u64::MAX - 3, &mut data));
    }

    #[test]
    fn a_panic_in_a_device_does_not_spread() {
        let mut bus = Bus::new();
        bus.insert(0, 4, echo()).unwrap();
        let bus = Arc::new(bus);
        let other = Arc::clone(&bus);
        assert!(
            thread::spawn(move || other.write(0, &[0xff]))
                .join()
                .is_err()
        );
        assert!(bus.read(0, &mut [0]));
    }

    proptest! {
        #[test]
        fn a_range_is_taken_exactly_when_it_overlaps_none(
            ranges in proptest::collection::vec((0u64..64, 0u64..8), 0..32),
        ) {
            let mut bus = Bus::new();
            let mut taken = [false; 80];
            for (base, len) in ranges {
                let cells = &mut taken[base as usize..(base + len) as usize];
                let free = len > 0 && cells.iter().all(|cell| !cell);
                prop_assert_eq!(bus.insert(base, len, echo()).is_ok(), free);
                if free {
                    cells.fill(true);
                }
            }
            for (address, cell) in taken.iter().enumerate() {
                prop_assert_eq!(bus.read(address as u64, &mut [0]), *cell);
            }
        }
    }
}
