//! What is left of a run: rows in a file, a table for the reader.

use std::{fmt::Write, path::Path};

use anyhow::{Context, Result};

use crate::{Bench, Row, System, store::ChunkSize};

/// What all stores are measured by.
pub const COMPARED: [Bench; 5] = [
    Bench::Size,
    Bench::Save,
    Bench::SaveAgain,
    Bench::Load,
    Bench::LoadOne,
];

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

/// The rows of stores as a table in Markdown: medians; how many times better fermata is than the best of the others;
/// and what part it reaches of what the slowest primitive allows.
pub fn store_table(rows: &[Row]) -> String {
    let mut systems: Vec<_> = rows.iter().map(|row| row.system).collect();
    systems.sort_unstable();
    systems.dedup();
    let mut table = String::from("| row |");
    for system in &systems {
        let _ = write!(table, " {system} |");
    }
    table.push_str(" times better | of the bound |\n|---|");
    table.push_str(&"---:|".repeat(systems.len() + 2));
    table.push('\n');
    for bench in COMPARED {
        let of = |system| {
            rows.iter()
                .find(|row| (row.bench, row.system) == (bench, system))
        };
        let _ = write!(table, "| `{bench}`, {} |", bench.unit());
        for system in &systems {
            let cell = of(*system).map_or("–".into(), |row| figure(row.median));
            let _ = write!(table, " {cell} |");
        }
        let ours = of(System::Fermata);
        let times = ours.zip(best_peer(rows, bench)).map(|(ours, peer)| {
            if bench.unit() == "MB/s" {
                ours.median / peer.median
            } else {
                peer.median / ours.median
            }
        });
        let times = times.map_or("–".into(), |times| format!("{times:.2}"));
        let bound = bound_of(bench)
            .zip(ours)
            .and_then(|(bound, ours)| at_its_setting(rows, ours, bound));
        let part = ours.zip(bound).map_or("–".into(), |(ours, bound)| {
            format!("{:.0} %", ours.median / bound.median * 100.0)
        });
        let _ = writeln!(table, " {times} | {part} |");
    }
    table
}

/// The rows of disks and networks as a table in Markdown: each of QEMU beside fermata's of the same benchmark, and how many
/// times better fermata's is.
pub fn io_table(rows: &[Row]) -> String {
    let mut table = String::from("| row | fermata | QEMU | times better |\n|---|---:|---:|---:|\n");
    for peer in rows.iter().filter(|row| row.system == System::Qemu) {
        let Some(ours) = rows.iter().find(|row| is_peer(row, peer)) else {
            continue;
        };
        let times = if ours.unit == "MB/s" {
            ours.median / peer.median
        } else {
            peer.median / ours.median
        };
        let of = |row: &Row| {
            let setting = row.setting.as_deref().map(|setting| format!("{setting}: "));
            format!("{}{}", setting.unwrap_or_default(), cell(row))
        };
        let _ = writeln!(
            table,
            "| `{}`, {} | {} | {} | {times:.2} |",
            ours.bench,
            ours.unit,
            of(ours),
            of(peer)
        );
    }
    table
}

/// The rows of chains of layers as a table in Markdown: of one layer beside those of many with the same extents, and what part
/// of the first the second are.
pub fn chain_table(rows: &[Row]) -> String {
    let mut table = String::from(
        "| row | extents | 1 layer | 50 layers | 50 / 1 |\n|---|---|---:|---:|---:|\n",
    );
    for one in rows {
        let Some(extent) = setting(one).strip_prefix("1 layer, ") else {
            continue;
        };
        let is_deep = |row: &&Row| {
            row.bench == one.bench && setting(row).strip_prefix("50 layers, ") == Some(extent)
        };
        let Some(deep) = rows.iter().find(is_deep) else {
            continue;
        };
        let _ = writeln!(
            table,
            "| `{}`, {} | {extent} | {} | {} | {:.2} |",
            one.bench,
            one.unit,
            cell(one),
            cell(deep),
            deep.median / one.median
        );
    }
    table
}

fn setting(row: &Row) -> &str {
    row.setting.as_deref().unwrap_or_default()
}

