//! A machine's devices: made, put on the buses, saved and restored as one.

use std::{
    collections::BTreeMap,
    fs::File,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use control::{ConsoleDevice, DiskChange, DiskStatus, Metric, NetConfig, VsockConfig};
use devices::{
    AcpiPm, Bus, ConsoleInput, Device, I8042, InputPort, InterruptLine, OnGuestRequest, RUN_PORTS,
    Rtc, Run, RunPort, Serial,
    virtio::{
        HostSide, MmioTransport, VirtioDevice,
        balloon::{BalloonControl, BalloonOptions},
        block::{Block, DiskControl},
        console::Console,
        entropy::Entropy,
    },
};
use hypervisor::{IoEvent, Vm};
use memory::{GuestMemory, MachineMemory};
use saved_state::{Container, Kind};

use crate::{
    balloons,
    boot::MmioDevice,
    console::Output,
    disks::{self, AttachedDisk},
    error::Error,
    generation::Generation,
    interrupt::Irqfd,
    nets,
    platform::{
        COM1_IRQ, COM1_PORT, COM1_PORTS, EVENT_GSI, I8042_PORT, I8042_PORTS, MAX_VIRTIO, RTC_PORT,
        RTC_PORTS, RUN_PORT, SLEEP_CONTROL_PORT, SLEEP_PORTS, VIRTIO_BYTES, virtio_gpa, virtio_gsi,
    },
    vcpu::Buses,
    vsocks,
};

/// The most disks, network and vsock devices, balloons and virtio consoles a machine can have: every virtio device but the source
/// of entropy.
pub(crate) const MAX_DEVICES: usize = MAX_VIRTIO - 1;

/// A machine's devices.
pub(crate) struct DeviceSet {
    /// Every device that has state, in the order in which they were made.
    all: Vec<(Kind, Arc<Mutex<dyn Device>>)>,
    /// Those with queues, for the event loop.
    pub(crate) transports: Vec<Arc<Mutex<MmioTransport>>>,
    /// Of each disk, in their order: what changes it, and what tells of that.
    disks: Vec<(DiskControl, HostSide)>,
    /// Takes what is typed.
    input: Arc<dyn InputPort>,
    /// Says that the machine is another one than it was.
    pub(crate) generation: Generation,
    /// Has the guest give memory back, if it can.
    pub(crate) balloon: Option<Arc<BalloonControl>>,
    /// The run that it is in.
    pub(crate) run: Arc<Run>,
}

/// The devices that a machine has by choice.
#[derive(Clone, Copy)]
pub(crate) struct Chosen<'a> {
    pub(crate) disks: &'a [AttachedDisk],
    pub(crate) nets: &'a [NetConfig],
    pub(crate) vsock: Option<&'a VsockConfig>,
    pub(crate) balloon: Option<BalloonOptions>,
    pub(crate) console: ConsoleDevice,
}

/// The devices while they are being made.
struct Builder<'a> {
    vm: &'a Vm,
    memory: &'a GuestMemory,
    buses: Buses,
    all: Vec<(Kind, Arc<Mutex<dyn Device>>)>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
}

impl DeviceSet {
    /// Makes the devices and the buses that vCPUs reach them by. What the guest writes to its consoles
    /// goes to `output`; `requests` is told when it wants to be switched off or reset.
    pub(crate) fn new(
        vm: &Vm,
        memory: &MachineMemory,
        chosen: Chosen<'_>,
        output: Output,
        requests: &OnGuestRequest,
    ) -> Result<(Self, Buses), Error> {
        let Chosen {
            disks,
            nets,
            vsock,
            balloon,
            console,
        } = chosen;
        let single = [
            vsock.is_some(),
            balloon.is_some(),
            console == ConsoleDevice::Virtio,
        ];
        if disks.len() + nets.len() + single.map(usize::from).iter().sum::<usize>() > MAX_DEVICES {
            return Err(Error::TooManyDevices);
        }
        let mut builder = Builder {
            vm,
            memory: memory.guest(),
            buses: Buses {
                ports: Bus::new(),
                mmio: Bus::new(),
                run: Arc::default(),
            },
            all: Vec::new(),
            transports: Vec::new(),
        };
        let serial = builder.legacy(output.clone(), requests)?;
        let generation = Generation::new(builder.line(EVENT_GSI)?);
        builder.virtio(Box::new(Entropy::new()))?;
        let mut controls = Vec::new();
        for disk in disks {
            let block = block(disk)?;
            controls.push((block.control(), builder.virtio(Box::new(block))?));
        }
        for (number, net) in nets.iter().enumerate() {
            builder.virtio(Box::new(nets::open(number, net)?))?;
        }
        if let Some(vsock) = vsock {
            builder.virtio(Box::new(vsocks::open(vsock)?))?;
        }
        let balloon = match balloon {
            Some(options) => Some(builder.balloon(options, memory)?),
            None => None,
        };
        let input: Arc<dyn InputPort> = match console {
            ConsoleDevice::Serial => serial,
            ConsoleDevice::Virtio => builder.console(output)?,
        };
        let Builder {
            buses,
            all,
            transports,
            ..
        } = builder;
        let set = Self {
            all,
            transports,
            disks: controls,
            input,
            generation,
            balloon,
            run: Arc::clone(&buses.run),
        };
        Ok((set, buses))
    }

