//! The balloon, as flags and files give it: with the same keys.

use anyhow::{Context, bail};
use control::BalloonConfig;
use schemars::JsonSchema;
use serde::Deserialize;

/// A balloon: memory that the guest gives back to the host, and that snapshots need not hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Balloon {
    /// Memory that is to be in it, in MiB: the guest does without.
    #[serde(default)]
    target_mib: u64,
    /// Whether the guest may take some back when it has no other left.
    #[serde(default)]
    deflate_on_oom: bool,
    /// Whether the guest reports what it has no use for at the moment.
    #[serde(default)]
    free_page_reporting: bool,
    /// Seconds between two times that the guest is asked for statistics; 0 if it is asked on demand only.
    #[serde(default)]
    statistics_interval_s: u32,
}

impl From<Balloon> for BalloonConfig {
    fn from(balloon: Balloon) -> Self {
        let Balloon {
            target_mib,
            deflate_on_oom,
            free_page_reporting,
            statistics_interval_s,
        } = balloon;
        Self {
            target_mib,
            deflate_on_oom,
            free_page_reporting,
            statistics_interval_s,
        }
    }
}

/// Parses `target_mib=…,deflate_on_oom,free_page_reporting,statistics_interval_s=…`, any of them.
pub(crate) fn balloon(text: &str) -> anyhow::Result<BalloonConfig> {
    let mut balloon = Balloon::default();
    for option in text.split(',') {
        let wrong = || format!("{option:?} is no number");
        match option.split_once('=').unwrap_or((option, "true")) {
            ("target_mib", value) => balloon.target_mib = value.parse().with_context(wrong)?,
            ("statistics_interval_s", value) => {
                balloon.statistics_interval_s = value.parse().with_context(wrong)?;
            }
            ("deflate_on_oom", value) => balloon.deflate_on_oom = truth(option, value)?,
            ("free_page_reporting", value) => balloon.free_page_reporting = truth(option, value)?,
            _ => bail!(
                "{option:?} is none of target_mib=NUMBER, deflate_on_oom, free_page_reporting and statistics_interval_s=NUMBER"
            ),
        }
    }
    Ok(balloon.into())
}

fn truth(option: &str, value: &str) -> anyhow::Result<bool> {
    let parsed = value.parse();
    parsed.with_context(|| format!("{option:?} is neither true nor false"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use super::*;

    #[test]
    fn a_flag_says_what_it_likes() {
        let all = balloon(
            "target_mib=64,deflate_on_oom,free_page_reporting=true,statistics_interval_s=5",
        );
        let expected = BalloonConfig {
            target_mib: 64,
            deflate_on_oom: true,
            free_page_reporting: true,
            statistics_interval_s: 5,
        };
        assert_eq!(all.unwrap(), expected);
        let little = balloon("target_mib=0,deflate_on_oom=false").unwrap();
        assert_eq!(little, BalloonConfig::default());
        for text in [
            "",
            "64",
            "target_mib",
            "target_mib=-1",
            "deflate_on_oom=1",
            "size=64",
        ] {
            assert!(balloon(text).is_err(), "{text}");
        }
    }
}
