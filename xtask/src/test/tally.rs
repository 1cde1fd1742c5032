//! Counts of passed and failed tests, read from what test runners print.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

/// How many tests passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    /// How many of those that passed had failed on another emulated machine before.
    pub(crate) unsteady: u32,
    /// How many emulated machines broke down.
    pub(crate) broken_down: u32,
}

impl Tally {
    /// What a line says, if it is a summary, as one of
    /// `test result: ok. 3 passed; 0 failed; 0 ignored; ...` (libtest) and
    /// `     Summary [   0.1s] 4 tests run: 3 passed (1 slow), 1 failed, 2 timed out, 1 skipped` (nextest).
    pub(crate) fn of_line(line: &str) -> Self {
        let counts = if let Some(counts) = line.strip_prefix("test result: ") {
            counts
        } else if let Some((_, counts)) = line
            .trim_start()
            .strip_prefix("Summary [")
            .and_then(|rest| rest.split_once("run: "))
        {
            counts
        } else {
            return Self::default();
        };
        let mut tally = Self::default();
        let words: Vec<&str> = counts
            .split([' ', ',', ';', '(', ')'])
            .filter(|word| !word.is_empty())
            .collect();
        for pair in words.windows(2) {
            let Ok(count) = pair[0].parse::<u32>() else {
                continue;
            };
            match pair[1] {
                "passed" => tally.passed += count,
                "failed" | "timed" | "exec" => tally.failed += count,
                _ => {}
            }
        }
        tally
    }
}

/// The names of the tests that failed, as libtest lists them at its end.
pub(crate) fn failures(output: &str) -> Vec<String> {
    let lines = output.lines().rev();
    let behind = lines
        .skip_while(|line| !line.starts_with("test result: "))
        .skip(1);
    let named = behind
        .take_while(|line| *line != "failures:")
        .filter_map(|line| line.strip_prefix("    "));
    let mut names: Vec<String> = named.map(str::to_owned).collect();
    names.reverse();
    // Without a list, that went on to whatever was printed before.
    if !output.contains("\nfailures:\n") {
        names.clear();
    }
    names
}

impl Add for Tally {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            unsteady: self.unsteady + other.unsteady,
            broken_down: self.broken_down + other.broken_down,
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Tally {
    fn sum<I: Iterator<Item = Self>>(tallies: I) -> Self {
        tallies.fold(Self::default(), Add::add)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.unsteady > 0 {
            write!(
                f,
                ", {} passed only on a second emulated machine",
                self.unsteady
            )?;
        }
        if self.broken_down > 0 {
            write!(f, ", {} emulated machines broke down", self.broken_down)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, passed: u32, failed: u32) {
        let expected = Tally {
            passed,
            failed,
            ..Tally::default()
        };
        assert_eq!(Tally::of_line(line), expected, "{line}");
    }

    #[test]
    fn libtest_summaries_count() {
        check(
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s",
            12,
            0,
        );
        check(
            "test result: FAILED. 1 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out",
            1,
            3,
        );
    }

    #[test]
    fn nextest_summaries_count() {
        check(
            "     Summary [   0.032s] 7 tests run: 7 passed, 0 skipped",
            7,
            0,
        );
        check(
            "     Summary [   9.100s] 9 tests run: 5 passed (1 slow, 2 leaky), 3 failed, 1 timed out, 2 skipped",
            5,
            4,
        );
        check(
            "     Summary [   0.1s] 2/9 tests run: 1 passed, 1 exec failed, 0 skipped",
            1,
            1,
        );
    }

    #[test]
    fn other_lines_count_nothing() {
        check("test tally::tests::a_test ... ok", 0, 0);
        check("printed by a test: 3 passed", 0, 0);
    }

    #[test]
    fn failures_are_those_of_the_list_at_the_end() {
        let output = "test a ... ok\ntest b::c ... FAILED\n\nfailures:\n\n---- b::c stdout ----\n    \
                      said\n\n\nfailures:\n    b::c\n    d\n\n\
                      test result: FAILED. 1 passed; 2 failed; 0 ignored\n\n";
        assert_eq!(failures(output), ["b::c", "d"]);
        let fine = "test a ... ok\n    said\n\ntest result: ok. 1 passed; 0 failed; 0 ignored\n";
        assert_eq!(failures(fine), [""; 0]);
    }
}
