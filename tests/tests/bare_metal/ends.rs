//! Every way in which a guest ends its machine, and what becomes known of it.

use api_types::EndReason;
use system_tests::{bare_metal, wait};

use crate::{boot, server};

#[test]
fn each_end_has_its_reason() {
    let Some(server) = server() else { return };
    for (kernel, reason) in [
        (bare_metal::power_off(), EndReason::PowerOff),
        (bare_metal::reset(), EndReason::Reboot),
        (bare_metal::triple_fault(), EndReason::TripleFault),
    ] {
        let machine = boot(&server, &kernel);
        let vm = || server.client.vm(machine.pid).unwrap().ended;
        assert_eq!(
            wait::until("the machine to end", vm).unwrap().reason,
            reason
        );
    }
}

#[test]
fn a_machine_is_ended_on_request_and_the_server_knows() {
    let Some(server) = server() else { return };
    for kernel in [
        bare_metal::spinner(),
        bare_metal::halted(),
        bare_metal::io(),
    ] {
        let machine = boot(&server, &kernel);
        let path = format!("/vms/{}", machine.pid);
        assert_eq!(server.client.delete(&path).unwrap().status, 200);
        let ended = server.client.vm(machine.pid).unwrap().ended.unwrap();
        assert_eq!(ended.reason, EndReason::Stopped);
    }
}
