//! `cargo xtask test`: all three levels, and one line that sums them up.

mod side_by_side;
mod tally;

use std::io::{BufRead, BufReader};
use std::panic::resume_unwind;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::job::Job;
use testbed::{debian, environment, setup};

use self::side_by_side::side_by_side;
use self::tally::Tally;
use crate::build;
use crate::ground::Ground;

/// The test program of the package `system-tests` that needs a KVM which boots stock kernels.
/// Its manifest says `test = false`, so that a plain `cargo test` leaves it out.
const LEVEL_3: &str = "level3";
/// Begins the names of tests that go on, on a second machine, with what the others left in the share.
const ELSEWHERE: &str = "elsewhere_";
/// What speaks to the Debian guest.
const DEBIAN_CLIENT: [&str; 1] = ["openssh-client"];
/// Some three times what they take on a busy machine; a guest that hangs must leave time to say so.
const LEVEL_3_TIMEOUT: Duration = Duration::from_secs(1800);

/// Runs all tests. Ends with success when none failed.
pub(crate) fn run() -> Result<ExitCode> {
    setup::ensure_packages(&[&debian::PACKAGES[..], &DEBIAN_CLIENT].concat())?;
    let mut ground = Ground::prepare(&[])?;
    // It waits for the network and the disk for most of its time, which the tests need not wait for. All packages are
    // there now: nobody changes what apt knows meanwhile.
    let debian = thread::spawn(debian::ensure);
    println!("\nLevels 1 and 2: no KVM, and bare-metal guests on any KVM");
    let mut tally = workspace_tests(&ground)?;

    let debian = debian
        .join()
        .unwrap_or_else(|panic| resume_unwind(panic))
        .context("cannot make the Debian guest")?;
    ground.tell(environment::DEBIAN, debian.directory().to_owned());
    println!("\nLevel 3: Linux guests");
    let programs = build::system_test(LEVEL_3)?;
    let program = programs.path(LEVEL_3)?;
    let tests = tests_of(program)?;
    let (elsewhere, here): (Vec<String>, Vec<String>) =
        tests.into_iter().partition(|name| name.contains(ELSEWHERE));
    tally += level_3(&ground, program, &here)?;
    println!("\nLevel 3, on another machine");
    tally += level_3(&ground, program, &elsewhere)?;

    println!("\n{tally}");
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs the tests of the workspace by nextest where it is installed, else by cargo.
fn workspace_tests(ground: &Ground) -> Result<Tally> {
    let has_nextest = build::cargo(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if has_nextest {
        // nextest knows nothing of examples in documentation.
        let tests = [
            "nextest",
            "run",
            "--workspace",
            "--no-fail-fast",
            "--color",
            "never",
        ];
        let examples = ["test", "--quiet", "--workspace", "--doc", "--no-fail-fast"];
        Ok(counted(ground, &tests)? + counted(ground, &examples)?)
    } else {
        counted(ground, &["test", "--workspace", "--no-fail-fast"])
    }
}

/// Runs cargo, lets its output through, and counts the tests in it. Tests of the whole product find
/// the programs that were built for the guests: cargo builds no program for another package's tests.
fn counted(ground: &Ground, arguments: &[&str]) -> Result<Tally> {
    // One pipe for both streams: nextest reports to standard error, libtest to standard output.
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let mut cargo = build::cargo(arguments);
    cargo
        .env(environment::BIN, ground.program("fermata")?)
        .env(environment::VMM_BIN, ground.program("fermata-vmm")?)
        .stdout(writer.try_clone().context("cannot share a pipe")?)
        .stderr(writer);
    let mut child = cargo.spawn().context("cannot run cargo")?;
    // The command holds the pipe's writing end; reading ends only when no one does.
    drop(cargo);

    let mut tally = Tally::default();
    for line in BufReader::new(reader).lines() {
        let line = line.context("cannot read cargo's output")?;
        println!("{line}");
        tally += Tally::of_line(&line);
    }
    let status = child.wait().context("cannot wait for cargo")?;
    if !status.success() && tally.failed == 0 {
        bail!("cargo {} failed: {status}", arguments.join(" "));
    }
    Ok(tally)
}

/// The names of a program's tests.
fn tests_of(program: &Path) -> Result<Vec<String>> {
    let listing = Command::new(program)
        .args(["--list", "--format", "terse"])
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let lines = String::from_utf8_lossy(&listing.stdout);
    let names = lines.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(names.map(str::to_owned).collect())
}

/// Runs tests where Linux guests run. An emulated machine is booted for each: if it breaks down, no other test has to run
/// again for it.
fn level_3(ground: &Ground, program: &Path, names: &[String]) -> Result<Tally> {
    let to_a_machine = match ground.is_emulated() {
        true => 1,
        false => names.len().max(1),
    };
    let jobs: Vec<&[String]> = names.chunks(to_a_machine).collect();
    side_by_side(&jobs, ground.machines_at_once(), |names| {
        on_machines(ground, program, names).with_context(|| names.join(" "))
    })
}

/// Runs tests on a machine of their own. If that is an emulated one, whose races can stop a guest as
/// well as the machine itself (see [`Ground::run`]), what fails there has a second chance on a fresh one. A
/// fault of ours that does not fail each time is still seen: the summary counts what needed the chance.
fn on_machines(ground: &Ground, program: &Path, names: &[String]) -> Result<Tally> {
    let (first, failures) = on_a_machine(ground, program, names)?;
    if first.failed == 0 || !ground.is_emulated() {
        return Ok(first);
    }
    println!(
        "\nfailed on an emulated machine, and run again on a fresh one: {}",
        failures.join(" ")
    );
    let (second, _) = on_a_machine(ground, program, &failures)?;
    Ok(Tally {
        passed: first.passed + second.passed,
        failed: second.failed,
        unsteady: first.failed.saturating_sub(second.failed),
    })
}

/// Runs tests on a machine of their own; tells the names of those that failed, too.
fn on_a_machine(ground: &Ground, program: &Path, names: &[String]) -> Result<(Tally, Vec<String>)> {
    let threads = format!("--test-threads={}", ground.test_threads());
    let argv = [program.as_os_str(), threads.as_ref()]
        .into_iter()
        .chain(["--exact".as_ref()])
        .chain(names.iter().map(AsRef::as_ref));
    let job = Job::new(argv).timeout(LEVEL_3_TIMEOUT);
    let output = if ground.is_emulated() {
        // What other machines print would be between its lines.
        let output = ground.run(job)?;
        print!("{}{}", output.stdout, output.stderr);
        output
    } else {
        ground.run(job.echo())?
    };

    let tally: Tally = output.stdout.lines().map(Tally::of_line).sum();
    if output.status != 0 && tally.failed == 0 {
        bail!(
            "the tests ended with status {} before they were done",
            output.status
        );
    }
    if tally.passed + tally.failed != names.len() as u32 {
        bail!(
            "{} ran other tests than {}",
            program.display(),
            names.join(" ")
        );
    }
    let failures = tally::failures(&output.stdout);
    if failures.len() as u32 != tally.failed {
        bail!("the tests that failed were not named");
    }
    Ok((tally, failures))
}
