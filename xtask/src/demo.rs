//! `cargo xtask demo`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use testbed::job::Job;

use crate::ground::Ground;

const TIMEOUT: Duration = Duration::from_secs(600);

/// Runs the program `demo` where a stock kernel boots.
pub(crate) fn run() -> Result<ExitCode> {
    let ground = Ground::prepare(&["demo"])?;
    let job = Job::new([ground.program("demo")?]).timeout(TIMEOUT).echo();
    let status = ground.run(job)?.status;
    if status != 0 {
        bail!("the demo ended with status {status}; what went wrong is above");
    }
    Ok(ExitCode::SUCCESS)
}
