//! Which records of a partition are done, when they are done in any order.
//!
//! ```text
//! offsets   … 7 8 │ 9  10  11  12  13 │ 14 …          committed: 9, with the metadata "10 and 12 are done"
//!            done │ ?  done  ?  done ? │ not read
//! ```
//! A group commits the *completed prefix*: the offset before which everything is done. What is done above it is remembered in the
//! metadata of that commit, so that the next owner of the partition does not do it again.
//!
//! Invariant: an offset below [`Offsets::committable`] is done, or there is no record at it. Offsets have gaps (transaction markers,
//! what was aborted or compacted away), so a gap is never waited for.

use std::collections::VecDeque;

use data_encoding::BASE64URL_NOPAD;

use crate::log::NextOffset;

/// What metadata of this format begins with. Other metadata is not ours, and ignored.
const MARKER: &str = "bn1.";
/// Bytes of metadata at most: a broker takes 4096 (`offset.metadata.max.bytes`).
const MAX_METADATA_BYTES: usize = 3 * 1024;
/// Offsets of one word.
const WORD: i64 = 64;

/// How far one partition has been read and done.
#[derive(Debug)]
pub(super) struct Offsets {
    /// Where reading goes on.
    read: i64,
    /// Records that were read and are not done: a bit each. By the offset divided by 64, in order; most are added at the end and done at
    /// the front.
    words: VecDeque<(i64, u64)>,
    /// Words that are zero. The first never is.
    empty: usize,
    /// How many records are open.
    open: usize,
    /// Behind the last record that is known to be done.
    done_to: i64,
    /// Runs `[from, to)` that the last owner has done above what it committed, in order and apart.
    done_before: Vec<(i64, i64)>,
}

impl Offsets {
    /// A partition that is read from a committed offset on, whose metadata says what above it is done.
    pub(super) fn new(start: NextOffset, metadata: &str) -> Self {
        let done_before = decode(start.0, metadata).unwrap_or_default();
        Self {
            read: start.0,
            words: VecDeque::new(),
            empty: 0,
            open: 0,
            done_to: done_before.last().map_or(start.0, |(_, to)| *to),
            done_before,
        }
    }

    /// Takes note of a record that was read. False: it is done already.
    pub(super) fn read(&mut self, offset: i64) -> bool {
        self.read = self.read.max(offset + 1);
        if self.done_before.last().is_some_and(|(_, to)| *to > offset) {
            let index = self.done_before.partition_point(|(_, to)| *to <= offset);
            if self.done_before[index].0 <= offset {
                return false;
            }
        }
        let at = match self.find(offset) {
            Ok(at) => {
                self.empty -= usize::from(self.words[at].1 == 0);
                at
            }
            Err(at) => {
                self.words.insert(at, (offset.div_euclid(WORD), 0));
                at
            }
        };
        let word = &mut self.words[at].1;
        let is_new = *word & bit(offset) == 0;
        *word |= bit(offset);
        self.open += usize::from(is_new);
        is_new
    }

    /// The place of an offset's word, or where it belongs.
    fn find(&self, offset: i64) -> Result<usize, usize> {
        let index = offset.div_euclid(WORD);
        let is_at = |word: Option<&(i64, u64)>| word.is_some_and(|(at, _)| *at == index);
        match self.words.back() {
            Some((last, _)) if *last < index => Err(self.words.len()),
            last if is_at(last) => Ok(self.words.len() - 1),
            _ if is_at(self.words.front()) => Ok(0),
            _ => self.words.binary_search_by_key(&index, |(at, _)| *at),
        }
    }

    /// Takes note of how far reading has come: there is no further record before it.
    pub(super) fn reach(&mut self, next: NextOffset) {
        self.read = self.read.max(next.0);
    }

    /// Takes note that a record is done. False: it was not open.
    pub(super) fn complete(&mut self, offset: i64) -> bool {
        let Ok(at) = self.find(offset) else { return false };
        let word = &mut self.words[at].1;
        if *word & bit(offset) == 0 {
            return false;
        }
        *word &= !bit(offset);
        self.open -= 1;
        self.done_to = self.done_to.max(offset + 1);
        if *word == 0 {
            self.empty += 1;
            self.drop_empty_words();
        }
        true
    }

