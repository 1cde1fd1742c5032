//! `fermata disk`: disks that branch, and what is changed of a machine's disks.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use branch_disk::{BaseInfo, Copied, Disk, Foundation, Info, LayerInfo, Mode, Rest, anything};
use clap::{Subcommand, ValueEnum};
use control::{DiskChange, DiskLimitsChange, DiskStatus, Registry};
use serde::Serialize;

use crate::{disk, machine, output, size};

/// How a qcow2 image begins.
const QCOW2: [u8; 4] = *b"QFI\xfb";
/// How a disk that branches begins (`docs/disk-format.md`).
const BRANCHING: [u8; 8] = *b"FERMDISK";

/// The exit code when a check finds something.
const DAMAGED: u8 = 2;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Prints JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a disk: of zeros, or on a raw image, which must not change as long as the disk is of use.
    Create {
        /// The disk.
        #[arg(value_parser = machine::absolute())]
        disk: PathBuf,
        /// Its size in bytes, or with K, M, G or T behind it in units of 1024; by default the base's.
        #[arg(long, value_parser = size::bytes, required_unless_present = "base")]
        size: Option<u64>,
        /// The raw image that it begins as.
        #[arg(long, value_name = "FILE", value_parser = machine::absolute())]
        base: Option<PathBuf>,
    },
    /// Makes a disk that begins as another is now. What the two have in common is kept once.
    Branch {
        /// The other: a disk that no machine uses, or a sealed layer of one.
        #[arg(value_parser = machine::absolute())]
        from: PathBuf,
        /// The new disk.
        #[arg(value_parser = machine::absolute())]
        disk: PathBuf,
        /// Its size, if it is to be larger.
        #[arg(long, value_parser = size::bytes)]
        size: Option<u64>,
    },
    /// Makes a disk of a machine larger, whether it runs or stands still; its guest is told. Disks never become smaller.
    Resize {
        #[command(flatten)]
        vm: machine::Name,
        /// The number of the disk, from 0 in the order of the disks: 0 is the guest's vda.
        #[arg(value_name = "NUMBER")]
        disk: u32,
        /// The size that it is to have, like 20G.
        #[arg(value_parser = size::bytes)]
        size: u64,
    },
    /// Changes what a disk of a machine may do in a second, whether it runs or stands still. Limits that are not named stay.
    Limit {
        #[command(flatten)]
        vm: machine::Name,
        /// The number of the disk, from 0 in the order of the disks: 0 is the guest's vda.
        #[arg(value_name = "NUMBER")]
        disk: u32,
        /// Limits, as behind the path of `run --disk`, with 0 for none: `bytes_per_second` and `operations_per_second`, for all
        /// requests together, and with `read_` or `write_` before it, for those alone.
        #[arg(value_name = "LIMIT=NUMBER,...", value_parser = disk::limits_change)]
        limits: DiskLimitsChange,
    },
    /// Shows a disk's layers, from the top, and what each takes.
    Info {
        /// The disk, or one of its layers.
        disk: PathBuf,
    },
    /// Makes a disk of an image, on which it does not depend afterwards.
    Import {
        /// The image.
        image: PathBuf,
        /// The disk.
        #[arg(value_parser = machine::absolute())]
        disk: PathBuf,
        /// What the image is [default: raw, unless it looks like something else].
        #[arg(long, value_enum)]
        format: Option<Format>,
    },
    /// Writes a disk's content into an image.
    Export {
        /// The disk, or one of its layers.
        disk: PathBuf,
        /// The image.
        #[arg(value_parser = machine::absolute())]
        image: PathBuf,
        /// What the image is to be.
        #[arg(long, value_enum, default_value_t = Format::Raw)]
        format: Format,
    },
    /// Makes one of the sealed layers of a disk that no machine uses, down to its base. What stands on the topmost of them stands on that.
    Merge {
        /// The disk.
        disk: PathBuf,
        /// Removes the files of the others that lie beside it, now and not later: unless another layer there stands on them, or a disk
        /// elsewhere, if that was made by this release or a later one, or somebody has them open. Snapshots in files need them, but for
        /// one of the topmost sealed layer; snapshots in a store do not.
        #[arg(long)]
        remove: bool,
    },
    /// Checks everything of a disk but its data. The exit code is 2 when something is wrong.
    Check {
        /// The disk, or one of its layers.
        disk: PathBuf,
    },
}

/// What an image that is not ours can be.
#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

