//! ACPI tables: how a stock kernel finds processors, interrupts and devices.
//!
//! The machine is hardware-reduced (ACPI specification, section 4.1): no fixed event registers and no
//! system control interrupt; it is switched off by the sleep control register and reset by the
//! keyboard controller's command.

use acpi_tables::{
    Aml, AmlSink,
    aml::{
        Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
        ResourceTemplate, Scope,
    },
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::{Error, layout};
use crate::platform::{
    COM1_IRQ, COM1_PORT, EVENT_GSI, I8042_PORT, IOAPIC_ADDRESS, LAPIC_ADDRESS, RTC_PORT,
    SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};

const OEM_ID: [u8; 6] = *b"FERMAT";
const OEM_TABLE_ID: [u8; 8] = *b"FERMATA ";
const OEM_REVISION: u32 = 1;
const DSDT_REVISION: u8 = 6;
/// Bytes of the header that every table begins with.
const HEADER_BYTES: u32 = 36;
/// Command of the keyboard controller that resets the machine.
const RESET_COMMAND: u8 = 0xfe;
/// Boot architecture flags: there is no VGA, and no message-signalled interrupts.
const NO_VGA: u16 = 1 << 2;
const NO_MSI: u16 = 1 << 3;
/// A device known by this id is a virtio-mmio device (Linux, drivers/virtio/virtio_mmio.c).
const VIRTIO_MMIO_ID: &str = "LNRO0005";

/// The id of a generic event device (ACPI 6.5, section 5.6.9), and how it calls what it knows of one.
const EVENT_DEVICE_ID: &str = "ACPI0013";
const EVENT_METHOD: &str = "_EVT";
/// What a driver of the machine's generation looks for, whatever the vendor's own id.
const GENERATION_ID: &str = "FRMTVGID";
const GENERATION_COMPATIBLE_ID: &str = "VM_Gen_Counter";
const GENERATION_PATH: &str = "\\_SB_.VGEN";
/// What a driver of the vmclock page looks for, whatever the vendor's own id.
const VMCLOCK_ID: &str = "FRMTVCLK";
const VMCLOCK_COMPATIBLE_ID: &str = "VMCLOCK";
const VMCLOCK_BYTES: u32 = 0x1000;
/// The notification that the generation has changed.
const GENERATION_CHANGED: u8 = 0x80;

/// A device that the guest finds by its ACPI description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MmioDevice {
    /// Guest-physical address of its registers.
    pub(crate) gpa: u32,
    /// Bytes of its registers.
    pub(crate) bytes: u32,
    /// Its interrupt line.
    pub(crate) gsi: u32,
}

/// Writes the tables of a machine; returns the address of the root pointer.
pub(crate) fn write(guest: &GuestMemory, vcpus: u32, devices: &[MmioDevice]) -> Result<u64, Error> {
    let mut writer = Writer {
        guest,
        next: layout::ACPI + Rsdp::len() as u64,
    };
    let dsdt = writer.put(&dsdt(devices))?;
    let fadt = writer.put(&fadt(dsdt))?;
    let madt = writer.put(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.put(&xsdt)?;
    writer.next = layout::ACPI;
    writer.put(&Rsdp::new(OEM_ID, xsdt))
}

/// Puts one table behind the other.
struct Writer<'a> {
    guest: &'a GuestMemory,
    next: u64,
}

impl Writer<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<u64, Error> {
        let mut bytes = Bytecode::default();
        table.to_aml_bytes(&mut bytes);
        let at = self.next.next_multiple_of(16);
        self.next = at + bytes.0.len() as u64;
        debug_assert!(
            self.next <= layout::HIGH_MEMORY,
            "the tables outgrew their room"
        );
        self.guest.write_slice(&bytes.0, GuestAddress(at))?;
        Ok(at)
    }
}

#[derive(Default)]
struct Bytecode(Vec<u8>);

impl AmlSink for Bytecode {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

/// The fixed description.
fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_MSI).into();
    fadt.reset_reg = port(I8042_PORT + 4);
    fadt.reset_value = RESET_COMMAND;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// An 8-bit register at a port.
fn port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}

/// Processors and interrupt controllers. A vCPU's number is its APIC id.
fn madt(vcpus: u32) -> impl Aml {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LAPIC_ADDRESS),
    );
    for id in 0..vcpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_ADDRESS, 0));
    madt
}

/// The devices.
fn dsdt(devices: &[MmioDevice]) -> Sdt {
    let mut body = Bytecode::default();
    isa_device("COM1", "PNP0501", COM1_PORT, 8, Some(COM1_IRQ), &mut body);
    // Without an interrupt: its alarm never fires.
    isa_device("RTC0", "PNP0B00", RTC_PORT, 2, None, &mut body);
    for (number, device) in (0u8..).zip(devices) {
        virtio_device(number, device, &mut body);
    }
    generation(&mut body);
    vmclock(&mut body);
    events(&mut body);
    let s5 = devices::SLEEP_TYPE_S5;
    Name::new(
        Path::new("\\_S5_"),
        &Package::new(vec![&s5, &s5, &0u8, &0u8]),
    )
    .to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&body.0);
    dsdt
}

