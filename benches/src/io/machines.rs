//! One machine of each monitor, with the same devices: a TAP device and full disks, on virtio-mmio.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use control::{
    CpuModel, DiskConfig, DiskFormat, DiskLimits, MachineConfig, NetAttachment, NetConfig, Origin,
    RateLimit,
};
use system_tests::tap::Tap;
use testbed::environment;

use super::{Disks, Place, archive, worker::Worker};
use crate::{
    Console, Fermata, System,
    chain::SMALL_SETTINGS,
    fermata::FermataMachine,
    qemu::{PROGRAM, QemuMachine},
};

const MEMORY_MIB: u64 = 512;

const READY: &str = "bench-guest: ready.";

/// Serial numbers of disks.
const RAW: &str = "raw";
const LAYERED: &str = "layered";
const RAW_URING: &str = "raw-uring";
const FLAT: &str = "flat";
const DEEP: &str = "deep";

/// What is measured of fermata,
const FERMATA: [Place; 5] = [
    Place::Disk {
        serial: RAW,
        setting: "raw",
    },
    Place::Disk {
        serial: LAYERED,
        setting: "branch",
    },
    Place::Net,
    Place::Chain {
        serial: FLAT,
        setting: SMALL_SETTINGS[0],
    },
    Place::Chain {
        serial: DEEP,
        setting: SMALL_SETTINGS[1],
    },
];

/// and what of QEMU.
const QEMU: [Place; 4] = [
    Place::Disk {
        serial: RAW,
        setting: "raw, threads",
    },
    Place::Disk {
        serial: LAYERED,
        setting: "qcow2, threads",
    },
    Place::Disk {
        serial: RAW_URING,
        setting: "raw, io_uring",
    },
    Place::Net,
];

/// Both, up.
pub(super) struct Machines {
    fermata: Worker,
    qemu: Worker,
    _fermata: (FermataMachine, Tap),
    _qemu: (QemuMachine, Tap),
}

