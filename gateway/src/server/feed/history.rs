//! The newest batches of one partition, kept in memory so that most who come back need not be fed from the log.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use crate::log::{Batch, Record};

/// What a record takes beside its bytes, about.
const RECORD_BYTES: usize = 256;

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

    /// The batch that an offset is in, or the next after it; `None` when the window does not reach back so far, or ends before.
    pub(super) fn page(&self, offset: i64) -> Option<Arc<Batch>> {
        if offset < self.from {
            return None;
        }
        let index = self.batches.partition_point(|batch| batch.next_offset.0 <= offset);
        self.batches.get(index).cloned()
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
        assert!(history.page(9).is_none(), "before the window");
        assert_eq!(history.page(10).expect("a page").next_offset.0, 12);
        assert_eq!(history.page(13).expect("a page").next_offset.0, 20);
        assert_eq!(history.page(19).expect("a page").next_offset.0, 20);
        assert!(history.page(20).is_none(), "the end");
        history.push(batch(20..22, 22));
        assert!(history.page(11).is_none(), "the first page is gone");
        assert_eq!(history.page(12).expect("a page").next_offset.0, 20);
        assert_eq!(
            (history.last_of(b"k0"), history.last_of(b"k2"), history.last_of(b"x")),
            (Some(21), Some(20), None)
        );
    }
}
