//! Room that the kernel is quick to copy to.

/// A cache line.
const ALIGNMENT: usize = 64;

/// A buffer that begins at a cache line.
///
/// What an allocator gives for many KiB begins 16 bytes behind a page's beginning as a rule. To copy page after page to there takes
/// some processors a third more time (docs/decisions/store-save-time.md).
#[derive(Default)]
pub(crate) struct Aligned {
    room: Vec<u8>,
}

impl Aligned {
    /// Its first `len` bytes, with whatever was in them before.
    pub(crate) fn first(&mut self, len: usize) -> &mut [u8] {
        let enough = len + ALIGNMENT;
        if self.room.len() < enough {
            self.room.resize(enough, 0);
        }
        // A hint by its contract, which may be more than there is.
        let start = self.room.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        &mut self.room[start..start + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_at_a_cache_line_whatever_is_asked_for() {
        let mut buffer = Aligned::default();
        for len in [1, 4096, 0, 256 << 10, 5] {
            let bytes = buffer.first(len);
            assert_eq!(bytes.len(), len);
            assert_eq!(bytes.as_ptr().addr() % ALIGNMENT, 0);
        }
    }
}
