//! What a check makes of files that are short or not there.

use std::fs;

use super::*;
use crate::{
    Error,
    create::Draft,
    header::{Header, Parent},
    layer::Layer,
    layout::{Geometry, SEAL_AT},
    media::Lock,
};

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
        let refused = Disk::open(&bench.path("d"), Mode::Read, &anything).unwrap_err();
        assert_eq!(refused.to_string(), found[0]);
        fs::rename(bench.path("away"), missing).unwrap();
    }
    // What was to be checked is no part of a disk if it is not there.
    assert!(crate::check(&bench.path("e"), &anything).is_err());
}

#[test]
fn what_the_host_says_is_told_once() {
    let bench = Bench::in_memory(1);
    let refused = Disk::open(&bench.path("d"), Mode::Read, &anything).unwrap_err();
    let said = refused.with_cause();
    assert_eq!(said.matches("os error").count(), 1, "{said}");
    assert!(said.contains("give the path of what is there"), "{said}");
}

#[test]
fn a_base_that_ends_within_a_sector_is_named() {
    let bench = Bench::in_memory(1);
    fs::write(bench.path("base"), [1; 1000]).unwrap();
    let on = Foundation::Raw(bench.path("base"));
    let refused = Disk::create(&bench.path("d"), Some(1 << 20), &on, &anything);
    let said = refused.unwrap_err().to_string();
    let name = format!("the base {} has 1000 bytes", bench.path("base").display());
    assert!(said.starts_with(&name), "{said}");
}

#[test]
fn a_map_of_other_runs_is_said_to_be_that() {
    let bench = Bench::in_memory(64);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let path = sealed(&mut disk).path;
    drop(disk);
    let layer = Layer::open(&path, true, Lock::Not).unwrap();
    let mut descriptor = layer.descriptor().unwrap().unwrap();
    descriptor.runs += 1;
    layer.write_descriptor(&layer.media, descriptor).unwrap();
    drop(layer);
    let found = problems(&bench);
    assert!(
        found.len() == 1 && found[0].contains("more runs"),
        "{found:?}"
    );
}

#[test]
fn a_layer_that_has_lost_its_seal_and_not_its_map_is_no_head() {
    let bench = Bench::in_memory(64);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let path = sealed(&mut disk).path;
    drop(disk);
    fs::remove_file(bench.path("d")).unwrap();
    fs::rename(path, bench.path("d")).unwrap();
    let file = fs::File::options().write(true).open(bench.path("d"));
    std::os::unix::fs::FileExt::write_all_at(&file.unwrap(), &[0; 4096], SEAL_AT).unwrap();
    let found = problems(&bench);
    assert_eq!(found.len(), 1, "{found:?}");
    for mode in [Mode::Read, Mode::Write] {
        let refused = Disk::open(&bench.path("d"), mode, &anything).unwrap_err();
        assert_eq!(refused.to_string(), found[0]);
    }
}

#[test]
fn a_chain_that_is_too_long_is_its_head_s_fault_and_the_greatest_depth_is_told() {
    let bench = Bench::in_memory(1);
    let mut below: Option<Header> = None;
    let layer = |name: &str, depth: u32, below: Option<&Header>, last: &str| {
        let parent = below.map_or(Parent::Nothing, |below| Parent::Layer {
            path: last.into(),
            id: below.id,
            bytes: 512,
        });
        let header = Header {
            id: crate::create::new_id(Path::new(name)).unwrap(),
            geometry: Geometry::of(512).unwrap(),
            depth,
            below: below.map_or(0, |below| below.depth),
            parent,
        };
        let path = bench.path(name);
        let draft = Draft::write(&path, &path, &header).unwrap();
        draft.publish(&path).unwrap();
        header
    };
    layer("deep", u32::MAX, None, "");
    let deepest = bench.open("deep").prepare().unwrap_err();
    assert!(matches!(deepest, Error::Deepest { .. }), "{deepest}");
    let mut last = String::new();
    for depth in 1..=1001 {
        let name = match depth {
            1001 => "d".to_owned(),
            depth => format!("l{depth}"),
        };
        below = Some(layer(&name, depth, below.as_ref(), &last));
        last = name;
    }
    let found = problems(&bench);
    let said = format!("{} is damaged", bench.path("d").display());
    assert!(found.len() == 1 && found[0].starts_with(&said), "{found:?}");
}
