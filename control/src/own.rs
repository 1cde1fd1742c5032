//! What each of several forks must have of its own.

use crate::{NetAttachment, NetChange, VsockChange};

/// Why forks cannot have what was named for them: one machine alone can.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTheirOwn {
    /// A MAC address.
    #[error("several forks cannot have one MAC address; leave it out, and each has one of its own")]
    Mac,
    /// A TAP device.
    #[error(
        "several forks cannot have the TAP device {0}; put {{n}} into the name, which stands for a fork's number"
    )]
    Tap(String),
    /// A vsock context ID.
    #[error(
        "several forks cannot have one vsock context ID; leave it out, and each has one of its own"
    )]
    Cid,
    /// The socket of a vsock device.
    #[error(
        "several forks cannot have one vsock socket; put {{n}} into its name, which stands for a fork's number"
    )]
    Vsock,
}

/// Whether `count` forks can have these changes. Known beforehand, it costs the machine that is forked nothing.
///
/// # Errors
///
/// [`NotTheirOwn`], of the first that they cannot.
pub fn of_their_own(
    nets: &[NetChange],
    vsock: &VsockChange,
    count: u32,
) -> Result<(), NotTheirOwn> {
    if count <= 1 {
        return Ok(());
    }
    for net in nets {
        let NetChange { attachment, mac } = net;
        if mac.is_some() {
            return Err(NotTheirOwn::Mac);
        }
        // A switch takes any number of machines.
        if let Some(NetAttachment::Tap(tap)) = attachment
            && net.of_fork(0) == net.of_fork(1)
        {
            return Err(NotTheirOwn::Tap(tap.clone()));
        }
    }
    let VsockChange { cid, path } = vsock;
    if cid.is_some() {
        return Err(NotTheirOwn::Cid);
    }
    if path.is_some() && vsock.of_fork(0) == vsock.of_fork(1) {
        return Err(NotTheirOwn::Vsock);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MacAddress;

    fn net(attachment: NetAttachment, mac: Option<MacAddress>) -> NetChange {
        NetChange {
            attachment: Some(attachment),
            mac,
        }
    }

    #[test]
    fn what_one_alone_can_have_is_for_one_alone() {
        let tap = |name: &str| NetAttachment::Tap(name.to_owned());
        let switch = NetAttachment::Socket("/switch".into());
        let mac = Some(MacAddress::local(1));
        let vsock = |cid, path: Option<&str>| VsockChange {
            cid,
            path: path.map(Into::into),
        };
        let none = VsockChange::default();
        let cases = [
            (net(tap("t{n}"), None), none.clone(), Ok(())),
            (
                net(switch.clone(), None),
                vsock(None, Some("/v{n}")),
                Ok(()),
            ),
            (
                net(tap("t"), None),
                none.clone(),
                Err(NotTheirOwn::Tap("t".to_owned())),
            ),
            (net(switch.clone(), mac), none, Err(NotTheirOwn::Mac)),
            (
                net(switch.clone(), None),
                vsock(Some(9), None),
                Err(NotTheirOwn::Cid),
            ),
            (
                net(switch, None),
                vsock(None, Some("/v")),
                Err(NotTheirOwn::Vsock),
            ),
        ];
        for (net, vsock, expected) in cases {
            let nets = [NetChange::default(), net];
            assert_eq!(of_their_own(&nets, &vsock, 2), expected);
            assert_eq!(of_their_own(&nets, &vsock, 1), Ok(()));
        }
    }
}
