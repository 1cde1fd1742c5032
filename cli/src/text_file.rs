//! Files that people write, in TOML or JSON; errors point at line and key.

use std::{fs::File, io::Read, path::Path};

use anyhow::{Context, anyhow, ensure};
use serde::de::DeserializeOwned;

/// Nobody writes a longer one.
const MAX_BYTES: u64 = 1 << 20;

/// Reads a file; what ends in `.json` is JSON, anything else TOML.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let failed = || format!("cannot read {}", path.display());
    let mut text = String::new();
    let mut file = File::open(path).with_context(failed)?.take(MAX_BYTES + 1);
    file.read_to_string(&mut text).with_context(failed)?;
    ensure!(
        text.len() as u64 <= MAX_BYTES,
        "{} is longer than {MAX_BYTES} bytes, too long for such a file",
        path.display()
    );
    let parsed = if path.extension().is_some_and(|ending| ending == "json") {
        from_json(&text)
    } else {
        from_toml(&text)
    };
    parsed.map_err(|wrong| anyhow!("{}:{wrong}", path.display()))
}

pub(crate) fn from_toml<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    toml::from_str(text).map_err(|wrong: toml::de::Error| {
        let at = wrong.span().map_or(0, |span| span.start);
        point_at(text, at, wrong.message())
    })
}

pub(crate) fn from_json<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|wrong| {
        let before: usize = text
            .split_inclusive('\n')
            .take(wrong.line().saturating_sub(1))
            .map(str::len)
            .sum();
        // The message ends with the place, which is told in another way.
        let message = wrong.to_string();
        let bare = message
            .rsplit_once(" at line ")
            .map_or(&*message, |parts| parts.0);
        point_at(text, before + wrong.column().saturating_sub(1), bare)
    })
}

/// A message with its line and column, and the line, in which the key is to be seen.
fn point_at(text: &str, at: usize, message: &str) -> String {
    let before = text.get(..at).unwrap_or(text);
    let begin = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = before.matches('\n').count() + 1;
    let column = before[begin..].chars().count() + 1;
    let shown = text[begin..].lines().next().unwrap_or_default();
    format!("{line}:{column}: {message}\n  {shown}")
}