    /// How a guest finds the virtio devices.
    pub(crate) fn described(&self) -> Vec<MmioDevice> {
        (0..self.transports.len())
            .map(|number| MmioDevice {
                gpa: virtio_gpa(number),
                bytes: VIRTIO_BYTES,
                gsi: virtio_gsi(number),
            })
            .collect()
    }

    /// The disks as they are now.
    pub(crate) fn disks(&self) -> Vec<DiskStatus> {
        self.disks
            .iter()
            .map(|(control, _)| disks::status(control))
            .collect()
    }

    /// What has its guest get what is typed at `source`.
    pub(crate) fn console_input(&self, source: File) -> ConsoleInput {
        let port = Arc::clone(&self.input);
        ConsoleInput { source, port }
    }

    /// Changes the disk at `index`, and says what it is then. The guest's driver is told of another size, and what waits for a limit
    /// is looked at again.
    pub(crate) fn change_disk(&self, index: u32, change: DiskChange) -> Result<DiskStatus, Error> {
        let found = self.disks.get(index as usize);
        let (control, host_side) = found.ok_or(Error::NoSuchDisk {
            index,
            has: self.disks.len(),
        })?;
        // First, for nothing else can fail.
        if let Some(bytes) = change.bytes {
            control.grow(bytes).map_err(devices::Error::Disk)?;
            host_side.refresh_config();
        }
        let limits = change.limits.of(disks::limits_of(control.limits()));
        control.set_limits(disks::limits(limits));
        host_side.look_again();
        Ok(disks::status(control))
    }

    /// Saves every device. None may be at work.
    pub(crate) fn save(&self, container: &mut Container) -> Result<(), Error> {
        for (_, instance, device) in self.numbered() {
            container.insert(lock(device).save(instance)?)?;
        }
        Ok(())
    }

    /// Restores every device.
    pub(crate) fn restore(&self, container: &mut Container) -> Result<(), Error> {
        for (kind, instance, device) in self.numbered() {
            let section = container.remove(kind, instance)?;
            lock(device).restore(&section)?;
        }
        Ok(())
    }

    /// Restores every device once more from the `sections` that all were restored from before. What is behind their disks may be
    /// other disks.
    pub(crate) fn reset(&self, sections: &Container) -> Result<(), Error> {
        for (control, _) in &self.disks {
            control.refresh_size();
        }
        for (kind, instance, device) in self.numbered() {
            let section = sections.get(kind, instance)?;
            lock(device).restore(section)?;
        }
        Ok(())
    }

    /// Raises the interrupts that were pending when the devices were saved; once, before the guest
    /// runs.
    pub(crate) fn resume(&self) {
        for (_, device) in &self.all {
            lock(device).resume();
        }
    }

    /// What every device counts, but for those that are at work: who asks must not wait for a disk.
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        let mut metrics = Vec::new();
        for (kind, instance, device) in self.numbered() {
            let Ok(device) = device.try_lock() else {
                continue;
            };
            let label = format!("{kind}{instance}").to_lowercase();
            metrics.extend(device.metrics().into_iter().map(|(name, value)| Metric {
                name: format!("fermata_device_{name}_total"),
                label: Some(("device".to_owned(), label.clone())),
                value,
            }));
        }
        metrics
    }

    /// Each device with its kind and its number among those of its kind.
    fn numbered(&self) -> impl Iterator<Item = (Kind, u32, &Mutex<dyn Device>)> {
        let mut next: BTreeMap<Kind, u32> = BTreeMap::new();
        self.all.iter().map(move |(kind, device)| {
            let count = next.entry(*kind).or_default();
            let instance = *count;
            *count += 1;
            (*kind, instance, &**device)
        })
    }
}

