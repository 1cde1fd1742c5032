//! The guest's clocks: the time stamp counter of each vCPU, and kvmclock.
//!
//! A machine that is held has its clocks stopped, one that was restored has them stopped since it was saved,
//! and both go on in the same way: every vCPU's counter is set by `KVM_VCPU_TSC_OFFSET` from one and the same
//! delta, because writing the counters one after the other would set them apart. Whether they go on from where they stood
//! is the choice of who lets the machine go on: [`ClockPlan::start`].

use std::time::Duration;

use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data, kvm_cpuid_entry2};
use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use crate::{Error, MsrEntry, Vcpu, Vm, error::Asked, msrs, tsc_offset};

/// How often a clock is read or set until it is right, and what is right enough: less than leaving the guest takes.
const TRIES: u32 = 4;
const ERROR_NS: u64 = 2_000;

/// How far the host's rate may be off before a guest's counter needs scaling: KVM's own tolerance.
const TOLERANCE_PPM: u64 = 250;

/// A vCPU's time stamp counter, as saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Versionize)]
pub struct VcpuClock {
    /// Its rate in kHz.
    pub tsc_khz: u32,
    /// Its offset from the host's, in its own ticks, modulo 2^64.
    pub tsc_offset: u64,
    /// Its value when it was saved.
    pub tsc: u64,
    /// The counter's value at which the local APIC's timer is due; 0 when it is not armed.
    pub deadline: u64,
}

/// kvmclock, as saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Versionize)]
pub struct MachineClock {
    /// Nanoseconds since the machine was booted, in guest time.
    pub kvmclock_ns: u64,
}

/// A value of the host's time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostTsc(u64);

impl HostTsc {
    /// The counter now.
    pub fn now() -> Self {
        Self(host_tsc())
    }

    /// Reads a clock, and tells the values just before and just after. A thread may be off its CPU between two looks, and then a
    /// clock and the counter are not of one instant: of a few tries, that in which least time passed.
    fn around<T>(
        host_khz: u32,
        mut read: impl FnMut() -> Result<T, Error>,
    ) -> Result<(Self, T, Self), Error> {
        let mut look = || {
            let before = Self::now();
            let clock = read()?;
            Ok::<_, Error>((before, clock, Self::now()))
        };
        let took =
            |(before, _, after): &(Self, T, Self)| nanoseconds(after.since(*before), host_khz);
        let mut best = look()?;
        for _ in 1..TRIES {
            if took(&best) < ERROR_NS {
                break;
            }
            let again = look()?;
            if took(&again) < took(&best) {
                best = again;
            }
        }
        Ok(best)
    }

    /// Ticks since `earlier`; 0 if it is not earlier.
    fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Returns at this value, or at once after it.
    fn wait(self) {
        while host_tsc() < self.0 {
            std::hint::spin_loop();
        }
    }
}

/// The clock of a vCPU.
#[derive(Debug, Default)]
pub(crate) enum ClockOf {
    /// It runs, or has not begun to.
    #[default]
    Running,
    /// It was stopped when the vCPU was held, at this value of the host's counter.
    Stopped(VcpuClock, HostTsc),
    /// It was stopped when it was saved.
    Restored(VcpuClock),
}

/// How a machine's clocks go on.
#[derive(Clone, Copy, Debug)]
pub struct ClockPlan {
    /// What is to be added to every offset were the clocks to go on at `stopped`, in guest ticks modulo 2^64.
    delta: u64,
    /// When they were stopped; for a restored machine, when this was planned.
    stopped: HostTsc,
    guest_khz: u32,
    host_khz: u32,
}

/// How and when a machine's clocks go on.
#[derive(Clone, Copy, Debug)]
pub struct ClockStart {
    /// What is added to every offset, in guest ticks modulo 2^64.
    delta: u64,
    /// The instant at which guest time goes on; no vCPU enters the guest before.
    at: HostTsc,
    host_khz: u32,
    /// What kvmclock goes forward.
    passed: Duration,
}

