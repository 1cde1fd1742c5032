//! What is left of a run: rows in a file, a table for the reader.

use std::{fmt::Write, path::Path};

use anyhow::{Context, Result};

use crate::{Row, System};

/// Writes `rows` to `path` as a JSON list, one row a line.
///
/// # Errors
///
/// When the file cannot be written.
pub fn write_json(rows: &[Row], path: &Path) -> Result<()> {
    let lines: Result<Vec<_>, _> = rows.iter().map(serde_json::to_string).collect();
    let json = format!("[\n{}\n]\n", lines?.join(",\n"));
    std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))
}

/// The rows as a table in Markdown: milliseconds, the median and in brackets the least and the most.
/// Where QEMU was measured too, the last column is its median over fermata's.
pub fn table(rows: &[Row]) -> String {
    let compared = rows.iter().any(|row| row.system == System::Qemu);
    let mut table = String::from("| bench    |  MiB | fermata, ms              |");
    if compared {
        table.push_str(" QEMU, ms                 | QEMU / fermata |");
    }
    table.push_str("\n|----------|-----:|--------------------------|");
    if compared {
        table.push_str("--------------------------|---------------:|");
    }
    table.push('\n');
    let of = |system| rows.iter().filter(move |row| row.system == system);
    for row in of(System::Fermata) {
        let _ = write!(
            table,
            "| {:8} | {:4} | {:24} |",
            row.bench,
            row.mem_mib,
            cell(row)
        );
        if compared {
            let peer = of(System::Qemu)
                .find(|peer| (peer.bench, peer.mem_mib) == (row.bench, row.mem_mib));
            let (figures, ratio) = peer.map_or_else(Default::default, |peer| {
                (cell(peer), format!("{:.2}", peer.median / row.median))
            });
            let _ = write!(table, " {figures:24} | {ratio:>14} |");
        }
        table.push('\n');
    }
    table
}

fn cell(row: &Row) -> String {
    // Three significant digits tell all that five runs can.
    let figure = |ms: f64| match ms {
        ..10.0 => format!("{ms:.2}"),
        10.0..100.0 => format!("{ms:.1}"),
        _ => format!("{ms:.0}"),
    };
    format!(
        "{} ({}–{})",
        figure(row.median),
        figure(row.min),
        figure(row.max)
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Bench, Samples};

    fn rows(systems: &[(System, u64)]) -> Vec<Row> {
        let mut samples = Samples::default();
        for (system, ms) in systems {
            samples.add(256, Bench::Boot, *system, Duration::from_millis(*ms));
        }
        samples.rows()
    }

    #[test]
    fn two_systems_are_compared() {
        let table = table(&rows(&[(System::Fermata, 20), (System::Qemu, 50)]));
        let line = table.lines().last().unwrap();
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        assert_eq!(
            cells,
            [
                "",
                "boot",
                "256",
                "20.0 (20.0–20.0)",
                "50.0 (50.0–50.0)",
                "2.50",
                ""
            ]
        );
    }

    #[test]
    fn one_system_alone_has_no_empty_columns() {
        let table = table(&rows(&[(System::Fermata, 2)]));
        assert!(
            table.lines().all(|line| line.split('|').count() == 5),
            "{table}"
        );
    }

    #[test]
    fn the_file_is_a_json_list() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rows.json");
        let rows = rows(&[(System::Fermata, 20), (System::Qemu, 50)]);
        write_json(&rows, &path).unwrap();
        let read: Vec<serde_json::Value> =
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!(read[1]["system"], "qemu");
    }
}
