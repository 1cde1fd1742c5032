//! One connection: what may be sent when (virtio 1.3, 5.10.6.3 and 5.10.6.5). No I/O is done here.

use std::num::Wrapping;

use super::packet::{Header, NO_RECEIVE, NO_SEND, Operation};

/// What the guest may send before the host's side has taken any of it.
pub(super) const BUFFER_BYTES: u32 = 64 << 10;

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The guest was asked, and has not answered.
    Asked,
    /// Bytes flow.
    Open,
    /// It has been told, or needs not be, that this is the end.
    Over,
}

/// How a guest breaks the rules of a connection, which is then reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// A connection, as far as the guest is concerned.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    pub(super) stage: Stage,
    /// Bytes that the guest has sent, and those of them that the host has taken.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// What the guest was last told of the latter.
    told: Wrapping<u32>,
    /// Bytes sent to the guest, those that it has taken, and the room that it has for what it has not.
    sent: Wrapping<u32>,
    taken: Wrapping<u32>,
    room: u32,
    /// The guest will send no more, or receive no more.
    pub(super) guest_sends: bool,
    pub(super) guest_receives: bool,
    /// The host will send no more, and the guest has been told so.
    host_sends: bool,
    shutdown_told: bool,
    /// Packets that are due.
    request: bool,
    response: bool,
    credit: bool,
    reset: bool,
}

impl Connection {
    fn new(stage: Stage) -> Self {
        Self {
            stage,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            taken: Wrapping(0),
            room: 0,
            guest_sends: true,
            guest_receives: true,
            host_sends: true,
            shutdown_told: false,
            request: false,
            response: false,
            credit: false,
            reset: false,
        }
    }

    /// One that somebody on the host wants.
    pub(super) fn to_guest() -> Self {
        Self {
            request: true,
            ..Self::new(Stage::Asked)
        }
    }

    /// One that the guest wants, by `header`, and has.
    pub(super) fn from_guest(header: &Header) -> Self {
        let mut connection = Self {
            response: true,
            ..Self::new(Stage::Open)
        };
        connection.learn(header);
        connection
    }

    /// Takes in what every packet of the guest's says of its buffers.
    fn learn(&mut self, header: &Header) {
        let taken = Wrapping(header.forwarded);
        // It cannot have taken what was not sent; who claims that has no credit.
        self.room = if (self.sent - taken).0 <= (self.sent - self.taken).0 {
            self.taken = taken;
            header.buffer_bytes
        } else {
            0
        };
    }

    /// Takes in a packet of the guest's; of data there are `header.len` bytes, which the caller keeps until
    /// [`Connection::forward`].
    pub(super) fn take(&mut self, operation: Operation, header: &Header) -> Result<(), Broken> {
        self.learn(header);
        match (operation, self.stage) {
            (_, Stage::Over) => {}
            (Operation::Response, Stage::Asked) => self.stage = Stage::Open,
            (Operation::Reset, _) => self.stage = Stage::Over,
            (Operation::Shutdown, Stage::Open) => {
                self.guest_receives &= header.flags & NO_RECEIVE == 0;
                self.guest_sends &= header.flags & NO_SEND == 0;
            }
            (Operation::Data, Stage::Open) if self.guest_sends => {
                let unforwarded = (self.received - self.forwarded).0;
                if header.len > BUFFER_BYTES - unforwarded {
                    return Err(Broken);
                }
                self.received += header.len;
            }
            (Operation::CreditUpdate, _) => {}
            (Operation::CreditRequest, _) => self.credit = true,
            _ => return Err(Broken),
        }
        Ok(())
    }

    /// The host has taken `bytes` of what the guest has sent.
    pub(super) fn forward(&mut self, bytes: u32) {
        self.forwarded += bytes;
        // In time for a guest that has filled half of the buffer to go on without a pause.
        self.credit |= (self.forwarded - self.told).0 >= BUFFER_BYTES / 2;
    }

    /// Bytes that the guest has sent and the host has not taken.
    pub(super) fn unforwarded(&self) -> u32 {
        (self.received - self.forwarded).0
    }

