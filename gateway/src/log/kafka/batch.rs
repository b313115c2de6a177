//! Messages of one partition on their way from librdkafka's queue to a batch.

use super::event::{Message, RecordMemory};
use crate::log::{Batch, NextOffset, Record, TopicPartition};

/// A batch is handed over when it has this many records.
const BATCH_RECORDS: usize = 4000;
/// A batch is handed over when its keys and values have this many bytes.
const BATCH_BYTES: usize = 1024 * 1024;

/// What was read of one partition and is not handed over yet.
#[derive(Debug)]
pub(super) struct PartitionBuffer {
    pub(super) partition: TopicPartition,
    records: Vec<Record>,
    bytes: usize,
    /// Where reading goes on.
    pub(super) next_offset: i64,
    /// The end that was told last, so that it is told once.
    told_end: Option<i64>,
}

impl PartitionBuffer {
    pub(super) fn new(partition: TopicPartition, start: i64) -> Self {
        Self {
            partition,
            records: Vec::new(),
            bytes: 0,
            next_offset: start,
            told_end: None,
        }
    }

    /// Adds a message; a batch when it is full.
    pub(super) fn push(&mut self, message: &Message, memory: &mut RecordMemory) -> Option<Batch> {
        self.bytes += message.size_bytes();
        self.next_offset = message.offset() + 1;
        self.records.push(message.to_record(memory));
        (self.records.len() >= BATCH_RECORDS || self.bytes >= BATCH_BYTES).then(|| self.take(false))
    }

    /// Takes note of the end of the partition; a batch unless that was told already.
    pub(super) fn reach_end(&mut self, end: i64) -> Option<Batch> {
        // Markers and what was aborted or compacted away lie between the last record and the end.
        self.next_offset = self.next_offset.max(end);
        if self.records.is_empty() && self.told_end == Some(self.next_offset) {
            return None;
        }
        self.told_end = Some(self.next_offset);
        Some(self.take(true))
    }

    /// What is there, as a batch.
    pub(super) fn flush(&mut self) -> Option<Batch> {
        (!self.records.is_empty()).then(|| self.take(false))
    }

    /// Drops what is there and goes on from elsewhere.
    pub(super) fn restart(&mut self, at: i64) {
        *self = Self::new(self.partition.clone(), at);
    }

    fn take(&mut self, caught_up: bool) -> Batch {
        self.bytes = 0;
        Batch {
            partition: self.partition.clone(),
            records: std::mem::take(&mut self.records),
            next_offset: NextOffset(self.next_offset),
            caught_up,
        }
    }
}
