//! Drawings of what chunk sizes cost, as the report has them.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;

use super::ChunkSize;

const PIXELS: (u32, u32) = (720, 420);
const MIB: f64 = (1 << 20) as f64;

/// A line of a drawing.
struct Line<'a> {
    name: &'a str,
    colour: RGBColor,
    points: Vec<(f64, f64)>,
}

/// Draws `store-size.svg` and `store-time.svg` into `directory`, from what four snapshots and a course took.
///
/// # Errors
///
/// When a file cannot be written.
pub fn draw(four: &[ChunkSize], course: &[ChunkSize], directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let points = |sizes: &[ChunkSize], of: fn(&ChunkSize) -> f64| -> Vec<(f64, f64)> {
        let sizes = sizes.iter();
        sizes
            .map(|size| (f64::from(size.chunk_bytes), of(size)))
            .collect()
    };
    let stored = |size: &ChunkSize| size.stored as f64 / MIB;
    chart(
        &directory.join("store-size.svg"),
        "Total size, MiB",
        &[
            Line {
                name: "four snapshots",
                colour: BLUE,
                points: points(four, stored),
            },
            Line {
                name: "150 snapshots of a course",
                colour: RED,
                points: points(course, stored),
            },
        ],
    )?;
    chart(
        &directory.join("store-time.svg"),
        "Time for four snapshots, s",
        &[
            Line {
                name: "save",
                colour: BLUE,
                points: points(four, |size| size.save),
            },
            Line {
                name: "load",
                colour: RED,
                points: points(four, |size| size.load),
            },
        ],
    )
}

fn chart(path: &Path, title: &str, lines: &[Line<'_>]) -> Result<()> {
    try_chart(path, title, lines)
        .map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn try_chart(
    path: &Path,
    title: &str,
    lines: &[Line<'_>],
) -> Result<(), Box<dyn std::error::Error>> {
    let all = || lines.iter().flat_map(|line| &line.points);
    let most = all().map(|point| point.1).fold(0.0, f64::max);
    let from = all().map(|point| point.0).fold(f64::MAX, f64::min);
    let to = all().map(|point| point.0).fold(0.0, f64::max);

    let area = SVGBackend::new(path, PIXELS).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d((from..to).log_scale().base(2.0), 0.0..most * 1.1)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("Chunk size")
        .y_desc(title)
        .x_labels(12)
        .x_label_formatter(&|bytes| chunk_label(*bytes))
        .draw()?;
    for line in lines {
        let style = line.colour.stroke_width(2);
        let series = LineSeries::new(line.points.iter().copied(), style).point_size(3);
        chart
            .draw_series(series)?
            .label(line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(())
}

fn chunk_label(bytes: f64) -> String {
    if bytes < 1024.0 {
        format!("{bytes:.0} B")
    } else if bytes < MIB {
        format!("{:.0} KiB", bytes / 1024.0)
    } else {
        format!("{:.0} MiB", bytes / MIB)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_drawings_have_every_line() {
        let directory = tempfile::tempdir().unwrap();
        let size = |chunk_bytes: u32| ChunkSize {
            chunk_bytes,
            snapshots: 4,
            stored: u64::from(chunk_bytes) << 10,
            save: 0.1,
            load: 0.2,
        };
        let sizes: Vec<_> = (9..=20).map(|bits| size(1 << bits)).collect();
        draw(&sizes, &sizes, directory.path()).unwrap();
        for (name, words) in [
            ("store-size.svg", ["150 snapshots", "4 KiB"]),
            ("store-time.svg", ["load", "1 MiB"]),
        ] {
            let svg = std::fs::read_to_string(directory.path().join(name)).unwrap();
            for word in words {
                assert!(svg.contains(word), "{name} has no {word}");
            }
        }
    }
}
