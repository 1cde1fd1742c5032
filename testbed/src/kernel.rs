//! Debian's kernels in `/boot`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Debian's two kernels of use here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// `linux-image-amd64`: has `kvm_amd` and 9p.
    Generic,
    /// `linux-image-cloud-amd64`: small, made for virtual machines.
    Cloud,
}

impl Flavour {
    pub(crate) fn package(self) -> &'static str {
        match self {
            Self::Generic => "linux-image-amd64",
            Self::Cloud => "linux-image-cloud-amd64",
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Generic => "-amd64",
            Self::Cloud => "-cloud-amd64",
        }
    }
}

/// An installed kernel.
pub(crate) struct Kernel {
    /// The bzImage.
    pub(crate) image: PathBuf,
    /// What `uname -r` says in it, as in `6.1.0-56-amd64`.
    pub(crate) release: String,
}

/// The newest installed kernel of `flavour`.
pub(crate) fn newest(flavour: Flavour) -> Result<Kernel> {
    let mut releases = Vec::new();
    for entry in std::fs::read_dir("/boot").context("cannot list /boot")? {
        let name = entry.context("cannot list /boot")?.file_name();
        releases.extend(
            name.to_string_lossy()
                .strip_prefix("vmlinuz-")
                .map(str::to_owned),
        );
    }
    let release = newest_release(&releases, flavour).with_context(|| {
        format!(
            "no kernel of {} in /boot; install that package",
            flavour.package()
        )
    })?;
    Ok(Kernel {
        image: Path::new("/boot").join(format!("vmlinuz-{release}")),
        release: release.to_owned(),
    })
}

fn newest_release(releases: &[String], flavour: Flavour) -> Option<&str> {
    let numbered = |release: &&String| {
        // Debian's own releases are digits and dots up to the flavour, as in 6.1.0-56-cloud-amd64.
        release
            .strip_suffix(flavour.suffix())
            .is_some_and(|version| !version.contains(|c: char| c.is_alphabetic()))
    };
    releases
        .iter()
        .filter(numbered)
        .max_by_key(|release| version_numbers(release))
        .map(String::as_str)
}

fn version_numbers(release: &str) -> Vec<u32> {
    release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_the_flavour_wins_by_number_not_by_spelling() {
        let releases = [
            "6.1.0-9-amd64",
            "6.1.0-56-amd64",
            "6.1.0-57-cloud-amd64",
            "6.1.0-60-rt-amd64",
        ]
        .map(str::to_owned);
        assert_eq!(
            newest_release(&releases, Flavour::Generic),
            Some("6.1.0-56-amd64")
        );
        assert_eq!(
            newest_release(&releases, Flavour::Cloud),
            Some("6.1.0-57-cloud-amd64")
        );
        assert_eq!(newest_release(&releases[..1], Flavour::Cloud), None);
    }
}
