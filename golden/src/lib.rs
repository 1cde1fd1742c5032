//! Golden files: what each version of a format is in bytes, where no change of the code reaches it.
//!
//! A saved type that is encoded otherwise under the same version makes the snapshots that users have unreadable, or
//! has them read as something else. So examples of each version that can be read are kept in a file of its own,
//! `golden/<name>-<version>.hex` in the package that reads it, and tests compare with it what the code makes of the
//! same values. An example is a line that begins with `#` and lines of 32 bytes in hexadecimal digits.
//!
//! A new file is written by the test that misses it if [`WRITE`] is set in the environment. One that is there is never
//! written again.

#![forbid(unsafe_code)]
#![allow(clippy::expect_used, clippy::unwrap_used)] // a test that cannot go on should stop

mod tree;

use std::{
    fmt::{Debug, Write as _},
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use saved_state::{SavedState, Section};
pub use tree::tree;

/// The environment variable that has files written that are missing.
pub const WRITE: &str = "FERMATA_WRITE_GOLDEN";

/// Bytes in a line.
const LINE_BYTES: usize = 32;

/// Checks every version of a kind of section that can be read, from the first on: `versions` has, for each, what the
/// examples in its file are decoded to.
///
/// # Panics
///
/// When a version has no file or no examples, and when one is not encoded as in its file, or not decoded to what it was.
pub fn check_sections<T: SavedState + Debug + PartialEq>(versions: &[&[T]]) {
    let kind = T::KIND.to_string();
    let name = kind.trim_end();
    assert_eq!(
        versions.len(),
        usize::from(T::VERSION),
        "{name} can be read in so many versions: say of each what its examples are decoded to"
    );
    for (version, examples) in (1..).zip(versions) {
        let sections = examples.iter().map(|example| section(0, example, version));
        let sections: Vec<_> = sections.collect();
        let payloads: Vec<_> = sections.iter().map(|section| &section.payload).collect();
        check(name, version.into(), &payloads);
        for (section, example) in sections.iter().zip(*examples) {
            let decoded = section.decode::<T>();
            assert_eq!(decoded.as_ref(), Ok(example), "{name} version {version}");
        }
    }
}

/// Encodes `state` as a release did whose newest version was `version`: without what that did not have.
///
/// # Panics
///
/// When there is no such version, or the state breaks a bound of the encoding.
pub fn section<T: SavedState>(instance: u32, state: &T, version: u16) -> Section {
    assert!((1..=T::VERSION).contains(&version));
    let mut payload = Vec::new();
    let encoded = state.serialize(&mut payload, &T::version_map(), version);
    encoded.expect("an example is within the bounds of the encoding");
    Section {
        kind: T::KIND,
        instance,
        version,
        payload,
    }
}

/// Checks that `examples`, as the code encodes them, are those in the file of version `version` of `name`.
///
/// # Panics
///
/// When they are not, when there are none, and when there is no such file and none is to be written.
pub fn check(name: &str, version: u32, examples: &[impl AsRef<[u8]>]) {
    assert!(!examples.is_empty(), "{name} version {version}: no example");
    let text = to_text(name, version, examples);
    let kept = kept(&path(name, version), &text, writes());
    compare(name, version, &kept, examples);
}

/// Whether files are written that are missing.
fn writes() -> bool {
    std::env::var_os(WRITE).is_some_and(|value| value == "1")
}

/// What a file has; if it is missing and `writes` is set, it is made of `text`. One that is there stays as it is, for what
/// users have may be encoded like it.
fn kept(path: &Path, text: &str, writes: bool) -> String {
    if !path.exists() {
        assert!(
            writes,
            "{} is missing: have this test write it with {WRITE}=1, and add it",
            path.display()
        );
        create(path, text).unwrap();
    }
    fs::read_to_string(path).unwrap()
}

fn compare(name: &str, version: u32, text: &str, examples: &[impl AsRef<[u8]>]) {
    assert!(
        from_text(text)
            .iter()
            .eq(examples.iter().map(AsRef::as_ref)),
        "the encoding of {name} changed: raise its version, keep reading version {version}, and add a file; \
         write it with {WRITE}=1"
    );
}

/// Where the file is, from the package's directory, in which its tests are run.
fn path(name: &str, version: u32) -> PathBuf {
    Path::new("golden").join(format!("{name}-{version}.hex"))
}

fn create(path: &Path, text: &str) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    File::create_new(path)?.write_all(text.as_bytes())
}

fn to_text(name: &str, version: u32, examples: &[impl AsRef<[u8]>]) -> String {
    let mut text = String::new();
    for (number, example) in (1..).zip(examples) {
        let of = examples.len();
        writeln!(
            text,
            "# {name} version {version}, example {number} of {of}, as encoded"
        )
        .unwrap();
        for line in example.as_ref().chunks(LINE_BYTES) {
            writeln!(text, "{}", hex::encode(line)).unwrap();
        }
    }
    text
}

fn from_text(text: &str) -> Vec<Vec<u8>> {
    let mut examples = Vec::new();
    for line in text.lines() {
        if line.starts_with('#') {
            examples.push(Vec::new());
        } else {
            let example = examples.last_mut().expect("a line says what follows");
            example.extend(hex::decode(line).expect("hexadecimal digits"));
        }
    }
    examples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_come_back_from_lines_of_32_bytes() {
        let examples = [(0..33).collect::<Vec<u8>>(), Vec::new(), vec![0xab; 32]];
        let text = to_text("LAMP", 2, &examples);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "# LAMP version 2, example 1 of 3, as encoded");
        assert_eq!([lines[1].len(), lines[2].len()], [64, 2]);
        assert_eq!(from_text(&text), examples);
    }

    #[test]
    fn a_file_is_never_written_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("golden").join("LAMP-1.hex");
        for text in ["first", "second"] {
            assert_eq!(kept(&path, text, true), "first");
        }
    }

    #[test]
    fn what_is_as_it_was_is_right() {
        compare("LAMP", 1, &to_text("LAMP", 1, &[[1], [2]]), &[[1], [2]]);
    }

    #[test]
    #[should_panic(expected = "the encoding of LAMP changed: raise its version")]
    fn an_encoding_that_changed_is_noticed() {
        compare("LAMP", 1, &to_text("LAMP", 1, &[[1], [2]]), &[[2], [1]]);
    }

    #[test]
    #[should_panic(expected = "golden/LAMP-3.hex is missing")]
    fn a_version_without_a_file_is_noticed() {
        kept(&path("LAMP", 3), "", false);
    }
}
