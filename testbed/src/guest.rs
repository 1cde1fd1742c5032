//! What virtual machines under test boot: Debian's cloud kernel, a small initramfs, a disk.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::initramfs::Initramfs;
use crate::kernel::{self, Flavour};
use crate::modules::Modules;

/// What the guest's init prints on the serial console once user space is up and all drivers are loaded.
pub const READY: &str = "fermata-guest: ready";

const INIT: &str = include_str!("../../resources/guest/init");

/// fermata's bus is virtio-mmio; QEMU's machines offer PCI.
const MODULES: [&str; 8] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "virtio_console",
    "vmw_vsock_virtio_transport",
];

/// The program that guests test their vsock device with.
const VSOCK: &str = include_str!("../../resources/guest/vsock.rs");

const DISK_MIB: u64 = 64;

/// What the guest does after [`READY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Counts on the console and tells what it has kept, for ever.
    Counter,
    /// Tells its clocks, for ever.
    Clocks,
    /// Tells what its CPU can do, and counts.
    Cpu,
    /// Carries bytes over its network device in both directions.
    Net,
    /// Echoes streams of its vsock device, and has its own echoed.
    Vsock,
    /// Fills memory, frees it once its balloon takes some, and tells what it has.
    Balloon,
    /// Prints and repeats what is typed, by its virtio console.
    Console,
    /// Tells how often its kernel has noticed that it is a copy.
    Generation,
    /// Powers off through ACPI.
    PowerOff,
    /// Reboots through the keyboard controller.
    Reboot,
    /// Panics; the kernel answers with a triple fault.
    Panic,
    /// An interactive shell on the console.
    Shell,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "counter",
            Self::Clocks => "clocks",
            Self::Cpu => "cpu",
            Self::Net => "net",
            Self::Vsock => "vsock",
            Self::Balloon => "balloon",
            Self::Console => "console",
            Self::Generation => "generation",
            Self::PowerOff => "poweroff",
            Self::Reboot => "reboot",
            Self::Panic => "panic",
            Self::Shell => "shell",
        })
    }
}

/// The kernel command line for a guest in `role`.
#[must_use]
pub fn command_line(role: Role) -> String {
    let reboot = match role {
        Role::Reboot => " reboot=k",
        Role::Panic => " reboot=t panic=-1",
        Role::Counter | Role::Clocks | Role::Cpu | Role::Net | Role::Vsock => "",
        Role::Balloon | Role::Console | Role::Generation | Role::PowerOff | Role::Shell => "",
    };
    format!("console=ttyS0 quiet{reboot} fermata.role={role}")
}

/// Paths of what a guest boots.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Debian's unmodified cloud kernel, a bzImage.
    pub kernel: PathBuf,
    /// busybox, virtio drivers for the mmio and PCI buses, and the init script of `resources/guest`.
    pub initrd: PathBuf,
    /// Debian's unmodified generic kernel, which has a driver for the machine's generation.
    pub generic_kernel: PathBuf,
    /// The same init script for it, without any drivers.
    pub generic_initrd: PathBuf,
    /// A sparse raw image of 64 MiB with an empty ext4 file system: to be copied, never attached.
    pub disk: PathBuf,
}

/// Builds the guest's files in the test bed's directory; takes a fraction of a second.
///
/// # Errors
/// When a package is missing ([`setup::ensure`](crate::setup::ensure) installs them) or the directory
/// cannot be written.
pub fn build() -> Result<Guest> {
    let directory = cache::directory()?;
    let kernel = kernel::newest(Flavour::Cloud)?;

    let initrd = directory.join("guest-initramfs.cpio");
    let mut initramfs = Initramfs::new(INIT)?;
    initramfs.modules(&Modules::of_kernel(&kernel.release)?.read(&MODULES)?)?;
    initramfs.file("bin/vsock", 0o755, &compiled(VSOCK)?)?;
    initramfs.write(&initrd)?;

    let generic_initrd = directory.join("guest-generic-initramfs.cpio");
    let mut initramfs = Initramfs::new(INIT)?;
    initramfs.modules(&[])?;
    initramfs.write(&generic_initrd)?;

    let disk = directory.join("guest-disk.raw");
    make_disk(&disk)?;
    Ok(Guest {
        kernel: kernel.image,
        initrd,
        generic_kernel: kernel::newest(Flavour::Generic)?.image,
        generic_initrd,
        disk,
    })
}

/// A program of one file, linked with nothing that the guest would need to have.
fn compiled(source: &str) -> Result<Vec<u8>> {
    let directory = cache::directory()?;
    let (input, output) = (
        cache::temporary_file_in(&directory)?,
        cache::temporary_file_in(&directory)?,
    );
    std::fs::write(input.path(), source).context("cannot write a program for the guest")?;
    // Cargo names the compiler that it was built with itself.
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let result = Command::new(compiler)
        .args(["--edition", "2024", "--crate-name", "guest", "-O"])
        .args(["-C", "target-feature=+crt-static", "-C", "strip=symbols"])
        .arg("-o")
        .args([output.path(), input.path()])
        .output()
        .context("cannot run rustc")?;
    if !result.status.success() {
        let said = String::from_utf8_lossy(&result.stderr);
        bail!("rustc cannot build a program for the guest: {said}");
    }
    std::fs::read(output.path()).context("cannot read a program for the guest")
}

fn make_disk(path: &Path) -> Result<()> {
    let parent = path.parent().context("a disk image needs a directory")?;
    let image = cache::temporary_file_in(parent)?;
    image
        .as_file()
        .set_len(DISK_MIB << 20)
        .context("cannot size a disk image")?;
    // /sbin is not on every user's PATH.
    let output = Command::new("/sbin/mke2fs")
        // Without lazy initialisation the guest's kernel does not write behind the tests' back.
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-E",
            "lazy_itable_init=0,lazy_journal_init=0",
        ])
        .arg(image.path())
        .output()
        .context("cannot run mke2fs; install e2fsprogs")?;
    if !output.status.success() {
        bail!("mke2fs failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    image
        .persist(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_role_is_on_the_command_line() {
        assert_eq!(
            command_line(Role::Counter),
            "console=ttyS0 quiet fermata.role=counter"
        );
        assert_eq!(
            command_line(Role::Panic),
            "console=ttyS0 quiet reboot=t panic=-1 fermata.role=panic"
        );
    }

    #[test]
    fn init_plays_every_role() {
        for role in [
            Role::Counter,
            Role::Clocks,
            Role::Cpu,
            Role::Net,
            Role::Vsock,
            Role::Balloon,
            Role::Console,
            Role::Generation,
            Role::PowerOff,
            Role::Reboot,
            Role::Panic,
            Role::Shell,
        ] {
            assert!(
                INIT.contains(&format!("\n{role})")),
                "init has no branch for {role}"
            );
        }
    }
}
