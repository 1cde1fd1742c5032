//! One machine: made from a kernel or from a snapshot, held, saved, and let go on.

use std::{
    fs::File,
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use branch_disk::LayerRef;
use control::{Confinement, CpuModel, GuestClock, LaunchSpec, MachineConfig};
use devices::{EventLoop, OnGuestRequest, Quiesced, SerialInput};
use hypervisor::{
    ClockPlan, ClockStart, CpuLevel, GuestCpuid, VcpuState, Vm, VmState, cpu_identity,
    missing_features,
};
use memory::{Layout, MachineMemory};
use saved_state::{Container, Header, SnapshotId};
use snapshot::{Progress, Snapshot};

use crate::{
    boot, console,
    device_set::{DeviceSet, MAX_DEVICES},
    disks::{self, AttachedDisk, Cuts},
    error::Error,
    metrics::{ExitCounts, MachineCounts},
    nets,
    state::{DiskState, MachineState},
    vcpu::VcpuEnd,
    vcpus::Vcpus,
    vsocks,
};

/// How long the device loop may take to come to rest: a request or two of a slow disk.
const QUIESCE_BOUND: Duration = Duration::from_secs(30);

/// What the vCPUs have to get ready in, once the instant is appointed at which guest time goes on: a few wake-ups of a
/// thread. Whoever is late has the guest see that time pass.
const CLOCK_LEAD: Duration = Duration::from_micros(200);

/// Who is told what the guest wants, or how it ends.
#[derive(Clone)]
pub(crate) struct Listeners {
    /// Told when it wants to be switched off or reset.
    pub(crate) requests: OnGuestRequest,
    /// Told when a vCPU cannot go on.
    pub(crate) end: Arc<dyn Fn(u32, VcpuEnd) + Send + Sync>,
}

/// What can be read of a machine while it does something else.
pub(crate) struct Counters {
    pub(crate) exits: Arc<ExitCounts>,
    pub(crate) machine: MachineCounts,
    pub(crate) devices: DeviceSet,
    /// How far the snapshot in work is.
    pub(crate) saving: Progress,
}

/// A machine. Fresh or restored it is held; [`Machine::run`] lets it go.
pub(crate) struct Machine {
    vm: Vm,
    memory: MachineMemory,
    vcpu_count: u32,
    disks: Vec<AttachedDisk>,
    vcpus: Vcpus,
    event_loop: EventLoop,
    counters: Arc<Counters>,
    /// There while the machine is held.
    quiesced: Option<Quiesced>,
    held_since: Instant,
    /// How its clocks go on, while it is held.
    clock: ClockPlan,
    /// When they were stopped, in the world's time.
    cut: Cut,
    /// Until a restored machine runs for the first time.
    restored: bool,
    /// It did not go on when it should have, and is in no known state.
    lost: bool,
    /// What it was last in a store, by its id there: what its next snapshot builds on.
    pub(crate) stored_as: Option<String>,
}

/// A machine that is held. Dropped, it lets the machine go on if it ran before.
#[must_use = "the machine goes on when this is dropped"]
pub(crate) struct Held<'a> {
    machine: &'a mut Machine,
    ran: bool,
    /// What its clocks have done meanwhile, if it goes on.
    clock: GuestClock,
}

/// When a machine's clocks were stopped, in the world's time.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// It was held in this process.
    Held { unix_ns: u64 },
    /// It was saved, maybe elsewhere, and has not run since.
    Saved { unix_ns: u64 },
}

impl Cut {
    fn now() -> Self {
        Self::Held {
            unix_ns: since_unix(0).as_nanos() as u64,
        }
    }

    fn unix_ns(self) -> u64 {
        let (Self::Held { unix_ns } | Self::Saved { unix_ns }) = self;
        unix_ns
    }
}

/// What has passed since so many nanoseconds after 1970. Two hosts' clocks may differ, but guest time never goes back.
fn since_unix(unix_ns: u64) -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH + Duration::from_nanos(unix_ns))
        .unwrap_or_default()
}

/// A machine whose parts are there and whose vCPUs have no threads yet.
struct Parts {
    vm: Vm,
    memory: MachineMemory,
    vcpus: Vec<hypervisor::Vcpu>,
    disks: Vec<AttachedDisk>,
    devices: DeviceSet,
    buses: crate::vcpu::Buses,
    input: Option<File>,
    clock: ClockPlan,
    cut: Cut,
    restored: bool,
    stored_as: Option<String>,
}