impl ClockPlan {
    /// Plans for a machine whose first vCPU is `first`.
    ///
    /// # Errors
    ///
    /// When KVM refuses to tell the counter.
    pub fn new(first: &Vcpu) -> Result<Self, Error> {
        // The rate that it has, which need not be the one that it was saved with: see `restore_tsc_rate`.
        let guest_khz = first.fd.get_tsc_khz().asked("tell the TSC's rate")?;
        let plan = |delta, stopped| Self {
            delta,
            stopped,
            guest_khz,
            host_khz: first.host_tsc_khz,
        };
        let ClockOf::Restored(saved) = &first.clock else {
            return Ok(plan(0, HostTsc::now()));
        };
        let offset_now = tsc_offset::get(&first.fd)?;
        let (_, now, after) = first.read_tsc()?;
        // The offset that would show the saved value now, less the one that was saved.
        let wanted = offset_now.wrapping_add(saved.tsc).wrapping_sub(now);
        // What passes between the two looks makes the guest's counter go forward, not back.
        Ok(plan(wanted.wrapping_sub(saved.tsc_offset), after))
    }

    /// When the machine's clocks were stopped.
    #[must_use]
    pub fn stopped(&self) -> HostTsc {
        self.stopped
    }

    /// The plan for a machine of which the last vCPU was held at `stopped`.
    #[must_use]
    pub fn held(self, stopped: HostTsc) -> Self {
        Self {
            delta: 0,
            stopped,
            ..self
        }
    }

    /// Has guest time go on after `lead`, which is for the vCPUs to get ready in, as if `passed` had passed since it
    /// stopped: nothing, and it has stood still.
    #[must_use]
    pub fn start(&self, lead: Duration, passed: Duration) -> ClockStart {
        let at = self.after(lead);
        let stood = scaled(at.since(self.stopped), self.guest_khz, self.host_khz);
        ClockStart {
            delta: self
                .delta
                .wrapping_sub(stood)
                .wrapping_add(ticks(passed, self.guest_khz)),
            at,
            host_khz: self.host_khz,
            passed,
        }
    }

    /// Has the clocks of a machine that was held here go on after `lead` as if they had not been stopped.
    #[must_use]
    pub fn never_stopped(&self, lead: Duration) -> ClockStart {
        let at = self.after(lead);
        ClockStart {
            delta: 0,
            at,
            host_khz: self.host_khz,
            passed: Duration::from_nanos(nanoseconds(at.since(self.stopped), self.host_khz)),
        }
    }

    fn after(&self, lead: Duration) -> HostTsc {
        HostTsc(host_tsc().wrapping_add(ticks(lead, self.host_khz)))
    }
}

/// What `ticks` at the rate `from_khz` are at the rate `to_khz`.
fn scaled(ticks: u64, to_khz: u32, from_khz: u32) -> u64 {
    (u128::from(ticks) * u128::from(to_khz) / u128::from(from_khz.max(1))) as u64
}

/// `time` in ticks at the rate `khz`.
fn ticks(time: Duration, khz: u32) -> u64 {
    // Nanoseconds times kHz are millionths of ticks.
    (time.as_nanos() * u128::from(khz) / 1_000_000) as u64
}

/// `ticks` at the rate `khz` in nanoseconds.
fn nanoseconds(ticks: u64, khz: u32) -> u64 {
    scaled(ticks, 1_000_000, khz)
}

