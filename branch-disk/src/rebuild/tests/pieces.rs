//! What is waited for beside who wants it, in pieces.

use std::fs::File;

use super::*;
use crate::{Awaited, Sink};

/// Takes what it does not wait for.
#[derive(Debug)]
struct Later(u64, Vec<Awaited>);

impl Sink for Later {
    fn len(&self) -> u64 {
        self.0
    }

    fn fill(&mut self, _: &File, _: u64, len: u64) -> io::Result<()> {
        self.0 -= len;
        Ok(())
    }

    fn zero(&mut self, len: u64) {
        self.0 -= len;
    }

    fn is_to_wait(&mut self, awaited: Awaited) -> io::Result<bool> {
        self.0 -= awaited.bytes();
        self.1.push(awaited);
        Ok(false)
    }
}

#[test]
fn what_is_waited_for_comes_in_pieces_that_have_nothing_in_common() {
    let directory = tempfile::tempdir().unwrap();
    let kept = Arc::new(Kept::default());
    let rebuild = begin(&directory.path().join("disk.layer"), &kept).unwrap();
    let disk = rebuild.branch(&anything).unwrap();
    const BEGIN: u64 = 200 << 10;
    let mut later = Later(700 << 10, Vec::new());
    disk.read(BEGIN, &mut later).unwrap();
    let [awaited] = <[_; 1]>::try_from(later.1).unwrap();
    let mut come = 0;
    for (piece, (kib, units)) in awaited
        .pieces()
        .zip([(56, 1), (256, 4), (256, 4), (132, 3)])
    {
        assert_eq!(piece.bytes(), kib << 10);
        piece.bring().unwrap();
        come += units * UNIT_BYTES;
        assert_eq!(kept.read.load(Relaxed), come);
    }
    assert_eq!(come, 12 * UNIT_BYTES);
}
