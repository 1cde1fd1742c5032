//! QEMU's command line for L1.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// What L1 is made of.
pub(crate) struct Machine<'a> {
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a Path,
    pub(crate) command_line: &'a str,
    /// File that gets what the kernel says on its serial console.
    pub(crate) console: &'a Path,
    /// Directories offered over 9p: the tag to mount each by, and whether L1 may write there.
    pub(crate) shares: &'a [(&'a str, &'a Path, bool)],
}

impl Machine<'_> {
    /// The program and its arguments. Standard input and output become L1's virtio-serial port.
    pub(crate) fn command(&self) -> Vec<OsString> {
        // The death of whoever started it ends QEMU too, however that came about.
        let mut command = words(
            "setpriv --pdeathsig KILL qemu-system-x86_64 -nodefaults -no-reboot -display none",
        );
        // TCG is the one accelerator here that can emulate SVM, and EPYC the model that comes with it.
        command.extend(words(
            "-machine q35 -accel tcg,thread=multi -cpu EPYC,+svm,+npt",
        ));
        command.extend(words(&format!(
            "-smp {} -m {}M",
            self.cpus, self.memory_mib
        )));
        command.extend([
            "-kernel".into(),
            self.kernel.into(),
            "-initrd".into(),
            self.initrd.into(),
        ]);
        command.extend(["-append".into(), self.command_line.into()]);
        command.extend(["-serial".into(), option("file:", self.console)]);
        command.extend(words(
            "-chardev stdio,id=agent,signal=off -device virtio-serial-pci",
        ));
        command.extend(words("-device virtserialport,chardev=agent,name=agent"));
        for (tag, path, writable) in self.shares {
            let readonly = if *writable { "off" } else { "on" };
            // The host's root holds several file systems: remap keeps their inode numbers apart.
            let start = format!(
                "local,id={tag},security_model=none,multidevs=remap,readonly={readonly},path="
            );
            command.extend(["-fsdev".into(), option(&start, path)]);
            command.extend(words(&format!(
                "-device virtio-9p-pci,fsdev={tag},mount_tag={tag}"
            )));
        }
        command
    }
}

fn words(line: &str) -> Vec<OsString> {
    line.split_whitespace().map(OsString::from).collect()
}

/// A QEMU option with a path in it: a comma that belongs to a value is written twice.
fn option(start: &str, path: &Path) -> OsString {
    let mut bytes = start.as_bytes().to_vec();
    for &byte in path.as_os_str().as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_read_only_unless_said_otherwise() {
        let machine = Machine {
            cpus: 2,
            memory_mib: 4096,
            kernel: Path::new("/k"),
            initrd: Path::new("/i"),
            command_line: "quiet a=b",
            console: Path::new("/c"),
            shares: &[
                ("host", Path::new("/"), false),
                ("share", Path::new("/a,b"), true),
            ],
        };
        let command = machine.command();
        let has = |wanted: &str| {
            command
                .iter()
                .any(|argument| argument.to_str().unwrap().contains(wanted))
        };
        assert!(has(
            "id=host,security_model=none,multidevs=remap,readonly=on,path=/"
        ));
        assert!(has("readonly=off,path=/a,,b"));
        assert!(
            has("quiet a=b"),
            "the kernel's command line is one argument"
        );
        assert!(has("4096M"));
    }
}