    /// Whether the guest takes, now or later, what the host sends.
    pub(super) fn takes(&self) -> bool {
        self.stage != Stage::Over && self.guest_receives
    }

    /// How many bytes may be sent to the guest now.
    pub(super) fn credit(&self) -> u32 {
        if self.stage == Stage::Open && self.guest_receives && self.host_sends {
            self.room.saturating_sub((self.sent - self.taken).0)
        } else {
            0
        }
    }

    /// The host has nothing more to send.
    pub(super) fn end_of_host(&mut self) {
        self.host_sends = false;
    }

    /// Ends it, and has the guest told.
    pub(super) fn reset(&mut self) {
        if self.stage != Stage::Over {
            self.stage = Stage::Over;
            self.reset = true;
        }
    }

    /// Ends it if neither side has anything left to say.
    pub(super) fn finish(&mut self) {
        let guest_done = !self.guest_sends && self.unforwarded() == 0;
        if self.stage == Stage::Open && guest_done && (!self.host_sends || !self.guest_receives) {
            self.reset();
        }
    }

    /// Whether it can be forgotten.
    pub(super) fn is_gone(&self) -> bool {
        self.stage == Stage::Over && !self.reset
    }

    /// Whether [`Connection::next_control`] has something.
    pub(super) fn has_control(&self) -> bool {
        self.reset || self.stage != Stage::Over && self.due().is_some()
    }

    fn due(&self) -> Option<(Operation, u32)> {
        if self.request {
            Some((Operation::Request, 0))
        } else if self.response {
            Some((Operation::Response, 0))
        } else if self.stage == Stage::Open && !self.host_sends && !self.shutdown_told {
            Some((Operation::Shutdown, NO_SEND))
        } else if self.credit {
            Some((Operation::CreditUpdate, 0))
        } else {
            None
        }
    }

    /// The next packet without data that the guest shall have, and its flags.
    pub(super) fn next_control(&mut self) -> Option<(Operation, u32)> {
        if self.reset {
            self.reset = false;
            return Some((Operation::Reset, 0));
        }
        if self.stage == Stage::Over {
            return None;
        }
        let due = self.due()?;
        match due.0 {
            Operation::Request => self.request = false,
            Operation::Response => self.response = false,
            Operation::Shutdown => self.shutdown_told = true,
            _ => self.credit = false,
        }
        Some(due)
    }

    /// `bytes` of data go to the guest.
    pub(super) fn send(&mut self, bytes: u32) {
        self.sent += bytes;
    }

    /// Fills in what every packet says of the buffers here.
    pub(super) fn tell(&mut self, header: &mut Header) {
        header.buffer_bytes = BUFFER_BYTES;
        header.forwarded = self.forwarded.0;
        self.told = self.forwarded;
        self.credit = false;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What either side may do.
    #[derive(Clone, Debug)]
    enum Action {
        GuestSends(u32),
        GuestTakes(u32),
        HostSends(u32),
        HostTakes(u32),
        Packets,
        GuestEnds(u32),
        HostEnds,
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            4 => (0..2 * BUFFER_BYTES).prop_map(Action::GuestSends),
            4 => (0..2 * BUFFER_BYTES).prop_map(Action::GuestTakes),
            4 => (0..2 * BUFFER_BYTES).prop_map(Action::HostSends),
            4 => (0..2 * BUFFER_BYTES).prop_map(Action::HostTakes),
            4 => Just(Action::Packets),
            1 => (0..4u32).prop_map(Action::GuestEnds),
            1 => Just(Action::HostEnds),
        ]
    }

