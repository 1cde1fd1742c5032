//! The keyboard controller, as far as it resets the machine.

use std::convert::Infallible;

use vm_superio::{I8042Device, Trigger};

use crate::{BusDevice, GuestRequest, OnGuestRequest};

struct RequestReset(OnGuestRequest);

impl Trigger for RequestReset {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        (self.0)(GuestRequest::Reset);
        Ok(())
    }
}

/// The five ports from 0x60 on. It knows one command, the CPU reset that Linux uses as its last
/// resort (`reboot=k`), and has no state.
pub struct I8042(I8042Device<RequestReset>);

impl I8042 {
    /// A controller that passes the guest's reset on to `requests`.
    pub fn new(requests: OnGuestRequest) -> Self {
        Self(I8042Device::new(RequestReset(requests)))
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (byte, register) in data.iter_mut().zip(offset as u8..) {
            *byte = self.0.read(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (byte, register) in data.iter().zip(offset as u8..) {
            let Ok(()) = self.0.write(register, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{conformance::Requests, *};

    #[test]
    fn the_reset_command_is_passed_on_and_nothing_else_is() {
        let requests = Requests::default();
        let mut controller = I8042::new(requests.callback());
        controller.write(0, &[0xfe]);
        controller.write(4, &[0xd1]);
        assert_eq!(requests.taken(), []);
        controller.write(4, &[0xfe]);
        assert_eq!(requests.taken(), [GuestRequest::Reset]);
    }
}
