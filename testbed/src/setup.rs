//! The Debian packages that the test bed is made of.

use std::collections::HashSet;
use std::fs::File;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::kernel::Flavour;

/// Everything needed beyond what Debian's base system and cargo bring.
fn packages() -> Vec<&'static str> {
    vec![
        Flavour::Cloud.package(),
        // L1's kernel at the nested level, and a guest's at both.
        Flavour::Generic.package(),
        "busybox-static",
        // mke2fs; absent from container images.
        "e2fsprogs",
        // TAP devices.
        "iproute2",
        // The client of the REST contract's test.
        "python3",
        // L1 at the nested level, the peer of the benchmarks at both.
        "qemu-system-x86",
    ]
}

/// Makes sure that all packages are installed. As root it installs what is missing and says so in a line;
/// what apt prints goes to `apt.log` in the test bed's directory.
///
/// # Errors
/// Names the command to run when the user is not root, and the log when apt fails.
pub fn ensure() -> Result<()> {
    ensure_packages(&packages())
}

/// As [`ensure`], for the named packages.
///
/// # Errors
/// As [`ensure`].
pub fn ensure_packages(packages: &[&str]) -> Result<()> {
    let missing = missing(packages, &installed()?);
    if missing.is_empty() {
        return Ok(());
    }
    let install = format!(
        "apt-get install --no-install-recommends {}",
        missing.join(" ")
    );
    if !is_root() {
        bail!("packages are missing. Run this as root, then try again:\n    {install}");
    }

    let log_path = cache::directory()?.join("apt.log");
    println!(
        "Installing {} (log: {})",
        missing.join(", "),
        log_path.display()
    );
    let log =
        File::create(&log_path).with_context(|| format!("cannot write {}", log_path.display()))?;
    let apt = |arguments: &[&str]| -> Result<()> {
        let status = Command::new("apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .status()
            .context("cannot run apt-get: the test bed needs Debian or a system like it")?;
        if !status.success() {
            bail!(
                "apt-get {} failed; see {}",
                arguments.join(" "),
                log_path.display()
            );
        }
        Ok(())
    };
    apt(&["update"])?;
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(missing);
    apt(&arguments)
}

fn missing<'a>(wanted: &[&'a str], installed: &HashSet<String>) -> Vec<&'a str> {
    wanted
        .iter()
        .copied()
        .filter(|package| !installed.contains(*package))
        .collect()
}

fn installed() -> Result<HashSet<String>> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${db:Status-Abbrev} ${Package}\n"])
        .output()
        .context("cannot run dpkg-query: the test bed needs Debian or a system like it")?;
    Ok(parse_installed(&String::from_utf8_lossy(&output.stdout)))
}

fn parse_installed(listing: &str) -> HashSet<String> {
    listing
        .lines()
        .filter_map(|line| line.strip_prefix("ii"))
        .map(|package| package.trim().to_owned())
        .collect()
}

pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    // The owner of /proc/self is the process's effective user.
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_packages_count_as_missing() {
        let installed = parse_installed("ii  python3\nrc  busybox-static\nun  e2fsprogs\n");
        assert_eq!(
            missing(&["python3", "busybox-static", "e2fsprogs"], &installed),
            ["busybox-static", "e2fsprogs"]
        );
    }
}
