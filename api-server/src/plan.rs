//! From a request to what a VMM is told. Nothing is started here.

mod cpu;
mod disk;
mod fork;
mod runs;
mod saving;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use api_types::{CreateRequest, ErrorCode, Net};
use control::{
    BalloonConfig, ConsoleDevice, GuestClock, MacAddress, MachineConfig, NetAttachment, NetChange,
    NetConfig, NotAMac, Origin, RateLimit, Source, UseWorkingSet,
};

use crate::{
    Limits, ServerConfig,
    error::ApiError,
    tree::{PathError, Tree},
};

pub use cpu::cpu_model;
pub(crate) use disk::change as disk_change;
pub(crate) use fork::{Fork, Forked, fork};
pub(crate) use runs::runs;
pub(crate) use saving::{send, snapshot};

/// The least memory a machine may have, in MiB.
const MIN_MEMORY_MIB: u64 = 64;

/// More devices of one kind than any machine can have. Where the limit is, a VMM knows.
const TOO_MANY_DEVICES: usize = 32;

/// No name of a TAP device is longer, with what stands for a fork's number.
const TAP_NAME_BYTES: usize = 64;

/// What a `POST /create` comes to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) origin: Origin,
    pub(crate) clock: GuestClock,
    /// Whether its memory is made of huge pages that the host has reserved.
    pub(crate) hugepages: bool,
    /// Whether a restored machine's memory comes when it is touched.
    pub(crate) on_demand: bool,
    /// What is then done with the pages that it touches first.
    pub(crate) working_set: UseWorkingSet,
    /// What the network devices of a restored machine are attached to.
    pub(crate) net_changes: Vec<NetChange>,
    /// Where disks of a restored machine are made that are not here: beside its memory file.
    pub(crate) disk_directory: Option<PathBuf>,
    /// What was asked for and is not done.
    pub(crate) notes: Vec<String>,
}

pub(crate) fn create(
    config: &ServerConfig,
    tree: &Tree,
    request: &CreateRequest,
) -> Result<Plan, ApiError> {
    let nets = nets(request)?;
    let (origin, net_changes) = if request.resume {
        let changes = nets.into_iter().map(net_change);
        (restore(config, tree, request)?, changes.collect())
    } else {
        let nets = nets.into_iter().map(|(attachment, mac)| NetConfig {
            attachment,
            mac,
            receive_limit: RateLimit::default(),
            send_limit: RateLimit::default(),
        });
        let machine = boot(config, tree, request, nets.collect())?;
        (Origin::Boot(machine), Vec::new())
    };
    let disk_directory = match &origin {
        Origin::Restore(Source::Files { memory, .. }) => memory.parent().map(Path::to_owned),
        _ => None,
    };
    Ok(Plan {
        disk_directory,
        origin,
        clock: guest_clock(request.clock),
        hugepages: request.hugepages,
        on_demand: request.resume && request.on_demand,
        working_set: use_working_set(request.working_set),
        net_changes,
        notes: notes(request),
    })
}

fn net_change((attachment, mac): (NetAttachment, Option<MacAddress>)) -> NetChange {
    NetChange {
        attachment: Some(attachment),
        mac,
    }
}

fn saved_files(
    config: &ServerConfig,
    tree: &Tree,
    state: &Option<String>,
    memory: &Option<String>,
) -> Result<Source, ApiError> {
    let state = input(tree, "cpu_snapshot_path", state)?;
    let memory = input(tree, "memory_snapshot_path", memory)?;
    different(&state, &memory)?;
    Ok(Source::Files {
        state,
        memory,
        store: config.store.clone(),
    })
}

fn restore(
    config: &ServerConfig,
    tree: &Tree,
    request: &CreateRequest,
) -> Result<Origin, ApiError> {
    let (state, memory) = (&request.cpu_snapshot_path, &request.memory_snapshot_path);
    Ok(Origin::Restore(saved_files(config, tree, state, memory)?))
}

/// The network devices that a request names, in either way.
fn nets(request: &CreateRequest) -> Result<Vec<(NetAttachment, Option<MacAddress>)>, ApiError> {
    let wrong = |message: String| ApiError::new(ErrorCode::BadRequest, message);
    // A client may send every field, and leave empty what it does not mean.
    let tap_device = request.tap_device.as_ref().filter(|tap| !tap.is_empty());
    match (tap_device, &request.nets) {
        (Some(_), Some(_)) => Err(wrong(
            "tap_device and nets both say what the network is; leave one out".to_owned(),
        )),
        (Some(name), None) => Ok(vec![(tap(name)?, None)]),
        (None, nets) => attached(nets),
    }
}

fn attached(nets: &Option<Vec<Net>>) -> Result<Vec<(NetAttachment, Option<MacAddress>)>, ApiError> {
    let nets = nets.as_deref().unwrap_or_default();
    few("nets", nets.len())?;
    let attached = nets.iter().map(|Net { tap_device, mac }| {
        let mac = mac.as_deref().map(str::parse).transpose();
        let wrong = |not| ApiError::new(ErrorCode::BadRequest, format!("nets: {not}"));
        let mac = mac.map_err(|not: NotAMac| wrong(not))?;
        Ok((tap(tap_device)?, mac))
    });
    attached.collect()
}

