//! The guest's files: the test bed's archive, with fio, iperf3 and the libraries that they are linked with.

use std::{
    collections::BTreeSet,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use cpio::newc::{self, ModeFileType};
use testbed::environment;

const INIT: &str = include_str!("../../../resources/bench/io-init");

const PROGRAMS: [&str; 2] = ["/usr/bin/fio", "/usr/bin/iperf3"];

/// Writes it to `path`. The kernel unpacks one archive after the other.
pub(super) fn write(path: &Path) -> Result<()> {
    let first = std::fs::read(environment::path(environment::GUEST_INITRD)?);
    let mut archive = Archive {
        bytes: first.context("cannot read the guest's archive")?,
        inode: 0,
    };
    archive.add("bench-init", ModeFileType::Regular, INIT.as_bytes())?;
    for directory in ["lib", "lib64"] {
        archive.add(directory, ModeFileType::Directory, &[])?;
    }
    let mut libraries = BTreeSet::new();
    for program in PROGRAMS {
        archive.copy(Path::new(program), "bin")?;
        libraries.extend(libraries_of(program)?);
    }
    for library in libraries {
        // The loader has its name in the programs; the others are looked for by their last names in /lib too.
        let to = if library.starts_with("/lib64") {
            "lib64"
        } else {
            "lib"
        };
        archive.copy(&library, to)?;
    }
    archive.write(path)
}

/// What ldd(1) lists, resolved through all links.
fn libraries_of(program: &str) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot run ldd")?;
    ensure!(
        output.status.success(),
        "{program} is not there; apt-get install fio iperf3"
    );
    Ok(listed(&String::from_utf8_lossy(&output.stdout)))
}

/// The paths in a listing like `libz.so.1 => /lib/libz.so.1 (0x00007f…)`, one a line.
fn listed(listing: &str) -> Vec<PathBuf> {
    let words = listing.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        words.find(|word| word.starts_with('/'))
    });
    words.map(PathBuf::from).collect()
}

struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn copy(&mut self, from: &Path, to: &str) -> Result<()> {
        let contents =
            std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let name = from
            .file_name()
            .and_then(|name| name.to_str())
            .with_context(|| format!("{} has no name", from.display()))?;
        self.add(&format!("{to}/{name}"), ModeFileType::Regular, &contents)
    }

    fn add(&mut self, name: &str, kind: ModeFileType, contents: &[u8]) -> Result<()> {
        self.inode += 1;
        let size =
            u32::try_from(contents.len()).with_context(|| format!("{name} has 4 GiB or more"))?;
        let entry = newc::Builder::new(name)
            .ino(self.inode)
            .mode(0o755)
            .set_mode_file_type(kind);
        let mut writer = entry.write(&mut self.bytes, size);
        writer
            .write_all(contents)
            .and_then(|()| writer.finish().map(drop))
            .with_context(|| format!("cannot archive {name}"))
    }

    fn write(mut self, path: &Path) -> Result<()> {
        newc::trailer(&mut self.bytes).context("cannot close an archive in memory")?;
        std::fs::write(path, self.bytes).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_the_loader_are_listed_and_what_has_no_file_is_not() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffd)\n\
            \tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f59)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f60)\n";
        let expected = [
            "/lib/x86_64-linux-gnu/libz.so.1",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(listed(listing), expected.map(PathBuf::from));
    }
}
