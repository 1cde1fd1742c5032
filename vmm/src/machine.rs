//! One machine: made from a kernel or from a snapshot, held, saved, and let go on.

use std::{
    fs::File,
    sync::Arc,
    time::{Duration, Instant},
};

use branch_disk::LayerId;
use control::{GuestClock, LaunchSpec, MachineConfig, Origin};
use devices::{EventLoop, InHand, OnGuestRequest, Quiesced};
use hypervisor::{ClockPlan, VcpuState, Vm, VmState};
use memory::{HostPages, MachineMemory};
use saved_state::SavedState;
use snapshot::{Lost, OnDemand, Saving, Snapshot};

use crate::{
    arriving_disks::{ArrivingDisks, Bringing},
    balloons, boot, console, cpu,
    device_set::{Chosen, DeviceSet, MAX_DEVICES},
    disks::{self, AttachedDisk},
    error::Error,
    frame::{Frame, Restored, Threads, restore_vcpu},
    limits::{addressable, confined, layout_of, warn_if_crowded},
    live::Live,
    merging::Merging,
    metrics::{ExitCounts, MachineCounts},
    nets,
    state::MachineState,
    stored_disks::{Rebuilding, StoredAs},
    urgent::Urgent,
    vcpu::VcpuEnd,
    vcpus::{self, Vcpus},
    vmclock, vsocks,
};

mod going_on;
mod held;
mod reset;
mod stall;
use going_on::Cut;
pub(crate) use held::Held;
use reset::Baseline;
use stall::Stalled;

/// How long those who are to stand still may take.
#[derive(Clone, Copy)]
struct Bounds {
    vcpus: Duration,
    /// A request or two of a slow disk.
    devices: Duration,
}

const BOUNDS: Bounds = Bounds {
    vcpus: vcpus::BOUND,
    devices: Duration::from_secs(30),
};

/// As what a saved machine goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GoesOn {
    /// As the one that it was: it has what that had.
    AsItself,
    /// As another beside that one: it has addresses of its own.
    AsAnother,
}

impl GoesOn {
    fn of(origin: &Origin) -> Self {
        match origin {
            Origin::Boot(_) | Origin::Restore(_) => Self::AsItself,
            Origin::Fork(_) => Self::AsAnother,
        }
    }
}

/// Who is told what the guest wants, or how it ends.
#[derive(Clone)]
pub(crate) struct Listeners {
    /// Told when it wants to be switched off or reset.
    pub(crate) requests: OnGuestRequest,
    /// Told when a vCPU cannot go on.
    pub(crate) end: Arc<dyn Fn(u32, VcpuEnd) + Send + Sync>,
    /// Told when a vCPU has come back because a run is done.
    pub(crate) parked: Arc<dyn Fn() + Send + Sync>,
    /// Told when somebody waits for memory that cannot be had.
    pub(crate) lost: Arc<dyn Fn(&Lost) + Send + Sync>,
}

/// What can be read of a machine while it does something else.
pub(crate) struct Counters {
    pub(crate) exits: Arc<ExitCounts>,
    pub(crate) machine: MachineCounts,
    pub(crate) devices: DeviceSet,
    /// How far the snapshot in work is.
    pub(crate) saving: Saving,
    /// Of a machine whose memory comes on demand, or came so.
    pub(crate) arriving: Option<OnDemand>,
    /// Its disks that come so, or did.
    pub(crate) arriving_disks: ArrivingDisks,
}

impl Counters {
    /// A page of memory that cannot be had.
    pub(crate) fn lost(&self) -> Option<Lost> {
        self.arriving.as_ref().and_then(OnDemand::lost)
    }

    /// Bytes of memory and of disks that have come.
    pub(crate) fn come(&self) -> u64 {
        let arriving = self.arriving.as_ref();
        let memory = arriving.map_or(0, |arriving| arriving.progress().done());
        memory.saturating_add(self.arriving_disks.come())
    }

    /// Whether memory or disks are still to come.
    pub(crate) fn is_any_missing(&self) -> bool {
        self.is_memory_missing() || !self.arriving_disks.are_here()
    }

