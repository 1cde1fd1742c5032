//! `cargo xtask test`: all three levels, and one line that sums them up.

mod side_by_side;
mod tally;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::panic::resume_unwind;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use testbed::job::Job;
use testbed::{debian, environment, setup};

use self::side_by_side::side_by_side;
use self::tally::Tally;
use crate::build;
use crate::ground::{Ground, Machine};

/// The test program of the package `system-tests` that needs a KVM which boots stock kernels.
/// Its manifest says `test = false`, so that a plain `cargo test` leaves it out.
const LEVEL_3: &str = "level3";
/// Begins the names of tests that go on, on a second machine, with what the others left in the share.
const ELSEWHERE: &str = "elsewhere_";
/// What speaks to the Debian guest.
const DEBIAN_CLIENT: [&str; 1] = ["openssh-client"];
/// Some three times what they take on a busy machine; a guest that hangs must leave time to say so.
const LEVEL_3_TIMEOUT: Duration = Duration::from_secs(1800);

/// The two that take longest go first, so that no core is left idle behind them.
const LONGEST: &str = "debian::";
/// The device that tests of level 2 need.
const KVM: &str = "/dev/kvm";
/// Tests that find no KVM have tested nothing, and fail if this says `required`.
const KVM_REQUIRED: &str = "FERMATA_KVM";

/// Runs all tests. Ends with success when none failed.
pub(crate) fn run() -> Result<ExitCode> {
    setup::ensure_packages(&[&debian::PACKAGES[..], &DEBIAN_CLIENT].concat())?;
    // Beside the product's own building, which for its last minutes is the work of a single core.
    let building = thread::spawn(|| build::tests(LEVEL_3));
    let ground = Ground::prepare(&[]);
    let built = building.join().unwrap_or_else(|panic| resume_unwind(panic));
    let mut ground = ground?;
    built?;
    // It waits for the network and the disk for most of its time, which the tests need not wait for. All packages are
    // there now: nobody changes what apt knows meanwhile.
    let debian = thread::spawn(debian::ensure);
    println!("\nLevels 1 and 2: no KVM, and bare-metal guests on any KVM");
    let no_kvm = File::open(KVM).err();
    let tally = workspace_tests(&ground, no_kvm.is_none());

    // Before an error is told: else its work would be left half done.
    let debian = debian
        .join()
        .unwrap_or_else(|panic| resume_unwind(panic))
        .context("cannot make the Debian guest")?;
    let mut tally = tally?;
    ground.tell(environment::DEBIAN, debian.directory().to_owned());
    let [here, elsewhere] = linux_guests(&ground, |_| true)?;
    if here == Tally::default() || elsewhere == Tally::default() {
        bail!("there are no tests on Linux guests, or none on another machine");
    }
    tally = tally + here + elsewhere;
    if let Some(error) = no_kvm {
        println!("\nOf level 2 nothing was tested: cannot open {KVM}: {error}");
    }
    Ok(conclude(tally))
}

/// Runs those tests on Linux guests whose names contain one of `parts`. Ends with success when none failed.
pub(crate) fn run_on_linux_guests(parts: &[String]) -> Result<ExitCode> {
    setup::ensure_packages(&[&debian::PACKAGES[..], &DEBIAN_CLIENT].concat())?;
    let mut ground = Ground::prepare(&[])?;
    let debian = debian::ensure().context("cannot make the Debian guest")?;
    ground.tell(environment::DEBIAN, debian.directory().to_owned());
    let [here, elsewhere] =
        linux_guests(&ground, |name| parts.iter().any(|part| name.contains(part)))?;
    let tally = here + elsewhere;
    if tally == Tally::default() {
        bail!(
            "no test on Linux guests has a name with {}",
            parts.join(" or ")
        );
    }
    Ok(conclude(tally))
}

