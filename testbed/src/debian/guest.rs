//! The Debian guest of the tests: systemd, two kernels with their own initial RAM disks, an ssh server, and what makes load.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Made, Recipe, run};
use crate::cache;

/// What the guest has, beside the second kernel, which `customize` installs.
const PACKAGES: [&str; 11] = [
    "systemd-sysv",
    "udev",
    "dbus",
    "openssh-server",
    "iproute2",
    "fio",
    "stress-ng",
    "socat",
    "initramfs-tools",
    "zstd",
    "linux-image-cloud-amd64",
];

/// Nobody reads in it.
const OPTIONS: [&str; 3] = [
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
];

const DISK_MIB: u32 = 1024;

/// Debian's own kernel, and that of its backports.
pub(super) const SERIES: [&str; 2] = ["6.1", "6.12"];

/// The directory with what `customize` installs, and itself.
const RESOURCES: &str = "resources/debian";

/// Kept beside the guest's files: what they were made of. Written last.
const MADE_OF: &str = "made-of";

/// The guest's files, in one directory.
#[derive(Clone, Debug)]
pub struct Guest {
    directory: PathBuf,
}

impl Guest {
    /// The guest whose files are in `directory`.
    pub fn in_directory(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
        }
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its root file system: to be the base of a branching disk or copied, never written to.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.directory.join("disk.raw")
    }

    /// The private key that opens root's account by ssh.
    #[must_use]
    pub fn key(&self) -> PathBuf {
        self.directory.join("key")
    }

    /// The kernel of a series, one of [`SERIES`], as its package has it.
    #[must_use]
    pub fn kernel(&self, series: &str) -> PathBuf {
        self.directory.join(format!("vmlinuz-{series}"))
    }

    /// The initial RAM disk that the guest has made for that kernel.
    #[must_use]
    pub fn initrd(&self, series: &str) -> PathBuf {
        self.directory.join(format!("initrd.img-{series}"))
    }
}

/// The guest: made when it is not there or was made of something else, which takes a minute or two.
///
/// # Errors
/// As [`Recipe::make`].
pub fn ensure() -> Result<Guest> {
    let directory = cache::directory()?.join("debian");
    let made_of = made_of()?;
    if fs::read_to_string(directory.join(MADE_OF)).is_ok_and(|was| was == made_of) {
        return Ok(Guest { directory });
    }

    let staging = tempfile::tempdir_in(cache::directory()?)
        .context("cannot make a directory for the Debian guest")?;
    let guest = Guest::in_directory(staging.path());
    run(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "fermata", "-f"])
            .arg(guest.key()),
        None,
    )?;
    let public_key = guest.key().with_extension("pub");
    let made = Recipe {
        packages: &PACKAGES,
        options: &OPTIONS,
        customize: &cache::workspace().join(RESOURCES).join("customize"),
        environment: &[("FERMATA_KEY", public_key.as_os_str())],
        disk_mib: DISK_MIB,
    }
    .make()?;
    for series in SERIES {
        copy_kernel(&made, series, &guest)?;
    }
    made.write_disk(&guest.disk())?;
    fs::write(staging.path().join(MADE_OF), made_of).context("cannot keep the Debian guest")?;

    if directory.exists() {
        fs::remove_dir_all(&directory).context("cannot remove the Debian guest that was")?;
    }
    let staging = staging.keep();
    // Whoever runs the tests is to see it, whoever made it.
    fs::set_permissions(&staging, fs::Permissions::from_mode(0o755))
        .and_then(|()| fs::rename(&staging, &directory))
        .context("cannot keep the Debian guest")?;
    Ok(Guest { directory })
}

/// Everything that the guest is made of, but what the packages hold.
fn made_of() -> Result<String> {
    let mut text = format!("{} {} {DISK_MIB}\n", PACKAGES.join(","), OPTIONS.join(" "));
    let directory = cache::workspace().join(RESOURCES);
    let context = || format!("cannot read {}", directory.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(&directory).with_context(context)? {
        files.push(entry.with_context(context)?.path());
    }
    files.sort();
    for file in files {
        text.push_str(&fs::read_to_string(&file).with_context(context)?);
    }
    Ok(text)
}

/// Puts a kernel of the guest, and its initial RAM disk, where a machine is started with them.
fn copy_kernel(made: &Made, series: &str, guest: &Guest) -> Result<()> {
    let boot = made.root().join("boot");
    let mut releases = Vec::new();
    for entry in fs::read_dir(&boot).context("cannot list the guest's kernels")? {
        let name = entry
            .context("cannot list the guest's kernels")?
            .file_name();
        let name = name.to_string_lossy();
        releases.extend(name.strip_prefix("vmlinuz-").map(str::to_owned));
    }
    let mut found = releases.iter().filter(|release| is_of(release, series));
    let (Some(release), None) = (found.next(), found.next()) else {
        bail!("of the guest's kernels {releases:?} not one is of the series {series}");
    };
    for (from, to) in [
        ("vmlinuz", guest.kernel(series)),
        ("initrd.img", guest.initrd(series)),
    ] {
        let from = boot.join(format!("{from}-{release}"));
        fs::copy(&from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}

/// `6.1.0-56-cloud-amd64` is of 6.1, and not of 6.12.
fn is_of(release: &str, series: &str) -> bool {
    release
        .strip_prefix(series)
        .is_some_and(|rest| rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_of_one_series() {
        let of = |release| SERIES.map(|series| is_of(release, series));
        assert_eq!(of("6.1.0-56-cloud-amd64"), [true, false]);
        assert_eq!(of("6.12.95+deb12-cloud-amd64"), [false, true]);
    }
}
