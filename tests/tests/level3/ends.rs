//! Every way in which a Linux guest ends its machine.

use api_types::EndReason;
use system_tests::{linux, wait};

#[test]
fn a_linux_guest_ends_for_its_own_reason() {
    let server = linux::server().unwrap();
    for (role, reason) in [
        ("poweroff", EndReason::PowerOff),
        ("reboot", EndReason::TripleFault),
        ("reboot reboot=k", EndReason::Reboot),
        ("panic", EndReason::TripleFault),
    ] {
        let machine = linux::boot(&server, role).unwrap();
        let ended = || server.client.vm(machine.pid).unwrap().ended;
        let ended = wait::until("the guest to end", ended).unwrap();
        assert_eq!(ended.reason, reason, "{role}");
    }
}