    fn drop_empty_words(&mut self) {
        while self.words.pop_front_if(|(_, word)| *word == 0).is_some() {
            self.empty -= 1;
        }
        // Behind one that stays open for long there would be ever more of them.
        if self.empty > self.words.len() / 2 {
            self.words.retain(|(_, word)| *word != 0);
            self.empty = 0;
        }
    }

    /// Whether a record is known to be done, or not to be.
    pub(super) fn is_done(&self, offset: i64) -> bool {
        let is_open = || {
            let word = self.find(offset).map_or(0, |at| self.words[at].1);
            word & bit(offset) != 0
        };
        match offset < self.read {
            true => !is_open(),
            false => self.done_before.iter().any(|(from, to)| (*from..*to).contains(&offset)),
        }
    }

    /// Behind the last record that is known to be done.
    pub(super) fn done_to(&self) -> i64 {
        self.done_to
    }

    /// How many runs of done records the metadata has to tell, give or take one.
    pub(super) fn runs(&self) -> usize {
        let behind = self.done_before.partition_point(|(_, to)| *to <= self.read);
        let mut runs = self.done_before.len() - behind;
        let (mut next, mut open) = (i64::MIN, false);
        for (index, word) in &self.words {
            let before = u64::from(open && *index == next);
            runs += (word & !(word << 1 | before)).count_ones() as usize;
            (next, open) = (index + 1, word >> 63 == 1);
        }
        runs
    }

    /// Records that are read and not done.
    pub(super) fn open(&self) -> usize {
        self.open
    }

    /// The open offsets in order.
    fn each_open(&self) -> impl Iterator<Item = i64> {
        self.words.iter().flat_map(|(index, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                let offset = (rest != 0).then(|| index * WORD + i64::from(rest.trailing_zeros()))?;
                rest &= rest - 1;
                Some(offset)
            })
        })
    }

    /// The offset to commit.
    pub(super) fn committable(&self) -> NextOffset {
        NextOffset(self.each_open().next().unwrap_or(self.read))
    }

    /// How far the partition has been read.
    pub(super) fn position(&self) -> NextOffset {
        NextOffset(self.read)
    }

    /// The metadata to commit with it: what is done above, and whether there was room for all of it. What is left out is done
    /// again.
    pub(super) fn metadata(&self) -> (String, bool) {
        let start = self.committable().0;
        let mut runs = Vec::new();
        let mut at = start;
        for open in self.each_open() {
            if open > at {
                runs.push((at, open));
                // There is no room for so many, whatever follows them.
                if runs.len() > MAX_METADATA_BYTES {
                    break;
                }
            }
            at = open + 1;
        }
        if at < self.read && at > start {
            runs.push((at, self.read));
        }
        let ahead = self.done_before.iter().filter(|(_, to)| *to > self.read);
        runs.extend(ahead.map(|(from, to)| ((*from).max(self.read), *to)));
        encode(start, &runs)
    }
}

fn bit(offset: i64) -> u64 {
    1 << offset.rem_euclid(WORD)
}

/// Lengths of what is open and what is done, in turn from `start` on, each as a LEB128 number.
fn encode(start: i64, runs: &[(i64, i64)]) -> (String, bool) {
    let room = (MAX_METADATA_BYTES - MARKER.len()) / 4 * 3;
    let mut bytes = Vec::new();
    let mut at = start;
    let mut is_all = true;
    for (from, to) in runs {
        let before = bytes.len();
        push_number(&mut bytes, (from - at).unsigned_abs());
        push_number(&mut bytes, (to - from).unsigned_abs());
        if bytes.len() > room {
            bytes.truncate(before);
            is_all = false;
            break;
        }
        at = *to;
    }
    let text = match bytes.is_empty() {
        true => String::new(),
        false => format!("{MARKER}{}", BASE64URL_NOPAD.encode(&bytes)),
    };
    (text, is_all)
}

/// `None` for what is not ours.
fn decode(start: i64, metadata: &str) -> Option<Vec<(i64, i64)>> {
    let bytes = BASE64URL_NOPAD.decode(metadata.strip_prefix(MARKER)?.as_bytes()).ok()?;
    let mut rest = bytes.as_slice();
    let (mut runs, mut at) = (Vec::new(), start);
    while !rest.is_empty() {
        let from = at.checked_add(take_number(&mut rest)?)?;
        let to = from.checked_add(take_number(&mut rest)?)?;
        runs.push((from, to));
        at = to;
    }
    Some(runs)
}

