//! The machine's fixed addresses, ports and interrupt lines: a PC's where a PC has the device.

use hypervisor::MAX_VCPUS;

/// The serial port.
pub(crate) const COM1_PORT: u16 = 0x3f8;
pub(crate) const COM1_PORTS: u64 = 8;
pub(crate) const COM1_IRQ: u32 = 4;

/// What ACPI's generic event device raises: where a PC has its second serial port.
pub(crate) const EVENT_GSI: u32 = 3;

/// The keyboard controller, of which only the reset line is there: data port, and command port 4 above.
pub(crate) const I8042_PORT: u16 = 0x60;
pub(crate) const I8042_PORTS: u64 = 5;

/// The real-time clock: index port and data port.
pub(crate) const RTC_PORT: u16 = 0x70;
pub(crate) const RTC_PORTS: u64 = 2;
pub(crate) const RTC_IRQ: u32 = 8;

/// ACPI's sleep control and sleep status registers.
pub(crate) const SLEEP_CONTROL_PORT: u16 = 0x604;
pub(crate) const SLEEP_STATUS_PORT: u16 = SLEEP_CONTROL_PORT + 1;
pub(crate) const SLEEP_PORTS: u64 = 2;

/// Where a guest says that a run is done. ISA cards decode ten bits of a port's number, of which these, 0xe4, are no card's and no device's
/// of a PC; and above the ten nobody who looks for devices looks here: ACPI's and the ICH's are from 0x400 to 0x7ff, QEMU's at 0x501 and
/// 0x510, EISA's identity at 0xc80, IPMI at 0xca2, AMD's power management at 0xcd6, PCI's configuration from 0xcf8 on.
pub(crate) const RUN_PORT: u16 = 0xce4;

/// The interrupt controllers, where KVM has them.
pub(crate) const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
pub(crate) const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_LINES: u32 = 24;

/// Registers of the first virtio device; each has a page.
const VIRTIO_BASE: u32 = 0xd000_0000;
pub(crate) const VIRTIO_BYTES: u32 = 0x1000;
const FIRST_VIRTIO_GSI: u32 = 5;

/// The most virtio devices a machine can have: one interrupt line each.
pub(crate) const MAX_VIRTIO: usize = (IOAPIC_LINES - FIRST_VIRTIO_GSI - 1) as usize;

// An APIC id of 8 bits is enough, and the broadcast id 255 stays free.
const _: () = assert!(MAX_VCPUS < 255);

/// Where virtio device `number` has its registers.
pub(crate) fn virtio_gpa(number: usize) -> u32 {
    VIRTIO_BASE + number as u32 * VIRTIO_BYTES
}

/// The interrupt line of virtio device `number`; the real-time clock's is left out.
pub(crate) fn virtio_gsi(number: usize) -> u32 {
    let line = FIRST_VIRTIO_GSI + number as u32;
    if line < RTC_IRQ { line } else { line + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_virtio_device_has_a_line_of_its_own() {
        let lines: Vec<u32> = (0..MAX_VIRTIO).map(virtio_gsi).collect();
        assert!(lines.is_sorted_by(|a, b| a < b));
        assert!(
            lines
                .iter()
                .all(|line| *line < IOAPIC_LINES && ![EVENT_GSI, COM1_IRQ, RTC_IRQ].contains(line))
        );
    }
}