/// Whether a row of ours is what a row of QEMU's is held against: a qcow2 is the peer of a disk that branches.
fn is_peer(ours: &Row, theirs: &Row) -> bool {
    let layered = |row: &Row, word: &str| setting(row).starts_with(word);
    ours.system == System::Fermata
        && ours.bench == theirs.bench
        && layered(ours, "branch") == layered(theirs, "qcow2")
}

fn best_peer(rows: &[Row], bench: Bench) -> Option<&Row> {
    rows.iter()
        .filter(|row| row.bench == bench && row.system != System::Fermata)
        .reduce(|best, row| if row.is_better_than(best) { row } else { best })
}

/// What fermata reaches at each of its settings of what the slowest primitive allows there, as a table in Markdown: medians.
pub fn bound_table(rows: &[Row]) -> String {
    let mut table = String::from(
        "| row | setting | fermata | bound | of the bound |\n|---|---|---:|---:|---:|\n",
    );
    for row in rows.iter().filter(|row| row.system == System::Fermata) {
        let Some(bound) = bound_of(row.bench).and_then(|bench| at_its_setting(rows, row, bench))
        else {
            continue;
        };
        let _ = writeln!(
            table,
            "| `{}`, {} | {} | {} | {} | {:.0} % |",
            row.bench,
            row.unit,
            row.setting.as_deref().unwrap_or("–"),
            cell(row),
            cell(bound),
            row.median / bound.median * 100.0
        );
    }
    table
}

fn at_its_setting<'r>(rows: &'r [Row], row: &Row, bench: Bench) -> Option<&'r Row> {
    rows.iter()
        .find(|other| other.bench == bench && other.setting == row.setting)
}

/// The row that bounds another, at the same setting.
fn bound_of(bench: Bench) -> Option<Bench> {
    match bench {
        Bench::Save | Bench::SaveMemory => Some(Bench::SaveBound),
        Bench::SaveAgain | Bench::SaveMemoryAgain => Some(Bench::SaveAgainBound),
        Bench::Load => Some(Bench::LoadBound),
        Bench::LoadMemory => Some(Bench::LoadMemoryBound),
        _ => None,
    }
}

/// The rows one by one, as a table in Markdown: the median and in brackets the least and the most.
pub fn list(rows: &[Row]) -> String {
    let mut table =
        String::from("| bench | system | setting | median (least–most) |\n|---|---|---|---:|\n");
    for row in rows {
        let setting = row.setting.as_deref().unwrap_or("");
        let _ = writeln!(
            table,
            "| `{}` | {} | {setting} | {} {} |",
            row.bench,
            row.system,
            cell(row),
            row.unit
        );
    }
    table
}

/// What chunk sizes cost, as a table in Markdown.
pub fn chunk_table(sizes: &[ChunkSize]) -> String {
    let mut table = String::from(
        "| chunk, bytes | snapshots | MiB | save, s | load, s |\n|---:|---:|---:|---:|---:|\n",
    );
    for size in sizes {
        let mib = size.stored as f64 / f64::from(1 << 20);
        let _ = writeln!(
            table,
            "| {} | {} | {mib:.1} | {:.3} | {:.3} |",
            size.chunk_bytes, size.snapshots, size.save, size.load
        );
    }
    table
}

fn cell(row: &Row) -> String {
    format!(
        "{} ({}–{})",
        figure(row.median),
        figure(row.min),
        figure(row.max)
    )
}

