//! The sleep registers of hardware-reduced ACPI.

use crate::{BusDevice, GuestRequest, OnGuestRequest};

/// The sleep type that the DSDT's `_S5` object must name for soft off.
pub const SLEEP_TYPE_S5: u8 = 5;

const SLEEP_CONTROL: u64 = 0;
/// Bits 2 to 4 of the control register: the sleep type.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
/// Bit 5 of the control register: go to sleep. It reads as zero.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The sleep control register and, one port above, the sleep status register (ACPI 6.5, 4.8.3.7).
///
/// The one sleep state is S5. No bit of either register is ever kept: the machine does not wake
/// from S5, so that the wake status stays clear, and the device has no state.
pub struct AcpiPm {
    requests: OnGuestRequest,
}

impl AcpiPm {
    /// Registers that pass the guest's power-off on to `requests`.
    pub fn new(requests: OnGuestRequest) -> Self {
        Self { requests }
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (SLEEP_CONTROL, [value, ..]) = (offset, data) else {
            return;
        };
        let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
        if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5 {
            (self.requests)(GuestRequest::PowerOff);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{conformance::Requests, *};

    #[test]
    fn only_an_enabled_s5_powers_off() {
        let requests = Requests::default();
        let mut pm = AcpiPm::new(requests.callback());
        pm.write(0, &[SLEEP_TYPE_S5 << 2]);
        pm.write(0, &[3 << 2 | 1 << 5]);
        pm.write(1, &[SLEEP_TYPE_S5 << 2 | 1 << 5]);
        assert_eq!(requests.taken(), []);
        pm.write(0, &[SLEEP_TYPE_S5 << 2 | 1 << 5]);
        assert_eq!(requests.taken(), [GuestRequest::PowerOff]);
    }
}
