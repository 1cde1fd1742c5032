use super::*;
use crate::{
    conformance::{Subject, conforms},
    sync::lock,
    virtio::{
        MMIO_BYTES, MmioTransport,
        driver::{self, Driver, Part, VERSION_1},
    },
};

struct Source(GuestMemory);

impl Subject for Source {
    type Device = MmioTransport;
    type Saved = SavedEntropy;
    const SPAN: u64 = MMIO_BYTES;

    fn new() -> Self {
        Self(driver::memory())
    }

    fn fresh(&self) -> MmioTransport {
        driver::transport(Entropy::new(), &self.0).0
    }

    fn work(&self, device: &mut MmioTransport) {
        let mut driver = Driver::start(device, &self.0, VERSION_1);
        driver.request(device, &[Part::In(16)]);
        driver.offer(&[Part::In(16)]);
    }

    fn go_on(&self, device: &mut MmioTransport) {
        crate::Device::resume(device);
        lock(device.worker()).process(0);
    }
}

conforms!(conformance, super::Source);

#[test]
fn buffers_are_filled_with_different_bytes() {
    let memory = driver::memory();
    let (mut device, _line) = driver::transport(Entropy::new(), &memory);
    let mut driver = Driver::start(&mut device, &memory, VERSION_1);
    let (len, first) = driver.request(&mut device, &[Part::In(40), Part::In(24)]);
    assert_eq!(len, 64);
    let (_, second) = driver.request(&mut device, &[Part::In(40), Part::In(24)]);
    assert!(first.concat().iter().any(|&byte| byte != 0));
    assert_ne!(first, second);
}

#[test]
fn a_large_buffer_gets_a_bounded_number_of_bytes() {
    let memory = driver::memory();
    let (mut device, _line) = driver::transport(Entropy::new(), &memory);
    let mut driver = Driver::start(&mut device, &memory, VERSION_1);
    let (len, filled) = driver.request(&mut device, &[Part::In(3 * REQUEST_BYTES)]);
    assert_eq!(len as usize, REQUEST_BYTES);
    assert!(filled[0][REQUEST_BYTES..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_machine_goes_on_with_what_was_available_when_it_was_saved() {
    let source = Source::new();
    let mut device = source.fresh();
    let mut driver = Driver::start(&mut device, &source.0, VERSION_1);
    driver.request(&mut device, &[Part::In(16)]);
    let place = driver.offer(&[Part::In(16)])[0];
    let section = crate::Device::save(&device, 0).unwrap();
    drop(device);
    let (mut restored, line) = driver::transport(Entropy::new(), &source.0);
    crate::Device::restore(&mut restored, &section).unwrap();
    lock(restored.worker()).process(0);
    assert_eq!(driver.used(), 2);
    assert_ne!(driver.bytes(place, 16), [0; 16]);
    assert_eq!(line.edges(), 1);
}