impl Machine {
    /// Makes a machine whose first instruction is that of a kernel.
    pub(crate) fn boot(
        config: &MachineConfig,
        confinement: Option<&Confinement>,
        console: console::Ends,
        listeners: &Listeners,
    ) -> Result<Self, Error> {
        let bytes = config.memory_mib.saturating_mul(1 << 20);
        let layout = layout_of(bytes)?;
        let memory = MachineMemory::zeroed(layout)?;
        let vm = Vm::new(&memory, config.vcpus)?;
        let requests = &listeners.requests;
        let console::Ends { output, input } = console;
        let MachineConfig {
            disks, nets, vsock, ..
        } = config;
        let vsock = vsock.as_ref();
        let disks = disks::attach(disks, confinement)?;
        let (devices, buses) =
            DeviceSet::new(&vm, memory.guest(), &disks, nets, vsock, output, requests)?;
        let registers = boot::load(&memory, config, &devices.described())?;
        devices.generation.begin(memory.guest())?;
        let cpuid = vm.cpuid().at_level(level(config.cpu))?;
        addressable(&memory, &cpuid)?;
        let mut vcpus = Vec::new();
        for id in 0..config.vcpus {
            let mut vcpu = vm.create_vcpu(id)?;
            vcpu.initialise(&cpuid)?;
            vcpus.push(vcpu);
        }
        let first = vcpus.first().ok_or(hypervisor::Error::VcpuCount(0))?;
        first.boot(&registers)?;
        let clock = ClockPlan::new(first)?;
        Self::assemble(
            Parts {
                vm,
                memory,
                vcpus,
                disks,
                devices,
                buses,
                input,
                clock,
                cut: Cut::now(),
                restored: false,
                stored_as: None,
            },
            listeners,
        )
    }

    /// Makes the machine that `saved` was, with what `spec` changes and permits. Its memory is checked first.
    pub(crate) fn restore(
        mut saved: Snapshot,
        spec: &LaunchSpec,
        console: console::Ends,
        listeners: &Listeners,
    ) -> Result<Self, Error> {
        let confinement = spec.confinement.as_ref();
        layout_of(saved.state.header.memory_bytes)?;
        let mut state = saved.take_state();
        let MachineState { disks } = state.take(0)?;
        // Before any is opened, for a state file may name very many.
        if disks.len() > MAX_DEVICES {
            return Err(Error::TooManyDevices);
        }
        if let Some(confinement) = confinement {
            confined(confinement, &state.header, &disks)?;
        }
        let disks = disks::reattach(&disks, confinement)?;
        let nets = nets::saved(&state, &spec.net_changes, confinement.is_some())?;
        let vsock = vsocks::saved(&state, &spec.vsock_change, confinement)?;
        let memory = saved.load()?;
        let stored_as = saved.stored_as().map(str::to_owned);
        let count = state.header.vcpus;
        let cut = Cut::Saved {
            unix_ns: state.header.created_unix_ns,
        };
        let mut vm = Vm::new(&memory, count)?;
        let requests = &listeners.requests;
        let console::Ends { output, input } = console;
        let vsock = vsock.as_ref();
        let (devices, buses) =
            DeviceSet::new(&vm, memory.guest(), &disks, &nets, vsock, output, requests)?;
        let mut vcpus = Vec::new();
        for id in 0..count {
            let saved: VcpuState = state.take(id)?;
            let missing = missing_features(&saved, vm.cpuid())?;
            if !missing.is_empty() {
                return Err(Error::MissingFeatures(missing));
            }
            let mut vcpu = vm.create_vcpu(id)?;
            vcpu.restore(&saved)?;
            vcpus.push(vcpu);
        }
        // After the vCPUs: an interrupt controller delivers to the local APICs as it is set.
        vm.restore(&state.take::<VmState>(0)?)?;
        devices.restore(&mut state)?;
        state.finish()?;
        let first = vcpus.first().ok_or(hypervisor::Error::VcpuCount(0))?;
        let clock = ClockPlan::new(first)?;
        Self::assemble(
            Parts {
                vm,
                memory,
                vcpus,
                disks,
                devices,
                buses,
                input,
                clock,
                cut,
                restored: true,
                stored_as,
            },
            listeners,
        )
    }

    fn assemble(parts: Parts, listeners: &Listeners) -> Result<Self, Error> {
        let Parts {
            vm,
            memory,
            vcpus,
            disks,
            devices,
            buses,
            input,
            clock,
            cut,
            restored,
            stored_as,
        } = parts;
        let input = input.map(|source| SerialInput {
            source,
            serial: Arc::clone(&devices.serial),
        });
        let (event_loop, quiesced) = EventLoop::spawn(&devices.transports, input)?;
        let exits = Arc::new(ExitCounts::default());
        let vcpu_count = vcpus.len() as u32;
        let vcpus = Vcpus::start(vcpus, &Arc::new(buses), &exits, &listeners.end)?;
        Ok(Self {
            vm,
            memory,
            vcpu_count,
            disks,
            vcpus,
            event_loop,
            counters: Arc::new(Counters {
                exits,
                machine: MachineCounts::default(),
                devices,
                saving: Progress::default(),
            }),
            quiesced: Some(quiesced),
            held_since: Instant::now(),
            clock,
            cut,
            restored,
            lost: false,
            stored_as,
        })
    }

