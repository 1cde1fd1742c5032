//! Huge pages of the host's, reserved while a test runs.

use std::fs;

/// How many huge pages of 2 MiB there are to be; only root may write it.
const NUMBER: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// More huge pages than there were before. Dropped, they are the host's again.
#[derive(Debug)]
pub struct Reserved {
    before: u64,
}

impl Reserved {
    /// Has `count` huge pages free, if the host gives them.
    pub fn new(count: u64) -> Option<Self> {
        let reserved = Self {
            before: number(NUMBER)?,
        };
        fs::write(NUMBER, (reserved.before + count).to_string()).ok()?;
        (free()? >= count).then_some(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // What cannot be undone is the host's loss alone.
        let _ = fs::write(NUMBER, self.before.to_string());
    }
}

/// How many huge pages are free; `None` on a host that knows none.
pub fn free() -> Option<u64> {
    number(FREE)
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
