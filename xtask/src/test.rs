//! `cargo xtask test`: all three levels, and one line that sums them up.

mod tally;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::environment;
use testbed::job::Job;

use self::tally::Tally;
use crate::build;
use crate::ground::Ground;

/// The test program of the package `system-tests` that needs a KVM which boots stock kernels.
/// Its manifest says `test = false`, so that a plain `cargo test` leaves it out.
const LEVEL_3: &str = "level3";
/// Begins the names of tests that go on, on a second machine, with what the others left in the share.
const ELSEWHERE: &str = "elsewhere_";
/// Some five times what they take on a busy machine; a guest that hangs must leave time to say so.
const LEVEL_3_TIMEOUT: Duration = Duration::from_secs(600);

/// Runs all tests. Ends with success when none failed.
pub(crate) fn run() -> Result<ExitCode> {
    let ground = Ground::prepare()?;
    println!("\nLevels 1 and 2: no KVM, and bare-metal guests on any KVM");
    let mut tally = workspace_tests(&ground)?;

    println!("\nLevel 3: Linux guests");
    let programs = build::system_test(LEVEL_3)?;
    let program = programs.path(LEVEL_3)?;
    tally += on_machines(&ground, program, &["--skip", ELSEWHERE])?;
    println!("\nLevel 3, on another machine");
    tally += on_machines(&ground, program, &[ELSEWHERE])?;

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

/// Runs a test program on a machine of its own. If that is an emulated one, whose races can stop a guest as
/// well as the machine itself (see [`Ground::run`]), what fails there has a second chance on a fresh one. A
/// fault of ours that does not fail each time is still seen: the summary counts what needed the chance.
fn on_machines(ground: &Ground, program: &Path, arguments: &[&str]) -> Result<Tally> {
    let first = on_a_machine(ground, program, arguments)?;
    if first.failed == 0 || !ground.is_emulated() {
        return Ok(first);
    }
    println!(
        "\n{} failed on an emulated machine; all run again on a fresh one",
        first.failed
    );
    let second = on_a_machine(ground, program, arguments)?;
    Ok(Tally {
        unsteady: first.failed.saturating_sub(second.failed),
        ..second
    })
}

/// Runs a test program on a machine of its own.
fn on_a_machine(ground: &Ground, program: &Path, arguments: &[&str]) -> Result<Tally> {
    let threads = format!("--test-threads={}", ground.test_threads());
    let argv = [program.as_os_str(), threads.as_ref()]
        .into_iter()
        .chain(arguments.iter().map(AsRef::as_ref));
    let output = ground.run(Job::new(argv).timeout(LEVEL_3_TIMEOUT))?;

    let tally: Tally = output.stdout.lines().map(Tally::of_line).sum();
    if output.status != 0 && tally.failed == 0 {
        bail!(
            "the tests ended with status {} before they were done",
            output.status
        );
    }
    if tally.passed + tally.failed == 0 {
        bail!("{} {} ran no test", program.display(), arguments.join(" "));
    }
    Ok(tally)
}
