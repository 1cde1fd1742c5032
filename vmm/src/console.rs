//! A machine's console: where it goes, and by which device.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use control::{Console, ConsoleDevice, keep_console};
use devices::virtio::console::SavedConsole;
use saved_state::{Container, SavedState};

use crate::terminal;

/// A console file is put aside when it has this many bytes; one that was put aside is kept. A guest
/// can so fill no more than twice as much of the host's disk.
const FILE_BYTES: u64 = 1 << 20;

/// The two ends of a console.
pub(crate) struct Ends {
    /// Takes what the guest writes.
    pub(crate) output: Output,
    /// Gives what the guest is to read, if there is anybody who could type.
    pub(crate) input: Option<File>,
}

/// Where what the guest writes goes, of each device that it writes to.
#[derive(Clone)]
pub(crate) struct Output(Arc<Mutex<dyn Write + Send>>);

impl Output {
    fn new(to: impl Write + Send + 'static) -> Self {
        Self(Arc::new(Mutex::new(to)))
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut to = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        to.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut to = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        to.flush()
    }
}

/// Opens the console.
pub(crate) fn open(console: &Console) -> io::Result<Ends> {
    match console {
        Console::File(path) => Ok(Ends {
            output: Output::new(BoundedFile::open(path)?),
            input: None,
        }),
        Console::Terminal => {
            let input = File::from(io::stderr().as_fd().try_clone_to_owned()?);
            Ok(Ends {
                output: Output::new(terminal::open(input.try_clone()?)?),
                input: Some(input),
            })
        }
    }
}

/// The device of a saved machine's console.
pub(crate) fn saved_device(container: &Container) -> ConsoleDevice {
    let mut sections = container.sections();
    match sections.any(|section| section.kind == SavedConsole::KIND) {
        true => ConsoleDevice::Virtio,
        false => ConsoleDevice::Serial,
    }
}

/// A file that is put aside, as `<name>.1`, when it has grown to its bound.
struct BoundedFile {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl BoundedFile {
    fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        keep_console(&file);
        Ok(Self {
            path: path.to_owned(),
            bytes: file.metadata()?.len(),
            file,
        })
    }

    fn put_aside(&mut self) -> io::Result<()> {
        let mut aside = self.path.clone().into_os_string();
        aside.push(".1");
        match std::fs::rename(&self.path, aside) {
            // Somebody has moved or removed it, or it could not be opened anew the last time.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
        *self = Self::open(&self.path)?;
        Ok(())
    }
}

impl Write for BoundedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes >= FILE_BYTES {
            self.put_aside()?;
        }
        let written = self.file.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use saved_state::Section;

    use super::*;
    use crate::state;

    #[test]
    fn what_each_device_writes_goes_to_the_same_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let mut first = open(&Console::File(path.clone())).unwrap().output;
        let mut second = first.clone();
        first.write_all(b"one ").unwrap();
        second.write_all(b"two ").unwrap();
        first.write_all(b"three").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one two three");
    }

    #[test]
    fn a_saved_machine_has_the_device_of_which_there_is_a_section() {
        let mut container = state::empty_container();
        assert_eq!(saved_device(&container), ConsoleDevice::Serial);
        let section = Section {
            kind: SavedConsole::KIND,
            instance: 0,
            version: 1,
            payload: Vec::new(),
        };
        container.insert(section).unwrap();
        assert_eq!(saved_device(&container), ConsoleDevice::Virtio);
    }

    #[test]
    fn a_console_file_is_bounded_and_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        std::fs::write(&path, "before\n").unwrap();
        let mut ends = open(&Console::File(path.clone())).unwrap();
        let line = [b'x'; 1000];
        for _ in 0..3000 {
            ends.output.write_all(&line).unwrap();
        }
        let size = |path: &Path| std::fs::metadata(path).unwrap().len();
        assert!(size(&path) <= FILE_BYTES + 1000);
        assert!(size(&directory.path().join("console.1")) <= FILE_BYTES + 1000);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
        // Somebody removes it, and its place cannot be taken for a while.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        std::fs::remove_file(directory.path().join("console.1")).unwrap();
        std::fs::create_dir_all(directory.path().join("console.1/full")).unwrap();
        let mut write = |times: usize| (0..times).try_for_each(|_| ends.output.write_all(&line));
        assert!(write(2000).is_err());
        std::fs::remove_dir(&path).unwrap();
        write(100).unwrap();
        assert_eq!(size(&path), 100_000);
    }
}