/// Three significant digits tell all that five runs can.
fn figure(figure: f64) -> String {
    match figure {
        ..1.0 => format!("{figure:.3}"),
        1.0..10.0 => format!("{figure:.2}"),
        10.0..100.0 => format!("{figure:.1}"),
        _ => format!("{figure:.0}"),
    }
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
    fn a_store_is_held_against_the_best_of_the_others() {
        let row = |bench, system, figure| Row::of(bench, system, 256, &[figure]).unwrap();
        let rows = [
            row(Bench::Size, System::Fermata, 200.0),
            row(Bench::Size, System::Restic, 500.0),
            row(Bench::Size, System::Borg, 300.0),
            row(Bench::Save, System::Fermata, 2000.0),
            row(Bench::Save, System::Restic, 400.0),
            row(Bench::Save, System::Borg, 500.0),
            row(Bench::SaveBound, System::Fermata, 2200.0).at("another"),
            row(Bench::SaveBound, System::Fermata, 2500.0),
        ];
        let table = store_table(&rows);
        let line = |bench: &str| table.lines().find(|line| line.contains(bench)).unwrap();
        assert_eq!(
            line("`size`"),
            "| `size`, MiB | 200 | 500 | 300 | 1.50 | – |"
        );
        assert_eq!(
            line("`save`"),
            "| `save`, MB/s | 2000 | 400 | 500 | 4.00 | 80 % |"
        );
        assert!(line("`load-one`").ends_with("| – | – | – | – | – |"));
    }

    #[test]
    fn each_setting_is_held_against_its_own_bound() {
        let row = |bench, setting, figure| {
            let row = Row::of(bench, System::Fermata, 256, &[figure]);
            row.unwrap().at(setting)
        };
        let rows = [
            row(Bench::Size, "raw", 700.0),
            row(Bench::Save, "zstd", 1500.0),
            row(Bench::Save, "raw", 5000.0),
            row(Bench::SaveBound, "raw", 10_000.0),
            row(Bench::SaveBound, "zstd", 2000.0),
        ];
        let table = bound_table(&rows);
        let parts: Vec<_> = table.lines().skip(2).collect();
        assert_eq!(parts.len(), 2, "{table}");
        assert!(
            parts[0].contains("zstd") && parts[0].ends_with("| 75 % |"),
            "{table}"
        );
        assert!(
            parts[1].contains("raw") && parts[1].ends_with("| 50 % |"),
            "{table}"
        );
    }

    #[test]
    fn each_disk_of_qemu_s_is_held_against_ours_of_its_kind() {
        let row = |bench, system, setting: &str, figure| {
            let row = Row::of(bench, system, 512, &[figure]).unwrap();
            if setting.is_empty() {
                row
            } else {
                row.at(setting)
            }
        };
        let rows = [
            row(Bench::SeqRead, System::Fermata, "branch", 30.0),
            row(Bench::SeqRead, System::Fermata, "raw", 50.0),
            row(Bench::SeqRead, System::Qemu, "qcow2, threads", 10.0),
            row(Bench::SeqRead, System::Qemu, "raw, threads", 20.0),
            row(Bench::Pss, System::Fermata, "", 3.0),
            row(Bench::Pss, System::Qemu, "", 30.0),
        ];
        let table = io_table(&rows);
        let times: Vec<_> = table
            .lines()
            .skip(2)
            .map(|line| line.split('|').nth(4).unwrap().trim())
            .collect();
        assert_eq!(times, ["3.00", "2.50", "10.00"]);
        assert!(table.contains("| branch: 30.0 (30.0–30.0) | qcow2, threads: 10.0 (10.0–10.0) |"));
    }

    #[test]
    fn a_chain_is_held_against_one_layer_with_the_same_extents() {
        let row = |bench, setting: &str, figure| {
            let row = Row::of(bench, System::Fermata, 0, &[figure]).unwrap();
            row.at(setting)
        };
        let rows = [
            row(Bench::ChainRandRead, "1 layer, 1 MiB", 10.0),
            row(Bench::ChainRandRead, "1 layer, 64 KiB", 20.0),
            row(Bench::ChainRandRead, "50 layers, 64 KiB", 15.0),
            row(Bench::ChainSeqRead, "1 layer, 64 KiB", 40.0),
            row(Bench::ChainSeqRead, "50 layers, 64 KiB", 38.0),
            row(Bench::SeqRead, "raw", 38.0),
        ];
        let table = chain_table(&rows);
        let lines: Vec<_> = table.lines().skip(2).collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("| `chain-rand-read`, MB/s | 64 KiB | 20.0 "));
        assert!(lines[0].ends_with(" | 0.75 |") && lines[1].ends_with(" | 0.95 |"));
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