impl Builder<'_> {
    /// The devices of a PC.
    fn legacy(
        &mut self,
        output: Output,
        requests: &OnGuestRequest,
    ) -> Result<Arc<Mutex<Serial>>, Error> {
        let line = self.line(COM1_IRQ)?;
        let serial = Arc::new(Mutex::new(Serial::new(line, Box::new(output))?));
        self.put(serial.clone());
        let rtc = Arc::new(Mutex::new(Rtc::new()));
        self.put(rtc.clone());
        let i8042 = Arc::new(Mutex::new(I8042::new(Arc::clone(requests))));
        let pm = Arc::new(Mutex::new(AcpiPm::new(Arc::clone(requests))));
        let run = RunPort::new(Arc::clone(&self.buses.run));
        let ports = &mut self.buses.ports;
        ports.insert(u64::from(COM1_PORT), COM1_PORTS, serial.clone())?;
        ports.insert(u64::from(RTC_PORT), RTC_PORTS, rtc)?;
        ports.insert(u64::from(I8042_PORT), I8042_PORTS, i8042)?;
        ports.insert(u64::from(SLEEP_CONTROL_PORT), SLEEP_PORTS, pm)?;
        ports.insert(u64::from(RUN_PORT), RUN_PORTS, Arc::new(Mutex::new(run)))?;
        Ok(serial)
    }

    /// Puts `device` on the next transport, with its interrupt line and its notifications; returns the host's side of it.
    fn virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<HostSide, Error> {
        let number = self.transports.len();
        let line = self.line(virtio_gsi(number))?;
        let transport = MmioTransport::new(device, self.memory.clone(), line)?;
        let gpa = u64::from(virtio_gpa(number));
        for (offset, value, event) in transport.ioeventfds() {
            let gpa = gpa + offset;
            self.vm.ioeventfd(event, IoEvent { gpa, value })?;
        }
        let host_side = transport.host_side();
        let transport = Arc::new(Mutex::new(transport));
        self.buses
            .mmio
            .insert(gpa, u64::from(VIRTIO_BYTES), transport.clone())?;
        self.put(transport.clone());
        self.transports.push(transport);
        Ok(host_side)
    }

    /// Puts the balloon on the next transport; returns the host's side of it.
    fn balloon(
        &mut self,
        options: BalloonOptions,
        memory: &MachineMemory,
    ) -> Result<Arc<BalloonControl>, Error> {
        let balloon = balloons::open(options, memory)?;
        let control = Arc::clone(balloon.control());
        self.virtio(Box::new(balloon))?;
        Ok(control)
    }

    /// Puts the console on the next transport; returns what takes its input.
    fn console(&mut self, output: Output) -> Result<Arc<dyn InputPort>, Error> {
        let console = Console::new(Box::new(output)).map_err(devices::Error::EventFd)?;
        let input = console.input();
        self.virtio(Box::new(console))?;
        Ok(input)
    }

    fn put(&mut self, device: Arc<Mutex<dyn Device>>) {
        let kind = lock(&*device).kind();
        self.all.push((kind, device));
    }

    fn line(&self, gsi: u32) -> Result<Arc<dyn InterruptLine>, Error> {
        Ok(Arc::new(Irqfd(self.vm.irqfd(gsi)?)))
    }
}

fn block(disk: &AttachedDisk) -> Result<Block, Error> {
    let AttachedDisk {
        config,
        branch,
        began_on: _,
        comes: _,
    } = disk;
    let id = config.serial.clone();
    let id = id.unwrap_or_else(|| disk_id(&config.path));
    let block = match branch {
        Some(branch) => Block::branching(Arc::clone(branch), &id),
        None => Block::open(&config.path, config.read_only, &id),
    };
    let aside = block
        .and_then(Block::flushing_aside)
        .and_then(Block::reading_aside);
    let block = aside.map_err(devices::Error::Disk)?;
    Ok(block.limited(disks::limits(config.limits)))
}

/// A disk's identity in the guest unless it is given one: the name of its image, as far as there is room.
fn disk_id(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let room = name.chars().filter(char::is_ascii);
    room.take(devices::virtio::block::ID_BYTES).collect()
}

fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    // A device whose code panicked keeps answering as well as it can; the guest decides.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use std::{io, num::NonZeroU64};

    use control::{DiskConfig, DiskFormat, DiskLimits};
    use devices::{RateLimit, virtio::block::SavedBlock};
    use memory::Layout;

    use super::*;

    #[derive(Debug)]
    struct NoLine;

    impl InterruptLine for NoLine {
        fn trigger(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_disk_has_the_limits_that_were_asked_for_and_they_are_saved() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, [0; 512]).unwrap();
        let number = NonZeroU64::new;
        let disk = AttachedDisk {
            config: DiskConfig {
                path,
                read_only: false,
                format: DiskFormat::Raw,
                serial: None,
                limits: DiskLimits {
                    bytes_per_second: number(1),
                    operations_per_second: number(2),
                    read_bytes_per_second: number(3),
                    read_operations_per_second: number(4),
                    write_bytes_per_second: number(5),
                    write_operations_per_second: number(6),
                },
            },
            branch: None,
            began_on: None,
            comes: None,
        };
        let memory = MachineMemory::zeroed(Layout::new(64 << 20).unwrap()).unwrap();
        let guest = memory.guest().clone();
        let block = Box::new(block(&disk).unwrap());
        let in_force = disks::limits_of(block.control().limits());
        assert_eq!(in_force, disk.config.limits);
        let device = MmioTransport::new(block, guest, Arc::new(NoLine)).unwrap();
        let saved: SavedBlock = device.save(0).unwrap().decode().unwrap();
        let limits = [saved.total_limit, saved.read_limit, saved.write_limit];
        let limit = |bytes, operations| RateLimit {
            bytes_per_second: number(bytes),
            operations_per_second: number(operations),
        };
        assert_eq!(
            limits.map(RateLimit::from),
            [limit(1, 2), limit(3, 4), limit(5, 6)]
        );
    }
}
