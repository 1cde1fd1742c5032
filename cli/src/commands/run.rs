//! `fermata run`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use api_server::Defaults;
use control::{BalloonConfig, DiskConfig, MachineConfig, NetConfig, Origin, Registry, VsockConfig};

use crate::{
    balloon,
    console::Console,
    cpu::Cpu,
    disk, foreground,
    machine::{self, Changes},
    machine_file::MachineFile,
    net, vsock,
};

#[derive(clap::Args)]
#[command(after_help = foreground::EXIT_CODES)]
pub(crate) struct Args {
    /// The kernel: a bzImage or an ELF vmlinux.
    #[arg(value_parser = machine::absolute(), required_unless_present = "config")]
    kernel: Option<PathBuf>,
    /// A file in TOML, or JSON if its name ends so, that describes the machine (docs/machine.schema.json). What is
    /// said here takes the place of what it says.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The initial RAM disk.
    #[arg(long, value_name = "FILE", value_parser = machine::absolute())]
    initrd: Option<PathBuf>,
    /// The kernel's command line [default: console=ttyS0 reboot=k panic=-1], with console=hvc0 behind the first if the console is a
    /// virtio console.
    #[arg(long)]
    cmdline: Option<String>,
    /// The number of vCPUs [default: 2].
    #[arg(long)]
    vcpus: Option<u32>,
    /// The memory in MiB [default: 256].
    #[arg(long)]
    memory: Option<u64>,
    /// Has the memory made of huge pages that the host has reserved (vm.nr_hugepages); otherwise transparent ones are asked for.
    #[arg(long)]
    hugepages: bool,
    /// What the CPUs are: `host`, `x86-64-v2` or `x86-64-v3`, or a template, a file that changes one of these
    /// (docs/cpu-template.schema.json). A machine of a level can be restored on any host of that level [default: host].
    #[arg(long, value_name = "LEVEL or FILE")]
    cpu: Option<Cpu>,
    /// A disk. Options behind the path: `ro` if the guest may only read it, `format=branch` if it branches (raw otherwise,
    /// whatever is in it), `serial=TEXT` for the serial number that the guest sees, and limits: `bytes_per_second` and
    /// `operations_per_second`, for all requests together, and with `read_` or `write_` before it, for those alone.
    #[arg(long = "disk", value_name = "FILE[,OPTION…]", value_parser = disk::disk)]
    disks: Vec<DiskConfig>,
    /// A network device: `tap=NAME` or `socket=PATH`, and if need be `mac=ADDRESS`, and limits by
    /// `receive_bytes_per_second`, `receive_packets_per_second`, `send_bytes_per_second` and
    /// `send_packets_per_second`.
    #[arg(long = "net", value_name = "KEY=VALUE,...", value_parser = net::net)]
    nets: Vec<NetConfig>,
    /// Streams between guest and host: `cid=NUMBER,path=SOCKET`.
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = vsock::vsock)]
    vsock: Option<VsockConfig>,
    /// A balloon, by which the guest gives memory back: any of `target_mib=NUMBER`, `deflate_on_oom`, `free_page_reporting` and
    /// `statistics_interval_s=NUMBER`.
    #[arg(long, value_name = "OPTION,...", value_parser = balloon::balloon)]
    balloon: Option<BalloonConfig>,
    /// The device of the console [default: serial]. What is typed here goes to it.
    #[arg(long, value_name = "DEVICE", value_enum)]
    console_device: Option<Console>,
}

impl Args {
    /// The machine that the flags and the file describe together.
    fn machine(self) -> anyhow::Result<(MachineConfig, Changes)> {
        let mut file = match &self.config {
            Some(path) => MachineFile::read(path)?,
            None => MachineFile::default(),
        };
        let defaults = Defaults::default();
        let kernel = self.kernel.or(file.kernel.take());
        let nets = file.nets()?;
        let vsock = self.vsock.or(file.vsock.take().map(VsockConfig::from));
        let balloon = self.balloon.or(file.balloon.map(BalloonConfig::from));
        let console = (self.console_device.or(file.console_device)).unwrap_or_default();
        let changes = Changes {
            hugepages: self.hugepages || file.hugepages,
            ..Changes::default()
        };
        let machine = MachineConfig {
            vcpus: self.vcpus.or(file.vcpus).unwrap_or(defaults.vcpus),
            memory_mib: (self.memory.or(file.memory_mib)).unwrap_or(defaults.memory_mib),
            cpu: self.cpu.or(file.cpu.take()).unwrap_or_default().model()?,
            kernel: kernel.context("there is no kernel: name one in the file or as an argument")?,
            initrd: self.initrd.or(file.initrd.take()),
            cmdline: (self.cmdline.or(file.cmdline.take()))
                .unwrap_or_else(|| console.cmdline().to_owned()),
            disks: if self.disks.is_empty() {
                file.disks()
            } else {
                self.disks
            },
            nets: if self.nets.is_empty() {
                nets
            } else {
                self.nets
            },
            vsock,
            balloon,
            console_device: console.into(),
        };
        Ok((machine, changes))
    }
}

