//! Reading little-endian fields from bytes that may end too early.

use crate::Error;

/// The unread rest of a byte slice.
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Error> {
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(Error::Malformed("a field reaches past its end"))?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let (head, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(Error::Malformed("a field reaches past its end"))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Error> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Text in a field of `N` bytes, padded with zeros. It is shown to people, on terminals: what would steer one is refused.
    pub(crate) fn text<const N: usize>(&mut self) -> Result<String, Error> {
        let field: [u8; N] = self.array()?;
        let len = field.iter().position(|&b| b == 0).unwrap_or(N);
        if field[len..].iter().any(|&b| b != 0) {
            return Err(Error::Malformed("a text field goes on behind its end"));
        }
        let text = std::str::from_utf8(&field[..len])
            .map_err(|_| Error::Malformed("a text field is not UTF-8"))?;
        if text.contains(char::is_control) {
            return Err(Error::Malformed("a text field has control characters"));
        }
        Ok(text.to_owned())
    }
}

/// Appends `text` as a field of `N` bytes, without control characters, cut at a character boundary or padded with zeros.
pub(crate) fn put_text<const N: usize>(out: &mut Vec<u8>, text: &str) {
    let text = text.replace(char::is_control, "");
    let mut len = text.len().min(N);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    out.extend_from_slice(&text.as_bytes()[..len]);
    out.resize(out.len() + N - len, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_steers_no_terminal() {
        let mut field = Vec::new();
        put_text::<16>(&mut field, "a\x1b[2Jb\r\n\u{9b}c");
        let text = Cursor::new(&field).text::<16>().unwrap();
        assert_eq!(text, "a[2Jbc");
        for control in [&b"\x1b"[..], b"\n", b"\x7f", "\u{9b}".as_bytes()] {
            let mut field = *b"a\0\0\0";
            field[1..=control.len()].copy_from_slice(control);
            assert!(Cursor::new(&field).text::<4>().is_err(), "{control:?}");
        }
    }

    #[test]
    fn text_that_goes_on_behind_its_end_is_refused() {
        assert_eq!(Cursor::new(b"ab\0\0").text::<4>().unwrap(), "ab");
        assert!(Cursor::new(b"a\0b\0").text::<4>().is_err());
    }
}
