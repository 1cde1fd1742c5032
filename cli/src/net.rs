//! Network devices, as flags and files give them: with the same keys.

use std::{num::NonZeroU64, path::PathBuf};

use anyhow::{Context, anyhow, bail};
use control::{MacAddress, NetAttachment, NetChange, NetConfig, RateLimit};
use schemars::JsonSchema;
use serde::Deserialize;

/// A network device, attached to either a TAP device or a socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Net {
    /// The TAP device.
    tap: Option<String>,
    /// The Unix socket of sequenced packets that a switch listens on.
    pub(crate) socket: Option<PathBuf>,
    /// The MAC address, like `02:00:5e:10:00:01`; by default one that follows from the host and the TAP device.
    #[schemars(with = "Option<String>")]
    mac: Option<MacAddress>,
    /// The most bytes that the guest receives in a second.
    receive_bytes_per_second: Option<NonZeroU64>,
    /// The most packets that the guest receives in a second.
    receive_packets_per_second: Option<NonZeroU64>,
    /// The most bytes that the guest sends in a second.
    send_bytes_per_second: Option<NonZeroU64>,
    /// The most packets that the guest sends in a second.
    send_packets_per_second: Option<NonZeroU64>,
}

impl Net {
    /// The device as a VMM is told of it.
    pub(crate) fn config(self) -> anyhow::Result<NetConfig> {
        let Self {
            tap,
            socket,
            mac,
            receive_bytes_per_second,
            receive_packets_per_second,
            send_bytes_per_second,
            send_packets_per_second,
        } = self;
        let attachment = attachment(tap, socket)?
            .context("a network device needs a tap or a socket to be attached to")?;
        Ok(NetConfig {
            attachment,
            mac,
            receive_limit: RateLimit {
                bytes_per_second: receive_bytes_per_second,
                packets_per_second: receive_packets_per_second,
            },
            send_limit: RateLimit {
                bytes_per_second: send_bytes_per_second,
                packets_per_second: send_packets_per_second,
            },
        })
    }
}

fn attachment(
    tap: Option<String>,
    socket: Option<PathBuf>,
) -> anyhow::Result<Option<NetAttachment>> {
    Ok(match (tap, socket) {
        (Some(_), Some(_)) => {
            bail!("a network device is attached to a tap or to a socket; leave one out")
        }
        (Some(tap), None) => Some(NetAttachment::Tap(tap)),
        (None, Some(socket)) => Some(NetAttachment::Socket(socket)),
        (None, None) => None,
    })
}

/// Parses `key=value,…` with the keys of a file.
pub(crate) fn net(text: &str) -> anyhow::Result<NetConfig> {
    parse(text)?.config()
}

/// Parses what a restored network device has instead of what it was saved with; `saved` for nothing.
pub(crate) fn change(text: &str) -> anyhow::Result<NetChange> {
    if text == "saved" {
        return Ok(NetChange::default());
    }
    let Net {
        tap,
        socket,
        mac,
        receive_bytes_per_second: None,
        receive_packets_per_second: None,
        send_bytes_per_second: None,
        send_packets_per_second: None,
    } = parse(text)?
    else {
        bail!("a restored network device keeps its limits; name only tap, socket and mac");
    };
    Ok(NetChange {
        attachment: attachment(tap, socket)?,
        mac,
    })
}

fn parse(text: &str) -> anyhow::Result<Net> {
    let mut net = Net::default();
    for pair in text.split(',') {
        let (key, value) = pair
            .split_once('=')
            .with_context(|| format!("{pair:?} is not KEY=VALUE, like tap=vmtap0"))?;
        let number = || {
            value
                .parse()
                .map(Some)
                .map_err(|_| anyhow!("{key} is {value:?}; give a number above 0"))
        };
        match key {
            "tap" => net.tap = Some(value.to_owned()),
            "socket" => net.socket = Some(std::path::absolute(value)?),
            "mac" => net.mac = Some(value.parse()?),
            "receive_bytes_per_second" => net.receive_bytes_per_second = number()?,
            "receive_packets_per_second" => net.receive_packets_per_second = number()?,
            "send_bytes_per_second" => net.send_bytes_per_second = number()?,
            "send_packets_per_second" => net.send_packets_per_second = number()?,
            _ => bail!(
                "a network device has no {key:?}, but tap, socket, mac, and \
                 receive_ or send_ before bytes_per_second and packets_per_second"
            ),
        }
    }
    Ok(net)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use super::*;

    #[test]
    fn flags_have_the_keys_of_the_file() {
        let flag = "tap=t,mac=02:00:00:00:00:01,receive_bytes_per_second=1,\
                    receive_packets_per_second=2,send_bytes_per_second=3,send_packets_per_second=4";
        let file = flag.replace(',', "\n").replace("tap=t", "tap=\"t\"");
        let file = file.replace("02:00:00:00:00:01", "\"02:00:00:00:00:01\"");
        let by_file: Net = toml::from_str(&file).unwrap();
        assert_eq!(by_file, parse(flag).unwrap());
        let config = net(flag).unwrap();
        assert_eq!(config.attachment, NetAttachment::Tap("t".to_owned()));
        let rates = [config.receive_limit, config.send_limit];
        let rates = rates.map(|limit| (limit.bytes_per_second, limit.packets_per_second));
        let number = NonZeroU64::new;
        assert_eq!(rates, [(number(1), number(2)), (number(3), number(4))]);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (text, said) in [
            ("", "KEY=VALUE"),
            ("vmtap0", "KEY=VALUE"),
            ("mac=02:00:00:00:00:01", "needs a tap or a socket"),
            ("tap=a,socket=b", "leave one out"),
            ("tap=a,mac=1", "MAC address"),
            ("tap=a,speed=1", "no \"speed\""),
            ("tap=a,send_bytes_per_second=0", "above 0"),
        ] {
            let error = net(text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_restored_device_is_changed_in_part_or_not_at_all() {
        assert_eq!(change("saved").unwrap(), NetChange::default());
        let moved = change("tap=b").unwrap();
        assert_eq!(moved.attachment, Some(NetAttachment::Tap("b".to_owned())));
        assert_eq!(moved.mac, None);
        assert!(
            change("mac=02:00:00:00:00:01")
                .unwrap()
                .attachment
                .is_none()
        );
        let error = change("tap=b,send_bytes_per_second=1").unwrap_err();
        assert!(error.to_string().contains("keeps its limits"), "{error}");
    }
}