pub(crate) async fn run(args: Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let (machine, changes) = args.machine()?;
    foreground::run(&Registry::open(run_dir)?, Origin::Boot(machine), changes).await
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use clap::Parser;
    use control::ConsoleDevice;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn machine(words: &[&str]) -> anyhow::Result<MachineConfig> {
        let args = Line::try_parse_from([&["run"], words].concat())?.args;
        Ok(args.machine()?.0)
    }

    #[test]
    fn flags_mean_the_same_as_the_file_and_come_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.toml");
        let text = "kernel = \"/k\"\nmemory_mib = 512\nvcpus = 4\nconsole_device = \"virtio\"\n[[disks]]\npath = \"/d\"\n\
                    read_bytes_per_second = 7\n\
                    [[nets]]\ntap = \"t\"\n[[nets]]\nsocket = \"s\"\n\
                    [vsock]\ncid = 3\npath = \"/v\"\n[balloon]\ntarget_mib = 9\n";
        std::fs::write(&path, text).unwrap();
        let config = path.to_str().unwrap();
        let by_file = machine(&["--config", config]).unwrap();
        let socket = format!("socket={}", directory.path().join("s").display());
        let flags = [
            "/k",
            "--memory",
            "512",
            "--vcpus",
            "4",
            "--disk",
            "/d,read_bytes_per_second=7",
        ];
        let nets = [
            "--net",
            "tap=t",
            "--net",
            &socket,
            "--vsock",
            "cid=3,path=/v",
            "--balloon",
            "target_mib=9",
            "--console-device",
            "virtio",
        ];
        let by_flags = machine(&[&flags[..], &nets].concat()).unwrap();
        assert_eq!(by_file, by_flags);
        assert_eq!(by_file.console_device, ConsoleDevice::Virtio);
        assert!(by_file.cmdline.contains("console=hvc0 "));
        let both = machine(&["/other", "--config", config, "--vcpus", "3"]).unwrap();
        assert_eq!((both.kernel, both.vcpus), ("/other".into(), 3));
        assert_eq!((both.memory_mib, both.disks.len()), (512, 1));
        assert_eq!(both.nets, by_file.nets);
    }

    #[test]
    fn huge_pages_are_had_by_flag_and_by_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.toml");
        std::fs::write(&path, "kernel = \"/k\"\nhugepages = true\n").unwrap();
        let config = path.to_str().unwrap();
        let huge = |words: &[&str]| {
            let line = Line::try_parse_from([&["run"], words].concat()).unwrap();
            line.args.machine().unwrap().1.hugepages
        };
        assert!(huge(&["--config", config]) && huge(&["/k", "--hugepages"]));
        assert!(!huge(&["/k"]));
    }

    #[test]
    fn help_tells_the_defaults() {
        use clap::CommandFactory;
        let help = Line::command().render_long_help().to_string();
        let Defaults {
            vcpus, memory_mib, ..
        } = Defaults::default();
        for default in [
            vcpus.to_string(),
            memory_mib.to_string(),
            Console::Serial.cmdline().to_owned(),
        ] {
            assert!(help.contains(&format!("[default: {default}]")), "{help}");
        }
    }

    #[test]
    fn without_a_kernel_there_is_no_machine() {
        assert!(machine(&[]).is_err());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m.toml");
        std::fs::write(&path, "").unwrap();
        let error = machine(&["--config", path.to_str().unwrap()]).unwrap_err();
        assert!(error.to_string().contains("kernel"), "{error}");
    }
}
