//! The devices that the VMM opens.

use std::{
    fs::OpenOptions,
    io::{self, ErrorKind},
};

use super::{Finding, Host};

const KVM: &str = "KVM";
const USERFAULTFD: &str = "userfaultfd";
const TUN: &str = "TUN";

/// The one version of KVM's API that there has been since Linux 2.6.22.
const KVM_API: i32 = 12;

/// Whether machines can run at all.
pub(super) fn kvm() -> Finding {
    let support = match hypervisor::probe() {
        Ok(support) => support,
        Err(hypervisor::Error::Open(error)) => {
            let advice = match error.kind() {
                ErrorKind::PermissionDenied => "`sudo usermod -aG kvm $USER`, then log in anew",
                ErrorKind::NotFound => {
                    "`sudo modprobe kvm_intel` or `kvm_amd`; in a container, pass /dev/kvm in"
                }
                _ => "see what the kernel's log says of kvm",
            };
            return Finding::fail(KVM, format!("/dev/kvm cannot be opened: {error}"), advice);
        }
        Err(error) => {
            return Finding::fail(KVM, error.to_string(), "use a newer kernel");
        }
    };
    if support.api_version != KVM_API {
        return Finding::fail(
            KVM,
            format!("API version {}, not {KVM_API}", support.api_version),
            "use a newer kernel",
        );
    }
    let found = format!(
        "API version {KVM_API}, up to {} vCPUs, {} MSRs",
        support.max_vcpus, support.msrs
    );
    if support.tsc_scaling {
        Finding::ok(KVM, found + ", TSC scaling")
    } else {
        Finding::warn(
            KVM,
            found + ", no TSC scaling",
            "restore only snapshots of hosts with the same TSC rate here",
        )
    }
}

/// Whether a restored machine's memory can follow on demand.
pub(super) fn userfaultfd(host: &Host) -> Finding {
    if openable(host, "dev/userfaultfd").is_ok() {
        return Finding::ok(USERFAULTFD, "/dev/userfaultfd can be opened");
    }
    match host.read("proc/sys/vm/unprivileged_userfaultfd").as_deref() {
        None => Finding::warn(
            USERFAULTFD,
            "the kernel has none",
            "memory is read when a machine is restored, not on demand; use a kernel with \
             CONFIG_USERFAULTFD",
        ),
        Some("1") => Finding::ok(USERFAULTFD, "open to everybody"),
        Some(_) if rustix::process::geteuid().is_root() => Finding::ok(USERFAULTFD, "open to root"),
        Some(_) => Finding::warn(
            USERFAULTFD,
            "open to root only",
            "`sudo sysctl vm.unprivileged_userfaultfd=1`, or let this user open /dev/userfaultfd",
        ),
    }
}

/// Whether machines can have a network of their own.
pub(super) fn tun(host: &Host) -> Finding {
    match openable(host, "dev/net/tun") {
        Ok(()) => Finding::ok(TUN, "/dev/net/tun can be opened"),
        Err(error) => Finding::warn(
            TUN,
            format!("/dev/net/tun cannot be opened: {error}"),
            "`sudo modprobe tun`; in a container, pass /dev/net/tun in",
        ),
    }
}

fn openable(host: &Host, path: &str) -> io::Result<()> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(host.path(path))
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Verdict, host::fake::Fake},
        *,
    };

    #[test]
    fn userfaultfd_is_open_by_its_device_or_by_its_switch() {
        let switch = "proc/sys/vm/unprivileged_userfaultfd";
        let verdict = |files: &[(&str, &str)]| userfaultfd(&Fake::new(files).host()).verdict;
        assert_eq!(verdict(&[("dev/userfaultfd", "")]), Verdict::Ok);
        assert_eq!(verdict(&[(switch, "1\n")]), Verdict::Ok);
        assert_eq!(verdict(&[]), Verdict::Warn);
        let root = rustix::process::geteuid().is_root();
        let closed = if root { Verdict::Ok } else { Verdict::Warn };
        assert_eq!(verdict(&[(switch, "0\n")]), closed);
    }

    #[test]
    fn tun_is_a_device() {
        assert_eq!(
            tun(&Fake::new(&[("dev/net/tun", "")]).host()).verdict,
            Verdict::Ok
        );
        assert_eq!(tun(&Fake::new(&[]).host()).verdict, Verdict::Warn);
    }
}
