//! Disks, as flags and files give them: with the same keys.

use std::{num::NonZeroU64, path::PathBuf};

use anyhow::{Context, anyhow, bail};
use control::{DiskConfig, DiskFormat, DiskLimits, DiskLimitsChange};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

/// A disk.
#[derive(Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Disk {
    /// The image, or the topmost layer of a disk that branches.
    pub(crate) path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    read_only: bool,
    /// What the file is. It is never guessed, as a guest can write anything into a raw image.
    #[serde(default)]
    format: Format,
    /// What the guest sees as the disk's serial number, of at most 20 bytes; by default the file's name.
    serial: Option<String>,
    /// The most bytes that are read and written in a second.
    bytes_per_second: Option<NonZeroU64>,
    /// The most operations of all kinds in a second.
    operations_per_second: Option<NonZeroU64>,
    /// The most bytes that are read in a second.
    read_bytes_per_second: Option<NonZeroU64>,
    /// The most reads in a second.
    read_operations_per_second: Option<NonZeroU64>,
    /// The most bytes that are written in a second.
    write_bytes_per_second: Option<NonZeroU64>,
    /// The most writes, flushes, discards and zeroes in a second.
    write_operations_per_second: Option<NonZeroU64>,
}

/// What a disk's file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Format {
    /// The disk's bytes and nothing else.
    #[default]
    Raw,
    /// A layer of a disk that branches, as `fermata disk create` makes one.
    Branch,
}

impl From<Disk> for DiskConfig {
    fn from(disk: Disk) -> Self {
        let Disk {
            path,
            read_only,
            format,
            serial,
            bytes_per_second,
            operations_per_second,
            read_bytes_per_second,
            read_operations_per_second,
            write_bytes_per_second,
            write_operations_per_second,
        } = disk;
        Self {
            path,
            read_only,
            format: match format {
                Format::Raw => DiskFormat::Raw,
                Format::Branch => DiskFormat::Branch,
            },
            serial,
            limits: DiskLimits {
                bytes_per_second,
                operations_per_second,
                read_bytes_per_second,
                read_operations_per_second,
                write_bytes_per_second,
                write_operations_per_second,
            },
        }
    }
}

/// Parses a disk: a path, with `path=` before it or not, and behind it any of `,ro`, `,format=branch`, `,format=raw`,
/// `,serial=TEXT`, and limits like `,read_bytes_per_second=NUMBER`. A path may have commas.
pub(crate) fn disk(text: &str) -> anyhow::Result<DiskConfig> {
    let mut rest = text;
    let mut disk = DiskConfig {
        path: PathBuf::new(),
        read_only: false,
        format: DiskFormat::Raw,
        serial: None,
        limits: DiskLimits::default(),
    };
    while let Some((before, option)) = rest.rsplit_once(',') {
        match option.split_once('=') {
            None if option == "ro" => disk.read_only = true,
            Some(("format", "branch")) => disk.format = DiskFormat::Branch,
            Some(("format", "raw")) => disk.format = DiskFormat::Raw,
            Some(("format", other)) => {
                bail!("{other:?} is no format of a disk; it is raw or branch")
            }
            Some(("serial", serial)) => disk.serial = Some(serial.to_owned()),
            Some((key, value)) => match limit(&mut disk.limits, key) {
                Some(limit) => {
                    let wrong = |_| anyhow!("{key} is {value:?}; give a number above 0");
                    *limit = Some(value.parse().map_err(wrong)?);
                }
                None => break,
            },
            None => break,
        }
        rest = before;
    }
    let path = rest.strip_prefix("path=").unwrap_or(rest);
    disk.path = std::path::absolute(path).context("a disk needs a path")?;
    Ok(disk)
}

/// Parses what is to change of a disk's limits: as they are behind its path, with commas between them and 0 for none, like
/// `read_bytes_per_second=0,operations_per_second=NUMBER`.
pub(crate) fn limits_change(text: &str) -> anyhow::Result<DiskLimitsChange> {
    let mut limits = Map::new();
    for limit in text.split(',') {
        let (key, value) = limit
            .split_once('=')
            .with_context(|| format!("{limit:?} is no limit; give NAME=NUMBER, with 0 for none"))?;
        let wrong = |_| anyhow!("{key} is {value:?}; give a number, or 0 for no limit");
        let number: u64 = value.parse().map_err(wrong)?;
        if limits.insert(key.to_owned(), number.into()).is_some() {
            bail!("{key} is given twice; leave one out");
        }
    }
    // It names those that there are when one is none of them.
    Ok(serde_json::from_value(limits.into())?)
}

