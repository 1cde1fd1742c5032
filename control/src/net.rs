//! Network devices, as a VMM is told of them.

use std::{
    fmt,
    num::NonZeroU64,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// What it is attached to.
    pub attachment: NetAttachment,
    /// Its address. Without one, the VMM gives it one: always the same on this host for a TAP device, a
    /// new one for a socket.
    #[serde(default)]
    pub mac: Option<MacAddress>,
    /// The limit on what the guest receives.
    #[serde(default)]
    pub receive_limit: RateLimit,
    /// The limit on what the guest sends.
    #[serde(default)]
    pub send_limit: RateLimit,
}

/// What a network device is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetAttachment {
    /// The TAP device of this name, which is there and nobody else's.
    Tap(String),
    /// The Unix socket of sequenced packets that listens at this absolute path; a message is an Ethernet
    /// frame.
    Socket(PathBuf),
}

impl fmt::Display for NetAttachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tap(name) => write!(f, "TAP device {name}"),
            Self::Socket(path) => write!(f, "socket {}", path.display()),
        }
    }
}

/// The most that may be received or sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes of frames in a second.
    #[serde(default)]
    pub bytes_per_second: Option<NonZeroU64>,
    /// Frames in a second.
    #[serde(default)]
    pub packets_per_second: Option<NonZeroU64>,
}

/// What a restored network device has instead of what it was saved with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetChange {
    /// What it is attached to.
    #[serde(default)]
    pub attachment: Option<NetAttachment>,
    /// Its address, which the guest learns of when its driver is bound anew.
    #[serde(default)]
    pub mac: Option<MacAddress>,
}

impl NetChange {
    /// What the fork of this number has, from 0: `{n}` in the name that it is attached to stands for the number.
    #[must_use]
    pub fn of_fork(&self, number: u32) -> Self {
        let attachment = self.attachment.as_ref();
        Self {
            attachment: attachment.map(|attachment| match attachment {
                NetAttachment::Tap(name) => NetAttachment::Tap(numbered(name, number)),
                NetAttachment::Socket(path) => NetAttachment::Socket(numbered_path(path, number)),
            }),
            mac: self.mac,
        }
    }
}

/// The name `name` of what belongs to the fork of this number.
fn numbered(name: &str, number: u32) -> String {
    name.replace("{n}", &number.to_string())
}

/// The same of a path.
pub(crate) fn numbered_path(path: &Path, number: u32) -> PathBuf {
    // What is no text has no such mark that anybody meant.
    let text = path.to_str();
    text.map_or_else(|| path.to_owned(), |text| numbered(text, number).into())
}

/// The address of one network device: six bytes, written in hexadecimal like `02:00:5e:10:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// Why a text is not the address of a network device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not the MAC address of one device; write one like 02:00:5e:10:00:01, whose first byte is even"
)]
pub struct NotAMac(String);

impl MacAddress {
    /// The address of these bytes, unless it is that of a group or zero.
    #[must_use]
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        (bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// An address that no manufacturer has given out, made of 46 bits of `from`.
    #[must_use]
    pub fn local(from: u64) -> Self {
        let [a, b, c, d, e, f, _, _] = from.to_le_bytes();
        // Locally administered, and of one device (IEEE 802, 8.2).
        Self([a & 0xfc | 0x02, b, c, d, e, f])
    }

    /// Its bytes, in the order of the wire.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = NotAMac;

    fn from_str(text: &str) -> Result<Self, NotAMac> {
        let wrong = || NotAMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut digits = text.split(':');
        for byte in &mut bytes {
            let pair = digits.next().filter(|pair| {
                pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit())
            });
            *byte = u8::from_str_radix(pair.ok_or_else(wrong)?, 16).map_err(|_| wrong())?;
        }
        match digits.next() {
            None => Self::new(bytes).ok_or_else(wrong),
            Some(_) => Err(wrong()),
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for MacAddress {
    type Error = NotAMac;

    fn try_from(text: String) -> Result<Self, NotAMac> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_address_of_one_device_is_refused() {
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "02:00:00:00:00:1",
            "02:00:00:00:00:+1",
            "02-00-00-00-00-01",
            "0g:00:00:00:00:01",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_local_address_is_written_and_read(from: u64) {
            let mac = MacAddress::local(from);
            prop_assert_eq!(mac.bytes()[0] & 3, 2);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
            prop_assert_eq!(mac.to_string().to_uppercase().parse(), Ok(mac));
        }

        #[test]
        fn any_text_is_an_answer(text in ".{0,20}") {
            if let Ok(mac) = text.parse::<MacAddress>() {
                prop_assert_eq!(mac.to_string(), text.to_lowercase());
            }
        }
    }
}