    /// What it counts.
    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Its memory.
    pub(crate) fn memory(&self) -> &MachineMemory {
        &self.memory
    }

    /// Its disks.
    pub(crate) fn disks(&self) -> &[AttachedDisk] {
        &self.disks
    }

    /// Number of vCPUs.
    pub(crate) fn vcpu_count(&self) -> u32 {
        self.vcpu_count
    }

    /// Holds it: every vCPU is out of the guest, every queue is drained, nothing is in flight. When
    /// it fails, the machine runs on if it ran.
    pub(crate) fn hold(&mut self) -> Result<Held<'_>, Error> {
        let ran = self.quiesced.is_none();
        if ran {
            let since = Instant::now();
            match self.vcpus.hold() {
                Ok(stopped) => self.clock = self.clock.held(stopped),
                Err(error) => {
                    self.let_run_after_failure(self.clock.never_stopped(Duration::ZERO));
                    return Err(error.into());
                }
            }
            self.cut = Cut::now();
            match self.quiesce() {
                Ok(quiesced) => self.quiesced = Some(quiesced),
                Err(error) => {
                    self.let_run_after_failure(self.clock.never_stopped(CLOCK_LEAD));
                    return Err(error);
                }
            }
            self.held_since = since;
            let took = since.elapsed().as_micros() as u64;
            let counts = &self.counters.machine;
            counts.holds.add(1);
            counts.last_hold_us.set(took);
            counts.longest_hold_us.set_max(took);
        }
        Ok(Held {
            machine: self,
            ran,
            clock: GuestClock::default(),
        })
    }

    /// Stops everything but the vCPUs, which are held already: they could notify a device again.
    fn quiesce(&mut self) -> Result<Quiesced, Error> {
        self.vm.stop_clock(self.clock.stopped(), &self.clock)?;
        Ok(self.event_loop.quiesce(QUIESCE_BOUND)?)
    }

    /// Whether it did not go on when it should have, so that nothing is known of it.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost
    }

    /// Whether the guest runs.
    pub(crate) fn is_running(&self) -> bool {
        self.quiesced.is_none()
    }

    /// Lets it run; one that runs goes on. Its clocks go on from where they stood, or from where they would be by now.
    /// When this fails, the machine is in no known state.
    pub(crate) fn run(&mut self, clock: GuestClock) -> Result<(), Error> {
        if self.is_running() {
            return Ok(());
        }
        if self.restored {
            let devices = &self.counters.devices;
            devices.resume();
            // Not before it runs: one that is only saved again is the same.
            devices.generation.renew(self.memory.guest())?;
        }
        let start = match (clock, self.cut) {
            (GuestClock::StandStill, _) => self.clock.start(CLOCK_LEAD, Duration::ZERO),
            (GuestClock::Follow, Cut::Held { .. }) => self.clock.never_stopped(CLOCK_LEAD),
            (GuestClock::Follow, Cut::Saved { unix_ns }) => {
                let passed = since_unix(unix_ns) + CLOCK_LEAD;
                self.clock.start(CLOCK_LEAD, passed)
            }
        };
        self.start(start)?;
        self.restored = false;
        self.quiesced = None;
        Ok(())
    }

    fn start(&mut self, start: ClockStart) -> Result<(), Error> {
        // Before any vCPU can enter the guest, which none does before the start.
        let started = self
            .vm
            .start_clock(start)
            .map_err(Error::from)
            .and_then(|()| Ok(self.vcpus.run(start)?));
        self.lost |= started.is_err();
        started
    }

    fn let_run_after_failure(&mut self, start: ClockStart) {
        if let Err(error) = self.start(start) {
            tracing::error!("the machine cannot go on after a pause that failed: {error}");
        }
    }
}