    /// Whether memory is still to come.
    fn is_memory_missing(&self) -> bool {
        let arriving = self.arriving.as_ref();
        arriving.is_some_and(|arriving| !arriving.is_complete())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.counters.is_memory_missing() {
            self.vcpus.leave();
        }
    }
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
    /// There while it is to stand still and somebody in it cannot, for lack of a page.
    stalled: Option<Stalled>,
    /// How its clocks go on, while it is held.
    clock: ClockPlan,
    /// When they were stopped, in the world's time.
    cut: Cut,
    /// Until a restored machine runs for the first time.
    restored: bool,
    /// While it is held, whether its guest can see that already.
    told: bool,
    /// It did not go on when it should have, and is in no known state.
    lost: bool,
    /// What it was last in a store, by its id there: what its next snapshot builds on.
    pub(crate) stored_as: Option<StoredAs>,
    /// What is written to its memory, once that has to be known.
    pub(crate) live: Option<Live>,
    /// How many layers its disks have.
    merging: Merging,
    /// Who has those of its disks come that are not all here. Dropped behind the vCPUs and the devices' loop, which write to them.
    bringing: Bringing,
    /// What it can be again, if it can.
    baseline: Option<Baseline>,
}

/// A machine whose parts are there and whose threads wait for their work.
struct Parts {
    vm: Vm,
    memory: MachineMemory,
    vcpus: Vec<hypervisor::Vcpu>,
    threads: Threads,
    disks: Vec<AttachedDisk>,
    devices: DeviceSet,
    buses: crate::vcpu::Buses,
    input: Option<File>,
    clock: ClockPlan,
    cut: Cut,
    restored: bool,
    stored_as: Option<StoredAs>,
    arriving: Option<OnDemand>,
    baseline: Option<Baseline>,
}

impl Machine {
    /// Makes the machine of `config`, within what `spec` permits; its first instruction is that of a kernel.
    pub(crate) fn boot(
        config: &MachineConfig,
        spec: &LaunchSpec,
        console: console::Ends,
        listeners: &Listeners,
    ) -> Result<Self, Error> {
        let bytes = config.memory_mib.saturating_mul(1 << 20);
        let layout = layout_of(bytes)?;
        warn_if_crowded(config.vcpus);
        let memory = MachineMemory::zeroed_of(host_pages(spec), layout)?;
        let frame = Frame::new(memory, config.vcpus)?;
        let Frame {
            memory,
            vm,
            mut vcpus,
            threads,
            restored: _,
        } = frame;
        let requests = &listeners.requests;
        let console::Ends { output, input } = console;
        let disks = disks::attach(&config.disks, spec.confinement.as_ref())?;
        let balloon = config.balloon.as_ref();
        let chosen = Chosen {
            disks: &disks,
            nets: &config.nets,
            vsock: config.vsock.as_ref(),
            balloon: balloon
                .map(|balloon| balloons::options(balloon, &memory))
                .transpose()?,
            console: config.console_device,
        };
        let (devices, buses) = DeviceSet::new(&vm, &memory, chosen, output, requests)?;
        let registers = boot::load(&memory, config, &devices.described())?;
        devices.generation.begin(memory.guest())?;
        vmclock::begin(memory.guest())?;
        let template = cpu::template(&config.cpu);
        let cpuid = vm.cpuid().of_template(&template)?;
        addressable(&memory, &cpuid)?;
        for vcpu in &mut vcpus {
            vcpu.initialise(&cpuid)?;
            vcpu.change_msrs(&template.msrs)?;
        }
        let first = vcpus.first().ok_or(hypervisor::Error::VcpuCount(0))?;
        first.boot(&registers)?;
        let clock = ClockPlan::new(first)?;
        Self::assemble(
            Parts {
                vm,
                memory,
                vcpus,
                threads,
                disks,
                devices,
                buses,
                input,
                clock,
                cut: Cut::now(),
                restored: false,
                stored_as: None,
                arriving: None,
                baseline: None,
            },
            listeners,
        )
    }

