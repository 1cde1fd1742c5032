//! An initial RAM file system: busybox, kernel modules in load order, and an init script.
//!
//! Format: cpio "newc", Documentation/driver-api/early-userspace/buffer-format.rst in Linux. It is not
//! compressed: unpacking costs an emulated CPU more than reading does.

use std::path::Path;

use anyhow::{Context, Result};
use cpio::newc::{self, ModeFileType};

use crate::modules::Module;

const BUSYBOX: &str = "/bin/busybox";

/// An archive in the making.
pub(crate) struct Initramfs {
    archive: Vec<u8>,
    /// The kernel takes entries of one inode number for hard links.
    inode: u32,
}

impl Initramfs {
    /// With busybox as `/bin/sh` (its shell finds all its other commands without links), the usual empty
    /// directories, and `init` as `/init`.
    pub(crate) fn new(init: &str) -> Result<Self> {
        let mut initramfs = Self {
            archive: Vec::new(),
            inode: 0,
        };
        for directory in ["bin", "dev", "proc", "sys", "tmp", "modules"] {
            initramfs.add(directory, ModeFileType::Directory, 0o755, &[])?;
        }
        let busybox = std::fs::read(BUSYBOX)
            .with_context(|| format!("cannot read {BUSYBOX}: install busybox-static"))?;
        initramfs.file("bin/busybox", 0o755, &busybox)?;
        initramfs.add("bin/sh", ModeFileType::Symlink, 0o777, b"busybox")?;
        initramfs.file("init", 0o755, init.as_bytes())?;
        Ok(initramfs)
    }

    /// Adds a regular file.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, contents: &[u8]) -> Result<()> {
        self.add(name, ModeFileType::Regular, permissions, contents)
    }

    /// Adds `modules` under `/modules`, and `/modules/order` with their names in load order, one a line.
    pub(crate) fn modules(&mut self, modules: &[Module]) -> Result<()> {
        let mut order = String::new();
        for module in modules {
            self.file(
                &format!("modules/{}", module.file_name),
                0o644,
                &module.bytes,
            )?;
            order.push_str(&module.file_name);
            order.push('\n');
        }
        self.file("modules/order", 0o644, order.as_bytes())
    }

    /// Closes the archive and puts it at `path`.
    pub(crate) fn write(mut self, path: &Path) -> Result<()> {
        newc::trailer(&mut self.archive).context("cannot close an archive in memory")?;
        crate::cache::write_atomically(path, &self.archive)
    }

    fn add(
        &mut self,
        name: &str,
        kind: ModeFileType,
        permissions: u32,
        contents: &[u8],
    ) -> Result<()> {
        self.inode += 1;
        let size =
            u32::try_from(contents.len()).with_context(|| format!("{name} has more than 4 GiB"))?;
        let entry = newc::Builder::new(name)
            .ino(self.inode)
            .mode(permissions)
            .set_mode_file_type(kind);
        let mut writer = entry.write(&mut self.archive, size);
        std::io::Write::write_all(&mut writer, contents)
            .with_context(|| format!("cannot archive {name}"))?;
        writer
            .finish()
            .with_context(|| format!("cannot archive {name}"))?;
        Ok(())
    }
}
