//! How many dead letters are too many.

use std::collections::VecDeque;

/// Records that a ratio is taken of.
const WINDOW: usize = 100;

/// When a consumer stops making dead letters, so that a bad deployment does not empty a topic into them. It then handles nothing,
/// says so to operators, and goes on when one of them has a record tried again, or when it is started again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DlqLimit {
    /// The largest part of the last 100 records that may become dead letters; 1.0: all of them.
    pub ratio: f64,
    /// So many one after the other are too many; `None`: no number is.
    pub consecutive: Option<usize>,
}

/// Counts what becomes of records.
#[derive(Debug)]
pub(super) struct DeadLetterCount {
    limit: Option<DlqLimit>,
    /// The last records: whether each became a dead letter.
    window: VecDeque<bool>,
    in_window: usize,
    consecutive: usize,
    is_reached: bool,
}

impl DeadLetterCount {
    pub(super) fn new(limit: Option<DlqLimit>) -> Self {
        Self {
            limit,
            window: VecDeque::new(),
            in_window: 0,
            consecutive: 0,
            is_reached: false,
        }
    }

    /// So many records were handled well.
    pub(super) fn done(&mut self, records: usize) {
        if self.limit.is_none() || records == 0 {
            return;
        }
        self.consecutive = 0;
        for _ in 0..records.min(WINDOW) {
            self.push(false);
        }
    }

    /// One more is to become a dead letter. False: that would be too many.
    pub(super) fn add(&mut self) -> bool {
        let Some(limit) = self.limit else { return true };
        if !self.is_reached {
            self.consecutive += 1;
            self.push(true);
            #[expect(clippy::cast_precision_loss, reason = "at most WINDOW")]
            let ratio = self.in_window as f64 / WINDOW as f64;
            self.is_reached = ratio > limit.ratio || limit.consecutive.is_some_and(|most| self.consecutive > most);
        }
        !self.is_reached
    }

    pub(super) fn is_reached(&self) -> bool {
        self.is_reached
    }

    /// An operator has looked.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.limit);
    }

    fn push(&mut self, dead: bool) {
        self.window.push_back(dead);
        self.in_window += usize::from(dead);
        if self.window.len() > WINDOW && self.window.pop_front() == Some(true) {
            self.in_window -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(ratio: f64, consecutive: Option<usize>) -> DeadLetterCount {
        DeadLetterCount::new(Some(DlqLimit { ratio, consecutive }))
    }

    #[test]
    fn too_many_one_after_the_other_are_too_many() {
        let mut count = count(1.0, Some(3));
        assert!(count.add() && count.add() && count.add());
        count.done(1);
        assert!(count.add() && count.add() && count.add());
        assert!(!count.add() && count.is_reached());
        count.done(5);
        assert!(!count.add(), "only an operator makes it go on");
        count.reset();
        assert!(count.add());
    }

    #[test]
    fn a_part_of_the_last_hundred_is_too_much() {
        let mut count = count(0.1, None);
        for _ in 0..10 {
            assert!(count.add());
            count.done(9);
        }
        count.done(100);
        assert!((0..10).all(|_| count.add()), "what is long ago does not count");
        assert!(!count.add());
    }
}
