//! A TAP device of the host's (Linux, Documentation/networking/tuntap.rst).

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
};

use libc::{
    IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, IFNAMSIZ, O_CLOEXEC, O_NONBLOCK, TUN_F_CSUM, TUN_F_TSO_ECN,
    TUN_F_TSO4, TUN_F_TSO6, TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ, c_int, c_uint, c_ulong,
    ifreq,
};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, netdevice::name_to_index, socket_with},
};

use super::{
    Attachment, NetError,
    backend::{Backend, Refused},
    header::{self, HEADER_BYTES},
};

const TUN: &str = "/dev/net/tun";

/// A TAP device that was there before.
pub(super) struct Tap {
    name: String,
    file: File,
}

impl Tap {
    pub(super) fn open(name: &str) -> Result<Self, NetError> {
        let of = |source: io::Error| NetError::Tap {
            name: name.to_owned(),
            source,
        };
        let request = request(name)?;
        // TUNSETIFF would make one that is not there, if it may, and take a slip of the pen for a wish.
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)
            .map_err(|errno| of(errno.into()))?;
        name_to_index(&socket, name).map_err(|errno| match errno {
            Errno::NODEV => NetError::NoTap(name.to_owned()),
            other => of(other.into()),
        })?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(O_NONBLOCK | O_CLOEXEC)
            .open(TUN)
            .map_err(NetError::Tun)?;
        set_interface(&file, &request).map_err(|source| {
            let name = name.to_owned();
            match source.raw_os_error() {
                Some(libc::EBUSY) => NetError::TapBusy(name),
                Some(libc::EPERM) => NetError::TapForbidden(name),
                Some(libc::EINVAL) => NetError::NotATap(name),
                _ => NetError::Tap { name, source },
            }
        })?;
        set_header_size(&file, HEADER_BYTES as c_int).map_err(of)?;
        set_offload(&file, 0).map_err(of)?;
        let name = name.to_owned();
        Ok(Self { name, file })
    }
}

impl Backend for Tap {
    fn attachment(&self) -> Attachment {
        Attachment::Tap(self.name.clone())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The kernel takes what it is given, and drops what it has no room for.
    fn can_be_full(&self) -> bool {
        false
    }

    fn offloads(&self) -> u64 {
        header::OFFLOADS
    }

    fn accept(&mut self, features: u64) {
        if let Err(error) = set_offload(&self.file, offload_flags(features)) {
            // It was zero before: frames then come whole and with checksums, which is always right. A guest has it tried as
            // often as it likes.
            tracing::debug!(tap = self.name, %error, "the TAP device takes no offloads");
        }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, Refused> {
        rustix::io::retry_on_intr(|| rustix::io::read(&self.file, &mut *buffer)).map_err(refused)
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), Refused> {
        match rustix::io::retry_on_intr(|| rustix::io::write(&self.file, frame)) {
            Ok(_) => Ok(()),
            // There is no event that would tell when to try again.
            Err(Errno::AGAIN) => Err(Refused::Frame(Errno::AGAIN.into())),
            Err(errno) => Err(refused(errno)),
        }
    }
}

/// What the TAP device may leave to a driver that has accepted `features`; never what it would refuse.
fn offload_flags(features: u64) -> c_uint {
    let direction = header::TO_GUEST;
    // A state may be from before sets of features that make no sense were refused.
    if !direction.makes_sense(features) {
        return 0;
    }
    let flags = [
        (direction.checksum, TUN_F_CSUM),
        (direction.tso4, TUN_F_TSO4),
        (direction.tso6, TUN_F_TSO6),
        (direction.ecn, TUN_F_TSO_ECN),
    ];
    let accepted = flags.iter().filter(|(bit, _)| features & bit != 0);
    accepted.fold(0, |all, (_, flag)| all | flag)
}

fn refused(errno: Errno) -> Refused {
    match errno {
        Errno::AGAIN => Refused::Later,
        // The interface was deleted.
        Errno::BADFD | Errno::NODEV => Refused::Gone(errno.into()),
        // It is down, or does not like the frame, or the host has no memory for it.
        _ => Refused::Frame(errno.into()),
    }
}

/// An interface request for TAP device `name`, to be opened without the protocol information of old and
/// with the header of virtio.
fn request(name: &str) -> Result<ifreq, NetError> {
    let plain = |byte: &u8| byte.is_ascii_graphic() && !b"/:%".contains(byte);
    let bytes = name.as_bytes();
    if bytes.is_empty()
        || bytes.len() >= IFNAMSIZ
        || !bytes.iter().all(plain)
        || [".", ".."].contains(&name)
    {
        return Err(NetError::TapName(name.to_owned()));
    }
    let mut ifr_name = [0; IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let ifr_ifru = libc::__c_anonymous_ifr_ifru {
        ifru_flags: (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as i16,
    };
    Ok(ifreq { ifr_name, ifr_ifru })
}

#[allow(unsafe_code)]
fn set_interface(file: &File, request: &ifreq) -> io::Result<()> {
    // The kernel writes the name back.
    let mut request = *request;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, although its number is encoded with an int; this
    // one is the function's own.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, &raw mut request) })
}

#[allow(unsafe_code)]
fn set_header_size(file: &File, bytes: c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const bytes) })
}

#[allow(unsafe_code)]
fn set_offload(file: &File, flags: c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD as _, c_ulong::from(flags)) })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused_before_anything_is_asked() {
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "tap%d",
            "with space",
            "sixteen-letters-",
            "tap\0",
        ] {
            let refused = Tap::open(name).err();
            assert!(matches!(refused, Some(NetError::TapName(_))), "{name:?}");
        }
    }

    #[test]
    fn whatever_a_driver_accepts_no_flag_is_without_those_it_needs() {
        let direction = header::TO_GUEST;
        let bits = [
            direction.checksum,
            direction.tso4,
            direction.tso6,
            direction.ecn,
        ];
        for chosen in 0..1 << bits.len() {
            let features = (0..bits.len()).filter(|i| chosen >> i & 1 != 0);
            let features = features.fold(0, |all, i| all | bits[i]);
            let flags = offload_flags(features);
            let segments = flags & (TUN_F_TSO4 | TUN_F_TSO6) != 0;
            assert!(!segments || flags & TUN_F_CSUM != 0, "{flags:#x}");
            assert!(flags & TUN_F_TSO_ECN == 0 || segments, "{flags:#x}");
        }
        let all = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        assert_eq!(offload_flags(header::OFFLOADS), all);
        assert_eq!(offload_flags(direction.checksum), TUN_F_CSUM);
    }

    #[test]
    fn one_that_is_not_there_is_not_made() {
        let refused = Tap::open("fermata-none").err();
        assert!(matches!(refused, Some(NetError::NoTap(_))), "{refused:?}");
    }
}
