//! Which parts of guest memory are mapped from a file.

use std::{collections::BTreeMap, ops::Range};

/// The most mappings of the process that guest memory may have become; Linux gives a process 65,530 (`vm.max_map_count`).
const MAX_MAPPINGS: usize = 32_768;

/// The most ranges that memory is mapped from: each is a mapping, as is what lies between two, and most of those that there may be
/// are for what the guest gives back.
pub(crate) const MAX_RANGES: usize = MAX_MAPPINGS / 8;

/// Ranges of a memory image below a private file mapping: pages there have content even if they were never touched.
#[derive(Debug, Default)]
pub(crate) struct Backed {
    /// End of each range, by its start; apart from each other.
    ends: BTreeMap<u64, u64>,
    /// The most mappings that memory can be in. It never becomes less: fresh memory stays a mapping of its own where both sides of
    /// it were written to before it came between them, for the kernel does not join those (`anon_vma`).
    mappings: usize,
}

impl Backed {
    /// `ranges` are ascending and apart.
    pub(crate) fn new(ranges: Vec<Range<u64>>) -> Self {
        Self {
            mappings: 2 * ranges.len() + 1,
            ends: ranges
                .into_iter()
                .map(|range| (range.start, range.end))
                .collect(),
        }
    }

    /// The ranges, ascending.
    pub(crate) fn ranges(&self) -> Vec<Range<u64>> {
        self.ends.iter().map(|(start, end)| *start..*end).collect()
    }

    /// Where `range` meets what is mapped from a file, ascending.
    pub(crate) fn within(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let reaches_in = self.ends.range(..range.start).next_back();
        let begin_in = self.ends.range(range.start..range.end);
        reaches_in
            .into_iter()
            .chain(begin_in)
            .map(|(start, end)| (*start).max(range.start)..(*end).min(range.end))
            .filter(|part| part.start < part.end)
            .collect()
    }

    /// Has everything in it again that was in it when it was of `all`, the ranges that it was made of, and returns what is to be
    /// mapped from the file for that. It is all of them if there could be too many mappings else, for parts that are put back
    /// need not become one mapping with what is beside them.
    pub(crate) fn put_back(&mut self, all: &[Range<u64>]) -> Vec<Range<u64>> {
        let missing = self.missing(all);
        if missing.is_empty() {
            return missing;
        }
        let crowded = self.mappings > MAX_MAPPINGS / 2;
        let mappings = self.mappings;
        *self = Self::new(all.to_vec());
        if crowded {
            return all.to_vec();
        }
        self.mappings = mappings;
        missing
    }

    /// What of `all` is not in it, ascending.
    fn missing(&self, all: &[Range<u64>]) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        for range in all {
            let mut at = range.start;
            for part in self.within(range) {
                missing.push(at..part.start);
                at = part.end;
            }
            missing.push(at..range.end);
        }
        missing.retain(|part| !part.is_empty());
        missing
    }

    /// Takes `part`, one of [`Backed::within`], out, once `renew` has put other memory in its place. Returns whether that
    /// was done: not if there could be too many mappings.
    pub(crate) fn take_out(&mut self, part: &Range<u64>, renew: impl FnOnce()) -> bool {
        let Some((&start, &end)) = self.ends.range(..=part.start).next_back() else {
            return false;
        };
        let cuts = usize::from(start < part.start) + usize::from(part.end < end);
        if cuts > 0 && self.mappings + cuts > MAX_MAPPINGS {
            return false;
        }
        renew();
        self.mappings += cuts;
        self.ends.remove(&start);
        if start < part.start {
            self.ends.insert(start, part.start);
        }
        if part.end < end {
            self.ends.insert(part.end, end);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn take(backed: &mut Backed, range: Range<u64>) -> bool {
        let parts = backed.within(&range);
        parts.iter().all(|part| backed.take_out(part, || ()))
    }

    #[test]
    fn there_are_never_more_mappings_than_the_process_may_have() {
        let end = 4 * MAX_MAPPINGS as u64;
        let mut backed = Backed::new(vec![0..end; 1]);
        // What is left between two is taken out at once, so that there are few parts at any time.
        let mut kept = (1..end - 2)
            .step_by(2)
            .filter(|at| !take(&mut backed, *at..at + 1) || !take(&mut backed, at - 1..*at));
        let first_kept = kept.next().unwrap();
        // It begins with three, and each that was taken out is two more.
        assert_eq!(first_kept, MAX_MAPPINGS as u64 - 3);
        assert_eq!(backed.ranges(), vec![first_kept - 1..end; 1]);
        // The end is one more, and there is none for what is then the end. What makes none more is still taken out.
        assert!(take(&mut backed, end - 8..end));
        assert!(!take(&mut backed, end - 16..end - 8));
        assert!(take(&mut backed, 0..end));
    }

    #[test]
    fn what_was_taken_out_is_put_back_and_never_in_too_many_mappings() {
        let end = 4 * MAX_MAPPINGS as u64;
        let all = [0..end, end + 8..end + 16];
        let mut backed = Backed::new(all.to_vec());
        assert_eq!(backed.put_back(&all), []);
        let mut anew = 0;
        for round in 0..MAX_MAPPINGS as u64 {
            assert!(take(&mut backed, 7..9));
            assert!(take(&mut backed, end - 2..end + 10));
            let back = backed.put_back(&all);
            if back == all {
                anew += 1;
                assert_eq!(backed.mappings, 5, "{round}");
            } else {
                assert_eq!(back, [7..9, end - 2..end, end + 8..end + 10]);
            }
            assert_eq!(backed.ranges(), all);
            assert!(backed.mappings <= MAX_MAPPINGS / 2 + 4);
        }
        assert!(anew > 2, "{anew}");
    }

    proptest! {
        #[test]
        fn what_is_taken_out_is_what_was_named(
            ranges in proptest::collection::vec((0u64..100, 1u64..30), 1..20),
        ) {
            let mut backed = Backed::new(vec![0..20, 30..64, 70..71]);
            let in_any = |ranges: &[Range<u64>], at| ranges.iter().any(|range| range.contains(&at));
            let mut model: Vec<bool> = (0..130).map(|at| in_any(&backed.ranges(), at)).collect();
            let was = model.clone();
            for (start, bytes) in ranges {
                prop_assert!(take(&mut backed, start..start + bytes));
                model[start as usize..(start + bytes) as usize].fill(false);
                let found: Vec<bool> = (0..130).map(|at| in_any(&backed.ranges(), at)).collect();
                prop_assert_eq!(&found, &model);
                let missing = backed.missing(&[0..20, 30..64, 70..71]);
                let is_missing = |at| in_any(&missing, at);
                prop_assert!((0..130).all(|at| is_missing(at) == (was[at as usize] && !model[at as usize])));
            }
        }
    }
}
