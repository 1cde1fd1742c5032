//! What a check makes of files that are short or not there.

use std::fs;

use super::*;

/// The problems of the disk `d`.
fn problems(bench: &Bench) -> Vec<String> {
    crate::check(&bench.path("d"), &anything).unwrap().problems
}

#[test]
fn a_map_that_was_cut_short_is_damage_and_the_rest_is_checked() {
    let bench = Bench::in_memory(64);
    let mut disk = bench.on_base("d");
    let layers = [1, 2].map(|byte| {
        write(&mut disk, 0, &[byte; 512]);
        sealed(&mut disk).path
    });
    for layer in layers {
        let file = fs::File::options().write(true).open(layer).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    }
    drop(disk);
    let found = problems(&bench);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().all(|problem| problem.contains("cut short")));
}

#[test]
fn what_a_disk_stands_on_and_is_not_there_is_a_problem() {
    let bench = Bench::in_memory(64);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let layer = sealed(&mut disk).path;
    drop(disk);
    for missing in [&bench.path("base"), &layer] {
        fs::rename(missing, bench.path("away")).unwrap();
        let found = problems(&bench);
        let said = format!("{} is not there", missing.display());
        assert!(found.len() == 1 && found[0].starts_with(&said), "{found:?}");
        fs::rename(bench.path("away"), missing).unwrap();
    }
    // What was to be checked is no part of a disk if it is not there.
    assert!(crate::check(&bench.path("e"), &anything).is_err());
}
