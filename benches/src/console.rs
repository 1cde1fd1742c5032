//! What the guest prints, seen when it is printed.

use std::{
    fs::File,
    io::Read,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init},
};

/// Guests in an emulated machine are some fifty times slower than on hardware.
const PATIENCE: Duration = Duration::from_secs(180);

/// How much of what was printed an error shows, in bytes.
const SHOWN: usize = 2000;

/// A serial console that a VMM writes to a file, from its first byte on. The kernel tells when it grows:
/// nobody polls on the CPUs that the guest needs.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    file: File,
    watch: OwnedFd,
    text: Vec<u8>,
}

impl Console {
    /// Makes an empty file at `path`.
    ///
    /// # Errors
    ///
    /// When it cannot be made or watched.
    pub fn create(path: PathBuf) -> Result<Self> {
        let context = || format!("cannot watch {}", path.display());
        File::create(&path).with_context(context)?;
        let file = File::open(&path).with_context(context)?;
        let watch = init(CreateFlags::CLOEXEC).with_context(context)?;
        add_watch(&watch, &path, WatchFlags::MODIFY).with_context(context)?;
        Ok(Self {
            path,
            file,
            watch,
            text: Vec::new(),
        })
    }

    /// Where the VMM is to write.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many bytes have been printed.
    ///
    /// # Errors
    ///
    /// When the file cannot be looked at.
    pub fn printed_bytes(&self) -> Result<u64> {
        let metadata = self.file.metadata();
        let metadata = metadata.with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(metadata.len())
    }

    /// Tells when the first has been printed, on a thread that waits for no CPU if the host permits it (`CAP_SYS_NICE`): behind the guest
    /// that it listens to, it could wait for a tick of the kernel's, and that would be measured instead.
    pub fn listen(mut self) -> JoinHandle<Result<Instant>> {
        thread::spawn(move || {
            be_first();
            self.wait_for_output()?;
            Ok(Instant::now())
        })
    }

    /// Waits until something has been printed.
    ///
    /// # Errors
    ///
    /// When nothing is within three minutes.
    pub fn wait_for_output(&mut self) -> Result<()> {
        self.wait_until("output", PATIENCE, |text| !text.is_empty())
    }

    /// Waits until `needle` has been printed.
    ///
    /// # Errors
    ///
    /// When it is not within three minutes; with what was printed instead.
    pub fn wait_for(&mut self, needle: &str) -> Result<()> {
        self.wait_for_either(needle, needle, PATIENCE).map(drop)
    }

    /// Waits until one of the two has been printed, for as long as `patience`, and tells which.
    ///
    /// # Errors
    ///
    /// When neither is; with what was printed instead.
    pub fn wait_for_either<'a>(
        &mut self,
        one: &'a str,
        other: &'a str,
        patience: Duration,
    ) -> Result<&'a str> {
        let has = |text: &[u8], needle: &str| contains(text, needle.as_bytes());
        self.wait_until(one, patience, |text| has(text, one) || has(text, other))?;
        Ok(if has(&self.text, one) { one } else { other })
    }

    /// Waits for `count` whole lines since what was forgotten, and gives them.
    ///
    /// # Errors
    ///
    /// When they are not printed within three minutes; with what was printed instead.
    pub fn next_lines(&mut self, count: usize) -> Result<Vec<String>> {
        let ends = |text: &[u8]| text.iter().filter(|byte| **byte == b'\n').count();
        self.wait_until("lines", PATIENCE, |text| ends(text) >= count)?;
        let text = String::from_utf8_lossy(&self.text);
        Ok(text.lines().take(count).map(str::to_owned).collect())
    }

    /// Forgets what has been printed so far.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn forget(&mut self) -> Result<()> {
        self.read()?;
        self.text.clear();
        Ok(())
    }

    fn read(&mut self) -> Result<()> {
        self.file
            .read_to_end(&mut self.text)
            .with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(())
    }

    fn wait_until(
        &mut self,
        what: &str,
        patience: Duration,
        found: impl Fn(&[u8]) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            // The watch began before the first byte, so that what is read too early is told again.
            self.read()?;
            if found(&self.text) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let shown = &self.text[self.text.len().saturating_sub(SHOWN)..];
                bail!(
                    "waited {} s in vain for {what:?}; the console says {:?}",
                    patience.as_secs(),
                    String::from_utf8_lossy(shown)
                );
            }
            self.sleep(left)?;
        }
    }

    /// Sleeps until the file has been written to, or `bound` is over.
    fn sleep(&self, bound: Duration) -> Result<()> {
        let bound = Timespec::try_from(bound).context("the bound is too long")?;
        let mut fds = [PollFd::new(&self.watch, PollFlags::IN)];
        if rustix::io::retry_on_intr(|| poll(&mut fds, Some(&bound)))? == 0 {
            return Ok(());
        }
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = Reader::new(&self.watch, &mut buffer);
        // One read takes all events that fit; all mean the same.
        events.next()?;
        Ok(())
    }
}

/// Gives the calling thread real-time priority.
#[allow(unsafe_code)]
fn be_first() {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: 0 is the calling thread, and the kernel reads the structure, which outlives the call. It is refused where that is not permitted.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
}

fn contains(text: &[u8], needle: &[u8]) -> bool {
    text.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn output_is_seen_whenever_it_comes() {
        let directory = tempfile::tempdir().unwrap();
        let mut console = Console::create(directory.path().join("console")).unwrap();
        let mut guest = File::options().append(true).open(console.path()).unwrap();
        guest.write_all(b"fer").unwrap();
        console.wait_for_output().unwrap();
        let writer = std::thread::spawn(move || {
            for byte in b"mata-guest: ready\n" {
                guest.write_all(&[*byte]).unwrap();
            }
        });
        console.wait_for("fermata-guest: ready").unwrap();
        writer.join().unwrap();
        console.wait_for("guest").unwrap();
    }
}
