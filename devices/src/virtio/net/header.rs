//! The header before every frame (virtio 1.3, 5.1.6), and what may be asked for in it.

use virtio_bindings::virtio_net::*;

/// Bytes of `struct virtio_net_hdr` without the fields of features that are not offered.
pub(super) const HEADER_BYTES: usize = 12;

/// The longest frame: an IP packet of 64 KiB that is yet to be segmented, with an Ethernet header and a
/// VLAN tag.
pub(super) const MAX_FRAME_BYTES: usize = 65_535 + 18;

/// The shortest frame: an Ethernet header.
pub(super) const MIN_FRAME_BYTES: usize = 14;

/// Where the number of buffers that a received frame takes is written.
pub(super) const BUFFERS_AT: std::ops::Range<usize> = 10..12;

const FLAGS_AT: usize = 0;
const SEGMENTATION_AT: usize = 1;

/// The feature bits by which one direction's offloads are negotiated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Direction {
    /// Checksums may be left to who receives the frame.
    pub(super) checksum: u64,
    /// TCP over IPv4 may be left unsegmented,
    pub(super) tso4: u64,
    /// and over IPv6,
    pub(super) tso6: u64,
    /// and both with explicit congestion notification.
    pub(super) ecn: u64,
}

/// From the device to the driver.
pub(super) const TO_GUEST: Direction = Direction {
    checksum: 1 << VIRTIO_NET_F_GUEST_CSUM,
    tso4: 1 << VIRTIO_NET_F_GUEST_TSO4,
    tso6: 1 << VIRTIO_NET_F_GUEST_TSO6,
    ecn: 1 << VIRTIO_NET_F_GUEST_ECN,
};

/// From the driver to the device.
pub(super) const FROM_GUEST: Direction = Direction {
    checksum: 1 << VIRTIO_NET_F_CSUM,
    tso4: 1 << VIRTIO_NET_F_HOST_TSO4,
    tso6: 1 << VIRTIO_NET_F_HOST_TSO6,
    ecn: 1 << VIRTIO_NET_F_HOST_ECN,
};

/// All that can be negotiated.
pub(super) const OFFLOADS: u64 = TO_GUEST.all() | FROM_GUEST.all();

impl Direction {
    const fn all(self) -> u64 {
        self.checksum | self.tso4 | self.tso6 | self.ecn
    }

    /// Whether `features` have for each what it needs (virtio 1.3, 5.1.3.1): nothing can be segmented later whose checksums are
    /// not left for later too, and no congestion be notified of in what is not.
    pub(super) fn makes_sense(self, features: u64) -> bool {
        let segments = features & (self.tso4 | self.tso6) != 0;
        let checks = features & self.checksum != 0;
        let notifies = features & self.ecn != 0;
        (checks || !segments) && (segments || !notifies)
    }

    /// Whether `header` asks for no more than was negotiated. Flags that nobody knows are left alone, as
    /// the specification wants it.
    pub(super) fn permits(self, features: u64, header: &[u8]) -> bool {
        let (Some(&flags), Some(&segmentation)) =
            (header.get(FLAGS_AT), header.get(SEGMENTATION_AT))
        else {
            return false;
        };
        let has = |bit: u64| features & bit != 0;
        if u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 && !has(self.checksum) {
            return false;
        }
        let segmentation = u32::from(segmentation);
        let notified = segmentation & VIRTIO_NET_HDR_GSO_ECN != 0;
        match segmentation & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => !notified,
            VIRTIO_NET_HDR_GSO_TCPV4 => has(self.tso4) && (!notified || has(self.ecn)),
            VIRTIO_NET_HDR_GSO_TCPV6 => has(self.tso6) && (!notified || has(self.ecn)),
            _ => false,
        }
    }
}

/// Whether the frame behind `header` is yet to be segmented.
pub(super) fn is_unsegmented(header: &[u8]) -> bool {
    let segmentation = header.get(SEGMENTATION_AT).copied().map(u32::from);
    segmentation.is_some_and(|kind| kind & !VIRTIO_NET_HDR_GSO_ECN != VIRTIO_NET_HDR_GSO_NONE)
}

/// Takes back that the checksums of a frame were found right, of which a driver that did not negotiate
/// checksums must not hear.
pub(super) fn forget_valid_checksum(header: &mut [u8]) {
    if let Some(flags) = header.get_mut(FLAGS_AT) {
        *flags &= !(VIRTIO_NET_HDR_F_DATA_VALID as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_permitted_that_was_not_negotiated() {
        let both = [TO_GUEST, FROM_GUEST];
        for direction in both {
            let Direction {
                checksum,
                tso4,
                tso6,
                ecn,
            } = direction;
            for (header, needs) in [
                ([0, 0], 0),
                ([1, 0], checksum),
                ([2, 0], 0),
                ([0xf8, 0], 0),
                ([1, 1], checksum | tso4),
                ([1, 4], checksum | tso6),
                ([1, 0x81], checksum | tso4 | ecn),
                ([1, 0x84], checksum | tso6 | ecn),
            ] {
                assert!(direction.permits(needs, &header), "{header:?}");
                assert!(direction.permits(OFFLOADS, &header), "{header:?}");
                for bit in (0..64).map(|bit| 1 << bit).filter(|bit| needs & bit != 0) {
                    assert!(!direction.permits(OFFLOADS & !bit, &header), "{header:?}");
                }
            }
            for header in [[0, 3], [0, 5], [0, 2], [0, 0x80], [0, 0x7f]] {
                assert!(!direction.permits(OFFLOADS, &header), "{header:?}");
            }
            assert!(!direction.permits(OFFLOADS, &[0]));
        }
    }

    #[test]
    fn features_that_lack_what_they_need_make_no_sense() {
        for direction in [TO_GUEST, FROM_GUEST] {
            let Direction {
                checksum,
                tso4,
                tso6,
                ecn,
            } = direction;
            for sense in [0, checksum, checksum | tso4, checksum | tso6 | ecn] {
                assert!(direction.makes_sense(sense), "{sense:#x}");
            }
            for nonsense in [tso4, tso6, ecn, checksum | ecn, tso4 | ecn] {
                assert!(!direction.makes_sense(nonsense), "{nonsense:#x}");
            }
            assert!(direction.makes_sense(OFFLOADS));
        }
    }

    #[test]
    fn only_the_one_flag_is_taken_back() {
        let mut header = [0xff; HEADER_BYTES];
        forget_valid_checksum(&mut header);
        assert_eq!(header[0], 0xfd);
        assert!(header[1..].iter().all(|&byte| byte == 0xff));
    }
}
