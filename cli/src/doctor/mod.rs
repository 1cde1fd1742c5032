//! `fermata doctor`.

mod cpu;
mod devices;
mod guest;
mod host;
mod resources;
mod setup;

use std::{path::Path, process::ExitCode};

use serde::Serialize;

use crate::{cpu::Cpu, output, store::StoreArgs};
use host::Host;
use setup::Login;

#[derive(clap::Args)]
#[command(
    after_help = "Exit codes: 0 machines can run here, and what was asked about; 1 they cannot."
)]
pub(crate) struct Args {
    /// Says whether machines of such CPUs can run here too: a level or a template, as `fermata run` takes it.
    #[arg(long, value_name = "LEVEL or FILE")]
    cpu: Option<Cpu>,
    /// Says whether this host's CPU has what a snapshot needs: its state file, or its name in the store.
    #[arg(long, value_name = "NAME or STATE")]
    snapshot: Option<String>,
    #[command(flatten)]
    store: StoreArgs,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// How it stands with one thing that machines need or could use.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// The thing.
    what: &'static str,
    verdict: Verdict,
    /// How it is.
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Machines run, but something is slower than it could be, or not to be had.
    Warn,
    /// No machine runs.
    Fail,
}

impl Finding {
    fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self {
            what,
            verdict: Verdict::Ok,
            found: found.into(),
            advice: None,
        }
    }

    fn warn(what: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            what,
            verdict: Verdict::Warn,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    fn fail(what: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Fail,
            ..Self::warn(what, found, advice)
        }
    }
}

pub(crate) fn doctor(args: &Args, run_dir: &Path) -> anyhow::Result<ExitCode> {
    let host = Host::real();
    let mut findings = vec![
        devices::kvm(),
        cpu::virtualisation(&host),
        cpu::pvm(&host),
        cpu::nesting(&host),
        devices::userfaultfd(&host),
        devices::tun(&host),
        resources::transparent_huge_pages(&host),
        resources::reserved_huge_pages(&host),
        resources::memory(&host),
        resources::disk(),
        setup::run_dir(run_dir, &host, &Login::of_environment()),
        setup::program(),
    ];
    if let Some(cpu) = &args.cpu {
        findings.push(guest::cpu(cpu)?);
    }
    if let Some(name) = &args.snapshot {
        findings.push(guest::snapshot(name, &args.store)?);
    }
    if args.json {
        output::print_json(&findings)?;
    } else {
        output::print(&report(&findings))?;
    }
    let works = findings
        .iter()
        .all(|finding| finding.verdict != Verdict::Fail);
    Ok(if works {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn report(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding {
        what,
        verdict,
        found,
        advice,
    } in findings
    {
        let mark = match verdict {
            Verdict::Ok => "ok  ",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        text.push_str(&format!("{mark}  {what:<24}  {found}\n"));
        if let Some(advice) = advice {
            text.push_str(&format!("{:34}{advice}\n", "-> "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_follows_what_it_is_about() {
        let text = report(&[
            Finding::ok("memory", "8 GiB"),
            Finding::fail("KVM", "absent", "load it"),
        ]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("FAIL  KVM"), "{text}");
        assert!(lines[2].ends_with("load it"), "{text}");
    }
}
