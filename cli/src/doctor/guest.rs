//! Whether this host's CPU has what a machine needs that somebody asks about.

use std::path::Path;

use anyhow::ensure;
use hypervisor::{CpuLevel, Error, GuestCpuid, VcpuState, missing_features};
use saved_state::{Container, SavedState};
use snapshot::{Snapshot, Source, read_state};

use super::Finding;
use crate::{cpu::Cpu, store::StoreArgs};

const CPU: &str = "CPU asked about";
const SNAPSHOT: &str = "CPU of the snapshot";

/// Whether machines of `cpu` can run here.
///
/// # Errors
///
/// When that is no CPU.
pub(super) fn cpu(cpu: &Cpu) -> anyhow::Result<Finding> {
    let template = cpu.template()?;
    Ok(match template.check() {
        Ok(()) => Finding::ok(CPU, "guests here can have it"),
        Err(error @ Error::Open(_)) => no_kvm(CPU, &error),
        Err(error) => Finding::fail(CPU, error.to_string(), other_level()),
    })
}

fn other_level() -> String {
    let host = GuestCpuid::of_host(1).ok();
    match host.and_then(|host| host.highest_level()) {
        Some(level @ (CpuLevel::V2 | CpuLevel::V3)) => format!("this host has all of {level}"),
        _ => "this host has no level in full; `host` is what it has".to_owned(),
    }
}

/// Whether the snapshot's machine can go on here, as far as its CPU is concerned.
///
/// # Errors
///
/// When there is no such snapshot.
pub(super) fn snapshot(name: &str, store: &StoreArgs) -> anyhow::Result<Finding> {
    let state = state(name, store)?;
    let vcpus: Vec<_> = state
        .sections()
        .filter(|section| section.kind == VcpuState::KIND)
        .collect();
    ensure!(!vcpus.is_empty(), "{name} has no vCPU; take another copy");
    let host = match GuestCpuid::of_host(vcpus.len() as u32) {
        Ok(host) => host,
        Err(error) => return Ok(no_kvm(SNAPSHOT, &error)),
    };
    let mut missing = Vec::new();
    for section in vcpus {
        let saved: VcpuState = section.decode()?;
        missing.extend(missing_features(&saved, &host)?);
    }
    missing.sort();
    missing.dedup();
    if missing.is_empty() {
        return Ok(Finding::ok(SNAPSHOT, "it has all that its guest uses"));
    }
    Ok(Finding::fail(
        SNAPSHOT,
        format!("it lacks {}", missing.join(", ")),
        "restore it on a host that has them; boot machines that are to move with `--cpu` and a level",
    ))
}

fn state(name: &str, store: &StoreArgs) -> anyhow::Result<Container> {
    if name.contains('/') || Path::new(name).is_file() {
        return Ok(read_state(Path::new(name))?);
    }
    let store = store.open()?;
    let from = Source::Stored {
        store: &store,
        name,
    };
    Ok(Snapshot::open(from)?.take_state())
}

fn no_kvm(what: &'static str, error: &Error) -> Finding {
    Finding::fail(what, error.to_string(), "see what is said of KVM above")
}
