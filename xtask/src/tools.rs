//! Small commands for whoever works on the test bed itself.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use testbed::job::Job;
use testbed::l1::{L1, Options};
use testbed::{cache, debian, guest, setup};

/// Boots L1, runs `command` in it, and ends with its status. The share is `l1-share`, never emptied.
pub(crate) fn l1(command: &[String]) -> Result<ExitCode> {
    setup::ensure()?;
    let share = cache::directory()?.join("l1-share");
    std::fs::create_dir_all(&share).with_context(|| format!("cannot make {}", share.display()))?;
    let mut l1 = L1::boot(&Options::new(&share))?;
    eprintln!(
        "L1 is up after {:.1} s; its share is {}",
        l1.boot_time().as_secs_f64(),
        share.display()
    );
    let job = Job::new(command)
        .directory(std::env::current_dir().context("cannot tell the current directory")?)
        .timeout(Duration::from_secs(3600))
        .echo();
    let output = l1.run(&job)?;
    l1.shutdown()?;
    Ok(ExitCode::from(u8::try_from(output.status).unwrap_or(1)))
}

/// Builds the guest's files and prints where they are.
pub(crate) fn guest() -> Result<ExitCode> {
    setup::ensure()?;
    let guest = guest::build()?;
    println!("kernel {}", guest.kernel.display());
    println!("initrd {}", guest.initrd.display());
    println!("generic_kernel {}", guest.generic_kernel.display());
    println!("generic_initrd {}", guest.generic_initrd.display());
    println!("disk   {}", guest.disk.display());
    println!("append {}", guest::command_line(guest::Role::Counter));
    setup::ensure_packages(&debian::PACKAGES)?;
    println!("debian {}", debian::ensure()?.directory().display());
    Ok(ExitCode::SUCCESS)
}
