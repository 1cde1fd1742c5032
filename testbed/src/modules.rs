//! Kernel modules in the order in which they can be inserted.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What modules.dep and modules.builtin (kmod's depmod(8)) say, as far as loading needs it.
pub(crate) struct Modules {
    directory: PathBuf,
    /// Module name to its file and its dependencies' files, relative to `directory`.
    loadable: HashMap<String, Entry>,
    builtin: Vec<String>,
}

struct Entry {
    file: String,
    dependencies: Vec<String>,
}

/// One module, ready for insmod.
pub(crate) struct Module {
    /// File name without directories and compression suffix, as in `virtio_blk.ko`.
    pub(crate) file_name: String,
    /// The module itself, decompressed.
    pub(crate) bytes: Vec<u8>,
}

impl Modules {
    /// Reads the tables of the kernel called `release`, as in `6.1.0-56-amd64`.
    pub(crate) fn of_kernel(release: &str) -> Result<Self> {
        let directory = Path::new("/lib/modules").join(release);
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))
        };
        Self::parse(&directory, &read("modules.dep")?, &read("modules.builtin")?)
    }

    fn parse(directory: &Path, dep: &str, builtin: &str) -> Result<Self> {
        let mut loadable = HashMap::new();
        for line in dep.lines() {
            let (file, dependencies) = line
                .split_once(':')
                .with_context(|| format!("modules.dep has the line {line:?} without a colon"))?;
            let entry = Entry {
                file: file.to_owned(),
                dependencies: dependencies.split_whitespace().map(str::to_owned).collect(),
            };
            loadable.insert(module_name(file), entry);
        }
        let builtin = builtin.lines().map(module_name).collect();
        Ok(Self {
            directory: directory.to_owned(),
            loadable,
            builtin,
        })
    }

    /// The files of `wanted` and of all that they need, dependencies first, none twice.
    /// What is built into the kernel needs no file.
    fn load_order(&self, wanted: &[&str]) -> Result<Vec<String>> {
        let mut order: Vec<String> = Vec::new();
        for name in wanted {
            let name = name.replace('-', "_");
            let Some(entry) = self.loadable.get(&name) else {
                if self.builtin.contains(&name) {
                    continue;
                }
                bail!(
                    "the kernel of {} has no module {name}",
                    self.directory.display()
                );
            };
            // depmod lists all dependencies, transitive ones too, the deepest last.
            for file in entry.dependencies.iter().rev().chain([&entry.file]) {
                if !order.contains(file) {
                    order.push(file.clone());
                }
            }
        }
        Ok(order)
    }

    /// Reads `wanted` and all that they need, in load order.
    pub(crate) fn read(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        self.load_order(wanted)?
            .iter()
            .map(|file| read_module(&self.directory.join(file)))
            .collect()
    }
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko.xz` is `virtio_rng`: the kernel takes - and _ for one.
fn module_name(file: &str) -> String {
    let name = file.rsplit_once('/').map_or(file, |(_, name)| name);
    name.split_once(".ko")
        .map_or(name, |(stem, _)| stem)
        .replace('-', "_")
}

/// Debian 13 and later compress modules; busybox's insmod takes plain ones only.
fn read_module(path: &Path) -> Result<Module> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (stem, decompressor) = match name.rsplit_once('.') {
        Some((stem, "xz")) => (stem, Some("xz")),
        Some((stem, "zst")) => (stem, Some("zstd")),
        _ => (&*name, None),
    };
    let bytes = match decompressor {
        None => std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?,
        Some(program) => {
            let output = Command::new(program)
                .args(["--decompress", "--stdout"])
                .arg(path)
                .output()
                .with_context(|| {
                    format!(
                        "cannot run {program}, which {} needs; install it",
                        path.display()
                    )
                })?;
            if !output.status.success() {
                bail!(
                    "{program} cannot decompress {}: {}",
                    path.display(),
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            output.stdout
        }
    };
    Ok(Module {
        file_name: stem.to_owned(),
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/kvm/kvm-amd.ko: kernel/crypto/ccp.ko kernel/kvm/kvm.ko kernel/virt/irqbypass.ko
kernel/crypto/ccp.ko:
kernel/kvm/kvm.ko: kernel/virt/irqbypass.ko
kernel/virt/irqbypass.ko:
kernel/net/tun.ko.xz:
";

    fn modules() -> Modules {
        Modules::parse(Path::new("/nowhere"), DEP, "kernel/fs/ext4/ext4.ko\n").unwrap()
    }

    #[test]
    fn dependencies_come_first() {
        let order = modules().load_order(&["kvm_amd"]).unwrap();
        assert_eq!(
            order,
            [
                "kernel/virt/irqbypass.ko",
                "kernel/kvm/kvm.ko",
                "kernel/crypto/ccp.ko",
                "kernel/kvm/kvm-amd.ko"
            ]
        );
    }

    #[test]
    fn a_shared_dependency_is_loaded_once() {
        let order = modules().load_order(&["kvm", "kvm-amd", "tun"]).unwrap();
        assert_eq!(
            order,
            [
                "kernel/virt/irqbypass.ko",
                "kernel/kvm/kvm.ko",
                "kernel/crypto/ccp.ko",
                "kernel/kvm/kvm-amd.ko",
                "kernel/net/tun.ko.xz"
            ]
        );
    }

    #[test]
    fn what_is_built_in_needs_no_file() {
        assert!(modules().load_order(&["ext4"]).unwrap().is_empty());
    }

    #[test]
    fn an_unknown_module_is_named() {
        let error = modules().load_order(&["nonesuch"]).unwrap_err();
        assert!(error.to_string().contains("nonesuch"), "{error}");
    }
}
