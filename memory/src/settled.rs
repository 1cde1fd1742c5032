//! Which pages need no content any more, of memory whose content comes while its machine runs.

use std::{
    ops::Range,
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::PAGE_BYTES;

/// A page is settled once, by its content or by its guest, who gives it back. What has been settled gets no content any
/// more: that would be of long ago.
#[derive(Debug)]
pub(crate) struct Settled {
    /// A bit for each page.
    pages: Box<[AtomicU64]>,
    /// Shared by those who put pages, from before they look whether a page is settled until it is; alone for who gives
    /// some back. Nobody who has it touches guest memory, so that nobody who waits for a page has it.
    turn: RwLock<()>,
    /// Nothing comes any more.
    complete: AtomicBool,
}

impl Settled {
    /// Of so many bytes of memory, of which nothing is settled.
    pub(crate) fn new(bytes: u64) -> Self {
        let words = bytes.div_ceil(PAGE_BYTES).div_ceil(64);
        Self {
            pages: (0..words).map(|_| AtomicU64::new(0)).collect(),
            turn: RwLock::new(()),
            complete: AtomicBool::new(false),
        }
    }

    /// Has `put` put each run of pages of `range` that are not settled, which then are. Returns their bytes. Others may put the
    /// same at the same time. Once everything has come, nothing is put.
    pub(crate) fn settle<E>(
        &self,
        range: &Range<u64>,
        mut put: impl FnMut(Range<u64>) -> Result<(), E>,
    ) -> Result<u64, E> {
        let _turn = self.turn.read().unwrap_or_else(PoisonError::into_inner);
        if self.is_complete() {
            return Ok(0);
        }
        let mut bytes = 0;
        let mut at = range.start;
        while let Some(run) = self.next_open(at..range.end) {
            put(run.clone())?;
            bytes += self.mark(&run);
            at = run.end;
        }
        Ok(bytes)
    }

    /// Has `forget` forget the content of `range`, none of which comes back.
    pub(crate) fn give_back<T>(&self, range: &Range<u64>, forget: impl FnOnce() -> T) -> T {
        if self.is_complete() {
            return forget();
        }
        let _turn = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        self.mark(range);
        forget()
    }

    /// Whether any page of `range` is not settled.
    pub(crate) fn is_open(&self, range: &Range<u64>) -> bool {
        self.next_open(range.clone()).is_some()
    }

    /// Has `put` put a page that needs no content, unless everything has come; whether it did.
    pub(crate) fn put_again<E>(&self, put: impl FnOnce() -> Result<(), E>) -> Result<bool, E> {
        let _turn = self.turn.read().unwrap_or_else(PoisonError::into_inner);
        if self.is_complete() {
            return Ok(false);
        }
        put().map(|()| true)
    }

    /// Says that nothing comes any more. When this returns, nobody is putting any either.
    pub(crate) fn complete(&self) {
        let _turn = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        self.complete.store(true, Ordering::Release);
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// The first run of pages in `range` that are not settled.
    fn next_open(&self, range: Range<u64>) -> Option<Range<u64>> {
        let mut offsets = range.clone().step_by(PAGE_BYTES as usize);
        let start = offsets.find(|offset| !self.is_settled(*offset))?;
        let end = offsets.find(|offset| self.is_settled(*offset));
        Some(start..end.unwrap_or(range.end))
    }

    fn is_settled(&self, offset: u64) -> bool {
        let (word, bit) = place(offset);
        let word = self.pages.get(word);
        word.is_none_or(|word| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Returns the bytes of those that were not settled.
    fn mark(&self, range: &Range<u64>) -> u64 {
        let offsets = range.clone().step_by(PAGE_BYTES as usize);
        let new = offsets.filter(|offset| {
            let (word, bit) = place(*offset);
            let word = self.pages.get(word);
            word.is_some_and(|word| word.fetch_or(bit, Ordering::AcqRel) & bit == 0)
        });
        new.count() as u64 * PAGE_BYTES
    }
}

/// Which word has the bit of the page at `offset`, and the bit.
fn place(offset: u64) -> (usize, u64) {
    let page = offset / PAGE_BYTES;
    ((page / 64) as usize, 1 << (page % 64))
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, convert::Infallible};

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 200;

    /// What a page has.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Page {
        Nothing,
        Content,
        GivenBack,
    }

    #[derive(Clone, Debug)]
    enum Step {
        Put(Range<u64>),
        Fail(Range<u64>),
        GiveBack(Range<u64>),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let range = (0..PAGES, 0..90u64)
            .prop_map(|(start, count)| start * PAGE_BYTES..(start + count).min(PAGES) * PAGE_BYTES);
        (0..5, range).prop_map(|(kind, range)| match kind {
            0..=2 => Step::Put(range),
            3 => Step::Fail(range),
            _ => Step::GiveBack(range),
        })
    }

    fn pages(range: &Range<u64>) -> Range<usize> {
        (range.start / PAGE_BYTES) as usize..(range.end / PAGE_BYTES) as usize
    }

    proptest! {
        #[test]
        fn each_page_gets_its_content_once_and_never_after_it_was_given_back(
            steps in proptest::collection::vec(any_step(), 1..40),
        ) {
            let settled = Settled::new(PAGES * PAGE_BYTES);
            let model = RefCell::new([Page::Nothing; PAGES as usize]);
            for step in steps {
                match step {
                    Step::Put(range) => {
                        let before = *model.borrow();
                        let put = settled.settle(&range, |run| {
                            let mut model = model.borrow_mut();
                            for page in &mut model[pages(&run)] {
                                assert_eq!(*page, Page::Nothing);
                                *page = Page::Content;
                            }
                            Ok::<_, Infallible>(())
                        });
                        let Ok(put) = put;
                        let model = model.borrow();
                        prop_assert!(!model[pages(&range)].contains(&Page::Nothing));
                        let new = before.iter().zip(model.iter()).filter(|(a, b)| a != b);
                        prop_assert_eq!(put, new.count() as u64 * PAGE_BYTES);
                    }
                    // What could not be put is still to come.
                    Step::Fail(range) => {
                        let open = settled.is_open(&range);
                        prop_assert_eq!(settled.settle(&range, |_| Err(())).is_err(), open);
                    }
                    Step::GiveBack(range) => settled.give_back(&range, || {
                        model.borrow_mut()[pages(&range)].fill(Page::GivenBack);
                    }),
                }
                for (page, state) in (0..).zip(*model.borrow()) {
                    let range = page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
                    prop_assert_eq!(settled.is_open(&range), state == Page::Nothing);
                }
            }
        }
    }

    #[test]
    fn what_is_beyond_the_memory_needs_nothing() {
        let settled = Settled::new(PAGE_BYTES);
        assert!(settled.is_open(&(0..PAGE_BYTES)));
        assert!(!settled.is_open(&(64 * PAGE_BYTES..65 * PAGE_BYTES)));
    }

    #[test]
    fn nobody_gives_back_while_somebody_puts() {
        let settled = Settled::new(PAGE_BYTES);
        let range = 0..PAGE_BYTES;
        let order = std::sync::Mutex::new(Vec::new());
        let say = |what| order.lock().unwrap().push(what);
        std::thread::scope(|scope| {
            let (began, begun) = std::sync::mpsc::channel();
            scope.spawn(|| {
                settled.settle(&range, move |_| {
                    began.send(()).unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    say("put");
                    Ok::<_, Infallible>(())
                })
            });
            begun.recv().unwrap();
            settled.give_back(&range, || say("forgotten"));
        });
        assert_eq!(*order.lock().unwrap(), ["put", "forgotten"]);
    }
}