impl Vcpu {
    /// Stops its clock, if it runs, as of `at`: says when it was stopped, by the host's counter, and disarms its timer, which
    /// would go off while the guest cannot see time pass. It must not have been in the guest since.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub(crate) fn stop_clock(&mut self, at: HostTsc) -> Result<HostTsc, Error> {
        match &self.clock {
            ClockOf::Stopped(_, at) => return Ok(*at),
            ClockOf::Restored(_) => return Ok(HostTsc::now()),
            ClockOf::Running => {}
        }
        // A kick can come while the vCPU waits for the instant at which guest time goes on: it has not gone on then, and
        // would go back if it ended before.
        let at = self.started.map_or(at, |started| at.max(started));
        let (before, mut clock) = self.read_clock()?;
        // From before it was read: an error makes the guest's counter go forward, not back.
        let since = scaled(before.since(at), clock.tsc_khz, self.host_tsc_khz);
        clock.tsc = clock.tsc.wrapping_sub(since);
        if clock.deadline != 0 {
            self.set_deadline(0)?;
        }
        self.clock = ClockOf::Stopped(clock, at);
        Ok(at)
    }

    /// Its clock as it was when the machine's last vCPU was stopped; of one that runs, as it is.
    pub(crate) fn save_clock(&self, stopped: HostTsc) -> Result<VcpuClock, Error> {
        match &self.clock {
            ClockOf::Restored(clock) => Ok(*clock),
            ClockOf::Stopped(clock, at) => {
                let ticks = scaled(stopped.since(*at), clock.tsc_khz, self.host_tsc_khz);
                Ok(VcpuClock {
                    tsc: clock.tsc.wrapping_add(ticks),
                    ..*clock
                })
            }
            ClockOf::Running => Ok(self.read_clock()?.1),
        }
    }

    /// Its clock as it is, and the host's counter just before its own was read.
    fn read_clock(&self) -> Result<(HostTsc, VcpuClock), Error> {
        let (before, tsc, _) = self.read_tsc()?;
        let clock = VcpuClock {
            tsc_khz: self.fd.get_tsc_khz().asked("tell the TSC's rate")?,
            tsc_offset: tsc_offset::get(&self.fd)?,
            deadline: msrs::get_one(&self.fd, msrs::IA32_TSC_DEADLINE)?,
            tsc,
        };
        Ok((before, clock))
    }

    /// Its counter, and the host's before and after.
    fn read_tsc(&self) -> Result<(HostTsc, u64, HostTsc), Error> {
        let read = || msrs::get_one(&self.fd, msrs::IA32_TSC);
        HostTsc::around(self.host_tsc_khz, read)
    }

    fn set_deadline(&self, value: u64) -> Result<(), Error> {
        let index = msrs::IA32_TSC_DEADLINE;
        msrs::set(&self.fd, &[MsrEntry { index, value }])
    }

    /// Gives the vCPU the rate that `clock` was saved with, unless the host's is as good.
    pub(crate) fn restore_tsc_rate(&self, clock: &VcpuClock) -> Result<(), Error> {
        let host = u64::from(self.host_tsc_khz);
        let guest = u64::from(clock.tsc_khz);
        if host.abs_diff(guest) * 1_000_000 <= host * TOLERANCE_PPM {
            return Ok(());
        }
        let Err(refused) = self.fd.set_tsc_khz(clock.tsc_khz) else {
            return Ok(());
        };
        if self.has_invariant_tsc() {
            return Err(Error::TscRate {
                guest: clock.tsc_khz,
                host: self.host_tsc_khz,
            });
        }
        // A guest that was not promised an invariant counter keeps time by kvmclock, which tells
        // it the new rate.
        tracing::warn!(
            vcpu = self.id,
            guest_khz = clock.tsc_khz,
            host_khz = self.host_tsc_khz,
            "the guest's TSC changes its rate, because this host cannot scale it: {refused}"
        );
        Ok(())
    }

    /// Has a clock that was stopped go on from the start on.
    pub(crate) fn start_clock(&mut self, start: ClockStart) -> Result<(), Error> {
        let (ClockOf::Stopped(clock, _) | ClockOf::Restored(clock)) =
            std::mem::take(&mut self.clock)
        else {
            return Ok(());
        };
        tsc_offset::set(&self.fd, clock.tsc_offset.wrapping_add(start.delta))?;
        // After the counter that it is compared with. Zero says that no timer was armed.
        if clock.deadline != 0 {
            self.set_deadline(clock.deadline)?;
        }
        self.started = Some(start.at);
        Ok(())
    }

    fn has_invariant_tsc(&self) -> bool {
        let promised =
            |entry: &kvm_cpuid_entry2| entry.function == 0x8000_0007 && entry.edx & (1 << 8) != 0;
        self.cpuid.iter().any(promised)
    }
}

