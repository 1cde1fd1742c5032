//! The directory tree in which every path of a request must lie.
//!
//! Paths are resolved by the kernel with `RESOLVE_BENEATH` (openat2(2)): neither `..` nor a symbolic
//! link leads out, and nothing is learnt of what lies outside. The VMM opens the resolved path later,
//! by name: whoever can change the tree itself between the two can redirect it. The tree's directories
//! are the operator's and those whom they trust; what this guards against is clients.

use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2, statat},
    io::Errno,
};

/// Why a path of a request cannot be used. Each variant begins with the request's field.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PathError {
    #[error("{0} is missing or empty; name a file")]
    Empty(&'static str),
    #[error("{field} {path:?} lies outside {}, the tree that this server serves; use a path in it", root.display())]
    Outside {
        field: &'static str,
        path: String,
        root: PathBuf,
    },
    #[error("{field} {path:?} does not exist; create it, or correct the path")]
    NotFound { field: &'static str, path: String },
    #[error("the directory of {field} {path:?} does not exist; create it, or correct the path")]
    NoDirectory { field: &'static str, path: String },
    #[error("{field} {path:?} is not a regular file; name one")]
    NotAFile { field: &'static str, path: String },
    #[error("{field} {path:?} cannot be used: {source}; correct the path or its permissions")]
    Unusable {
        field: &'static str,
        path: String,
        source: io::Error,
    },
    #[error(
        "the host cannot look at {field} {path:?}: {source}; ask again, or see what it is short of"
    )]
    Host {
        field: &'static str,
        path: String,
        source: io::Error,
    },
}

/// How often a path is looked up again that something was moved beside: with `..` in it, that can be anything on the host.
const LOOK_UPS: usize = 1000;

/// The tree.
#[derive(Debug)]
pub(crate) struct Tree {
    /// As the operator spelt it, made absolute.
    root: PathBuf,
    /// The same without symbolic links, as answers show it.
    resolved: PathBuf,
    handle: OwnedFd,
}

impl Tree {
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        let root = std::path::absolute(root)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let handle = open(&root, flags, Mode::empty())?;
        let resolved = name_of(&handle)?;
        Ok(Self {
            root,
            resolved,
            handle,
        })
    }

    /// Its directory: absolute, without symbolic links.
    pub(crate) fn resolved(&self) -> &Path {
        &self.resolved
    }

    /// The file that `path` names, which is there: absolute, without symbolic links.
    pub(crate) fn input(&self, field: &'static str, path: &str) -> Result<PathBuf, PathError> {
        let relative = self.relative(field, path)?;
        let file = self
            .resolve(relative, OFlags::empty())
            .map_err(|errno| self.error(field, path, errno))?;
        let unusable = |source| self.unusable(field, path, source);
        let kind = fstat(&file).map_err(|e| unusable(e.into()))?.st_mode;
        if FileType::from_raw_mode(kind) != FileType::RegularFile {
            return Err(PathError::NotAFile {
                field,
                path: path.to_owned(),
            });
        }
        name_of(&file).map_err(unusable)
    }

    /// Where a file goes that `path` names, whose directory is there. A symbolic link of that name is
    /// not followed: the VMM renames its file over it.
    pub(crate) fn output(&self, field: &'static str, path: &str) -> Result<PathBuf, PathError> {
        let not_a_file = || PathError::NotAFile {
            field,
            path: path.to_owned(),
        };
        let relative = self.relative(field, path)?;
        // What ends in a slash or a dot names a directory, though `file_name` would not say so.
        if matches!(
            relative.as_os_str().as_bytes(),
            [.., b'/'] | [.., b'/', b'.']
        ) {
            return Err(not_a_file());
        }
        let name: OsString = relative.file_name().ok_or_else(not_a_file)?.to_owned();
        let parent = relative.parent().unwrap_or(Path::new(""));
        let directory = self
            .resolve(parent, OFlags::DIRECTORY)
            .map_err(|errno| match errno {
                Errno::NOENT | Errno::NOTDIR => PathError::NoDirectory {
                    field,
                    path: path.to_owned(),
                },
                other => self.error(field, path, other),
            })?;
        match statat(&directory, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Directory => {
                return Err(not_a_file());
            }
            Ok(_) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(self.error(field, path, errno)),
        }
        let directory = name_of(&directory).map_err(|e| self.unusable(field, path, e))?;
        Ok(directory.join(name))
    }

    fn relative<'a>(&self, field: &'static str, path: &'a str) -> Result<&'a Path, PathError> {
        if path.is_empty() {
            return Err(PathError::Empty(field));
        }
        let path = Path::new(path);
        if path.is_relative() {
            return Ok(path);
        }
        path.strip_prefix(&self.root)
            .or_else(|_| path.strip_prefix(&self.resolved))
            .map_err(|_| self.outside(field, &path.to_string_lossy()))
    }

    fn resolve(&self, relative: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let relative = if relative.as_os_str().is_empty() {
            Path::new(".")
        } else {
            relative
        };
        let look_up = || {
            openat2(
                &self.handle,
                relative,
                OFlags::PATH | OFlags::CLOEXEC | flags,
                Mode::empty(),
                ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
            )
        };
        let again = |found: &Result<_, Errno>| matches!(found, Err(Errno::INTR | Errno::AGAIN));
        let mut found = look_up();
        for _ in 0..LOOK_UPS {
            if !again(&found) {
                break;
            }
            found = look_up();
        }
        found
    }

    fn error(&self, field: &'static str, path: &str, errno: Errno) -> PathError {
        match errno {
            Errno::XDEV => self.outside(field, path),
            Errno::NOENT | Errno::NOTDIR => PathError::NotFound {
                field,
                path: path.to_owned(),
            },
            other => self.unusable(field, path, other.into()),
        }
    }

    fn outside(&self, field: &'static str, path: &str) -> PathError {
        PathError::Outside {
            field,
            path: path.to_owned(),
            root: self.root.clone(),
        }
    }

    fn unusable(&self, field: &'static str, path: &str, source: io::Error) -> PathError {
        let path = path.to_owned();
        match Errno::from_io_error(&source) {
            Some(Errno::ACCESS | Errno::PERM | Errno::LOOP | Errno::NAMETOOLONG | Errno::INVAL) => {
                PathError::Unusable {
                    field,
                    path,
                    source,
                }
            }
            _ => PathError::Host {
                field,
                path,
                source,
            },
        }
    }
}

