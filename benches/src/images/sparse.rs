//! Copies of files with holes.

use std::{fs::File, io::Read, os::unix::fs::FileExt, path::Path};

use anyhow::{Context, Result};

const PIECE: usize = 64 << 10;

/// Copies the first `len` bytes of `from` to `to`, which appears whole or not at all. What is zero becomes holes.
pub(super) fn copy(from: &Path, len: u64, to: &Path) -> Result<()> {
    let partial = to.with_extension("partial");
    let context = || format!("cannot copy {} to {}", from.display(), to.display());
    let mut source = File::open(from).with_context(context)?;
    let target = File::create(&partial).with_context(context)?;
    target.set_len(len).with_context(context)?;
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < len {
        let now = usize::try_from(len - at).map_or(PIECE, |left| left.min(PIECE));
        source.read_exact(&mut piece[..now]).with_context(context)?;
        if piece[..now].iter().any(|byte| *byte != 0) {
            target
                .write_all_at(&piece[..now], at)
                .with_context(context)?;
        }
        at += now as u64;
    }
    drop(target);
    std::fs::rename(&partial, to).with_context(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_cut_and_otherwise_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let mut bytes = vec![0; 3 * PIECE + 5];
        bytes[PIECE + 1] = 1;
        bytes[3 * PIECE] = 2;
        std::fs::write(&from, &bytes).unwrap();
        copy(&from, 3 * PIECE as u64 + 2, &to).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), bytes[..3 * PIECE + 2]);
        assert!(copy(&from, bytes.len() as u64 + 1, &to).is_err());
    }
}