impl Vm {
    /// Stops kvmclock, if it runs, as it was when the machine's last vCPU was stopped.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn stop_clock(&mut self, stopped: HostTsc, plan: &ClockPlan) -> Result<(), Error> {
        if self.stopped_clock.is_none() {
            let read = || self.fd.get_clock().asked("tell kvmclock");
            let (before, clock, _) = HostTsc::around(plan.host_khz, read)?;
            // Where KVM does not tell when it looked: earlier errs forward, and guest time never goes back.
            let read_at = looked_at(&clock).unwrap_or(before);
            let since = nanoseconds(read_at.since(stopped), plan.host_khz);
            self.stopped_clock = Some(MachineClock {
                kvmclock_ns: clock.clock.saturating_sub(since),
            });
        }
        Ok(())
    }

    /// Has a clock that was stopped go on; does nothing to one that runs.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn start_clock(&mut self, start: ClockStart) -> Result<(), Error> {
        let Some(MachineClock { kvmclock_ns }) = self.stopped_clock else {
            return Ok(());
        };
        let passed = u64::try_from(start.passed.as_nanos()).unwrap_or(u64::MAX);
        let at_start = kvmclock_ns.saturating_add(passed);
        let mut setting = Setting::default();
        for _ in 0..TRIES {
            let lead = setting.lead();
            let before = HostTsc::now();
            let clock = kvm_clock_data {
                // Ahead by what setting takes, so that guest time does not go back.
                clock: start.clock_at(at_start, before).saturating_add(lead),
                // Without `KVM_CLOCK_REALTIME`, with which the time since would be added.
                ..Default::default()
            };
            self.fd.set_clock(&clock).asked("set kvmclock")?;
            let took = nanoseconds(HostTsc::now().since(before), start.host_khz);
            let now = self.fd.get_clock().asked("tell kvmclock")?;
            let right = looked_at(&now).map(|at| start.clock_at(at_start, at));
            if setting.is_right(took, right.map(|right| now.clock.abs_diff(right))) {
                break;
            }
        }
        self.stopped_clock = None;
        Ok(())
    }

    pub(crate) fn save_clock(&self) -> Result<MachineClock, Error> {
        match &self.stopped_clock {
            Some(clock) => Ok(*clock),
            None => Ok(MachineClock {
                kvmclock_ns: self.fd.get_clock().asked("tell kvmclock")?.clock,
            }),
        }
    }
}

/// What is known while kvmclock is set: the thread may be off its CPU between looking at the time and setting the clock.
#[derive(Debug, Default)]
struct Setting {
    /// The least, in nanoseconds, that setting it has taken.
    least: Option<u64>,
}

impl Setting {
    /// How far ahead it is to be set.
    fn lead(&self) -> u64 {
        self.least.unwrap_or(0)
    }

    /// Whether it is right once it was set with that lead, which took `took` nanoseconds; `error` is how far it is off, if KVM tells.
    fn is_right(&mut self, took: u64, error: Option<u64>) -> bool {
        let (lead, before) = (self.lead(), self.least);
        let least = before.map_or(took, |least| least.min(took));
        self.least = Some(least);
        // No more can be had where it takes long each time: KVM looks at the clock somewhere in it, and may not tell where.
        let bound = match (before, error) {
            (None, _) => ERROR_NS,
            (Some(_), Some(_)) => ERROR_NS.max(least),
            (Some(_), None) => ERROR_NS.max(least / 2),
        };
        error.unwrap_or(took.abs_diff(lead)) < bound
    }
}

impl ClockStart {
    /// Whether the guest sees no time pass.
    pub(crate) fn stood_still(&self) -> bool {
        self.passed.is_zero()
    }

    /// Returns when guest time goes on, and the guest may be entered.
    pub fn wait(&self) {
        self.at.wait();
    }

    /// What a clock shows at `now` that shows `at_start` at the start.
    fn clock_at(&self, at_start: u64, now: HostTsc) -> u64 {
        let (lead, late) = (self.at.since(now), now.since(self.at));
        at_start
            .saturating_sub(nanoseconds(lead, self.host_khz))
            .saturating_add(nanoseconds(late, self.host_khz))
    }
}

/// When KVM looked at the clock, if it tells.
fn looked_at(clock: &kvm_clock_data) -> Option<HostTsc> {
    (clock.flags & KVM_CLOCK_HOST_TSC != 0).then_some(HostTsc(clock.host_tsc))
}