/// What both boot.
struct Guest {
    vcpus: u32,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Machines {
    /// Boots both and waits until they take orders.
    pub(super) fn boot(scratch: &Path, disks: &Disks, vcpus: u32) -> Result<Self> {
        let guest = Guest {
            vcpus,
            kernel: scratch.join("io-kernel"),
            initrd: scratch.join("io-initrd"),
        };
        let kernel = environment::path(environment::GUEST_KERNEL)?;
        std::fs::copy(&kernel, &guest.kernel)
            .with_context(|| format!("cannot copy {}", kernel.display()))?;
        archive::write(&guest.initrd)?;

        let tap = Tap::new("bench-fermata", "10.78.1.1/24")?;
        let console = scratch.join("fermata.console");
        let machine = fermata(scratch, &guest, disks, &tap, console)?;
        let fermata = (machine, tap);
        let tap = Tap::new("bench-qemu", "10.78.2.1/24")?;
        let machine = qemu(&guest, disks, &tap, scratch.join("qemu.console"))?;
        Ok(Self {
            fermata: Worker::new([10, 78, 1, 2].into()),
            qemu: Worker::new([10, 78, 2, 2].into()),
            _fermata: fermata,
            _qemu: (machine, tap),
        })
    }

    pub(super) fn worker(&self, system: System) -> &Worker {
        match system {
            System::Qemu => &self.qemu,
            _ => &self.fermata,
        }
    }

    /// What is measured in run `run`, in an order that alternates: whatever else the host does hits both.
    pub(super) fn order(&self, run: u32) -> Vec<(System, Place)> {
        order(run)
    }
}

fn order(run: u32) -> Vec<(System, Place)> {
    let ours = FERMATA.map(|place| (System::Fermata, place));
    let theirs = QEMU.map(|place| (System::Qemu, place));
    // Our raw image, theirs; our branching disk, their qcow2; their other raw image; our network, theirs; one layer, many.
    let mut order = vec![
        ours[0], theirs[0], ours[1], theirs[1], theirs[2], ours[2], theirs[3], ours[3], ours[4],
    ];
    if run % 2 == 1 {
        order.reverse();
    }
    order
}

fn command_line(address: &str) -> String {
    format!("console=ttyS0 quiet panic=-1 reboot=t rdinit=/bench-init bench.address={address}/24")
}

fn fermata(
    scratch: &Path,
    guest: &Guest,
    disks: &Disks,
    tap: &Tap,
    console: PathBuf,
) -> Result<FermataMachine> {
    let disk = |path: &Path, format, serial: &str| DiskConfig {
        path: path.to_owned(),
        read_only: [FLAT, DEEP].contains(&serial),
        format,
        serial: Some(serial.to_owned()),
        limits: DiskLimits::default(),
    };
    let config = MachineConfig {
        cpu: CpuModel::Host,
        vcpus: guest.vcpus,
        memory_mib: MEMORY_MIB,
        kernel: guest.kernel.clone(),
        initrd: Some(guest.initrd.clone()),
        cmdline: command_line("10.78.1.2"),
        disks: vec![
            disk(&disks.raw[0], DiskFormat::Raw, RAW),
            disk(&disks.branch, DiskFormat::Branch, LAYERED),
            disk(&disks.chains[0], DiskFormat::Branch, FLAT),
            disk(&disks.chains[1], DiskFormat::Branch, DEEP),
        ],
        nets: vec![NetConfig {
            attachment: NetAttachment::Tap(tap.name().to_owned()),
            mac: None,
            receive_limit: RateLimit::default(),
            send_limit: RateLimit::default(),
        }],
        vsock: None,
        balloon: None,
        console_device: control::ConsoleDevice::default(),
    };
    let mut console = Console::create(console)?;
    let machine = Fermata::new(scratch)?.start(Origin::Boot(config), console.path())?;
    console.wait_for(READY)?;
    Ok(machine)
}

fn qemu(guest: &Guest, disks: &Disks, tap: &Tap, console: PathBuf) -> Result<QemuMachine> {
    let mut console = Console::create(console)?;
    let process = Command::new(PROGRAM)
        .args(qemu_arguments(guest, disks, tap, console.path()))
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start QEMU")?;
    let machine = QemuMachine::of(process, console.path().with_extension("qmp"));
    console.wait_for(READY)?;
    Ok(machine)
}

/// The machine whose devices are on virtio-mmio too. What the guest has written is in the host's page cache when it
/// completes and on the disk after a flush, as with fermata.
fn qemu_arguments(guest: &Guest, disks: &Disks, tap: &Tap, console: &Path) -> Vec<OsString> {
    let words = |line: &str| -> Vec<OsString> { line.split(' ').map(OsString::from).collect() };
    let mut arguments = words(&format!(
        "-nodefaults -no-user-config -display none -no-reboot -machine microvm,accel=kvm \
        -global virtio-mmio.force-legacy=off -cpu host -smp {} -m {MEMORY_MIB}",
        guest.vcpus
    ));
    let mut option = |name: &str, prefix: &str, value: &Path| {
        let mut text = OsString::from(prefix);
        text.push(value);
        arguments.extend([name.into(), text]);
    };
    option("-kernel", "", &guest.kernel);
    option("-initrd", "", &guest.initrd);
    option("-append", "", command_line("10.78.2.2").as_ref());
    option("-serial", "file:", console);
    let drives = [
        (RAW, "raw", "threads", &disks.raw[1]),
        (LAYERED, "qcow2", "threads", &disks.qcow2),
        (RAW_URING, "raw", "io_uring", &disks.raw[2]),
    ];
    for (id, format, aio, path) in drives {
        let prefix = format!(
            "if=none,id={id},format={format},cache=writeback,discard=unmap,aio={aio},file="
        );
        option("-drive", &prefix, path);
    }
    for (id, ..) in drives {
        arguments.extend(words(&format!(
            "-device virtio-blk-device,drive={id},serial={id}"
        )));
    }
    arguments.extend(words(&format!(
        "-netdev tap,id=net,ifname={},script=no,downscript=no,vhost=off \
        -device virtio-net-device,netdev=net",
        tap.name()
    )));
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_of_ours_has_its_peer_beside_it() {
        for run in [0, 1] {
            let order = order(run);
            let place = |system, wanted: &str| {
                order.iter().position(|(of, place)| {
                    *of == system
                        && match place {
                            Place::Disk { setting, .. } => *setting == wanted,
                            Place::Chain { .. } => false,
                            Place::Net => wanted == "net",
                        }
                })
            };
            for (ours, theirs) in [
                ("raw", "raw, threads"),
                ("branch", "qcow2, threads"),
                ("net", "net"),
            ] {
                let ours = place(System::Fermata, ours).unwrap();
                let theirs = place(System::Qemu, theirs).unwrap();
                assert_eq!(ours.abs_diff(theirs), 1);
                assert_eq!(ours < theirs, run == 0);
            }
            assert_eq!(order.len(), FERMATA.len() + QEMU.len());
        }
    }
}
