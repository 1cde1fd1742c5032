//! Directories of files, as of a store or of a disk with its layers. They have names and times in them that are other ones
//! each time, so that they are kept to be read, and not to be compared with.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use crate::{LINE_BYTES, kept, path, writes};

const ZEROS: [u8; LINE_BYTES] = [0; LINE_BYTES];

/// A copy, to be read, of the directory that is kept as version `version` of `name`. If none is kept and one is to be
/// written, `make` makes it.
///
/// # Panics
///
/// When there is no such file and none is to be written.
pub fn tree(name: &str, version: u32, make: impl FnOnce(&Path)) -> TempDir {
    let path = path(name, version);
    let text = if writes() && !path.exists() {
        let made = TempDir::new().unwrap();
        make(made.path());
        to_text(made.path())
    } else {
        String::new()
    };
    let copy = TempDir::new().unwrap();
    lay_out(&kept(&path, &text, writes()), copy.path());
    copy
}

/// For each file a line with its path and length, and lines of 32 bytes in hexadecimal digits; `* n` is the line before *n*
/// times more, which at the beginning of a file is one of zeros. A directory with nothing in it is a line that ends with `/`.
fn to_text(directory: &Path) -> String {
    let mut text = String::new();
    for path in leaves(directory) {
        let name = path.strip_prefix(directory).unwrap().display();
        if path.is_dir() {
            writeln!(text, "# {name}/").unwrap();
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        writeln!(text, "# {name}: {} bytes", bytes.len()).unwrap();
        let mut before = &ZEROS[..];
        let mut again = 0;
        for line in bytes.chunks(LINE_BYTES).chain([&[][..]]) {
            if line == before {
                again += 1;
                continue;
            }
            if again > 0 {
                writeln!(text, "* {again}").unwrap();
            }
            if !line.is_empty() {
                writeln!(text, "{}", hex::encode(line)).unwrap();
            }
            (before, again) = (line, 0);
        }
    }
    text
}

fn lay_out(text: &str, directory: &Path) {
    let mut open: Option<File> = None;
    let mut before = ZEROS.to_vec();
    for line in text.lines() {
        if let Some(named) = line.strip_prefix("# ") {
            if let Some(empty) = named.strip_suffix('/') {
                fs::create_dir_all(directory.join(empty)).unwrap();
                continue;
            }
            let (name, _) = named.rsplit_once(": ").unwrap();
            let path = directory.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            open = Some(File::create_new(path).unwrap());
            before = ZEROS.to_vec();
            continue;
        }
        let file = open.as_mut().expect("a line says what follows");
        if let Some(again) = line.strip_prefix("* ") {
            let bytes = before.repeat(again.parse().unwrap());
            file.write_all(&bytes).unwrap();
        } else {
            before = hex::decode(line).expect("hexadecimal digits");
            file.write_all(&before).unwrap();
        }
    }
}

/// All files below a directory, and the directories that have nothing in them, in order.
fn leaves(directory: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let below = if path.is_dir() {
            leaves(&path)
        } else {
            Vec::new()
        };
        match below.is_empty() {
            true => all.push(path),
            false => all.extend(below),
        }
    }
    all.sort();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_back_and_directories_without_any() {
        let [from, to] = [(); 2].map(|()| TempDir::new().unwrap());
        let kept: [(&str, Vec<u8>); 5] = [
            ("a/zeros", vec![0; 100_001]),
            ("a/none", Vec::new()),
            ("odd", [&[0; 64][..], &[1; 33], &[0; 31], &[2]].concat()),
            ("a/words", b"for ever and ever".repeat(32)),
            ("b/c/short", vec![7; 5]),
        ];
        for (name, bytes) in &kept {
            let path = from.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        fs::create_dir_all(from.path().join("b/empty")).unwrap();
        let text = to_text(from.path());
        assert!(text.lines().count() < 40, "{text}");
        lay_out(&text, to.path());
        assert_eq!(leaves(to.path()).len(), kept.len() + 1);
        assert!(to.path().join("b/empty").is_dir());
        for (name, bytes) in &kept {
            assert_eq!(&fs::read(to.path().join(name)).unwrap(), bytes, "{name}");
        }
    }
}