/// The host's time stamp counter.
#[allow(unsafe_code)]
fn host_tsc() -> u64 {
    // SAFETY: every x86_64 processor has the instruction, and it only reads.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST_KHZ: u32 = 2_000_000;
    const HOST_KHZ: u32 = 3_000_000;

    fn plan() -> ClockPlan {
        ClockPlan {
            delta: 1_000,
            stopped: HostTsc::now(),
            guest_khz: GUEST_KHZ,
            host_khz: HOST_KHZ,
        }
    }

    #[test]
    fn a_clock_is_read_again_when_the_thread_was_off_its_cpu() {
        let mut reads = 0;
        let (before, read, after) = HostTsc::around(HOST_KHZ, || {
            reads += 1;
            if reads != 2 {
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(reads)
        })
        .unwrap();
        assert_eq!(read, 2);
        assert!(nanoseconds(after.since(before), HOST_KHZ) < 10_000_000);
        // No more often than it is of use, and not for ever.
        assert!((2..=TRIES).contains(&reads), "{reads}");
    }

    #[test]
    fn a_later_start_sets_the_counter_further_back() {
        let plan = plan();
        let [first, second] =
            [0, 1].map(|ms| plan.start(Duration::from_millis(ms), Duration::ZERO));
        assert!(1_000u64.wrapping_sub(second.delta) > 1_000u64.wrapping_sub(first.delta));
        assert!(second.at > first.at);
    }

    #[test]
    fn time_that_has_passed_is_added_at_the_guests_rate() {
        let plan = plan();
        let hour = Duration::from_secs(3600);
        let [still, following] = [Duration::ZERO, hour].map(|passed| plan.start(hour, passed));
        let ahead = following.delta.wrapping_sub(still.delta);
        let hour_ticks = 3600 * 1000 * u64::from(GUEST_KHZ);
        // The second was planned a little later.
        assert!(
            ahead <= hour_ticks && ahead > hour_ticks / 100 * 99,
            "{ahead}"
        );
    }

    /// How often kvmclock is set, where that takes so many nanoseconds, and how far ahead it is then.
    fn set(took: &[u64], told: bool) -> (usize, i64) {
        let mut setting = Setting::default();
        for (tries, took) in (1..).zip(took) {
            let ahead = setting.lead() as i64 - *took as i64;
            let error = told.then_some(ahead.unsigned_abs());
            if setting.is_right(*took, error) {
                return (tries, ahead);
            }
        }
        panic!("it is not right");
    }

    #[test]
    fn kvmclock_is_set_again_until_it_is_right() {
        for told in [true, false] {
            assert_eq!(set(&[900], told), (1, -900));
            assert_eq!(set(&[5_000, 5_100], told), (2, -100));
            // Off its CPU the first time, and the second.
            assert_eq!(set(&[4_000_000, 5_000, 5_000], told), (3, 0));
            assert_eq!(set(&[5_000, 4_000_000, 6_000], told), (3, -1_000));
        }
        // Where it takes long, and never the same, nobody waits for better.
        for told in [true, false] {
            assert_eq!(set(&[40_000, 30_000], told), (2, 10_000));
        }
    }

    #[test]
    fn who_is_late_sets_the_clock_to_what_it_is_by_then() {
        let start = ClockStart {
            delta: 0,
            at: HostTsc(3_000_000),
            host_khz: HOST_KHZ,
            passed: Duration::ZERO,
        };
        for (now, shown) in [(2_997_000, 9_000), (3_000_000, 10_000), (3_003_000, 11_000)] {
            assert_eq!(start.clock_at(10_000, HostTsc(now)), shown);
        }
    }

    #[test]
    fn a_clock_that_was_never_stopped_keeps_its_offset() {
        let start = plan()
            .held(HostTsc(HostTsc::now().0 - 3_000_000))
            .never_stopped(Duration::ZERO);
        assert_eq!(start.delta, 0);
        assert!(
            start.passed >= Duration::from_millis(1),
            "{:?}",
            start.passed
        );
    }

    #[test]
    fn ticks_and_nanoseconds() {
        assert_eq!(nanoseconds(3_000, HOST_KHZ), 1_000);
        assert_eq!(scaled(3_000, GUEST_KHZ, HOST_KHZ), 2_000);
        assert_eq!(scaled(u64::MAX, HOST_KHZ, HOST_KHZ), u64::MAX);
    }
}
