//! `cargo xtask bench store`.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use testbed::{debian, setup};

use super::{images, rustic};
use crate::ground::Ground;

/// The peers that Debian has.
const PEERS: [&str; 3] = ["restic", "borgbackup", "casync"];

/// Makes sure that images and peers are there, then runs the program `bench-store` on this machine.
pub(crate) fn store(json: &Path, figures: Option<&Path>) -> Result<ExitCode> {
    setup::ensure_packages(&[&PEERS[..], &debian::PACKAGES].concat())?;
    let ground = Ground::prepare(&["bench-store", "store-images"])?;
    let images = images::ensure(&ground)?;
    let mut bench = Command::new(ground.program("bench-store")?);
    bench.arg("run").arg("--images").arg(images);
    bench.arg("--json").arg(json);
    if let Some(rustic) = rustic::ensure() {
        bench.arg("--rustic").arg(rustic);
    }
    if let Some(figures) = figures {
        bench.arg("--figures").arg(figures);
    }
    let status = bench.status().context("cannot run bench-store")?;
    if !status.success() {
        bail!("bench-store failed: {status}");
    }
    Ok(ExitCode::SUCCESS)
}