pub(crate) async fn run(args: &Args, run_dir: PathBuf) -> anyhow::Result<ExitCode> {
    let json = args.json;
    match &args.command {
        Command::Create { disk, size, base } => {
            if let Some(base) = base
                && begins_with(base, &BRANCHING)?
            {
                bail!(
                    "{} is a disk that branches, and no raw image; `fermata disk branch` has another begin as it is",
                    base.display()
                );
            }
            let on = base.clone().map_or(Foundation::Nothing, Foundation::Raw);
            made(&Disk::create(disk, *size, &on, &anything)?, json)
        }
        Command::Branch { from, disk, size } => {
            made(&Disk::branch_now(from, disk, *size, &anything)?, json)
        }
        Command::Resize { vm, disk, size } => {
            let change = DiskChange {
                bytes: Some(*size),
                ..DiskChange::default()
            };
            let now = changed(vm, *disk, change, run_dir).await?;
            resized(*disk, now.bytes, json)
        }
        Command::Limit { vm, disk, limits } => {
            let change = DiskChange {
                limits: *limits,
                ..DiskChange::default()
            };
            let now = changed(vm, *disk, change, run_dir).await?;
            limited(*disk, now, json)
        }
        Command::Info { disk } => info(&read(disk)?, json),
        Command::Import {
            image,
            disk,
            format,
        } => {
            // A guest may write at the beginning of a raw image what it likes: nobody guesses.
            for (begin, what) in [
                (&QCOW2[..], "a qcow2 image: say `--format qcow2`"),
                (&BRANCHING[..], "a disk that branches: use it as it is"),
            ] {
                if format.is_none() && begins_with(image, begin)? {
                    bail!(
                        "{} looks like {what}, or `--format raw` if it is none",
                        image.display()
                    );
                }
            }
            let copied = match format.unwrap_or(Format::Raw) {
                Format::Raw => branch_disk::import_raw(image, disk, &anything),
                Format::Qcow2 => branch_disk::import_qcow2(image, disk, &anything),
            };
            report_copy(copied?, json)
        }
        Command::Export {
            disk,
            image,
            format,
        } => {
            let disk = read(disk)?;
            let copied = match format {
                Format::Raw => branch_disk::export_raw(&disk, image),
                Format::Qcow2 => branch_disk::export_qcow2(&disk, image),
            };
            report_copy(copied?, json)
        }
        Command::Merge { disk, remove } => merge(disk, *remove, json),
        Command::Check { disk } => check(disk, json),
    }
}