impl Held<'_> {
    /// Leaves the machine held.
    pub(crate) fn keep(mut self) {
        self.ran = false;
    }

    /// Has its clocks do this if it goes on; else they stand still.
    pub(crate) fn with_clock(mut self, clock: GuestClock) -> Self {
        self.clock = clock;
        self
    }

    /// Lets the machine go on, whether it ran before or not.
    pub(crate) fn let_go(mut self) -> Result<(), Error> {
        self.ran = false;
        self.machine.run(self.clock)
    }

    /// Since when it has been standing still.
    pub(crate) fn since(&self) -> Instant {
        self.machine.held_since
    }

    /// Its memory.
    pub(crate) fn memory(&self) -> &MachineMemory {
        &self.machine.memory
    }

    /// Everything of it but its memory and the content of its disks, which is what `cuts` says.
    pub(crate) fn save(&mut self, cuts: &Cuts) -> Result<Container, Error> {
        // Exhaustive, so that a new field is either saved or said not to be.
        let Machine {
            vm,
            memory,
            vcpu_count,
            disks,
            vcpus,
            event_loop: _,
            counters,
            quiesced: _,
            held_since: _,
            clock,
            cut,
            restored: _,
            lost: _,
            stored_as: _,
        } = &mut *self.machine;
        let mut container = Container::new(header(vm, memory, *vcpu_count, *cut)?);
        let disks: Result<_, _> = (disks.iter().enumerate())
            .map(|(index, disk)| disk_state(disk, cuts.layer(index)))
            .collect();
        container.put(0, &MachineState { disks: disks? })?;
        for state in vcpus.save(clock.stopped())? {
            container.put(state.id, &state)?;
        }
        container.put(0, &vm.save()?)?;
        counters.devices.save(&mut container)?;
        Ok(container)
    }

    /// Its disks.
    pub(crate) fn disks(&self) -> &[AttachedDisk] {
        self.machine.disks()
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.ran
            && let Err(error) = self.machine.run(self.clock)
        {
            tracing::error!("the machine cannot go on: {error}");
        }
    }
}

fn disk_state(disk: &AttachedDisk, ended: Option<&LayerRef>) -> Result<DiskState, Error> {
    let config = &disk.config;
    let state = match (ended, disks::read_layer(disk)) {
        (Some(layer), _) => Ok(DiskState::of_layer(config, layer)),
        (None, Some(read)) => DiskState::of_read_layer(config, read),
        (None, None) => DiskState::of(config),
    };
    state.map_err(|source| Error::DiskSync {
        path: config.path.display().to_string(),
        source,
    })
}

/// Whether what a state file asks for is what this process may give: the file may come from anybody.
fn confined(confinement: &Confinement, header: &Header, disks: &[DiskState]) -> Result<(), Error> {
    let mib = header.memory_bytes >> 20;
    if header.vcpus > confinement.vcpus || mib > confinement.memory_mib {
        return Err(Error::TooLarge {
            vcpus: header.vcpus,
            mib,
        });
    }
    for disk in disks {
        // One that is not there is refused when it is opened, by the same path.
        let path = Path::new(&disk.path);
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        if !disks::allows(Some(confinement), &real) {
            return Err(Error::DiskOutside {
                path: disk.path.clone(),
            });
        }
    }
    Ok(())
}

fn level(model: CpuModel) -> CpuLevel {
    match model {
        CpuModel::Host => CpuLevel::Host,
        CpuModel::V2 => CpuLevel::V2,
        CpuModel::V3 => CpuLevel::V3,
    }
}

/// Whether the guest's CPUs have address bits for all of its memory.
fn addressable(memory: &MachineMemory, cpuid: &GuestCpuid) -> Result<(), Error> {
    let regions = memory.layout().regions();
    let end = regions.iter().map(|region| region.gpa + region.bytes).max();
    match end {
        Some(end) if end > 1 << cpuid.address_bits() => Err(Error::NoAddressBits {
            mib: memory.layout().bytes() >> 20,
            bits: cpuid.address_bits(),
        }),
        _ => Ok(()),
    }
}

/// The layout of `bytes` of guest memory, if this host can hold it at all.
fn layout_of(bytes: u64) -> Result<Layout, Error> {
    let layout = Layout::new(bytes)?;
    let info = rustix::system::sysinfo();
    let host = (info.totalram as u64 + info.totalswap as u64) * u64::from(info.mem_unit);
    if bytes > host {
        return Err(Error::HostTooSmall {
            guest_mib: bytes >> 20,
            host_mib: host >> 20,
        });
    }
    Ok(layout)
}

fn header(vm: &Vm, memory: &MachineMemory, vcpus: u32, cut: Cut) -> Result<Header, Error> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Error::Host(errno.into()))?;
    Ok(Header {
        id: SnapshotId(id),
        release: crate::RELEASE.to_owned(),
        created_unix_ns: cut.unix_ns(),
        host_cpu: cpu_identity(vm.cpuid()),
        vcpus,
        memory_bytes: memory.layout().bytes(),
    })
}