fn tap(name: &str) -> Result<NetAttachment, ApiError> {
    if name.len() > TAP_NAME_BYTES {
        let message = "no network device has so long a name; name a TAP device of at most 15 bytes";
        return Err(ApiError::new(ErrorCode::BadRequest, message));
    }
    Ok(NetAttachment::Tap(name.to_owned()))
}

/// Refuses lists of devices that are long enough to take much of the server's memory, and of what a VMM can be told.
fn few(field: &str, devices: usize) -> Result<(), ApiError> {
    if devices < TOO_MANY_DEVICES {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::BadRequest,
        format!("{field} has {devices} entries, more than a machine can have; leave some out"),
    ))
}

fn boot(
    config: &ServerConfig,
    tree: &Tree,
    request: &CreateRequest,
    nets: Vec<NetConfig>,
) -> Result<MachineConfig, ApiError> {
    let kernel = input(tree, "kernel_path", &request.kernel_path)?;
    let initrd = match request.initrd_path.as_deref() {
        None => config.defaults.initrd.clone(),
        Some("") => None,
        Some(path) => Some(tree.input("initrd_path", path)?),
    };
    let disks = match &request.disks {
        None => config.defaults.disks.clone(),
        Some(disks) => {
            few("disks", disks.len())?;
            let disks = disks.iter().map(|disk| disk::attached(tree, disk));
            disks.collect::<Result<_, _>>()?
        }
    };
    let vcpus = request.vcpus.unwrap_or(config.defaults.vcpus);
    let memory_mib = request.memory_mib.unwrap_or(config.defaults.memory_mib);
    size(vcpus, memory_mib, &config.limits)?;
    let cmdline = request.cmdline.as_ref();
    Ok(MachineConfig {
        vcpus,
        memory_mib,
        cpu: cpu::checked(request.cpu.as_ref())?,
        kernel,
        initrd,
        cmdline: cmdline.unwrap_or(&config.defaults.cmdline).clone(),
        disks,
        nets,
        vsock: None,
        balloon: request.balloon.map(balloon),
        console_device: console_device(request.console_device.unwrap_or_default()),
    })
}

fn balloon(options: api_types::BalloonOptions) -> BalloonConfig {
    let api_types::BalloonOptions {
        target_mib,
        deflate_on_oom,
        free_page_reporting,
        statistics_interval_s,
    } = options;
    BalloonConfig {
        target_mib,
        deflate_on_oom,
        free_page_reporting,
        statistics_interval_s,
    }
}

fn console_device(asked: api_types::ConsoleDevice) -> ConsoleDevice {
    match asked {
        api_types::ConsoleDevice::Serial => ConsoleDevice::Serial,
        api_types::ConsoleDevice::Virtio => ConsoleDevice::Virtio,
    }
}

fn notes(request: &CreateRequest) -> Vec<String> {
    let mut notes = Vec::new();
    if request.config.is_some() {
        notes.push("config is not used: this release does not configure guests".to_owned());
    }
    if request.on_demand && !request.resume {
        notes.push("on_demand is not used: a booted machine has no memory to load".to_owned());
    }
    if request.working_set.is_some() && !(request.on_demand && request.resume) {
        notes.push("working_set is not used: memory does not come on demand".to_owned());
    }
    let shape = [
        ("vcpus", request.vcpus.is_some()),
        ("memory_mib", request.memory_mib.is_some()),
        ("cpu", request.cpu.is_some()),
        ("initrd_path", request.initrd_path.is_some()),
        ("cmdline", request.cmdline.is_some()),
        ("disks", request.disks.is_some()),
        ("balloon", request.balloon.is_some()),
        ("console_device", request.console_device.is_some()),
    ];
    for (field, given) in shape {
        if request.resume && given {
            notes.push(format!(
                "{field} is not used: a restored machine has what it was saved with"
            ));
        }
    }
    notes
}

fn use_working_set(asked: Option<api_types::WorkingSet>) -> UseWorkingSet {
    match asked {
        None | Some(api_types::WorkingSet::Bring) => UseWorkingSet::Bring,
        Some(api_types::WorkingSet::Record) => UseWorkingSet::Record,
        Some(api_types::WorkingSet::Ignore) => UseWorkingSet::Ignore,
    }
}

pub(crate) fn guest_clock(clock: api_types::GuestClock) -> GuestClock {
    match clock {
        api_types::GuestClock::StandStill => GuestClock::StandStill,
        api_types::GuestClock::Follow => GuestClock::Follow,
    }
}

fn input(tree: &Tree, field: &'static str, path: &Option<String>) -> Result<PathBuf, PathError> {
    tree.input(field, path.as_deref().unwrap_or_default())
}

fn different(state: &Path, memory: &Path) -> Result<(), ApiError> {
    if state == memory {
        return Err(ApiError::new(
            ErrorCode::BadRequest,
            "cpu_snapshot_path and memory_snapshot_path name the same file; name two",
        ));
    }
    Ok(())
}

/// Whether a machine may have so many vCPUs and MiB of memory.
pub(crate) fn size(vcpus: u32, memory_mib: u64, limits: &Limits) -> Result<(), ApiError> {
    within("vcpus", vcpus.into(), 1, limits.vcpus.into())?;
    within("memory_mib", memory_mib, MIN_MEMORY_MIB, limits.memory_mib)
}

fn within(field: &str, value: u64, least: u64, most: u64) -> Result<(), ApiError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::BadRequest,
        format!("{field} is {value}; ask for {least} to {most}"),
    ))
}
