//! A name in a directory, which one alone has while a snapshot of that name comes.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, OFlags, flock},
    io::Errno,
};

use crate::Error;

/// It is locked. The lock goes with the process, so that a hidden file which is left keeps nobody from the name.
#[derive(Debug)]
pub(crate) struct Reserved {
    path: PathBuf,
    _file: File,
}

impl Reserved {
    /// Takes `name` in `directory`.
    ///
    /// # Errors
    ///
    /// [`Error::NameTaken`] when somebody else has it; what the host says.
    pub(crate) fn new(directory: &Path, name: &str) -> Result<Self, Error> {
        let path = directory.join(format!(".{name}.receiving"));
        loop {
            let mut options = OpenOptions::new();
            let opened = options.write(true).create(true).truncate(false);
            // Through a link it would never be what has the name.
            let opened = opened.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
            let file = opened.mode(0o600).open(&path);
            let file = file.map_err(Error::io("reserve", &path))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(Error::NameTaken(name.to_owned())),
                Err(errno) => return Err(Error::errno("reserve", &path)(errno)),
            }
            // Who had it before may have removed what was opened here.
            let inode = |metadata: fs::Metadata| metadata.ino();
            let ours = file.metadata().map(inode).ok();
            if ours.is_some() && ours == path.symlink_metadata().map(inode).ok() {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // While it is still locked. What stays is taken over by the next.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_alones_and_free_once_that_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let reserved = Reserved::new(directory.path(), "vm").unwrap();
        let refused = Reserved::new(directory.path(), "vm").unwrap_err();
        assert!(matches!(refused, Error::NameTaken(_)), "{refused}");
        drop(reserved);
        // Left by somebody who was killed.
        fs::write(directory.path().join(".vm.receiving"), "").unwrap();
        drop(Reserved::new(directory.path(), "vm").unwrap());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (link, target) = (".vm.receiving", "elsewhere");
        std::os::unix::fs::symlink(target, directory.path().join(link)).unwrap();
        let refused = Reserved::new(directory.path(), "vm")
            .unwrap_err()
            .to_string();
        assert!(refused.contains(link), "{refused}");
        assert!(!directory.path().join(target).exists());
    }
}
