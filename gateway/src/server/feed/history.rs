//! The newest batches of one partition, kept in memory so that most who come back need not be fed from the log.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use crate::log::{Batch, Record};

/// What a record takes beside its bytes, about.
const RECORD_BYTES: usize = 256;
/// Batches that have come one by one are joined to pages of so many records at least, or so many bytes.
const PAGE_RECORDS: usize = 500;
const PAGE_BYTES: usize = 256 * 1024;

/// A window of a partition that ends where the feed stands.
#[derive(Debug, Default)]
pub(super) struct History {
    batches: VecDeque<Arc<Batch>>,
    bytes: usize,
    max_bytes: usize,
    /// The window begins here.
    from: i64,
}

impl History {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self {
            max_bytes,
            ..Self::default()
        }
    }

    /// Forgets everything and begins at `from`.
    pub(super) fn restart(&mut self, from: i64) {
        *self = Self {
            from,
            ..Self::new(self.max_bytes)
        };
    }

    pub(super) fn push(&mut self, batch: Arc<Batch>) {
        self.bytes += size_bytes(&batch);
        self.batches.push_back(batch);
        while self.bytes > self.max_bytes
            && let Some(oldest) = self.batches.pop_front()
        {
            self.bytes -= size_bytes(&oldest);
            self.from = oldest.next_offset.0;
        }
    }

    /// What stands at an offset, or next after it, and some of what follows; `None` when the window does not reach back so far, or
    /// ends before.
    pub(super) fn page(&self, offset: i64) -> Option<Arc<Batch>> {
        let index = self.index(offset)?;
        let first = &self.batches[index];
        let (mut records, mut bytes, mut end) = (0, 0, index);
        while let Some(batch) = self.batches.get(end)
            && records < PAGE_RECORDS
            && bytes < PAGE_BYTES
        {
            records += batch.records.len();
            bytes += size_bytes(batch);
            end += 1;
        }
        if end == index + 1 {
            return Some(first.clone());
        }
        let last = &self.batches[end - 1];
        let parts = self.batches.range(index..end);
        Some(Arc::new(Batch {
            partition: first.partition.clone(),
            records: parts.flat_map(|batch| &batch.records).cloned().collect(),
            next_offset: last.next_offset,
            caught_up: last.caught_up,
        }))
    }

    /// Whether there is a page for an offset.
    pub(super) fn holds(&self, offset: i64) -> bool {
        self.index(offset).is_some()
    }

    /// The batch that an offset is in, or the next after it.
    fn index(&self, offset: i64) -> Option<usize> {
        if offset < self.from {
            return None;
        }
        let index = self.batches.partition_point(|batch| batch.next_offset.0 <= offset);
        (index < self.batches.len()).then_some(index)
    }

    /// The offset of the newest record with a key, if it is in the window.
    pub(super) fn last_of(&self, key: &[u8]) -> Option<i64> {
        let records = self.batches.iter().rev().flat_map(|batch| batch.records.iter().rev());
        records
            .into_iter()
            .find(|record| record.key.as_deref() == Some(key))
            .map(|record| record.offset)
    }
}

fn size_bytes(batch: &Batch) -> usize {
    let size = |record: &Record| RECORD_BYTES + record.value.as_ref().map_or(0, Bytes::len);
    batch.records.iter().map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{Headers, NextOffset, TopicPartition};

    fn batch(offsets: std::ops::Range<i64>, next: i64) -> Arc<Batch> {
        let record = |offset: i64| Record {
            offset,
            timestamp_ms: 0,
            key: Some(format!("k{}", offset % 3).into()),
            value: None,
            headers: Headers::new(),
        };
        let partition = TopicPartition::new("t", 0);
        Arc::new(Batch {
            partition,
            records: offsets.map(record).collect(),
            next_offset: NextOffset(next),
            caught_up: true,
        })
    }

    #[test]
    fn pages_are_found_by_offset_and_the_oldest_go_first() {
        let mut history = History::new(5 * RECORD_BYTES);
        history.restart(10);
        history.push(batch(10..12, 12));
        history.push(batch(12..14, 20));
        assert!(history.page(9).is_none() && !history.holds(9), "before the window");
        assert_eq!(history.page(19).expect("a page").next_offset.0, 20);
        assert!(history.page(20).is_none() && !history.holds(20), "the end");
        history.push(batch(20..22, 22));
        assert!(history.page(11).is_none(), "the first batch is gone");
        assert!(history.holds(12));
        assert_eq!(
            (history.last_of(b"k0"), history.last_of(b"k2"), history.last_of(b"x")),
            (Some(21), Some(20), None)
        );
    }

    #[test]
    fn a_page_joins_small_batches_and_never_splits_one() {
        let mut history = History::new(usize::MAX);
        for offset in 0..2 * PAGE_RECORDS as i64 {
            history.push(batch(offset..offset + 1, offset + 1));
        }
        let page = history.page(3).expect("a page");
        assert_eq!((page.records.len(), page.records[0].offset), (PAGE_RECORDS, 3));
        assert_eq!(page.next_offset.0, 3 + PAGE_RECORDS as i64);
        let end = 2 * PAGE_RECORDS as i64;
        history.push(batch(end..end + 3, end + 3));
        assert_eq!(history.page(end + 1).expect("a page").records.len(), 3);
    }
}