/// Whether a regular file begins so. What cannot be opened is told by who needs it.
fn begins_with(path: &Path, magic: &[u8]) -> anyhow::Result<bool> {
    if !path.is_file() {
        return Ok(false);
    }
    let mut begin = Vec::new();
    if let Ok(file) = File::open(path) {
        file.take(magic.len() as u64)
            .read_to_end(&mut begin)
            .with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(begin == magic)
}

fn read(path: &Path) -> anyhow::Result<Disk> {
    Ok(Disk::open(path, Mode::Read, &anything)?)
}

fn made(disk: &Disk, json: bool) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Made {
        path: PathBuf,
        bytes: u64,
    }
    let made = Made {
        path: disk.path().to_owned(),
        bytes: disk.bytes(),
    };
    if json {
        output::print_json(&made)?;
    } else {
        let (path, size) = (made.path.display(), output::bytes(made.bytes));
        output::print(&format!(
            "{path}: {size}; attach it with `--disk path={path},format=branch`\n"
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A disk of a machine once it is changed.
async fn changed(
    vm: &machine::Name,
    disk: u32,
    change: DiskChange,
    run_dir: PathBuf,
) -> anyhow::Result<DiskStatus> {
    let record = vm.find(&Registry::open(run_dir)?)?;
    let client = machine::connect(&record).await?;
    Ok(client.change_disk(disk, change).await?)
}

fn resized(disk: u32, bytes: u64, json: bool) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Resized {
        disk: u32,
        bytes: u64,
    }
    if json {
        output::print_json(&Resized { disk, bytes })?;
    } else {
        let size = output::bytes(bytes);
        output::print(&format!(
            "disk {disk} has {size}; the guest has been told\n"
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn limited(number: u32, now: DiskStatus, json: bool) -> anyhow::Result<ExitCode> {
    let now = api_server::disk_of(now);
    if json {
        output::print_json(&now)?;
    } else {
        let limits = disk::limits_text(&now.limits)?;
        output::print(&format!("disk {number}: {limits}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn info(disk: &Disk, json: bool) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Report {
        bytes: u64,
        layers: Vec<Layer>,
        base: Option<Base>,
    }
    #[derive(Serialize)]
    struct Layer {
        path: PathBuf,
        id: String,
        bytes: u64,
        owned_bytes: u64,
        allocated_bytes: u64,
        sealed: bool,
        mapped: bool,
    }
    #[derive(Serialize)]
    struct Base {
        path: PathBuf,
        bytes: u64,
    }
    let Info {
        bytes,
        layers,
        base,
    } = disk.info()?;
    if json {
        let layers = layers.into_iter().map(|layer| Layer {
            path: layer.path,
            id: layer.id.to_string(),
            bytes: layer.bytes,
            owned_bytes: layer.owned_bytes,
            allocated_bytes: layer.allocated_bytes,
            sealed: layer.sealed,
            mapped: layer.mapped,
        });
        let base = base.map(|BaseInfo { path, bytes }| Base { path, bytes });
        output::print_json(&Report {
            bytes,
            layers: layers.collect(),
            base,
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows: Vec<_> = layers.iter().map(row).collect();
    if let Some(base) = base {
        let taken = output::bytes(base.bytes);
        rows.push([
            base.path.display().to_string(),
            "base".to_owned(),
            taken.clone(),
            taken,
        ]);
    }
    let heading = ["FILE", "STATE", "OWNS", "TAKES"];
    let table = output::table(heading, &rows);
    output::print(&format!("size  {}\n\n{table}", output::bytes(bytes)))?;
    Ok(ExitCode::SUCCESS)
}

fn row(layer: &LayerInfo) -> [String; 4] {
    let state = if layer.sealed { "sealed" } else { "head" };
    [
        layer.path.display().to_string(),
        state.to_owned(),
        output::bytes(layer.owned_bytes),
        output::bytes(layer.allocated_bytes),
    ]
}

fn merge(path: &Path, remove: bool, json: bool) -> anyhow::Result<ExitCode> {
    let mut disk = Disk::open(path, Mode::Write, &anything)?;
    let sealed = disk.sealed_layers();
    let whole = match &*sealed {
        [lowest, .., topmost] => disk.merge(*lowest, *topmost),
        _ => None,
    };
    let Some(merge) = whole else {
        return report_merge(sealed.len(), None, Rest::default(), json);
    };
    let merged = merge.write(&|| true)?;
    disk.adopt(&merged);
    let all = Rest {
        removed: Vec::new(),
        kept: merged.rest(),
    };
    let (rest, refused) = match remove.then(|| merged.remove_rest()) {
        None => (all, None),
        Some(Ok(rest)) => (rest, None),
        Some(Err(error)) => (all, Some(error)),
    };
    let code = report_merge(sealed.len(), Some(merged.path()), rest, json)?;
    match refused {
        None => Ok(code),
        Some(error) => Err(error).context("the layers are one, and no file was removed"),
    }
}

fn report_merge(
    layers: usize,
    into: Option<&Path>,
    rest: Rest,
    json: bool,
) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Report<'a> {
        layers: usize,
        into: Option<&'a Path>,
        removed: Vec<PathBuf>,
        kept: Vec<PathBuf>,
    }
    let Rest { removed, kept } = rest;
    if json {
        let report = Report {
            layers,
            into,
            removed,
            kept,
        };
        output::print_json(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(into) = into else {
        output::print(&format!("{layers} sealed layers, nothing to merge\n"))?;
        return Ok(ExitCode::SUCCESS);
    };
    let mut text = format!("{layers} layers are {}\n", into.display());
    for (what, paths) in [("removed", removed), ("not needed by this disk", kept)] {
        for path in paths {
            text += &format!("{what}: {}\n", path.display());
        }
    }
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn report_copy(copied: Copied, json: bool) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Report {
        bytes: u64,
        data_bytes: u64,
    }
    let Copied { bytes, data_bytes } = copied;
    if json {
        output::print_json(&Report { bytes, data_bytes })?;
    } else {
        let (size, data) = (output::bytes(bytes), output::bytes(data_bytes));
        output::print(&format!("{size}, of which {data} are not zeros\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn check(path: &Path, json: bool) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Report {
        layers: usize,
        without_map: usize,
        problems: Vec<String>,
    }
    let branch_disk::Checked {
        layers,
        problems,
        without_map,
    } = branch_disk::check(path, &anything)?;
    let code = if problems.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(DAMAGED)
    };
    if json {
        output::print_json(&Report {
            layers,
            without_map,
            problems,
        })?;
    } else if problems.is_empty() {
        output::print(&format!("{layers} layers, nothing wrong\n"))?;
    } else {
        output::print(&(problems.join("\n") + "\n"))?;
    }
    Ok(code)
}
