//! What users' machines have beside memory.

use std::{fs::File, os::fd::OwnedFd, path::Path};

use anyhow::{Context, Result};
use control::{
    DiskConfig, DiskFormat, DiskLimits, MachineConfig, NetAttachment, NetConfig, RateLimit,
};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};

const VCPUS: u32 = 2;
const DISK_BYTES: u64 = 64 << 20;

/// The other end of a machine's network, where nobody listens. Kept for as long as the machine lives.
#[derive(Debug)]
pub(crate) struct Wire {
    _listener: OwnedFd,
}

/// The machine of `config` with two vCPUs, a raw disk and a network device. A guest of a few instructions leaves the second vCPU
/// waiting to be started, and the devices without drivers. Files are made in `scratch`.
pub(crate) fn attached(config: MachineConfig, scratch: &Path) -> Result<(MachineConfig, Wire)> {
    let disk = scratch.join("disk");
    let made = File::create(&disk).and_then(|file| file.set_len(DISK_BYTES));
    made.context("cannot make a disk")?;
    let socket = scratch.join("wire");
    let wire = listener(&socket).context("cannot listen for a network device")?;
    let disk = DiskConfig {
        path: disk,
        read_only: false,
        format: DiskFormat::Raw,
        serial: None,
        limits: DiskLimits::default(),
    };
    let net = NetConfig {
        attachment: NetAttachment::Socket(socket),
        mac: None,
        receive_limit: RateLimit::default(),
        send_limit: RateLimit::default(),
    };
    let config = MachineConfig {
        vcpus: VCPUS,
        disks: vec![disk],
        nets: vec![net],
        ..config
    };
    Ok((config, wire))
}

/// A listener of the kind that network devices connect to.
fn listener(path: &Path) -> rustix::io::Result<Wire> {
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    let listener = socket_with(AddressFamily::UNIX, kind, flags, None)?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    listen(&listener, 1)?;
    Ok(Wire {
        _listener: listener,
    })
}
