//! A machine's network devices: which they are, what they are attached to, and their addresses.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use control::{MacAddress, NetAttachment, NetChange, NetConfig, RateLimit};
use devices::virtio::net::{Attachment, Net, NetError, NetOptions, SavedNet};
use saved_state::{Container, SavedState};

use crate::{error::Error, machine::GoesOn};

/// Attaches network device `number` of a machine.
pub(crate) fn open(number: usize, config: &NetConfig) -> Result<Net, Error> {
    let NetConfig {
        attachment,
        mac,
        receive_limit,
        send_limit,
    } = config;
    let mac = match mac {
        Some(mac) => *mac,
        None => address(number, attachment)?,
    };
    let options = NetOptions {
        mac: mac.bytes(),
        receive_limit: limit(*receive_limit),
        send_limit: limit(*send_limit),
    };
    let net = match attachment {
        NetAttachment::Tap(name) => Net::tap(name, options),
        NetAttachment::Socket(path) => Net::connect(&text(path)?, options),
    };
    tracing::info!(number, %attachment, %mac, "a network device");
    Ok(net.map_err(devices::Error::Net)?)
}

/// The network devices of a saved machine, with `changes`. If it is `confined`, it is attached to nothing
/// but what the changes name. One that goes on as another has other addresses, and no TAP device that is not named: that of the
/// saved machine is one machine's.
pub(crate) fn saved(
    container: &Container,
    changes: &[NetChange],
    confined: bool,
    goes_on: GoesOn,
) -> Result<Vec<NetConfig>, Error> {
    let sections = container.sections();
    let nets = sections.filter(|section| section.kind == SavedNet::KIND);
    let nets: BTreeMap<u32, SavedNet> = nets
        .map(|section| Ok((section.instance, section.decode()?)))
        .collect::<Result<_, saved_state::Error>>()?;
    if changes.len() > nets.len() {
        return Err(Error::NoSuchNet {
            has: nets.len(),
            named: changes.len(),
        });
    }
    let unchanged = NetChange::default();
    let changes = changes.iter().chain(std::iter::repeat(&unchanged));
    let nets = nets.into_values().zip(changes).enumerate();
    nets.map(|(number, (saved, change))| changed(number, saved, change, confined, goes_on))
        .collect()
}

fn changed(
    number: usize,
    saved: SavedNet,
    change: &NetChange,
    confined: bool,
    goes_on: GoesOn,
) -> Result<NetConfig, Error> {
    let NetChange { attachment, mac } = change;
    let was = match saved.attachment {
        Attachment::Tap(name) => Some(NetAttachment::Tap(name)),
        Attachment::Socket(path) => Some(NetAttachment::Socket(path.into())),
        Attachment::Descriptor => None,
    };
    let attachment = match (attachment, was) {
        (Some(attachment), _) => attachment.clone(),
        (None, Some(NetAttachment::Tap(tap))) if goes_on == GoesOn::AsAnother => {
            return Err(Error::TapOfAnother { number, tap });
        }
        (None, Some(was)) if !confined => was,
        (None, was) => return Err(Error::NetNotNamed { number, was }),
    };
    let impossible = || devices::Error::Impossible {
        kind: SavedNet::KIND,
        reason: "its MAC address is not that of one device".to_owned(),
    };
    let was = MacAddress::new(saved.mac).ok_or_else(impossible)?;
    Ok(NetConfig {
        attachment,
        mac: match goes_on {
            GoesOn::AsItself => Some(mac.unwrap_or(was)),
            // Without one, it gets one as at boot.
            GoesOn::AsAnother => *mac,
        },
        receive_limit: saved_limit(saved.receive_limit.into()),
        send_limit: saved_limit(saved.send_limit.into()),
    })
}

fn limit(limit: RateLimit) -> devices::RateLimit {
    let RateLimit {
        bytes_per_second,
        packets_per_second,
    } = limit;
    devices::RateLimit {
        bytes_per_second,
        operations_per_second: packets_per_second,
    }
}

fn saved_limit(limit: devices::RateLimit) -> RateLimit {
    let devices::RateLimit {
        bytes_per_second,
        operations_per_second,
    } = limit;
    RateLimit {
        bytes_per_second,
        packets_per_second: operations_per_second,
    }
}

/// A path is saved as text.
fn text(path: &Path) -> Result<String, Error> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Error::NetPath(PathBuf::from(path)))
}

