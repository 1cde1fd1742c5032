//! A machine in a file: what `fermata run --config` reads, in TOML or JSON.
//!
//! The schema is published as `docs/machine.schema.json`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use control::{DiskConfig, NetConfig};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    balloon::Balloon, console::Console, cpu::Cpu, disk::Disk, net::Net, text_file, vsock::Vsock,
};

/// A machine. Paths are relative to the file's directory; what is left out is as the flags have it.
#[derive(Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "A machine, for `fermata run --config`")]
pub(crate) struct MachineFile {
    /// The kernel: a bzImage or an ELF vmlinux.
    pub(crate) kernel: Option<PathBuf>,
    /// The initial RAM disk.
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub(crate) cmdline: Option<String>,
    /// The number of vCPUs.
    #[schemars(range(min = 1, max = 32))]
    pub(crate) vcpus: Option<u32>,
    /// The memory in MiB.
    #[schemars(range(min = 64))]
    pub(crate) memory_mib: Option<u64>,
    /// Whether the memory is made of huge pages that the host has reserved.
    #[serde(default)]
    pub(crate) hugepages: bool,
    /// What the CPUs are. A machine of a level can be restored on any host of that level.
    pub(crate) cpu: Option<Cpu>,
    /// The disks, in the order of their names in the guest.
    #[serde(default)]
    pub(crate) disks: Vec<Disk>,
    /// The network devices, in the order of their names in the guest.
    #[serde(default)]
    pub(crate) nets: Vec<Net>,
    /// Streams between guest and host.
    pub(crate) vsock: Option<Vsock>,
    /// Memory that the guest gives back.
    pub(crate) balloon: Option<Balloon>,
    /// The device of the console.
    pub(crate) console_device: Option<Console>,
}

impl MachineFile {
    /// Reads a file; what ends in `.json` is JSON, anything else TOML. All paths become absolute.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let mut file: Self = text_file::read(path)?;
        let directory =
            std::path::absolute(path).with_context(|| format!("cannot read {}", path.display()))?;
        file.resolve(directory.parent().unwrap_or(Path::new("/")));
        Ok(file)
    }

    /// Makes paths absolute.
    fn resolve(&mut self, directory: &Path) {
        let disks = self.disks.iter_mut().map(|disk| &mut disk.path);
        let sockets = self.nets.iter_mut().filter_map(|net| net.socket.as_mut());
        let paths = self.kernel.iter_mut().chain(&mut self.initrd);
        let vsock = self.vsock.as_mut().map(|vsock| &mut vsock.path);
        let template = self.cpu.as_mut().and_then(Cpu::file_mut);
        for path in paths
            .chain(disks)
            .chain(sockets)
            .chain(vsock)
            .chain(template)
        {
            *path = directory.join(&*path);
        }
    }

    /// The network devices as a VMM is told of them.
    pub(crate) fn nets(&mut self) -> anyhow::Result<Vec<NetConfig>> {
        self.nets.drain(..).map(Net::config).collect()
    }

    /// The disks as a VMM is told of them.
    pub(crate) fn disks(self) -> Vec<DiskConfig> {
        self.disks.into_iter().map(DiskConfig::from).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use std::{env, fs};

    use control::DiskFormat;

    use super::*;
    use crate::text_file::{from_json, from_toml};

    const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/machine.schema.json");

    /// Set it to write the schema instead of comparing it.
    const WRITE: &str = "FERMATA_WRITE_SCHEMA";

    fn read(name: &str, text: &str) -> anyhow::Result<MachineFile> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join(name);
        fs::write(&path, text)?;
        let mut file = MachineFile::read(&path)?;
        // Where it lay does not matter here.
        let kernel = file.kernel.take();
        let relative = kernel.map(|kernel| kernel.strip_prefix(directory.path()).unwrap().into());
        Ok(MachineFile {
            kernel: relative,
            ..file
        })
    }

    fn refused(name: &str, text: &str) -> String {
        let error = read(name, text).unwrap_err().to_string();
        error.split_once(name).unwrap().1.to_owned()
    }

    #[test]
    fn toml_and_json_say_the_same() {
        let toml = "kernel = \"vmlinuz\"\nvcpus = 4\n[[disks]]\npath = \"/a\"\nread_only = true\n\
            format = \"branch\"\nserial = \"s\"\n";
        let json = r#"{"kernel": "vmlinuz", "vcpus": 4, "disks": [{"path": "/a", "read_only": true,
                "format": "branch", "serial": "s"}]}"#;
        let machine = read("machine.toml", toml).unwrap();
        assert_eq!(machine, read("machine.json", json).unwrap());
        assert_eq!(machine.kernel.as_deref(), Some(Path::new("vmlinuz")));
        assert_eq!((machine.vcpus, machine.memory_mib), (Some(4), None));
        let [disk] = machine.disks().try_into().unwrap();
        assert_eq!((disk.path, disk.read_only), ("/a".into(), true));
        assert_eq!(
            (disk.format, disk.serial.as_deref()),
            (DiskFormat::Branch, Some("s"))
        );
    }

    #[test]
    fn an_empty_file_leaves_all_to_the_flags() {
        assert_eq!(read("m.toml", "").unwrap(), MachineFile::default());
    }

    #[test]
    fn errors_point_at_line_and_key() {
        let wrong = refused("m.toml", "kernel = \"k\"\nvcpu = 4\n");
        assert!(wrong.starts_with(":2:1: unknown field `vcpu`"), "{wrong}");
        assert!(wrong.ends_with("\n  vcpu = 4"), "{wrong}");
        let wrong = refused("m.toml", "vcpus = \"four\"\n");
        assert!(wrong.starts_with(":1:9: invalid type"), "{wrong}");
        let wrong = refused(
            "m.json",
            "{\n  \"kernel\": \"k\",\n  \"vcpus\": \"four\"\n}",
        );
        assert!(wrong.starts_with(":3:"), "{wrong}");
        assert!(wrong.ends_with("\n    \"vcpus\": \"four\""), "{wrong}");
        let wrong = refused("m.json", "{\"kernel\": ");
        assert!(wrong.starts_with(":1:"), "{wrong}");
    }

    #[test]
    fn a_file_without_end_is_refused() {
        let error = MachineFile::read(Path::new("/dev/zero")).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }

    #[test]
    fn every_prefix_and_every_flipped_byte_is_an_answer_and_no_panic() {
        let toml = "kernel = \"é\"\n[[disks]]\npath = \"/a\"\n";
        let json = r#"{"kernel": "é", "disks": [{"path": "/a"}]}"#;
        for (text, json) in [(toml, false), (json, true)] {
            for at in 0..text.len() {
                for with in [None, Some(b'\n'), Some(b'"'), Some(0xC3)] {
                    let mut bytes = text.as_bytes().to_vec();
                    match with {
                        None => bytes.truncate(at),
                        Some(byte) => bytes[at] = byte,
                    }
                    let Ok(text) = String::from_utf8(bytes) else {
                        continue;
                    };
                    let _: Result<MachineFile, String> = if json {
                        from_json(&text)
                    } else {
                        from_toml(&text)
                    };
                }
            }
        }
    }

    #[test]
    fn the_published_schema_is_the_current_one() {
        let schema = schemars::schema_for!(MachineFile);
        let current = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        if env::var_os(WRITE).is_some() {
            fs::write(COMMITTED, &current).unwrap();
        }
        assert!(
            fs::read_to_string(COMMITTED).unwrap() == current,
            "docs/machine.schema.json is not what is read; write it with \
             {WRITE}=1 cargo test -p cli schema"
        );
    }
}
