//! The one peer that Debian does not have.

use std::path::PathBuf;
use std::process::Command;

use testbed::cache;

/// rustic, built by cargo once and then kept; `None` when it cannot be built, which the results say.
pub(super) fn ensure() -> Option<PathBuf> {
    let tools = cache::workspace().join("target/tools");
    let program = tools.join("bin/rustic");
    if program.exists() {
        return Some(program);
    }
    println!("Building rustic, which takes some ten minutes");
    let status = Command::new("cargo")
        .args(["install", "rustic-rs", "--locked", "--quiet", "--root"])
        .arg(&tools)
        .status();
    if status.is_ok_and(|status| status.success()) {
        return Some(program);
    }
    println!("rustic cannot be built here: the results are without it");
    None
}