/// The absolute path of what a handle was opened on.
fn name_of(handle: &OwnedFd) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", handle.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::symlink,
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use super::*;

    /// `tree/{file,dir/}` beside `secret`, with links in the tree that lead in and out.
    fn tree() -> (tempfile::TempDir, Tree) {
        let base = tempfile::tempdir().unwrap();
        let root = base.path().join("tree");
        fs::create_dir_all(root.join("dir")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        fs::write(base.path().join("secret"), "").unwrap();
        symlink("../secret", root.join("out")).unwrap();
        symlink("..", root.join("up")).unwrap();
        symlink("dir", root.join("in")).unwrap();
        let tree = Tree::open(&root).unwrap();
        (base, tree)
    }

    #[test]
    fn paths_are_relative_to_the_tree_or_absolute_in_it() {
        let (_base, tree) = tree();
        let file = tree.resolved.join("file");
        assert_eq!(tree.input("f", "file").unwrap(), file);
        assert_eq!(tree.input("f", "dir/../file").unwrap(), file);
        assert_eq!(tree.input("f", file.to_str().unwrap()).unwrap(), file);
        let new = tree.resolved.join("dir/new");
        assert_eq!(tree.output("f", "in/new").unwrap(), new);
        assert_eq!(tree.output("f", new.to_str().unwrap()).unwrap(), new);
        assert_eq!(tree.output("f", "file").unwrap(), file);
    }

    #[test]
    fn a_tree_may_be_reached_through_a_link() {
        let (base, tree) = tree();
        let link = base.path().join("link");
        symlink("tree", &link).unwrap();
        let linked = Tree::open(&link).unwrap();
        for spelling in [link.join("file"), tree.resolved.join("file")] {
            let found = linked.input("f", spelling.to_str().unwrap()).unwrap();
            assert_eq!(found, tree.resolved.join("file"));
        }
    }

    #[test]
    fn nothing_leads_out_and_nothing_outside_is_told_apart() {
        let (base, tree) = tree();
        let secret = base.path().join("secret");
        let absent = base.path().join("absent");
        let paths = [
            "../secret",
            "../absent",
            "dir/../../secret",
            "out",
            "up/secret",
            "up/absent",
            "/etc/passwd",
            secret.to_str().unwrap(),
            absent.to_str().unwrap(),
        ];
        for path in paths {
            let refused = tree.input("f", path);
            assert!(
                matches!(refused, Err(PathError::Outside { .. })),
                "{path}: {refused:?}"
            );
        }
        for path in ["../new", "up/new", "/etc/new"] {
            let refused = tree.output("f", path);
            assert!(
                matches!(refused, Err(PathError::Outside { .. })),
                "{path}: {refused:?}"
            );
        }
    }

    #[test]
    fn what_the_host_is_short_of_is_no_fault_of_the_path() {
        let (_base, tree) = tree();
        let error = |errno| tree.error("f", "file", errno);
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::IO] {
            assert!(matches!(error(errno), PathError::Host { .. }), "{errno}");
        }
        assert!(matches!(error(Errno::ACCESS), PathError::Unusable { .. }));
    }

    #[test]
    fn a_path_is_found_while_others_are_renamed() {
        let (base, tree) = tree();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let names = ["one", "two"].map(|name| base.path().join(name));
                fs::write(&names[0], "").unwrap();
                for number in 0.. {
                    fs::rename(&names[number % 2], &names[(number + 1) % 2]).unwrap();
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            let found: Vec<_> = (0..20_000)
                .map(|_| tree.input("f", "dir/../file"))
                .filter(Result::is_err)
                .collect();
            stop.store(true, Ordering::Relaxed);
            assert!(found.is_empty(), "{found:?}");
        });
    }

    #[test]
    fn magic_links_are_not_followed() {
        let proc = Tree::open(Path::new("/proc/self")).unwrap();
        assert!(proc.input("f", "exe").is_err());
    }

    #[test]
    fn an_output_replaces_a_link_and_does_not_follow_it() {
        let (_base, tree) = tree();
        assert_eq!(tree.output("f", "out").unwrap(), tree.resolved.join("out"));
    }

    #[test]
    fn what_is_not_a_file_is_refused() {
        let (_base, tree) = tree();
        for path in ["dir", ".", "in"] {
            let refused = tree.input("f", path);
            assert!(
                matches!(refused, Err(PathError::NotAFile { .. })),
                "{path}: {refused:?}"
            );
        }
        for path in ["dir", ".", "dir/", "file/", "new/", "new/.", "dir/.."] {
            let refused = tree.output("f", path);
            assert!(
                matches!(refused, Err(PathError::NotAFile { .. })),
                "{path}: {refused:?}"
            );
        }
        assert!(matches!(tree.input("f", ""), Err(PathError::Empty("f"))));
        assert!(matches!(
            tree.input("f", "absent"),
            Err(PathError::NotFound { .. })
        ));
        assert!(matches!(
            tree.input("f", "file/x"),
            Err(PathError::NotFound { .. })
        ));
        assert!(matches!(
            tree.output("f", "no/new"),
            Err(PathError::NoDirectory { .. })
        ));
        assert!(matches!(
            tree.output("f", "file/new"),
            Err(PathError::NoDirectory { .. })
        ));
        for path in ["a\0b", &"x".repeat(10_000)] {
            assert!(matches!(
                tree.input("f", path),
                Err(PathError::Unusable { .. })
            ));
            assert!(matches!(
                tree.output("f", path),
                Err(PathError::Unusable { .. })
            ));
        }
    }
}
