//! Whether fermata itself is in order.

use std::path::Path;

use control::Registry;

use super::Finding;
use crate::program;

const RUN_DIR: &str = "run directory";
const PROGRAM: &str = "VMM program";

/// Whether machines can be written down.
pub(super) fn run_dir(dir: &Path) -> Finding {
    let shown = dir.display().to_string();
    match Registry::open(dir).and_then(|registry| registry.list()) {
        Ok(records) => Finding::ok(RUN_DIR, format!("{shown}, {} machines", records.len())),
        Err(error) => Finding::fail(RUN_DIR, shown, error.to_string()),
    }
}

/// Whether there is a program that runs them.
pub(super) fn program() -> Finding {
    match program::find() {
        Ok(path) => Finding::ok(PROGRAM, path.display().to_string()),
        Err(error) => Finding::fail(PROGRAM, "not found", error.to_string()),
    }
}
