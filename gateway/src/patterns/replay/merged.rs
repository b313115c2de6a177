//! The records of several partitions in one order, whatever order their batches arrive in.
//!
//! Read ahead are one partition, or all side by side. Then a partition's batches wait until every other has a next record to compare
//! with; one that is too far ahead rests, that is, it is not read until half of what waits has gone. So what is held is bounded by
//! [`AHEAD_BYTES`] for each partition, and a batch.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ops::{Range, RangeBounds as _};

use super::{Progress, Replayed, Times};
use crate::log::{Batch, Reader, Record, Result, StartAt, TopicPartition};

/// Bytes of a partition that wait to be merged before it rests.
const AHEAD_BYTES: usize = 4 * 1024 * 1024;
/// What a record takes beside its key and value.
const RECORD_BYTES: usize = 128;

/// One partition of the range.
#[derive(Debug)]
pub(super) struct Part {
    partition: TopicPartition,
    /// Where reading goes on.
    pub(super) next: i64,
    /// Where it ends.
    pub(super) to: i64,
    /// Read, and not handed out.
    waiting: VecDeque<Record>,
    waiting_bytes: usize,
    /// Whether the reader has it.
    is_assigned: bool,
}

impl Part {
    pub(super) fn new(partition: TopicPartition, next: i64, to: i64) -> Self {
        Self {
            partition,
            next,
            to,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            is_assigned: false,
        }
    }

    pub(super) fn partition(&self) -> i32 {
        self.partition.partition
    }

    /// Offsets that are not read.
    pub(super) fn left(&self) -> u64 {
        u64::try_from(self.to - self.next).unwrap_or(0)
    }

    fn is_read(&self) -> bool {
        self.next >= self.to
    }

    fn advance(&mut self, next: i64, progress: &Progress) {
        let before = self.left();
        self.next = self.next.max(next.min(self.to));
        progress.add(before - self.left());
    }

    /// Whether nothing can be merged before it has been read on.
    fn is_hungry(&self) -> bool {
        self.waiting.is_empty() && !self.is_read()
    }

    fn is_to_be_assigned(&self) -> bool {
        !self.is_assigned && !self.is_read() && self.waiting_bytes <= AHEAD_BYTES / 2
    }
}

/// Reads parts and merges them.
#[derive(Debug)]
pub(super) struct Merged {
    reader: Reader,
    parts: Vec<Part>,
    /// Those that are read now, by their places in `parts`.
    open: Range<usize>,
    /// The next record of each open part that has one: its timestamp and the part.
    heads: BinaryHeap<Reverse<(i64, usize)>>,
    /// Whether it has to be looked what the open parts lack.
    is_short: bool,
}

impl Merged {
    pub(super) fn new(reader: Reader, parts: Vec<Part>, is_side_by_side: bool) -> Self {
        Self {
            reader,
            open: if is_side_by_side { 0..parts.len() } else { 0..0 },
            parts,
            heads: BinaryHeap::new(),
            is_short: true,
        }
    }

    /// The next record with a timestamp in `times`; `None` when all parts have been read. Cancel safe.
    pub(super) async fn next(&mut self, times: &Times, progress: &Progress) -> Result<Option<Replayed>> {
        loop {
            if self.is_short {
                self.fill(times, progress).await?;
            }
            if let Some(Reverse((_, index))) = self.heads.pop() {
                return Ok(self.take(index));
            }
            if self.open.end == self.parts.len() {
                return Ok(None);
            }
            self.open = self.open.end..self.open.end + 1;
            self.is_short = true;
        }
    }

    /// Goes on from a later offset of a partition, as those before are gone.
    pub(super) fn skip(&mut self, partition: i32, to: i64, progress: &Progress) {
        if let Some(part) = self.parts.iter_mut().find(|part| part.partition() == partition) {
            part.advance(to, progress);
        }
    }

    fn take(&mut self, index: usize) -> Option<Replayed> {
        let part = &mut self.parts[index];
        let record = part.waiting.pop_front()?;
        part.waiting_bytes -= size_bytes(&record);
        if let Some(head) = part.waiting.front() {
            self.heads.push(Reverse((head.timestamp_ms, index)));
        }
        self.is_short = self.is_short || part.is_hungry() || part.is_to_be_assigned();
        Some(Replayed {
            partition: part.partition(),
            record,
        })
    }

    /// Reads until each open part has a next record or is read to its end.
    async fn fill(&mut self, times: &Times, progress: &Progress) -> Result<()> {
        loop {
            for index in self.open.clone() {
                if self.parts[index].is_to_be_assigned() {
                    self.assign(index).await?;
                }
            }
            if !self.parts[self.open.clone()].iter().any(Part::is_hungry) {
                self.is_short = false;
                return Ok(());
            }
            let batch = match self.reader.next().await {
                Ok(batch) => batch,
                Err(error) => {
                    if let crate::log::Error::OffsetOutOfRange { partition, .. } = &error {
                        self.unassigned(partition.partition);
                    }
                    return Err(error);
                }
            };
            if let Some(index) = self.add(batch, times, progress) {
                self.parts[index].is_assigned = false;
                self.reader.unassign(self.parts[index].partition()).await?;
            }
        }
    }

    async fn assign(&mut self, index: usize) -> Result<()> {
        let part = &mut self.parts[index];
        self.reader.assign(part.partition(), StartAt::Offset(part.next)).await?;
        part.is_assigned = true;
        Ok(())
    }

    fn unassigned(&mut self, partition: i32) {
        if let Some(part) = self.parts.iter_mut().find(|part| part.partition() == partition) {
            part.is_assigned = false;
        }
    }

    /// Takes what is wanted of a batch; the part, when it is not to be read on for now.
    fn add(&mut self, batch: Batch, times: &Times, progress: &Progress) -> Option<usize> {
        let number = batch.partition.partition;
        let index = self.parts.iter().position(|part| part.partition() == number)?;
        let part = &mut self.parts[index];
        let had_some = !part.waiting.is_empty();
        for record in batch.records {
            if record.offset < part.to && times.contains(&record.timestamp_ms) {
                part.waiting_bytes += size_bytes(&record);
                part.waiting.push_back(record);
            }
        }
        if let (false, Some(head)) = (had_some, part.waiting.front()) {
            self.heads.push(Reverse((head.timestamp_ms, index)));
        }
        // Behind the last record of the range may be nothing but markers and gaps, of which no record tells.
        let next = if batch.caught_up { part.to } else { batch.next_offset.0 };
        part.advance(next, progress);
        let is_too_far = had_some && part.waiting_bytes > AHEAD_BYTES;
        (part.is_read() || is_too_far).then_some(index)
    }
}

fn size_bytes(record: &Record) -> usize {
    RECORD_BYTES + record.size_bytes()
}