fn conclude(tally: Tally) -> ExitCode {
    println!("\n{tally}");
    if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs the wanted of the tests on Linux guests: those on machines of their own, and then those that go on elsewhere.
fn linux_guests(ground: &Ground, wanted: impl Fn(&str) -> bool) -> Result<[Tally; 2]> {
    println!("\nLevel 3: Linux guests");
    let programs = build::system_test(LEVEL_3)?;
    let program = programs.path(LEVEL_3)?;
    let mut tests = tests_of(program)?;
    tests.retain(|name| wanted(name));
    let (elsewhere, mut here): (Vec<String>, Vec<String>) =
        tests.into_iter().partition(|name| name.contains(ELSEWHERE));
    here.sort_by_key(|name| !name.starts_with(LONGEST));
    let here = level_3(ground, program, &here)?;
    println!("\nLevel 3, on another machine");
    Ok([here, level_3(ground, program, &elsewhere)?])
}

/// Runs the tests of the workspace by nextest where it is installed, else by cargo.
fn workspace_tests(ground: &Ground, has_kvm: bool) -> Result<Tally> {
    let run = |arguments: &[&str]| counted(ground, has_kvm, arguments);
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
        Ok(run(&tests)? + run(&examples)?)
    } else {
        println!("cargo-nextest is not installed, without which this takes longer");
        run(&["test", "--workspace", "--no-fail-fast"])
    }
}

/// Runs cargo, lets its output through, and counts the tests in it. Tests of the whole product find
/// the programs that were built for the guests: cargo builds no program for another package's tests.
fn counted(ground: &Ground, has_kvm: bool, arguments: &[&str]) -> Result<Tally> {
    // One pipe for both streams: nextest reports to standard error, libtest to standard output.
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let mut cargo = build::cargo(arguments);
    cargo
        .env(environment::BIN, ground.program("fermata")?)
        .env(environment::VMM_BIN, ground.program("fermata-vmm")?)
        .stdout(writer.try_clone().context("cannot share a pipe")?)
        .stderr(writer);
    if has_kvm {
        cargo.env(KVM_REQUIRED, "required");
    }
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
    ensure!(
        listing.status.success(),
        "{} does not list its tests: {}",
        program.display(),
        String::from_utf8_lossy(&listing.stderr)
    );
    let lines = String::from_utf8_lossy(&listing.stdout);
    let names = lines.lines().filter_map(|line| line.strip_suffix(": test"));
    Ok(names.map(str::to_owned).collect())
}

/// Runs tests where Linux guests run. An emulated machine takes one at a time: if it breaks down, no other has to run
/// again for it.
fn level_3(ground: &Ground, program: &Path, names: &[String]) -> Result<Tally> {
    let at_once = match ground.is_emulated() {
        true => 1,
        false => names.len().max(1),
    };
    let jobs: Vec<&[String]> = names.chunks(at_once).collect();
    let workers = ground.machines_at_once();
    side_by_side(
        &jobs,
        workers,
        || ground.machine(),
        |machine, names| {
            let before = machine.broken_down;
            let tally =
                with_a_second_chance(machine, program, names).with_context(|| names.join(" "))?;
            Ok(Tally {
                broken_down: machine.broken_down - before,
                ..tally
            })
        },
    )
}

/// Runs tests. If that is on an emulated machine, whose races can stop a guest as
/// well as the machine itself (see [`Machine::run`]), what fails there has a second chance on a fresh one. A
/// fault of ours that does not fail each time is still seen: the summary counts what needed the chance.
fn with_a_second_chance(machine: &mut Machine, program: &Path, names: &[String]) -> Result<Tally> {
    let (first, failures) = run_tests(machine, program, names)?;
    if first.failed == 0 || !machine.ground.is_emulated() {
        return Ok(first);
    }
    println!(
        "\nfailed on an emulated machine, and run again on a fresh one: {}",
        failures.join(" ")
    );
    machine.replace();
    let (second, _) = run_tests(machine, program, &failures)?;
    if second.failed > 0 {
        // Who knows what they have left there.
        machine.replace();
    }
    Ok(Tally {
        passed: first.passed + second.passed,
        failed: second.failed,
        unsteady: first.failed.saturating_sub(second.failed),
        ..Tally::default()
    })
}

/// Runs tests; tells the names of those that failed, too.
fn run_tests(
    machine: &mut Machine,
    program: &Path,
    names: &[String],
) -> Result<(Tally, Vec<String>)> {
    let threads = format!("--test-threads={}", machine.ground.test_threads());
    let argv = [program.as_os_str(), threads.as_ref()]
        .into_iter()
        // What tests say of how long their steps took is of use when they pass, too.
        .chain(["--exact".as_ref(), "--show-output".as_ref()])
        .chain(names.iter().map(AsRef::as_ref));
    let job = Job::new(argv).timeout(LEVEL_3_TIMEOUT);
    let output = if machine.ground.is_emulated() {
        // What other machines print would be between its lines.
        let output = machine.run(job)?;
        print!("{}{}", output.stdout, output.stderr);
        output
    } else {
        machine.run(job.echo())?
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