    /// Makes the machine that `saved` was, with what `spec` changes and permits. Its memory is checked first, or when it comes. It is
    /// made in `prepared`, if that is there and for it.
    pub(crate) fn restore(
        mut saved: Snapshot,
        prepared: Option<Frame>,
        spec: &LaunchSpec,
        console: console::Ends,
        listeners: &Listeners,
    ) -> Result<Self, Error> {
        let confinement = spec.confinement.as_ref();
        layout_of(saved.state.header.memory_bytes)?;
        let mut state = saved.take_state();
        let whole = state.clone();
        let MachineState { disks } = state.take(0)?;
        // Before any is opened, for a state file may name very many.
        if disks.len() > MAX_DEVICES {
            return Err(Error::TooManyDevices);
        }
        if let Some(confinement) = confinement {
            confined(confinement, &state.header, &disks)?;
        }
        let layers = disks
            .iter()
            .map(|disk| disk.layer().ok().flatten())
            .collect();
        let rebuilding = Rebuilding {
            of: saved.stored_as().unwrap_or_default(),
            directory: spec.disk_directory.as_deref(),
            rule: &|path| disks::allows(confinement, path),
            on_demand: spec.on_demand,
        };
        let disks = disks::reattach(&disks, &saved, &rebuilding)?;
        let goes_on = GoesOn::of(&spec.origin);
        let nets = nets::saved(&state, &spec.net_changes, confinement.is_some(), goes_on)?;
        let vsock = vsocks::saved(&state, &spec.vsock_change, confinement, goes_on)?;
        let balloon = balloons::saved(&state)?;
        let count = state.header.vcpus;
        let (frame, arriving) = stall::load(&saved, prepared, count, spec, listeners)?;
        let Frame {
            memory,
            mut vm,
            mut vcpus,
            threads,
            restored,
        } = frame;
        let stored_as = saved.stored_as().map(|id| StoredAs {
            id: id.to_owned(),
            layers,
        });
        let cut = Cut::Saved {
            unix_ns: state.header.created_unix_ns,
        };
        let requests = &listeners.requests;
        let console::Ends { output, input } = console;
        let chosen = Chosen {
            disks: &disks,
            nets: &nets,
            vsock: vsock.as_ref(),
            balloon,
            console: console::saved_device(&state),
        };
        let (devices, buses) = DeviceSet::new(&vm, &memory, chosen, output, requests)?;
        for vcpu in &mut vcpus {
            let saved = state.remove(VcpuState::KIND, vcpu.id())?;
            if restored != Restored::MemoryAndVcpus {
                restore_vcpu(vcpu, &saved.decode()?, &vm)?;
            }
        }
        // After the vCPUs: an interrupt controller delivers to the local APICs as it is set.
        vm.restore(&state.take::<VmState>(0)?)?;
        devices.restore(&mut state)?;
        state.finish()?;
        let first = vcpus.first().ok_or(hypervisor::Error::VcpuCount(0))?;
        let clock = ClockPlan::new(first)?;
        let baseline = Baseline::new(whole, &memory, confinement, clock);
        Self::assemble(
            Parts {
                vm,
                memory,
                vcpus,
                threads,
                disks,
                devices,
                buses,
                input,
                clock,
                cut,
                restored: true,
                stored_as,
                arriving,
                baseline,
            },
            listeners,
        )
    }

    fn assemble(parts: Parts, listeners: &Listeners) -> Result<Self, Error> {
        let Parts {
            vm,
            memory,
            vcpus,
            threads,
            disks,
            devices,
            buses,
            input,
            clock,
            cut,
            restored,
            stored_as,
            arriving,
            baseline,
        } = parts;
        let arriving_disks = ArrivingDisks::of(&disks);
        let input = input.map(|source| devices.console_input(source));
        let (event_loop, quiesced) =
            EventLoop::start_on(threads.devices, &devices.transports, input)?;
        let exits = Arc::new(ExitCounts::default());
        let vcpu_count = vcpus.len() as u32;
        let Listeners { end, parked, .. } = listeners;
        let vcpus = vcpus.into_iter().zip(threads.vcpus).collect();
        let vcpus = Vcpus::start(vcpus, &Arc::new(buses), &exits, end, parked)?;
        Ok(Self {
            vm,
            memory,
            vcpu_count,
            merging: Merging::new(&disks),
            bringing: Bringing::new(arriving_disks.clone(), &disks),
            disks,
            vcpus,
            event_loop,
            counters: Arc::new(Counters {
                exits,
                machine: MachineCounts::default(),
                devices,
                saving: Saving::default(),
                arriving,
                arriving_disks,
            }),
            quiesced: Some(quiesced),
            held_since: Instant::now(),
            stalled: None,
            clock,
            cut,
            restored,
            told: false,
            lost: false,
            stored_as,
            live: None,
            baseline,
        })
    }

