//! Why a network device cannot be attached.

use std::io;

/// Why a network device cannot be attached to what it shall be. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// No network interface can have this name.
    #[error(
        "{0:?} cannot be the name of a TAP device; a name has 1 to 15 characters of ASCII, and no slash, colon, percent sign or space"
    )]
    TapName(String),
    /// There is no such interface.
    #[error(
        "there is no TAP device {0}; make it with `ip tuntap add dev {0} mode tap user <who runs fermata>` and `ip link set {0} up`"
    )]
    NoTap(String),
    /// Somebody else has it open.
    #[error(
        "the TAP device {0} is attached to another machine; stop that one, or name another TAP device"
    )]
    TapBusy(String),
    /// It belongs to another user.
    #[error(
        "this user may not use the TAP device {0}; make it anew with `ip tuntap add dev {0} mode tap user <who runs fermata>`"
    )]
    TapForbidden(String),
    /// The interface is of another type, or has several queues.
    #[error(
        "the network interface {0} is no TAP device with one queue; make one with `ip tuntap add dev <name> mode tap`"
    )]
    NotATap(String),
    /// The host gives no TAP devices.
    #[error(
        "/dev/net/tun cannot be opened: {0}; `modprobe tun`, or in a container pass the device in"
    )]
    Tun(#[source] io::Error),
    /// The host refused something else.
    #[error("the TAP device {name} cannot be used: {source}; `ip link show {name}` may tell why")]
    Tap {
        /// Its name.
        name: String,
        /// What the host says.
        source: io::Error,
    },
    /// Nobody listens.
    #[error(
        "cannot connect to the network socket {path}: {source}; start what listens on it first"
    )]
    Socket {
        /// Its path.
        path: String,
        /// What the host says.
        source: io::Error,
    },
    /// It is no socket that keeps frames apart.
    #[error(
        "the network descriptor is no socket of sequenced packets or datagrams: {0}; hand one over"
    )]
    Descriptor(#[source] io::Error),
    /// A timer could not be made.
    #[error("a rate limit needs a timer: {0}; raise the limit of open files (ulimit -n)")]
    Timer(#[source] io::Error),
    /// The guest's driver uses what the backend lacks.
    #[error(
        "the guest leaves checksums or segmentation to its network device, which only a TAP device can do; attach it to one"
    )]
    Offloads,
}
