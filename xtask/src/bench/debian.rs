//! The disk of the Debian guests that the store is measured with.

use std::path::Path;

use anyhow::Result;
use testbed::cache;
use testbed::debian::Recipe;

/// What the guest has from the beginning.
const PACKAGES: [&str; 5] = ["systemd-sysv", "udev", "dbus", "python3", "perl"];

/// Makes a disk with Debian at `path`, with a service that does what it is told.
pub(super) fn make_disk(path: &Path) -> Result<()> {
    println!("Making a Debian with mmdebstrap, from the packages that apt is set up for");
    let recipe = Recipe {
        packages: &PACKAGES,
        options: &[],
        customize: &cache::workspace().join("resources/bench/customize"),
        environment: &[],
        disk_mib: 512,
    };
    recipe.make()?.write_disk(path)
}