/// Limits as they are behind a disk's path.
pub(crate) fn limits_text(limits: &api_types::DiskLimits) -> anyhow::Result<String> {
    let limits: Map<String, Value> = serde_json::from_value(serde_json::to_value(limits)?)?;
    let limits: Vec<_> = limits
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    Ok(match limits.is_empty() {
        true => "no limits".to_owned(),
        false => limits.join(","),
    })
}

/// The limit of this name.
fn limit<'l>(limits: &'l mut DiskLimits, key: &str) -> Option<&'l mut Option<NonZeroU64>> {
    Some(match key {
        "bytes_per_second" => &mut limits.bytes_per_second,
        "operations_per_second" => &mut limits.operations_per_second,
        "read_bytes_per_second" => &mut limits.read_bytes_per_second,
        "read_operations_per_second" => &mut limits.read_operations_per_second,
        "write_bytes_per_second" => &mut limits.write_bytes_per_second,
        "write_operations_per_second" => &mut limits.write_operations_per_second,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use super::*;

    #[test]
    fn flags_have_the_keys_of_the_file() {
        let flag = "path=/a,read_only=true,format=branch,serial=s,bytes_per_second=1,\
                    operations_per_second=2,read_bytes_per_second=3,read_operations_per_second=4,\
                    write_bytes_per_second=5,write_operations_per_second=6";
        let file = flag.replace(',', "\n").replace("branch", "\"branch\"");
        let file = file.replace("=/a", "=\"/a\"").replace("=s", "=\"s\"");
        let by_file: Disk = toml::from_str(&file).unwrap();
        let by_flag = disk(&flag.replace("read_only=true", "ro")).unwrap();
        assert_eq!(DiskConfig::from(by_file), by_flag);
        let number = NonZeroU64::new;
        let expected = DiskLimits {
            bytes_per_second: number(1),
            operations_per_second: number(2),
            read_bytes_per_second: number(3),
            read_operations_per_second: number(4),
            write_bytes_per_second: number(5),
            write_operations_per_second: number(6),
        };
        assert_eq!(by_flag.limits, expected);
    }

    #[test]
    fn limits_are_changed_by_the_keys_that_they_are_given_by() {
        let given = "bytes_per_second=1,operations_per_second=2,read_bytes_per_second=3,\
                     read_operations_per_second=4,write_bytes_per_second=5,\
                     write_operations_per_second=6";
        let change = limits_change(given).unwrap();
        let limits = disk(&format!("/a,{given}")).unwrap().limits;
        assert_eq!(change.of(DiskLimits::default()), limits);
        let fewer = limits_change("bytes_per_second=0,operations_per_second=7").unwrap();
        let expected = DiskLimits {
            bytes_per_second: None,
            operations_per_second: NonZeroU64::new(7),
            ..limits
        };
        assert_eq!(fewer.of(limits), expected);
        for (text, said) in [
            ("", "give NAME=NUMBER"),
            ("bytes_per_second", "give NAME=NUMBER"),
            ("bytes_per_second=-1", "\"-1\""),
            ("bytes_per_second=", "or 0 for no limit"),
            ("bytes_per_second=1,", "give NAME=NUMBER"),
            ("bytes_per_second=1,bytes_per_second=2", "given twice"),
            (
                "bytes=1",
                "unknown field `bytes`, expected one of `bytes_per_second`",
            ),
        ] {
            let error = limits_change(text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_disk_is_a_path_and_what_is_said_of_it() {
        let plain = disk("/a,b").unwrap();
        assert_eq!(
            (plain.path.to_str(), plain.read_only),
            (Some("/a,b"), false)
        );
        assert_eq!((plain.format, plain.serial), (DiskFormat::Raw, None));
        let read_only = disk("/a,ro").unwrap();
        assert_eq!(
            (read_only.path.to_str(), read_only.read_only),
            (Some("/a"), true)
        );
        for text in [
            "path=/a,format=branch,serial=s 1,ro",
            "/a,ro,serial=s 1,format=branch",
        ] {
            let all = disk(text).unwrap();
            assert_eq!((all.path.to_str(), all.read_only), (Some("/a"), true));
            assert_eq!(
                (all.format, all.serial.as_deref()),
                (DiskFormat::Branch, Some("s 1"))
            );
        }
        let error = disk("/a,format=qcow2").unwrap_err().to_string();
        assert!(error.contains("raw or branch"), "{error}");
        assert!(disk(",ro").is_err());
        for rate in ["0", "x", "-1", ""] {
            let error = disk(&format!("/a,bytes_per_second={rate}")).unwrap_err();
            assert!(error.to_string().contains("above 0"), "{error}");
        }
    }
}
