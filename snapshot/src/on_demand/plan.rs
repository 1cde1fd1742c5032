//! Which parts of an image are to be read, and in which order.

use std::collections::BTreeSet;

/// Parts are read in the order of the image, from the one on that was touched last: what a guest touches is seldom alone.
#[derive(Debug)]
pub(super) struct Plan {
    left: BTreeSet<u64>,
    /// Where to go on.
    next: u64,
    at_work: usize,
    /// They could not be read, and nobody has said to try again.
    failed: BTreeSet<u64>,
}

impl Plan {
    pub(super) fn new(parts: impl IntoIterator<Item = u64>) -> Self {
        Self {
            left: parts.into_iter().collect(),
            next: 0,
            at_work: 0,
            failed: BTreeSet::new(),
        }
    }

    /// A part that is to be read now; [`Plan::put_back`] has to follow.
    pub(super) fn take(&mut self) -> Option<u64> {
        let ahead = self.left.range(self.next..).next();
        let part = *ahead.or_else(|| self.left.first())?;
        self.left.remove(&part);
        self.next = part + 1;
        self.at_work += 1;
        Some(part)
    }

    /// Somebody has touched `part`.
    pub(super) fn touched(&mut self, part: u64) {
        self.next = part;
    }

    /// A part that was taken is read, or could not be.
    pub(super) fn put_back(&mut self, part: u64, read: bool) {
        self.at_work -= 1;
        if !read {
            self.failed.insert(part);
        }
    }

    /// What could not be read is to be tried again.
    pub(super) fn retry(&mut self) {
        self.left.append(&mut self.failed);
    }

    /// Whether some could not be read.
    pub(super) fn has_failed(&self) -> bool {
        !self.failed.is_empty()
    }

    /// Whether nothing is left but what could not be read.
    pub(super) fn is_at_rest(&self) -> bool {
        self.left.is_empty() && self.at_work == 0
    }

    /// Whether everything has been read.
    pub(super) fn is_done(&self) -> bool {
        self.is_at_rest() && self.failed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_was_touched_comes_first_and_what_follows_it() {
        let mut plan = Plan::new([1, 3, 4, 7]);
        assert_eq!(plan.take(), Some(1));
        plan.touched(4);
        let order: Vec<_> = std::iter::from_fn(|| plan.take()).collect();
        assert_eq!(order, [4, 7, 3]);
        assert!(Plan::new([]).is_done());
    }

    proptest! {
        #[test]
        fn each_part_is_read_once_whatever_is_touched_and_fails(
            parts in proptest::collection::btree_set(0u64..50, 0..30),
            steps in proptest::collection::vec((0..5, 0u64..60), 0..200),
        ) {
            let mut plan = Plan::new(parts.clone());
            let (mut taken, mut read, mut failed) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
            for (kind, part) in steps {
                match kind {
                    0 | 1 => {
                        let next = plan.take();
                        let unseen = |part| !read.contains(part) && !failed.contains(part) && !taken.contains(part);
                        prop_assert_eq!(next.is_some(), parts.iter().any(unseen));
                        taken.extend(next);
                    }
                    2 => plan.touched(part),
                    3 => if let Some(last) = taken.pop() {
                        let well = part % 3 > 0;
                        plan.put_back(last, well);
                        let ended = if well { &mut read } else { &mut failed };
                        prop_assert!(ended.insert(last));
                    },
                    _ => {
                        plan.retry();
                        failed.clear();
                    }
                }
                prop_assert_eq!(plan.is_done(), read.len() == parts.len());
                let seen = read.len() + failed.len();
                prop_assert_eq!(plan.is_at_rest(), seen == parts.len());
            }
        }
    }
}
