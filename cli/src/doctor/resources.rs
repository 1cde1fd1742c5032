//! How much there is of what machines use up.

use super::{Finding, Host};
use crate::output::bytes;

const THP: &str = "transparent huge pages";
const HUGETLB: &str = "reserved huge pages";
const MEMORY: &str = "memory";
const DISK: &str = "disk";

/// The default machine and its VMM.
const ENOUGH_MEMORY: u64 = 512 << 20;

/// Some snapshots of the default machine.
const ENOUGH_DISK: u64 = 2 << 30;

const MEMINFO: &str = "proc/meminfo";

/// Whether guest memory is mapped by huge pages without anybody asking.
pub(super) fn transparent_huge_pages(host: &Host) -> Finding {
    // Like `always [madvise] never`.
    let modes = host.read("sys/kernel/mm/transparent_hugepage/enabled");
    let mode = modes
        .as_deref()
        .and_then(|modes| modes.split_once('[')?.1.split_once(']'))
        .map(|(mode, _)| mode);
    match mode {
        Some(mode @ ("always" | "madvise")) => Finding::ok(THP, mode),
        Some(mode) => Finding::warn(
            THP,
            mode,
            "`echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled` makes guests faster",
        ),
        None => Finding::warn(
            THP,
            "the kernel has none",
            "guests run a little slower; use a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
        ),
    }
}

/// How many huge pages are set aside.
pub(super) fn reserved_huge_pages(host: &Host) -> Finding {
    let number = |name| host.number(MEMINFO, name).unwrap_or_default();
    let (free, total) = (number("HugePages_Free"), number("HugePages_Total"));
    let found = match total {
        0 => "none; not needed".to_owned(),
        _ => format!(
            "{free} of {total} free, {} each",
            bytes(number("Hugepagesize") << 10)
        ),
    };
    Finding::ok(HUGETLB, found)
}

/// How much memory machines can have.
pub(super) fn memory(host: &Host) -> Finding {
    let available = host.number(MEMINFO, "MemAvailable").unwrap_or_default() << 10;
    let found = format!("{} available", bytes(available));
    if available >= ENOUGH_MEMORY {
        Finding::ok(MEMORY, found)
    } else {
        Finding::warn(
            MEMORY,
            found,
            "end something, or run machines with little memory",
        )
    }
}

/// How much room there is for snapshots, by default.
pub(super) fn disk() -> Finding {
    let space = match rustix::fs::statvfs(".") {
        Ok(space) => space,
        Err(error) => {
            let found = format!("the current directory cannot be asked: {error}");
            return Finding::warn(DISK, found, "change to another directory");
        }
    };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let found = format!("{} free in the current directory", bytes(free));
    if free >= ENOUGH_DISK {
        Finding::ok(DISK, found)
    } else {
        Finding::warn(DISK, found, "free some, or keep snapshots elsewhere")
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Verdict, host::fake::Fake},
        *,
    };

    #[test]
    fn huge_pages_are_had_unless_never() {
        let verdict = |modes| {
            let file = ("sys/kernel/mm/transparent_hugepage/enabled", modes);
            transparent_huge_pages(&Fake::new(&[file]).host()).verdict
        };
        assert_eq!(verdict("[always] madvise never\n"), Verdict::Ok);
        assert_eq!(verdict("always [madvise] never\n"), Verdict::Ok);
        assert_eq!(verdict("always madvise [never]\n"), Verdict::Warn);
        assert_eq!(verdict("nonsense"), Verdict::Warn);
    }

    #[test]
    fn memory_is_what_is_available() {
        let verdict = |meminfo| memory(&Fake::new(&[(MEMINFO, meminfo)]).host()).verdict;
        assert_eq!(
            verdict("MemFree: 1 kB\nMemAvailable: 524288 kB\n"),
            Verdict::Ok
        );
        assert_eq!(verdict("MemAvailable: 524287 kB\n"), Verdict::Warn);
        assert_eq!(verdict(""), Verdict::Warn);
    }

    #[test]
    fn reserved_pages_are_counted() {
        let text = "HugePages_Total: 4\nHugePages_Free: 3\nHugepagesize: 2048 kB\n";
        let fake = Fake::new(&[(MEMINFO, text)]);
        assert_eq!(
            reserved_huge_pages(&fake.host()).found,
            "3 of 4 free, 2 MiB each"
        );
    }
}
