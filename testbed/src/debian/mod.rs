//! Debian on a disk, made by mmdebstrap from the packages that this machine's apt is set up for.

mod guest;
mod sources;

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::{cache, setup};

pub use guest::{Guest, ensure};

/// What makes a Debian, to be installed by [`setup::ensure_packages`].
pub const PACKAGES: [&str; 2] = ["mmdebstrap", "e2fsprogs"];

const SUITE: &str = "bookworm";

/// What a Debian is made of.
#[derive(Clone, Debug)]
pub struct Recipe<'a> {
    /// What it has, beside what every Debian has and what these packages need.
    pub packages: &'a [&'a str],
    /// More options for mmdebstrap.
    pub options: &'a [&'a str],
    /// The program that makes the rest: it is run, with the root's directory as its argument, when the packages are
    /// installed, and cleans up apt's cache.
    pub customize: &'a Path,
    /// What that program is told in its environment.
    pub environment: &'a [(&'a str, &'a OsStr)],
    /// The size of its disk in MiB.
    pub disk_mib: u32,
}

/// A Debian that was made, as files in a directory. Dropped, it is removed.
#[derive(Debug)]
pub struct Made {
    directory: TempDir,
    disk_mib: u32,
}

impl Recipe<'_> {
    /// Installs it into a directory; takes a minute or two. What mmdebstrap prints goes to `mmdebstrap.log` in the test
    /// bed's directory.
    ///
    /// # Errors
    /// When not root, who alone can make files of all owners; with the name of the log when mmdebstrap fails.
    pub fn make(&self) -> Result<Made> {
        if !setup::is_root() {
            bail!("only root can make a Debian; run this as root once, what it makes is kept");
        }
        let log = cache::directory()?.join("mmdebstrap.log");
        let made = Made {
            directory: tempfile::tempdir_in(cache::directory()?)
                .context("cannot make a directory for Debian's files")?,
            disk_mib: self.disk_mib,
        };
        let mut mmdebstrap = Command::new("mmdebstrap");
        mmdebstrap
            .args(["--variant=minbase", "--format=directory"])
            // Without this dpkg waits for the disk after each file; a file system that breaks here is made again.
            .arg("--dpkgopt=force-unsafe-io")
            // Packages that `customize` leaves there are to stay.
            .arg("--skip=cleanup/apt/cache")
            .arg(format!("--include={}", self.packages.join(",")))
            .args(sources::apt_options()?)
            .args(self.options)
            .arg(option("--customize-hook=", self.customize.as_os_str()))
            .envs(self.environment.iter().copied())
            .arg(SUITE)
            .arg(made.root())
            .args(sources::of(SUITE)?);
        run(&mut mmdebstrap, Some(&log))?;
        Ok(made)
    }
}

impl Made {
    /// The directory with all its files.
    #[must_use]
    pub fn root(&self) -> std::path::PathBuf {
        self.directory.path().join("root")
    }

    /// Puts it on a disk at `path`: a sparse raw image that holds an ext4 file system and no partitions.
    ///
    /// # Errors
    /// When it does not fit, or `path` cannot be written.
    pub fn write_disk(&self, path: &Path) -> Result<()> {
        let image = self.directory.path().join("disk");
        // Without lazy initialisation the guest's kernel does not write behind our back.
        let features = "lazy_itable_init=0,lazy_journal_init=0";
        // /sbin is not on every user's PATH.
        let mut mke2fs = Command::new("/sbin/mke2fs");
        mke2fs
            .args(["-q", "-F", "-t", "ext4", "-E", features, "-d"])
            .args([&self.root(), &image])
            .arg(format!("{}m", self.disk_mib));
        run(&mut mke2fs, None)?;
        std::fs::rename(&image, path).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// An option with its value behind it.
fn option(name: &str, value: &OsStr) -> std::ffi::OsString {
    let mut option = std::ffi::OsString::from(name);
    option.push(value);
    option
}

/// Runs a program; where there is a log, its output goes there.
fn run(command: &mut Command, log: Option<&Path>) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null());
    if let Some(log) = log {
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdout(file.try_clone()?).stderr(file);
    }
    let status = command
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        let see = log.map_or(String::new(), |log| format!("; see {}", log.display()));
        bail!("{program} failed: {status}{see}");
    }
    Ok(())
}