    /// Says whether it is still there.
    pub(crate) fn wanted(&self) -> impl Fn() -> bool + Send + Sync + 'static {
        self.bringing.wanted()
    }

    /// Somebody has learnt of it, so that what its guest does is to be of use.
    pub(crate) fn is_known(&mut self) {
        self.bringing.is_known();
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

    /// There may be a snapshot that needs these layers of its disks for itself.
    pub(crate) fn keep_layers(&mut self, layers: Vec<LayerId>) {
        self.merging.need(layers);
    }

    /// Has the layers stay that it went on from: a snapshot that has no content of its disks may need them.
    pub(crate) fn keep_found_layers(&self) {
        self.merging.keep_found(&self.disks);
    }

    /// Has layers of its disks become one that no snapshot needs for itself, if they are many. It has been held since it last did.
    pub(crate) fn merge_layers(&mut self) {
        self.merging.look(&self.disks, self.stored_as.as_ref());
    }

    /// What its devices are just at.
    pub(crate) fn devices_in_hand(&self) -> InHand {
        self.event_loop.in_hand()
    }

    /// Number of vCPUs.
    pub(crate) fn vcpu_count(&self) -> u32 {
        self.vcpu_count
    }

    /// Does what is left to do of making it, and takes its time: before it is held for the first time.
    pub(crate) fn settle(&self) -> Result<(), Error> {
        Ok(self.vm.drop_missed_ticks()?)
    }

    /// Holds it: every vCPU is out of the guest, every queue is drained, nothing is in flight. When
    /// it fails, the machine runs on if it ran.
    pub(crate) fn hold(&mut self) -> Result<Held<'_>, Error> {
        let ran = self.is_running();
        let urgent = Urgent::new();
        if self.quiesced.is_none()
            && let Err((stalled, error)) = self.stand_still(BOUNDS, urgent.is_some())
        {
            if ran {
                self.let_run_after_failure(self.clock.never_stopped(stalled.lead()));
            } else {
                self.stalled = Some(stalled);
            }
            return Err(error);
        }
        Ok(Held {
            machine: self,
            urgent,
            ran,
            clock: GuestClock::default(),
        })
    }

    /// Has everything stand still, before others who compute if `urgent`, as the caller then is. When it fails, it says who does not, and all that come before do.
    fn stand_still(&mut self, bounds: Bounds, urgent: bool) -> Result<(), (Stalled, Error)> {
        let since = Instant::now();
        if let Some(arriving) = &self.counters.arriving {
            arriving.stands_still();
        }
        let stopped = self.vcpus.hold(bounds.vcpus, urgent);
        let stopped = stopped.map_err(|error| (Stalled::InVcpu, error.into()))?;
        // Else all vCPUs stood still before, and their clocks with them.
        if self.stalled != Some(Stalled::InDevice) {
            self.clock = self.clock.held(stopped);
            self.cut = Cut::now();
        }
        let quiesced = self.quiesce(bounds.devices);
        self.quiesced = Some(quiesced.map_err(|error| (Stalled::InDevice, error))?);
        self.stalled = None;
        self.held_since = since;
        let took = since.elapsed().as_micros() as u64;
        let counts = &self.counters.machine;
        counts.holds.add(1);
        counts.last_hold_us.set(took);
        counts.longest_hold_us.set_max(took);
        Ok(())
    }

    /// Stops everything but the vCPUs, which are held already: they could notify a device again.
    fn quiesce(&mut self, bound: Duration) -> Result<Quiesced, Error> {
        self.vm.stop_clock(self.clock.stopped(), &self.clock)?;
        Ok(self.event_loop.quiesce(bound)?)
    }

    /// Lets vCPUs go on that have come back because a run is done that is nobody's any more. While it is held, they wait on.
    pub(crate) fn unpark(&mut self) -> Result<(), Error> {
        if !self.is_running() || !self.vcpus.is_any_parked() {
            return Ok(());
        }
        // Their clocks were never stopped.
        let started = self.vcpus.run(self.clock.never_stopped(Duration::ZERO));
        self.lost |= started.is_err();
        Ok(started?)
    }

    /// Whether it did not go on when it should have, so that nothing is known of it.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost
    }

    /// Whether the guest runs.
    pub(crate) fn is_running(&self) -> bool {
        self.quiesced.is_none() && self.stalled.is_none()
    }
}

fn host_pages(spec: &LaunchSpec) -> HostPages {
    if spec.hugepages {
        HostPages::Reserved
    } else {
        HostPages::Any
    }
}