fn push_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_number(bytes: &mut &[u8]) -> Option<i64> {
    let mut number = 0i64;
    for index in 0..9 {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= i64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use rand::rngs::StdRng;
    use rand::seq::IteratorRandom as _;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    #[test]
    fn the_prefix_ends_at_the_first_record_that_is_not_done() {
        let mut offsets = Offsets::new(NextOffset(5), "");
        for offset in [5, 6, 9, 10] {
            assert!(offsets.read(offset));
        }
        offsets.reach(NextOffset(12));
        assert_eq!(offsets.committable(), NextOffset(5));
        assert!(offsets.complete(6) && offsets.complete(5) && !offsets.complete(5));
        assert_eq!(offsets.committable(), NextOffset(9), "the gap is not waited for");
        offsets.complete(10);
        assert_eq!((offsets.committable(), offsets.open()), (NextOffset(9), 1));
        let next = Offsets::new(offsets.committable(), &offsets.metadata().0);
        assert_eq!(next.done_before, [(10, 12)]);
        offsets.complete(9);
        assert_eq!(
            (offsets.committable(), offsets.metadata().0.as_str()),
            (NextOffset(12), "")
        );
    }

    #[test]
    fn metadata_of_others_is_ignored() {
        for metadata in ["", "x", "bn1", "bn1.!", "bn1.gICAgICAgICAgICA", "{\"a\":1}"] {
            assert!(Offsets::new(NextOffset(0), metadata).read(0), "{metadata}");
        }
    }

    #[test]
    fn metadata_that_would_be_too_long_says_the_first_part() {
        let mut offsets = Offsets::new(NextOffset(0), "");
        for offset in 0..20_000 {
            offsets.read(offset);
        }
        for offset in (1..20_000).step_by(2) {
            offsets.complete(offset);
        }
        let (metadata, is_all) = offsets.metadata();
        assert!(!is_all);
        assert!((MAX_METADATA_BYTES - 100..=MAX_METADATA_BYTES).contains(&metadata.len()));
        let mut next = Offsets::new(offsets.committable(), &metadata);
        assert!(next.read(0) && !next.read(1) && next.read(2) && !next.read(1001));
        assert!(next.read(19_999), "what did not fit is done again");
    }

    /// Owners come and go, records are done in any order, and offsets have gaps.
    #[test]
    fn nothing_is_passed_over_and_what_was_said_to_be_done_is_not_done_again() {
        for seed in 0..300 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut at = 0;
            let log: Vec<i64> = (0..200)
                .map(|_| {
                    at += random.random_range(1..4);
                    at
                })
                .collect();
            let mut done: BTreeMap<i64, u32> = BTreeMap::new();
            let (mut committed, mut metadata) = (NextOffset(0), String::new());
            loop {
                let mut offsets = Offsets::new(committed, &metadata);
                let mut open = BTreeSet::new();
                let mut unread = log.iter().copied().filter(|offset| *offset >= committed.0).peekable();
                for _ in 0..random.random_range(1..80) {
                    if random.random_bool(0.6)
                        && let Some(offset) = unread.next()
                    {
                        if offsets.read(offset) {
                            open.insert(offset);
                        } else {
                            assert!(done.contains_key(&offset), "seed {seed}: {offset} was never done");
                        }
                        offsets.reach(NextOffset(unread.peek().copied().unwrap_or(offset + 1)));
                    } else if let Some(offset) = open.iter().copied().choose(&mut random) {
                        open.remove(&offset);
                        *done.entry(offset).or_default() += 1;
                        assert!(offsets.complete(offset));
                    }
                }
                let undone = log.iter().find(|offset| !done.contains_key(offset));
                assert!(
                    undone.is_none_or(|undone| offsets.committable().0 <= *undone),
                    "seed {seed}: {undone:?} is passed over"
                );
                (committed, metadata) = (offsets.committable(), offsets.metadata().0);
                if undone.is_none() {
                    break;
                }
            }
            // Each owner commits what it has done, so nothing is ever done twice.
            assert!(done.values().all(|times| *times == 1), "seed {seed}");
        }
    }
}
