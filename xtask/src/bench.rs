//! `cargo xtask bench`.

mod debian;
mod images;
mod rustic;
mod store;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::{job::Job, setup};

use crate::build;
use crate::ground::Ground;

pub(crate) use store::store;

const TIMEOUT: Duration = Duration::from_secs(3600);

/// Runs the program `bench-vm` where a stock kernel boots, and puts its rows into `json`.
pub(crate) fn vm(json: &Path) -> Result<ExitCode> {
    on_guests("bench-vm", json)
}

/// Runs the program `bench-io` in the same way.
pub(crate) fn io(json: &Path) -> Result<ExitCode> {
    // Before: QEMU of another release, of which qemu-utils may be here, goes when that of this one comes.
    setup::ensure()?;
    setup::ensure_packages(&["fio", "iperf3", "qemu-utils"])?;
    on_guests("bench-io", json)
}

fn on_guests(program: &str, json: &Path) -> Result<ExitCode> {
    let ground = Ground::prepare(&[program])?;
    let rows = ground.share.join("rows.json");
    let job = Job::new([
        ground.program(program)?.as_os_str(),
        "--json".as_ref(),
        rows.as_ref(),
    ]);
    let status = ground.run(job.timeout(TIMEOUT).echo())?.status;
    if status != 0 {
        bail!("the benchmark ended with status {status}; what went wrong is above");
    }
    std::fs::copy(&rows, json)
        .with_context(|| format!("cannot copy {} to {}", rows.display(), json.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs the program `bench-native` on this machine.
pub(crate) fn native(json: &Path) -> Result<ExitCode> {
    here("bench-native", json)
}

/// Runs the program `bench-instant` on this machine, and `bench-instant-linux` where a stock kernel boots; the rows of both are one list.
pub(crate) fn instant(json: &Path) -> Result<ExitCode> {
    here("bench-instant", json)?;
    let linux = json.with_extension("linux.json");
    on_guests("bench-instant-linux", &linux)?;
    let mut rows = rows(json)?;
    rows.append(&mut self::rows(&linux)?);
    std::fs::write(json, serde_json::to_string_pretty(&rows)? + "\n")?;
    std::fs::remove_file(&linux)?;
    Ok(ExitCode::SUCCESS)
}

/// The rows in a file.
fn rows(json: &Path) -> Result<Vec<serde_json::Value>> {
    let text = std::fs::read_to_string(json);
    let text = text.with_context(|| format!("cannot read {}", json.display()))?;
    Ok(serde_json::from_str(&text)?)
}

fn here(program: &str, json: &Path) -> Result<ExitCode> {
    let programs = build::release_programs(&[program])?;
    let status = std::process::Command::new(programs.path(program)?)
        .arg("--json")
        .arg(json)
        .status();
    let status = status.with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        bail!("{program} failed: {status}");
    }
    Ok(ExitCode::SUCCESS)
}
