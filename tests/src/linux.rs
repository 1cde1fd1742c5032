//! The Linux guest of `resources/guest`, on a server of its own.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::environment;

use crate::{
    console::{Console, Verified, count, verified},
    http::Machine,
    server::Server,
};

/// The guest's command line, less its role: `panic=-1` and `reboot=t` make every bad end a quick one.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";

/// A server whose tree has the guest's kernel, its initial RAM disk, and an empty disk.
///
/// # Errors
///
/// When the environment does not say where they are, or the server does not come up.
pub fn server() -> Result<Server> {
    server_with(&[])
}

/// As [`server`], started with more `arguments`.
///
/// # Errors
///
/// As [`server`].
pub fn server_with(arguments: &[&str]) -> Result<Server> {
    let server = Server::start(arguments)?;
    for (variable, name) in [
        (environment::GUEST_KERNEL, "vmlinuz"),
        (environment::GUEST_INITRD, "initrd"),
        (environment::GUEST_DISK, "disk"),
    ] {
        copy_sparse(&environment::path(variable)?, &server.tree().join(name))?;
    }
    Ok(server)
}

/// Boots the guest with 2 vCPUs and 256 MiB, in the given role.
///
/// # Errors
///
/// When it is not created.
pub fn boot(server: &Server, role: &str) -> Result<Machine> {
    let more = json!({
        "vcpus": 2,
        "memory_mib": 256,
        "initrd_path": server.path("initrd"),
        "cmdline": format!("{CMDLINE} fermata.role={role}"),
        "disks": [{"path": server.path("disk")}],
    });
    server.client.boot(&server.path("vmlinuz"), &more)
}

/// Waits until the guest has verified itself with both CPUs at work, and returns what it said.
///
/// # Errors
///
/// When it does not.
pub fn verify(console: &Console) -> Result<Verified> {
    let both = |line: &str| verified(line).filter(|said| said.cpus == "0,1");
    console.first("both CPUs to make progress", both)
}

/// Waits until the guest counts on from `count`, and returns the number it had come to.
///
/// # Errors
///
/// When it does not.
pub fn counts_past(console: &Console, past: u64) -> Result<u64> {
    console.first("the count to go on", |line| {
        count(line).filter(|n| *n > past)
    })
}

/// Asserts that `after` shows everything that `before` did.
///
/// # Errors
///
/// When something was lost.
pub fn nothing_lost(before: &Verified, after: &Verified) -> Result<()> {
    ensure!(before == after, "the guest was {before:?} and is {after:?}");
    Ok(())
}

/// Copies a file and leaves its holes holes.
///
/// # Errors
///
/// When it cannot be copied.
pub fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let status = std::process::Command::new("cp")
        .args(["--sparse=always", "--preserve=timestamps", "--"])
        .args([from, to])
        .status()
        .context("cannot run cp")?;
    ensure!(status.success(), "{} cannot be copied", from.display());
    Ok(())
}

/// Removes a file that may not be there.
///
/// # Errors
///
/// When it is there and cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}
