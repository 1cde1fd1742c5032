//! What both sides say before anything is secret: that they are fermata, and which protocol they speak.

use crate::Error;

const MAGIC: [u8; 8] = *b"FERMATAP";
const VERSION: u32 = 1;

/// Bytes of a greeting.
pub(crate) const GREETING_BYTES: usize = 12;

/// The greeting of this side.
pub(crate) fn ours() -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

/// Whether the other side can be spoken to.
pub(crate) fn check(theirs: &[u8; GREETING_BYTES]) -> Result<(), Error> {
    let [magic @ .., a, b, c, d] = theirs;
    let version = u32::from_le_bytes([*a, *b, *c, *d]);
    match (*magic == MAGIC, version == VERSION) {
        (false, _) => Err(Error::NotFermata),
        (true, false) => Err(Error::Version {
            ours: VERSION,
            theirs: version,
        }),
        (true, true) => Ok(()),
    }
}
