//! Random ids of files, and names that people choose.

use crate::bytes::{from_hex, to_hex};
use crate::error::{Error, Result};

/// Sixteen bytes that name a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct FileId(pub(crate) [u8; 16]);

impl FileId {
    /// A new one, from the kernel's random numbers.
    pub(crate) fn random() -> Result<Self> {
        let mut bytes = [0; 16];
        fill_random(&mut bytes)?;
        Ok(FileId(bytes))
    }

    /// Reads a file's name.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        from_hex(name).map(FileId)
    }
}

impl std::fmt::Display for FileId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&to_hex(&self.0))
    }
}

impl std::fmt::Debug for FileId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Fills a buffer from the kernel's random numbers.
pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
                .map_err(|errno| Error::io("get random numbers")(errno.into()))?;
    }
    Ok(())
}

/// Accepts names that snapshots can have: they are safe as file names everywhere.
///
/// # Errors
///
/// [`Error::Name`].
pub fn check_name(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if (1..=128).contains(&name.len()) && name.chars().all(allowed) && !name.starts_with(['.', '-'])
    {
        Ok(())
    } else {
        Err(Error::Name(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_their_directory() {
        for good in ["a", "vm-1.2_x", &"n".repeat(128)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "-rf",
            "a b",
            "ä",
            "a\0",
            &"n".repeat(129),
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