/// An address for a device that was given none.
///
/// A TAP device has one machine at a time: its address follows from its name and the host, so that a guest
/// that is booted there again is known to its neighbours, and two hosts with TAP devices of the same names
/// can be on one network. Behind a socket there may be any number of machines: theirs is a random one.
fn address(number: usize, attachment: &NetAttachment) -> Result<MacAddress, Error> {
    match attachment {
        NetAttachment::Tap(name) => Ok(address_of_tap(&host_id(), name, number)),
        NetAttachment::Socket(_) => {
            let mut random = [0; 8];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
                .map_err(|errno| Error::Host(errno.into()))?;
            Ok(MacAddress::local(u64::from_le_bytes(random)))
        }
    }
}

fn address_of_tap(host: &str, name: &str, number: usize) -> MacAddress {
    // Neither text contains a line break.
    let from = format!("{host}\n{name}\n{number}");
    MacAddress::local(scatter(from.bytes().fold(FNV_BASIS, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME)
    })))
}

/// FNV-1a of 64 bits (draft-eastlake-fnv): addresses need to differ, not to be secret, and must be the same
/// in all releases.
const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

/// Has every bit depend on every other: the lower ones, which are taken, depend on too few.
fn scatter(hash: u64) -> u64 {
    let mixed = (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 32
}

/// What tells this host from others (machine-id(5)), or else its name.
fn host_id() -> String {
    let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    match id.trim() {
        "" => rustix::system::uname().nodename().to_string_lossy().into(),
        id => id.to_owned(),
    }
}

/// Whose fault it is that a network device cannot be attached.
pub(crate) fn kind(error: &NetError) -> control::FailureKind {
    use control::FailureKind;
    match error {
        NetError::NoTap(_) => FailureKind::NotFound,
        NetError::TapBusy(_) => FailureKind::WrongState,
        NetError::TapName(_)
        | NetError::NotATap(_)
        | NetError::Descriptor(_)
        | NetError::Offloads => FailureKind::BadRequest,
        NetError::Socket { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            FailureKind::NotFound
        }
        NetError::TapForbidden(_)
        | NetError::Tun(_)
        | NetError::Tap { .. }
        | NetError::Socket { .. }
        | NetError::Timer(_) => FailureKind::Host,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use std::{io, os::fd::OwnedFd, sync::Arc};

    use control::{Failure, FailureKind};
    use devices::{Device, InterruptLine, virtio::MmioTransport};
    use memory::{Layout, MachineMemory};
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
    };

    use super::*;

    #[derive(Debug)]
    struct NoLine;

    impl InterruptLine for NoLine {
        fn trigger(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn switch(path: &Path) -> OwnedFd {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let switch = socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
        bind(&switch, &SocketAddrUnix::new(path).unwrap()).unwrap();
        listen(&switch, 4).unwrap();
        switch
    }

    /// What a machine saves that has a network device on each of `paths`.
    fn container(paths: &[&Path], mac: [u8; 6]) -> Container {
        let memory = MachineMemory::zeroed(Layout::new(64 << 20).unwrap()).unwrap();
        let mut container = crate::state::empty_container();
        for (path, instance) in paths.iter().zip(0..) {
            let options = NetOptions {
                mac,
                receive_limit: devices::RateLimit::default(),
                send_limit: devices::RateLimit {
                    bytes_per_second: 1000.try_into().ok(),
                    operations_per_second: None,
                },
            };
            let net = Net::connect(path.to_str().unwrap(), options).unwrap();
            let guest = memory.guest().clone();
            let device = MmioTransport::new(Box::new(net), guest, Arc::new(NoLine)).unwrap();
            container.insert(device.save(instance).unwrap()).unwrap();
        }
        container
    }

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    #[test]
    fn a_saved_device_is_what_it_was_but_for_what_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("switch");
        let _switch = switch(&path);
        let container = container(&[&path, &path], MAC);
        let same = saved(&container, &[], false, GoesOn::AsItself).unwrap();
        assert_eq!(same.len(), 2);
        for net in &same {
            assert_eq!(net.attachment, NetAttachment::Socket(path.clone()));
            assert_eq!(net.mac.unwrap().bytes(), MAC);
            let limits = [net.receive_limit, net.send_limit];
            let bytes = limits.map(|limit| limit.bytes_per_second.map(u64::from));
            assert_eq!(bytes, [None, Some(1000)]);
        }
        let mac = MacAddress::local(9);
        let tap = NetAttachment::Tap("t".to_owned());
        let changes = [
            NetChange::default(),
            NetChange {
                attachment: Some(tap.clone()),
                mac: Some(mac),
            },
        ];
        let changed = saved(&container, &changes, false, GoesOn::AsItself).unwrap();
        assert_eq!(changed[0], same[0]);
        assert_eq!((&changed[1].attachment, changed[1].mac), (&tap, Some(mac)));
        assert_eq!(changed[1].send_limit, same[1].send_limit);
    }

    #[test]
    fn one_that_goes_on_as_another_has_addresses_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("switch");
        let _switch = switch(&path);
        let container = container(&[&path], MAC);
        let another = |changes: &[NetChange]| {
            let mut nets = saved(&container, changes, false, GoesOn::AsAnother).unwrap();
            nets.remove(0)
        };
        let plain = another(&[]);
        assert_eq!(plain.attachment, NetAttachment::Socket(path));
        assert_eq!(plain.mac, None);
        let macs = [(); 2].map(|()| address(0, &plain.attachment).unwrap());
        assert_ne!(macs[0], macs[1]);
        let mac = Some(MacAddress::local(9));
        let change = NetChange {
            attachment: None,
            mac,
        };
        assert_eq!(another(&[change]).mac, mac);
    }

    #[test]
    fn a_state_file_attaches_nobody_who_is_confined() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("switch");
        let _switch = switch(&path);
        let container = container(&[&path, &path], MAC);
        let tap = |name: &str| NetChange {
            attachment: Some(NetAttachment::Tap(name.to_owned())),
            mac: None,
        };
        for changes in [vec![], vec![tap("a")], vec![NetChange::default(), tap("b")]] {
            let refused =
                Failure::from(saved(&container, &changes, true, GoesOn::AsItself).unwrap_err());
            assert_eq!(refused.kind, FailureKind::BadRequest);
            assert!(refused.message.contains("switch"), "{refused}");
        }
        let both = saved(&container, &[tap("a"), tap("b")], true, GoesOn::AsItself).unwrap();
        assert_eq!(both.len(), 2);
    }

    #[test]
    fn more_changes_than_devices_are_refused() {
        let container = container(&[], MAC);
        assert!(
            saved(&container, &[], true, GoesOn::AsItself)
                .unwrap()
                .is_empty()
        );
        let refused =
            saved(&container, &[NetChange::default()], false, GoesOn::AsItself).unwrap_err();
        let refused = Failure::from(refused);
        assert_eq!(refused.kind, FailureKind::BadRequest);
        assert!(
            refused.message.contains("has 0 network devices"),
            "{refused}"
        );
    }

    #[test]
    fn an_address_of_a_group_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("switch");
        let _switch = switch(&path);
        let container = container(&[&path], [1, 0, 0, 0, 0, 7]);
        let refused = Failure::from(saved(&container, &[], false, GoesOn::AsItself).unwrap_err());
        assert_eq!(refused.kind, FailureKind::NotASnapshot, "{refused}");
    }

    #[test]
    fn each_tap_device_of_each_host_has_an_address_of_its_own_and_keeps_it() {
        let mut seen = std::collections::HashSet::new();
        for host in ["", "7d1d1b9d", "7d1d1b9e"] {
            for name in (0..200).map(|number| format!("vmtap{number}")) {
                for number in 0..2 {
                    let mac = address_of_tap(host, &name, number);
                    assert!(seen.insert(mac), "{mac} twice");
                }
            }
        }
        // In every release.
        let kept = address_of_tap("7d1d1b9d", "vmtap100", 0).to_string();
        assert_eq!(kept, "7a:fe:98:8f:42:66");
    }

    #[test]
    fn errors_have_the_kind_that_their_reader_can_do_something_about() {
        let kind_of = |attachment| {
            let config = NetConfig {
                attachment,
                mac: None,
                receive_limit: RateLimit::default(),
                send_limit: RateLimit::default(),
            };
            Failure::from(open(0, &config).err().unwrap()).kind
        };
        let tap = |name: &str| NetAttachment::Tap(name.to_owned());
        assert_eq!(kind_of(tap("fermata-none")), FailureKind::NotFound);
        assert_eq!(kind_of(tap("no/name")), FailureKind::BadRequest);
        // The loopback interface is there on every machine, and is no TAP device.
        let lo = kind_of(tap("lo"));
        assert!([FailureKind::BadRequest, FailureKind::Host].contains(&lo));
        let socket = NetAttachment::Socket("/nonexistent/switch".into());
        assert_eq!(kind_of(socket), FailureKind::NotFound);
    }
}