/// Where the machine's generation is.
fn generation(out: &mut Bytecode) {
    let (low, high) = (layout::GENERATION as u32, (layout::GENERATION >> 32) as u32);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("VGEN"),
            vec![
                &Name::new(Path::new("_HID"), &GENERATION_ID),
                &Name::new(Path::new("_CID"), &GENERATION_COMPATIBLE_ID),
                &Name::new(Path::new("_DDN"), &GENERATION_COMPATIBLE_ID),
                &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
            ],
        )],
    )
    .to_aml_bytes(out);
}

/// Where the vmclock page is.
fn vmclock(out: &mut Bytecode) {
    let page = Memory32Fixed::new(false, layout::VMCLOCK as u32, VMCLOCK_BYTES);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("VCLK"),
            vec![
                &Name::new(Path::new("_HID"), &VMCLOCK_ID),
                &Name::new(Path::new("_CID"), &VMCLOCK_COMPATIBLE_ID),
                &Name::new(Path::new("_DDN"), &VMCLOCK_COMPATIBLE_ID),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&page])),
            ],
        )],
    )
    .to_aml_bytes(out);
}

/// What tells that the generation has changed. There is one event, so that the method need not look which.
fn events(out: &mut Bytecode) {
    let generation = Path::new(GENERATION_PATH);
    let line = Interrupt::new(true, true, false, false, EVENT_GSI);
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("GED0"),
            vec![
                &Name::new(Path::new("_HID"), &EVENT_DEVICE_ID),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&line])),
                &Method::new(
                    Path::new(EVENT_METHOD),
                    1,
                    true,
                    vec![&Notify::new(&generation, &GENERATION_CHANGED)],
                ),
            ],
        )],
    )
    .to_aml_bytes(out);
}

/// A device of the PC, at its port and with its edge-triggered interrupt if it has one.
fn isa_device(name: &str, id: &str, port: u16, ports: u8, irq: Option<u32>, out: &mut Bytecode) {
    let io = IO::new(port, port, 1, ports);
    let interrupt = irq.map(|irq| Interrupt::new(true, true, false, false, irq));
    let mut resources: Vec<&dyn Aml> = vec![&io];
    resources.extend(interrupt.as_ref().map(|interrupt| interrupt as &dyn Aml));
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(name),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new(id)),
                &Name::new(Path::new("_UID"), &0u8),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
            ],
        )],
    )
    .to_aml_bytes(out);
}

/// A virtio device behind its memory-mapped transport.
fn virtio_device(number: u8, device: &MmioDevice, out: &mut Bytecode) {
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(&format!("V{number:03}")),
            vec![
                &Name::new(Path::new("_HID"), &VIRTIO_MMIO_ID),
                &Name::new(Path::new("_UID"), &number),
                // The device sees the guest's caches.
                &Name::new(Path::new("_CCA"), &1u8),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, device.gpa, device.bytes),
                        &Interrupt::new(true, true, false, false, device.gsi),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use memory::{Layout, MIN_MEMORY_BYTES, MachineMemory};

    use super::*;

    fn sum(guest: &GuestMemory, at: u64, bytes: usize) -> u8 {
        let mut table = vec![0; bytes];
        guest.read_slice(&mut table, GuestAddress(at)).unwrap();
        table
            .iter()
            .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reachable_and_adds_up_to_zero() {
        let memory = MachineMemory::zeroed(Layout::new(MIN_MEMORY_BYTES).unwrap()).unwrap();
        let guest = memory.guest();
        let device = MmioDevice {
            gpa: 0xd000_0000,
            bytes: 0x1000,
            gsi: 5,
        };
        let root = write(guest, 32, &[device; 16]).unwrap();
        assert_eq!(sum(guest, root, 20), 0);
        assert_eq!(sum(guest, root, 36), 0);
        let address = |at| guest.read_obj::<u64>(GuestAddress(at)).unwrap();
        let length = |at| guest.read_obj::<u32>(GuestAddress(at + 4)).unwrap() as usize;
        let xsdt = address(root + 24);
        let (fadt, madt) = (address(xsdt + 36), address(xsdt + 44));
        let dsdt = address(fadt + 140);
        for (table, name) in [
            (xsdt, b"XSDT"),
            (fadt, b"FACP"),
            (madt, b"APIC"),
            (dsdt, b"DSDT"),
        ] {
            assert_eq!(
                &guest.read_obj::<[u8; 4]>(GuestAddress(table)).unwrap(),
                name
            );
            assert_eq!(
                sum(guest, table, length(table)),
                0,
                "{}",
                name.escape_ascii()
            );
            assert!(table + length(table) as u64 <= layout::HIGH_MEMORY);
        }
    }
}
