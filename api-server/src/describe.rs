//! A machine as clients see it.

use std::{path::Path, time::Duration};

use api_types::{
    AttachedNet, Balloon, BalloonStatistics, Disk, DiskLimits, DiskStatus, Reset, Runs, RunsEnd,
    Sent, Vm, VmOrigin, VmState,
};
use control::{
    BalloonStatus, Client, Console, MachineState, NetAttachment, NetConfig, Origin, Parent, Record,
    Registry, ResetReport, RunsReport, SentReport, SnapshotReport, Source, Status,
};
use tokio::time::timeout;
use tracing::debug;

/// How long one machine may keep a list of machines waiting.
const STATUS_BOUND: Duration = Duration::from_secs(3);

/// Asks the VMM of `record` what it is doing; `None` if it does not answer within some seconds.
pub async fn status_of(record: &Record) -> Option<Status> {
    let asked = async {
        let client = Client::connect(record.port, &record.secret).await?;
        client.status().await
    };
    let pid = record.process.pid;
    match timeout(STATUS_BOUND, asked).await {
        Ok(Ok(status)) => Some(status),
        Ok(Err(error)) => {
            debug!(pid, %error, "a VMM gives no status");
            None
        }
        Err(_) => {
            debug!(pid, "a VMM does not answer");
            None
        }
    }
}

/// The machine of `record`, which said `status` if it answered.
pub fn describe(registry: &Registry, record: &Record, status: Option<Status>) -> Vm {
    let pid = record.process.pid;
    Vm {
        pid,
        port: record.port,
        state: status
            .as_ref()
            .map_or(VmState::Unresponsive, |status| state(status.state)),
        vcpus: Some(record.vcpus),
        memory_mib: Some(record.memory_mib),
        uptime_ms: status.as_ref().map(|status| status.uptime_ms),
        lost_memory: status
            .as_ref()
            .and_then(|status| status.lost_memory.clone()),
        release: status.as_ref().map(|status| status.release.clone()),
        disks: status.map(|status| status.disks.into_iter().map(disk_of).collect()),
        origin: origin(&record.origin),
        console: console(&record.console),
        log: text(&registry.log_of(pid)),
        notes: Vec::new(),
        ended: None,
    }
}

pub(crate) fn origin(origin: &Origin) -> VmOrigin {
    match origin {
        Origin::Boot(machine) => VmOrigin::Boot {
            kernel_path: text(&machine.kernel),
            initrd_path: machine.initrd.as_deref().map(text),
            cmdline: machine.cmdline.clone(),
            disks: machine
                .disks
                .iter()
                .map(|disk| Disk {
                    path: text(&disk.path),
                    read_only: disk.read_only,
                    format: match disk.format {
                        control::DiskFormat::Raw => api_types::DiskFormat::Raw,
                        control::DiskFormat::Branch => api_types::DiskFormat::Branch,
                    },
                    serial: disk.serial.clone(),
                    limits: disk_limits(disk.limits),
                })
                .collect(),
            nets: machine.nets.iter().map(net).collect(),
        },
        Origin::Restore(source) => saved(source),
        Origin::Fork(Parent::Machine { pid }) => VmOrigin::Fork { of: *pid },
        // It is one of those that go on from there.
        Origin::Fork(Parent::Saved(source)) => saved(source),
    }
}

/// A disk as clients see it.
pub fn disk_of(status: control::DiskStatus) -> DiskStatus {
    let control::DiskStatus { bytes, limits } = status;
    DiskStatus {
        size_bytes: bytes,
        limits: disk_limits(limits),
    }
}

fn disk_limits(limits: control::DiskLimits) -> DiskLimits {
    let control::DiskLimits {
        bytes_per_second,
        operations_per_second,
        read_bytes_per_second,
        read_operations_per_second,
        write_bytes_per_second,
        write_operations_per_second,
    } = limits;
    DiskLimits {
        bytes_per_second,
        operations_per_second,
        read_bytes_per_second,
        read_operations_per_second,
        write_bytes_per_second,
        write_operations_per_second,
    }
}

fn saved(source: &Source) -> VmOrigin {
    match source {
        Source::Files { state, memory, .. } => VmOrigin::Restore {
            cpu_snapshot_path: text(state),
            memory_snapshot_path: text(memory),
        },
        Source::Stored { store, name } => VmOrigin::Stored {
            snapshot: name.clone(),
            store: text(&store.directory),
        },
    }
}

/// A reset as clients see it.
pub fn reset_of(report: ResetReport) -> Reset {
    let ResetReport {
        dirty_pages,
        total_us,
    } = report;
    Reset {
        dirty_pages,
        total_us,
    }
}

/// Runs as clients see them.
pub fn runs_of(report: RunsReport) -> Runs {
    let RunsReport {
        done,
        ended,
        last,
        result,
        dirty_pages,
        reset_us,
        total_us,
    } = report;
    Runs {
        done,
        ended: match ended {
            control::RunsEnd::AllDone => RunsEnd::AllDone,
            control::RunsEnd::Result => RunsEnd::Result,
            control::RunsEnd::Limit => RunsEnd::Limit,
            control::RunsEnd::Interrupted => RunsEnd::Interrupted,
            control::RunsEnd::Ended => RunsEnd::Ended,
        },
        last: last.get(),
        result,
        dirty_pages,
        reset_us,
        total_us,
    }
}

/// A snapshot that was sent as clients see it.
pub(crate) fn sent_of(report: SnapshotReport) -> Option<Sent> {
    let SentReport {
        name,
        id,
        new_bytes,
    } = report.sent?;
    Some(Sent {
        name,
        id,
        new_bytes,
        downtime_us: report.downtime_us,
        total_us: report.total_us,
    })
}

/// A balloon as clients see it.
pub fn balloon_of(status: BalloonStatus) -> Balloon {
    let BalloonStatus {
        driver,
        target_mib,
        actual_bytes,
        statistics_interval_s,
        statistics,
    } = status;
    Balloon {
        driver,
        target_mib,
        actual_bytes,
        statistics_interval_s,
        statistics: statistics.map(|told| BalloonStatistics {
            age_ms: told.age_ms,
            values: told.values,
        }),
    }
}

fn net(net: &NetConfig) -> AttachedNet {
    let (tap_device, socket_path) = match &net.attachment {
        NetAttachment::Tap(name) => (Some(name.clone()), None),
        NetAttachment::Socket(path) => (None, Some(text(path))),
    };
    AttachedNet {
        tap_device,
        socket_path,
        mac: net.mac.map(|mac| mac.to_string()),
    }
}

pub(crate) fn console(console: &Console) -> Option<String> {
    match console {
        Console::File(path) => Some(text(path)),
        Console::Terminal => None,
    }
}

pub(crate) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn state(state: MachineState) -> VmState {
    match state {
        MachineState::Running => VmState::Running,
        MachineState::Paused => VmState::Paused,
        MachineState::Saving => VmState::Saving,
        MachineState::Ended => VmState::Ended,
    }
}
