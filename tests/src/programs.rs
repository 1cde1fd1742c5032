//! Where the programs under test are.

use std::{env, path::PathBuf};

use testbed::environment;

/// The `fermata` program.
pub fn fermata() -> PathBuf {
    program(environment::BIN, "fermata")
}

/// The `fermata-vmm` program.
pub fn vmm() -> PathBuf {
    program(environment::VMM_BIN, "fermata-vmm")
}

/// What the environment names, or what was built beside this very program.
fn program(variable: &str, name: &str) -> PathBuf {
    if let Some(path) = env::var_os(variable) {
        return path.into();
    }
    // A test program is in `target/<profile>/deps`, the others one directory above.
    let here = env::current_exe().unwrap_or_default();
    let above = here.ancestors().skip(1).take(2);
    above
        .map(|directory| directory.join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| name.into())
}
