//! What goes to standard output and to standard error.

use std::io::{self, Write};

use serde::Serialize;

/// Prints `text`. A reader that has seen enough, like `head`, is no error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => Ok(printed?),
    }
}

/// Says `text` on standard error. That nobody can be told is no reason not to do what is to be done. It may quote a file
/// from anybody: what would steer a terminal is shown instead, and a line behind the first is indented, so that none
/// passes for a message of ours.
pub(crate) fn say(text: &str) {
    let lines: Vec<String> = text.split('\n').map(shown).collect();
    let _ = io::stderr().write_all(format!("{}\n", lines.join("\n  ")).as_bytes());
}

/// `text` with its control characters as escapes.
fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_control() {
            true => shown.extend(character.escape_default()),
            false => shown.push(character),
        }
    }
    shown
}

/// Prints `value` as indented JSON.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Rows under a heading, in columns as wide as they need; control characters, of foreign names, as escapes.
pub(crate) fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = heading.map(str::len);
    let rows: Vec<[String; N]> = rows
        .iter()
        .map(|row| row.each_ref().map(|cell| shown(cell)))
        .collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; N]| {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(cells) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        line.truncate(line.trim_end().len());
        line + "\n"
    };
    let mut text = line(heading);
    for row in &rows {
        text.push_str(&line(row.each_ref().map(String::as_str)));
    }
    text
}

/// A number of bytes for people: `256 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut value = count as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 {
        format!("{value} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            ["1".to_owned(), "ä".to_owned()],
            ["22".to_owned(), String::new()],
        ];
        assert_eq!(table(["PID", "X"], &rows), "PID  X\n1    ä\n22\n");
    }

    #[test]
    fn names_steer_no_terminal() {
        let rows = [["a\x1b[2J\nb".to_owned(), "1".to_owned()]];
        let lines = table(["NAME", "X"], &rows);
        assert_eq!(lines, "NAME           X\na\\u{1b}[2J\\nb  1\n");
    }

    #[test]
    fn bytes_are_given_in_the_unit_that_fits() {
        assert_eq!(bytes(0), "0 bytes");
        assert_eq!(bytes(1023), "1023 bytes");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(256 << 20), "256 MiB");
        assert_eq!(bytes(u64::MAX), "16777216 TiB");
    }
}
