//! `fermata run`.

use std::{path::PathBuf, process::ExitCode};

use api_server::Defaults;
use control::{DiskConfig, MachineConfig, Origin, Registry};

use crate::{foreground, machine};

#[derive(clap::Args)]
#[command(after_help = foreground::EXIT_CODES)]
pub(crate) struct Args {
    /// The kernel: a bzImage or an ELF vmlinux.
    #[arg(value_parser = machine::absolute())]
    kernel: PathBuf,
    /// The initial RAM disk.
    #[arg(long, value_name = "FILE", value_parser = machine::absolute())]
    initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, default_value = "console=ttyS0 reboot=k panic=-1")]
    cmdline: String,
    /// The number of vCPUs.
    #[arg(long, default_value_t = Defaults::default().vcpus)]
    vcpus: u32,
    /// The memory in MiB.
    #[arg(long, default_value_t = Defaults::default().memory_mib)]
    memory: u64,
    /// A disk; `,ro` after the path if the guest may only read it.
    #[arg(long = "disk", value_name = "FILE[,ro]", value_parser = machine::disk)]
    disks: Vec<DiskConfig>,
}

pub(crate) async fn run(args: Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let origin = Origin::Boot(MachineConfig {
        vcpus: args.vcpus,
        memory_mib: args.memory,
        kernel: args.kernel,
        initrd: args.initrd,
        cmdline: args.cmdline,
        disks: args.disks,
    });
    foreground::run(&Registry::open(run_dir)?, origin).await
}
