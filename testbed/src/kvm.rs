//! Can this machine's `/dev/kvm` boot a stock Linux kernel?

use std::fs::File;

use anyhow::{Result, bail};

/// Overrides the decision: `native` or `nested`.
pub const OVERRIDE: &str = "FERMATA_TESTBED";

/// Where guests that run a Linux kernel are started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// On this machine.
    Native,
    /// Inside an emulated machine with hardware virtualisation.
    Nested,
}

/// A level, and the sentence that says why.
#[derive(Debug)]
pub struct Choice {
    /// Where guests go.
    pub level: Level,
    /// One sentence for the user.
    pub reason: String,
}

/// Decides by the CPU's flags and by opening `/dev/kvm`, unless [`OVERRIDE`] is set.
///
/// # Errors
/// When the override is neither `native` nor `nested`, or cannot be read.
pub fn pick() -> Result<Choice> {
    let override_value = std::env::var(OVERRIDE).ok();
    let flags = std::fs::read_to_string("/proc/cpuinfo")?;
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(drop);
    decide(override_value.as_deref(), &flags, device)
}

fn decide(
    override_value: Option<&str>,
    cpuinfo: &str,
    device: std::io::Result<()>,
) -> Result<Choice> {
    let (level, reason) = match override_value {
        Some("native") => (Level::Native, format!("{OVERRIDE}=native asks for this machine's own KVM.")),
        Some("nested") => (Level::Nested, format!("{OVERRIDE}=nested asks for an emulated machine.")),
        Some(other) => bail!("{OVERRIDE}={other} is neither native nor nested"),
        None => match (hardware_virtualisation(cpuinfo), device) {
            // A /dev/kvm without either flag is KVM-PVM, which cannot run a stock kernel.
            (None, _) => (
                Level::Nested,
                "The CPU shows neither vmx nor svm, so guests run inside an emulated machine that has svm.".to_owned(),
            ),
            (Some(flag), Ok(())) => {
                (Level::Native, format!("The CPU has {flag} and /dev/kvm opens, so guests run on this machine."))
            }
            (Some(flag), Err(error)) => (
                Level::Nested,
                format!(
                    "The CPU has {flag} but /dev/kvm does not open ({error}), so guests run inside an emulated \
                     machine; to spare that, load the kvm module and join the group kvm."
                ),
            ),
        },
    };
    Ok(Choice { level, reason })
}

fn hardware_virtualisation(cpuinfo: &str) -> Option<&str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    flags
        .split_whitespace()
        .find(|flag| matches!(*flag, "vmx" | "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(override_value: Option<&str>, flags: &str, opens: bool) -> Level {
        let device = if opens {
            Ok(())
        } else {
            Err(std::io::ErrorKind::PermissionDenied.into())
        };
        let cpuinfo = format!("processor\t: 0\nflags\t\t: fpu {flags} sse2\n");
        decide(override_value, &cpuinfo, device).unwrap().level
    }

    #[test]
    fn native_takes_both_the_flag_and_the_device() {
        assert_eq!(level(None, "vmx", true), Level::Native);
        assert_eq!(level(None, "svm", true), Level::Native);
        assert_eq!(level(None, "svm", false), Level::Nested);
        assert_eq!(level(None, "svm_lock", true), Level::Nested);
    }

    #[test]
    fn the_override_wins_and_a_typo_is_refused() {
        assert_eq!(level(Some("nested"), "vmx", true), Level::Nested);
        assert_eq!(level(Some("native"), "", false), Level::Native);
        assert!(decide(Some("nativ"), "", Ok(())).is_err());
    }
}
