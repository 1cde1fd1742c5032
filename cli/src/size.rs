//! Numbers of bytes, as people write them.

use anyhow::{Context, anyhow};

/// Parses a number of bytes: `2G`.
pub(crate) fn bytes(text: &str) -> anyhow::Result<u64> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let unit: u64 = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return Err(anyhow!("a size has one unit: 2G")),
    };
    let number: u64 = digits.parse().context("a size is a number, like 2G")?;
    number.checked_mul(unit).context("that is too large")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes("512").unwrap(), 512);
        assert_eq!(bytes("2G").unwrap(), 2 << 30);
        for wrong in ["", "G", "2GG", "-1", "99999999999T", "2.5G"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
