//! New disks and new heads.

use std::{
    cell::RefCell,
    fs,
    io::ErrorKind,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
};

use super::*;
use crate::{
    Error,
    tape::{self, Call},
};

/// A sealed layer on a base, and a directory elsewhere.
fn layer(bench: &Bench) -> (Foundation, TempDir) {
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let monday = sealed(&mut disk);
    let on = Foundation::Layer(monday.path, Some(monday.id));
    (on, in_memory())
}

#[test]
fn what_a_disk_stands_on_is_opened_once() {
    let bench = Bench::in_memory(8);
    let (on, _) = layer(&bench);
    for on in [on, Foundation::Raw(bench.path("base"))] {
        let asked = RefCell::new(Vec::new());
        let rule = |path: &Path| {
            asked.borrow_mut().push(path.to_owned());
            true
        };
        let mut disk = Disk::create(&bench.path("new"), None, &on, &rule).unwrap();
        let mut asked = asked.into_inner();
        let all_of_it = asked.len();
        asked.sort();
        asked.dedup();
        assert_eq!(asked.len(), all_of_it, "{asked:?}");
        // It is nobody else's, and of use.
        let other = Disk::open(&bench.path("new"), Mode::Read, &anything);
        assert!(matches!(other, Err(Error::InUse { .. })), "{other:?}");
        write(&mut disk, 512, &[2; 512]);
        let content = all(&disk);
        drop(disk);
        assert!(all(&bench.open("new")) == content);
        fs::remove_file(bench.path("new")).unwrap();
    }
}

#[test]
fn a_disk_that_does_not_come_about_leaves_nothing() {
    let bench = Bench::in_memory(8);
    let (on, elsewhere) = layer(&bench);
    let names = bench.names();
    let new = elsewhere.path().join("new");
    // Of the second name of what it stands on, of its own.
    tape::fail(|call| call == Call::SyncNames, 1, ErrorKind::Other);
    let failed = Disk::create(&new, None, &on, &anything);
    tape::permit();
    assert!(matches!(failed, Err(Error::Io { .. })), "{failed:?}");
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    assert_eq!(bench.names(), names);
    Disk::create(&new, None, &on, &anything).unwrap();
}

#[test]
fn the_next_head_is_whose_the_last_was() {
    let bench = Bench::in_memory(8);
    let mut disk = bench.on_base("d");
    let path = bench.path("d");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    // Who is not privileged gives no files away.
    let given = chown(&path, Some(1234), Some(1235)).is_ok();
    write(&mut disk, 0, &[1; 512]);
    let monday = sealed(&mut disk);
    let [head, layer] = [&path, &monday.path].map(|path| fs::metadata(path).unwrap());
    assert_ne!(head.ino(), layer.ino());
    assert_eq!(head.mode() & 0o7777, 0o640);
    assert_eq!((head.uid(), head.gid()), (layer.uid(), layer.gid()));
    assert_eq!(head.uid() == 1234, given);
}

#[test]
fn a_name_as_long_as_a_layer_s_can_be_does_for_all() {
    let bench = Bench::in_memory(8);
    // A sealed layer has 39 bytes more.
    for name in ["a", "b"].map(|letter| letter.repeat(255 - 39)) {
        let mut disk = bench.on_base(&name);
        write(&mut disk, 0, &[1; 512]);
        let monday = sealed(&mut disk);
        let mut branch = Disk::branch(&monday.path, Some(monday.id), &anything).unwrap();
        write(&mut branch, 512, &[2; 512]);
        sealed(&mut branch);
        // What a crash leaves goes with the next, and is not another's.
        let left = crate::name::draft(&monday.path, monday.id);
        fs::write(&left, "").unwrap();
        crate::name::sweep(disk.path());
        assert!(left.exists());
        crate::name::sweep(&monday.path);
        assert!(!left.exists());
    }
    let names = bench.names();
    let on = Foundation::Raw(bench.path("base"));
    let refused = Disk::create(&bench.path(&"c".repeat(255 - 38)), None, &on, &anything);
    assert!(
        matches!(refused, Err(Error::LongName { .. })),
        "{refused:?}"
    );
    let said = refused.unwrap_err().to_string();
    assert!(said.contains("at most 216 bytes"), "{said}");
    assert_eq!(bench.names(), names);
}

#[test]
fn a_branch_that_is_refused_leaves_its_source_as_it_was() {
    let bench = Bench::in_memory(8);
    let mut disk = bench.on_base("d");
    write(&mut disk, 0, &[1; 512]);
    let id = disk.id();
    drop(disk);
    let names = bench.names();
    let long = "a".repeat(217);
    let proc = Path::new("/proc/b.disk");
    let targets = ["d", "base", "away/e", &long].map(|name| bench.dir.path().join(name));
    let targets = targets.iter().map(|path| (&**path, None));
    let too_small = (&*bench.path("e"), Some(512));
    for (target, bytes) in targets.chain([(proc, None), too_small]) {
        let refused = Disk::branch_now(&bench.path("d"), target, bytes, &anything);
        assert!(refused.is_err(), "{}", target.display());
        assert_eq!(bench.names(), names, "{}", target.display());
        assert_eq!(bench.open("d").id(), id, "{}", target.display());
    }
    // Of what was written to, of what was not, of a layer; there and elsewhere.
    let elsewhere = in_memory();
    for target in [bench.path("e"), elsewhere.path().join("f"), bench.path("g")] {
        let mut branch =
            Disk::branch_now(&bench.path("d"), &target, Some(8192), &anything).unwrap();
        assert_eq!(all(&branch)[..512], [1; 512]);
        write(&mut branch, 4096, &[2; 512]);
        drop(branch);
        sound(&target);
        assert_eq!(read(&bench.open("d"), 0, 512), [1; 512]);
    }
    let layer = bench
        .names()
        .into_iter()
        .find(|name| name.ends_with(".layer"));
    let layer = bench.path(&layer.unwrap());
    drop(Disk::branch_now(&layer, &bench.path("h"), None, &anything).unwrap());
    let layers = |names: Vec<String>| names.iter().filter(|n| n.ends_with(".layer")).count();
    assert_eq!(layers(bench.names()), 1, "{:?}", bench.names());
    assert!(bench.names().iter().all(|name| !name.ends_with(".partial")));
}
