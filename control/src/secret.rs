//! What a client of a VMM has to know.

use std::{fmt, io};

use constant_time_eq::constant_time_eq_32;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

/// Bytes of a secret.
pub(crate) const SECRET_BYTES: usize = 32;

/// A random key that a VMM demands of whoever connects. In JSON it is hexadecimal; in logs it does
/// not appear.
#[derive(Clone, Serialize, Deserialize)]
pub struct Secret(#[serde(with = "hex::serde")] [u8; SECRET_BYTES]);

impl Secret {
    /// A new secret from the kernel's random number generator.
    ///
    /// # Errors
    ///
    /// When the kernel has none, as before Linux 3.17 or under a filter.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; SECRET_BYTES];
        // A request of up to 256 bytes is never cut short (getrandom(2)).
        getrandom(&mut bytes, GetRandomFlags::empty())?;
        Ok(Self(bytes))
    }

    /// Whether `offered` is this secret, in a time that does not depend on where they differ.
    pub(crate) fn matches(&self, offered: &[u8; SECRET_BYTES]) -> bool {
        constant_time_eq_32(&self.0, offered)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.matches(&other.0)
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_json_and_stays_out_of_logs() {
        let secret = Secret::random().unwrap();
        let json = serde_json::to_string(&secret).unwrap();
        assert_eq!(json.len(), 2 * SECRET_BYTES + 2);
        assert_eq!(serde_json::from_str::<Secret>(&json).unwrap(), secret);
        assert_eq!(format!("{secret:?}"), "Secret(..)");
    }

    #[test]
    fn two_are_never_equal_and_a_short_one_is_none() {
        assert_ne!(Secret::random().unwrap(), Secret::random().unwrap());
        assert!(serde_json::from_str::<Secret>("\"00ff\"").is_err());
    }
}
