//! The disk of the Debian guests that the store is measured with.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use testbed::cache;

const SUITE: &str = "bookworm";

/// What the guest has from the beginning.
const PACKAGES: &str = "systemd-sysv,udev,dbus,python3,perl";

/// What waits in apt's cache until a guest installs it.
const LATER: &str = "sqlite3 vim-tiny less";

/// What the disk holds, in MiB.
const DISK_MIB: u32 = 512;

/// Makes a disk with Debian at `path`, with a service that does what it is told.
pub(super) fn make_disk(path: &Path) -> Result<()> {
    let directory = tempfile::tempdir_in(cache::directory()?)
        .context("cannot make a directory for Debian's files")?;
    let root = directory.path().join("root");
    println!("Making a Debian with mmdebstrap, from the packages that apt is set up for");
    install(&root)?;
    let image = directory.path().join("disk");
    // Without lazy initialisation the guest's kernel does not write behind our back.
    let features = "lazy_itable_init=0,lazy_journal_init=0";
    let mut mke2fs = Command::new("/sbin/mke2fs");
    mke2fs
        .args(["-q", "-F", "-t", "ext4", "-E", features, "-d"])
        .args([&root, &image])
        .arg(format!("{DISK_MIB}m"));
    run(&mut mke2fs, None)?;
    std::fs::rename(&image, path).with_context(|| format!("cannot write {}", path.display()))
}

fn install(root: &Path) -> Result<()> {
    let resources = cache::workspace().join("resources/bench");
    let resource = |name: &str| {
        let path = resources.join(name);
        path.to_str()
            .filter(|path| !path.contains(['\'', '\n']))
            .map(|path| format!("'{path}'"))
            .with_context(|| format!("{} is not a path for a shell", path.display()))
    };
    let script = resource("debian-work")?;
    let unit = resource("debian-work.service")?;
    let hooks = [
        format!("install -m 755 {script} \"$1\"/usr/local/sbin/debian-work"),
        format!("install -m 644 {unit} \"$1\"/etc/systemd/system/debian-work.service"),
        "chroot \"$1\" systemctl enable debian-work.service".into(),
        // What has been installed need not wait.
        "chroot \"$1\" apt-get clean".into(),
        format!(
            "chroot \"$1\" apt-get install --download-only --no-install-recommends --yes {LATER}"
        ),
    ];
    let log = cache::directory()?.join("mmdebstrap.log");
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap
        .args(["--variant=minbase", "--format=directory"])
        // Or the packages that are to wait would be removed.
        .args(["--skip=cleanup/apt/cache", "--include", PACKAGES])
        .args(hooks.iter().map(|hook| format!("--customize-hook={hook}")))
        .arg(SUITE)
        .arg(root);
    run(&mut mmdebstrap, Some(&log))
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
