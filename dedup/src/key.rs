//! The key of an encrypted store, and the file that it is kept in.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use zeroize::{Zeroize, Zeroizing};

use crate::bytes::{from_hex, to_hex};
use crate::error::{Error, Result};
use crate::name::fill_random;

const KEY_BYTES: usize = 32;

/// A key file in its text form: the digits, and the end of the line.
const TEXT_BYTES: usize = 2 * KEY_BYTES + 1;

/// The permissions of group and others.
const OTHERS: u32 = 0o077;

/// The key of an encrypted store: 32 bytes. They are wiped when it is dropped, and never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(Zeroizing<[u8; KEY_BYTES]>);

impl From<[u8; KEY_BYTES]> for Key {
    fn from(mut bytes: [u8; KEY_BYTES]) -> Self {
        let key = Key(Zeroizing::new(bytes));
        bytes.zeroize();
        key
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

impl Key {
    /// A new one, from the kernel's random numbers.
    ///
    /// # Errors
    ///
    /// The kernel gives none.
    pub fn random() -> Result<Self> {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        fill_random(&mut *bytes)?;
        Ok(Key(bytes))
    }

    /// Reads a key file: 64 hexadecimal digits in lower case and the end of the line, or the 32 bytes themselves.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] when the file is neither, or may be read by others than its owner; it cannot be read.
    pub fn read_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed = || Error::file(format!("read the key file {}", path.display()));
        let refused = |why: &str| {
            Err(Error::Parameter(format!(
                "the key file {} {why}",
                path.display()
            )))
        };
        let file = File::open(path).map_err(failed())?;
        // Of the open file, not of the path: nobody can exchange it in between.
        let mode = file.metadata().map_err(failed())?.mode();
        if mode & OTHERS != 0 {
            return refused(&format!(
                "has mode {:03o}, so others than its owner may use it: run `chmod 600`",
                mode & 0o777
            ));
        }
        // One byte more than the longer form, to notice what is too long; never moved, so that no copy stays.
        let mut content = Zeroizing::new([0; TEXT_BYTES + 1]);
        let mut len = 0;
        let mut rest = file.take(content.len() as u64);
        loop {
            match rest.read(&mut content[len..]).map_err(failed())? {
                0 => break,
                read => len += read,
            }
        }
        match Key::parse(&content[..len]) {
            Some(key) => Ok(key),
            None => refused(
                "is none: it has 64 hexadecimal digits in lower case on one line, or 32 bytes",
            ),
        }
    }

    /// Makes a key file with a new key, in the text form, which only its owner may read. Durably: a store must not
    /// outlive its key.
    ///
    /// # Errors
    ///
    /// There is a file of this name; it cannot be written.
    pub fn create_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed = || Error::io(format!("write the key file {}", path.display()));
        let key = Key::random()?;
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed())?;
        let mut text = Zeroizing::new(to_hex(&*key.0));
        text.push('\n');
        file.write_all(text.as_bytes()).map_err(failed())?;
        file.sync_all().map_err(failed())?;
        let parent = path.canonicalize().map_err(failed())?;
        if let Some(parent) = parent.parent() {
            let dir = File::open(parent).map_err(failed())?;
            dir.sync_all().map_err(failed())?;
        }
        Ok(key)
    }

    fn parse(content: &[u8]) -> Option<Self> {
        if let Ok(bytes) = <[u8; KEY_BYTES]>::try_from(content) {
            return Some(bytes.into());
        }
        let digits = content.strip_suffix(b"\n").unwrap_or(content);
        let digits = std::str::from_utf8(digits).ok()?;
        from_hex::<KEY_BYTES>(digits).map(Key::from)
    }

    /// Its bytes, which are nobody else's to see.
    pub fn bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn file(content: &[u8], mode: u32) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        let permissions = std::fs::Permissions::from_mode(mode);
        file.as_file().set_permissions(permissions).unwrap();
        file
    }

    #[test]
    fn both_forms_are_the_same_key() {
        let key = Key::from([0xAB; 32]);
        for content in [
            [0xAB; 32].as_slice(),
            "ab".repeat(32).as_bytes(),
            ("ab".repeat(32) + "\n").as_bytes(),
        ] {
            assert_eq!(Key::read_file(file(content, 0o600)).unwrap(), key);
        }
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for content in [
            "",
            "short",
            &"ab".repeat(33),
            &"AB".repeat(32),
            &("ab".repeat(32) + "\n\n"),
        ] {
            let read = Key::read_file(file(content.as_bytes(), 0o600));
            let refused = read.map(drop).unwrap_err();
            assert!(matches!(refused, Error::Parameter(_)), "{content:?}");
            // Somebody may have digits of the other kind.
            assert!(refused.to_string().contains("in lower case"), "{refused}");
        }
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        for mode in [0o640, 0o604, 0o660, 0o601] {
            let read = Key::read_file(file(&[1; 32], mode)).map_err(|error| error.to_string());
            assert!(read.unwrap_err().contains("chmod 600"), "{mode:o}");
        }
        assert!(Key::read_file(file(&[1; 32], 0o400)).is_ok());
    }

    #[test]
    fn a_new_key_file_is_its_owners_alone_and_replaces_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = Key::create_file(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(Key::read_file(&path).unwrap(), key);
        assert!(Key::create_file(&path).is_err());
        assert_ne!(Key::create_file(dir.path().join("other")).unwrap(), key);
    }

    #[test]
    fn a_key_is_not_printed() {
        assert_eq!(format!("{:?}", Key::from([7; 32])), "Key(…)");
    }
}
