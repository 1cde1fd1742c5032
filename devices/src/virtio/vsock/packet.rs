//! The header of every packet (virtio 1.3, 5.10.6).

use super::{HOST_CID, STREAM};

/// Bytes of `struct virtio_vsock_hdr`.
pub(super) const HEADER_BYTES: usize = 44;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Operation {
    const ALL: [(u16, Self); 7] = [
        (1, Self::Request),
        (2, Self::Response),
        (3, Self::Reset),
        (4, Self::Shutdown),
        (5, Self::Data),
        (6, Self::CreditUpdate),
        (7, Self::CreditRequest),
    ];

    pub(super) fn of(number: u16) -> Option<Self> {
        let found = Self::ALL.into_iter().find(|(n, _)| *n == number);
        found.map(|(_, operation)| operation)
    }

    fn number(self) -> u16 {
        let found = Self::ALL.into_iter().find(|(_, o)| *o == self);
        found.map_or(0, |(number, _)| number)
    }
}

/// The sender of a shutdown will not receive,
pub(super) const NO_RECEIVE: u32 = 1;
/// or will not send.
pub(super) const NO_SEND: u32 = 2;

/// Names a connection: a port of the host's and one of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// A header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) operation: u16,
    pub(super) flags: u32,
    pub(super) buffer_bytes: u32,
    pub(super) forwarded: u32,
}

impl Header {
    /// A packet for the guest of `guest_cid`.
    pub(super) fn to_guest(guest_cid: u64, ports: Ports, operation: Operation) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            operation: operation.number(),
            ..Self::default()
        }
    }

    /// The connection that a packet of the guest's is about.
    pub(super) fn ports(&self) -> Ports {
        Ports {
            host: self.dst_port,
            guest: self.src_port,
        }
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = &bytes[..];
        let mut take = |n: usize| {
            let (now, later) = rest.split_at(n.min(rest.len()));
            rest = later;
            let mut word = [0; 8];
            word[..now.len()].copy_from_slice(now);
            u64::from_le_bytes(word)
        };
        Self {
            src_cid: take(8),
            dst_cid: take(8),
            src_port: take(4) as u32,
            dst_port: take(4) as u32,
            len: take(4) as u32,
            kind: take(2) as u16,
            operation: take(2) as u16,
            flags: take(4) as u32,
            buffer_bytes: take(4) as u32,
            forwarded: take(4) as u32,
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let Self {
            src_cid,
            dst_cid,
            src_port,
            dst_port,
            len,
            kind,
            operation,
            flags,
            buffer_bytes,
            forwarded,
        } = self;
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend(src_cid.to_le_bytes());
        bytes.extend(dst_cid.to_le_bytes());
        bytes.extend(src_port.to_le_bytes());
        bytes.extend(dst_port.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(operation.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(buffer_bytes.to_le_bytes());
        bytes.extend(forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(|i| i as u8);
        let header = Header::decode(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port, 0x1716_1514);
        assert_eq!((header.kind, header.operation), (0x1d1c, 0x1f1e));
        assert_eq!(header.forwarded, 0x2b2a_2928);
        assert_eq!(header.encode(), bytes);
    }

    #[test]
    fn operations_have_numbers_and_others_have_none() {
        for number in 0..=u16::MAX {
            match Operation::of(number) {
                Some(operation) => assert_eq!(operation.number(), number),
                None => assert!(!(1..=7).contains(&number)),
            }
        }
    }
}