    proptest! {
        /// With a guest that keeps the rules: it is never sent more than it has room for, never told that
        /// it may send more than there is room for here, and neither side waits for the other for ever.
        #[test]
        fn credit_is_kept_by_both_sides(room in 1u32..200_000, actions in prop::collection::vec(action(), 0..200)) {
            let mut guest = Header { buffer_bytes: room, ..Header::default() };
            let mut connection = Connection::from_guest(&guest);
            let (mut told, mut sent_by_guest, mut in_guest) = (0u32, 0u32, 0u32);
            let mut ended = false;
            for action in actions {
                let open = connection.stage == Stage::Open;
                match action {
                    Action::GuestSends(bytes) if open && connection.guest_sends => {
                        guest.len = bytes.min(BUFFER_BYTES - (sent_by_guest - told));
                        sent_by_guest += guest.len;
                        prop_assert_eq!(connection.take(Operation::Data, &guest), Ok(()));
                        prop_assert!(connection.unforwarded() <= BUFFER_BYTES);
                    }
                    Action::GuestTakes(bytes) if open => {
                        let bytes = bytes.min(in_guest);
                        in_guest -= bytes;
                        guest.forwarded += bytes;
                        prop_assert_eq!(connection.take(Operation::CreditUpdate, &guest), Ok(()));
                    }
                    Action::HostSends(bytes) => {
                        let bytes = bytes.min(connection.credit());
                        connection.send(bytes);
                        in_guest += bytes;
                        prop_assert!(in_guest <= room);
                    }
                    Action::HostTakes(bytes) => {
                        connection.forward(bytes.min(connection.unforwarded()));
                        connection.finish();
                    }
                    Action::Packets => while connection.has_control() {
                        prop_assert!(connection.next_control().is_some());
                        let mut header = Header::default();
                        connection.tell(&mut header);
                        told = header.forwarded;
                        prop_assert!(sent_by_guest - told <= BUFFER_BYTES);
                    },
                    Action::GuestEnds(flags) if open => {
                        guest.flags = flags;
                        prop_assert_eq!(connection.take(Operation::Shutdown, &guest), Ok(()));
                        connection.finish();
                    }
                    Action::HostEnds => {
                        ended = true;
                        connection.end_of_host();
                        connection.finish();
                        prop_assert_eq!(connection.credit(), 0);
                    }
                    _ => {}
                }
            }
            // Whatever happened: when each side takes what there is, there is credit again, or an end.
            connection.forward(connection.unforwarded());
            connection.finish();
            guest.forwarded += in_guest;
            let _ = connection.take(Operation::CreditUpdate, &guest);
            while connection.next_control().is_some() {}
            if connection.stage == Stage::Open {
                prop_assert!(connection.credit() > 0 || ended || !connection.guest_receives);
                prop_assert!(connection.guest_sends || !ended);
            } else {
                prop_assert!(connection.is_gone());
            }
        }

        /// With a guest that does not: every packet is taken or refused, and what is kept stays bounded.
        #[test]
        fn no_packet_breaks_the_bounds(packets in prop::collection::vec((0u16..9, any::<[u32; 4]>()), 0..50)) {
            for mut connection in [Connection::to_guest(), Connection::from_guest(&Header::default())] {
                for (number, [len, flags, buffer_bytes, forwarded]) in &packets {
                    let header = Header {
                        len: *len % (2 * BUFFER_BYTES),
                        flags: *flags,
                        buffer_bytes: *buffer_bytes,
                        forwarded: *forwarded,
                        ..Header::default()
                    };
                    if let Some(operation) = Operation::of(*number)
                        && connection.take(operation, &header).is_err()
                    {
                        connection.reset();
                    }
                    prop_assert!(connection.unforwarded() <= BUFFER_BYTES);
                    prop_assert!(connection.credit() <= *buffer_bytes);
                }
            }
        }
    }

    #[test]
    fn a_guest_that_claims_to_have_taken_what_was_not_sent_has_no_credit() {
        let header = Header {
            buffer_bytes: 100,
            ..Header::default()
        };
        let mut connection = Connection::from_guest(&header);
        assert_eq!(connection.credit(), 100);
        connection.send(60);
        let wrong = Header {
            forwarded: 61,
            ..header
        };
        connection.take(Operation::CreditUpdate, &wrong).unwrap();
        assert_eq!(connection.credit(), 0);
        let right = Header {
            forwarded: 60,
            ..header
        };
        connection.take(Operation::CreditUpdate, &right).unwrap();
        assert_eq!(connection.credit(), 100);
    }
}
