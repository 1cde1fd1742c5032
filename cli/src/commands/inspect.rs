//! `fermata inspect`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use hypervisor::{CpuNeeds, VcpuState};
use saved_state::{Container, Header, SavedState};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::output;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The state file of a snapshot.
    file: PathBuf,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// What there is to say of a state file.
#[derive(Serialize)]
struct Report {
    snapshot: String,
    release: String,
    created_unix_ns: u64,
    host_cpu: HostCpu,
    /// The level of which a host's CPU must be, besides of the same vendor, or `host` if the guest was shown less than
    /// any level has; if the vCPUs can be read.
    needs_cpu: Option<String>,
    /// What it must have besides, by name.
    needs_features: Vec<String>,
    vcpus: u32,
    memory_bytes: u64,
    /// Empty when the body is damaged.
    sections: Vec<SectionRow>,
    /// What is wrong with the body, if anything is.
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

#[derive(Serialize)]
struct HostCpu {
    vendor: String,
    signature: String,
    brand: String,
}

#[derive(Serialize)]
struct SectionRow {
    kind: String,
    instance: u32,
    version: u16,
    bytes: usize,
}

/// Fails when the file is not one from which a machine can be restored.
pub(crate) fn inspect(args: &Args) -> anyhow::Result<ExitCode> {
    let report = read(&args.file).with_context(|| format!("{}", args.file.display()))?;
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&report.to_string())?;
    }
    Ok(match report.damage {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
    })
}

fn read(path: &Path) -> anyhow::Result<Report> {
    let bytes = snapshot::read_state_bytes(path)?;
    let header = Header::read(&bytes)?;
    let (sections, needs, damage) = match Container::from_bytes(&bytes) {
        Ok(container) => (rows(&container), needs(&container), None),
        Err(error) => (Vec::new(), None, Some(error.to_string())),
    };
    let Header {
        id,
        release,
        created_unix_ns,
        host_cpu,
        vcpus,
        memory_bytes,
    } = header;
    Ok(Report {
        snapshot: id.to_string(),
        release,
        created_unix_ns,
        host_cpu: HostCpu {
            vendor: host_cpu.vendor,
            signature: format!("{:#010x}", host_cpu.signature),
            brand: host_cpu.brand,
        },
        needs_cpu: needs.as_ref().map(|needs| needs.level.to_string()),
        needs_features: needs.map(|needs| needs.besides).unwrap_or_default(),
        vcpus,
        memory_bytes,
        sections,
        damage,
    })
}

/// What the first vCPU needs, as all others do.
fn needs(container: &Container) -> Option<CpuNeeds> {
    let vcpu = container
        .sections()
        .find(|section| section.kind == VcpuState::KIND)?;
    vcpu.decode::<VcpuState>().ok()?.needs().ok()
}

fn rows(container: &Container) -> Vec<SectionRow> {
    let sections = container.sections();
    sections
        .map(|section| SectionRow {
            kind: section.kind.to_string(),
            instance: section.instance,
            version: section.version,
            bytes: section.payload.len(),
        })
        .collect()
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let HostCpu {
            vendor,
            signature,
            brand,
        } = &self.host_cpu;
        writeln!(f, "snapshot  {}", self.snapshot)?;
        writeln!(f, "created   {}", date(self.created_unix_ns))?;
        writeln!(f, "release   fermata {}", self.release)?;
        let brand = match brand.is_empty() {
            true => String::new(),
            false => format!(", {brand}"),
        };
        writeln!(f, "host CPU  {vendor} {signature}{brand}")?;
        if let Some(level) = &self.needs_cpu {
            let level = if level == "host" { "x86-64" } else { level };
            write!(f, "runs on   {level} by {vendor}")?;
            if !self.needs_features.is_empty() {
                write!(f, ", with {}", self.needs_features.join(", "))?;
            }
            writeln!(f)?;
        }
        writeln!(f, "vCPUs     {}", self.vcpus)?;
        writeln!(f, "memory    {}", output::bytes(self.memory_bytes))?;
        if let Some(damage) = &self.damage {
            return writeln!(f, "\nIt cannot be restored: {damage}");
        }
        let rows: Vec<_> = self
            .sections
            .iter()
            .map(|section| {
                [
                    section.kind.clone(),
                    section.instance.to_string(),
                    section.version.to_string(),
                    section.bytes.to_string(),
                ]
            })
            .collect();
        let heading = ["SECTION", "INSTANCE", "VERSION", "BYTES"];
        write!(f, "\n{}", output::table(heading, &rows))
    }
}

fn date(unix_ns: u64) -> String {
    OffsetDateTime::from_unix_timestamp_nanos(unix_ns.into())
        .ok()
        .and_then(|date| date.format(&Rfc3339).ok())
        .unwrap_or_else(|| format!("{unix_ns} ns after 1970"))
}
