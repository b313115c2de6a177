//! Reading a part of a topic again, from one place to another: the log is the truth, and state is a fold of it.
//!
//! ```text
//! topic ══ the range, its end taken when the replay starts ══▶ one order ──▶ fold ──▶ state
//! ```
//! [`Replay`] says what is wanted and in which order, [`Replay::open`] finds where that stands, and [`Replaying`] reads it. It is in no
//! group, commits nothing, and sends nothing.
//!
//! Invariant: a replay is all of its range or an error. The same offsets again are the same records in the same order.

mod merged;

use std::collections::BTreeMap;
use std::ops::{Bound, Deref, Range, RangeBounds};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use self::merged::{Merged, Part};
use super::Error;
use crate::log::{self, Log, Record, StartAt, TopicPartition};

/// Which records of a topic are wanted again, and in which order. Without more said: all, from offset 0 to the end at the start.
///
/// ```
/// use barnabas::patterns::replay::{Merge, Replay};
///
/// # async fn stock(log: &barnabas::log::Log) -> Result<(), barnabas::patterns::Error> {
/// // How many events there were in November, the oldest first.
/// let november = Replay::topic("stock.events").from_ms(1_793_491_200_000).before_ms(1_796_083_200_000);
/// let events = november.merge(Merge::ByTimestamp).fold(log, 0, |count, _event| *count += 1).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Replay {
    topic: String,
    /// Nothing: all partitions, from their first offset to their end.
    offsets: Option<BTreeMap<i32, (i64, Option<i64>)>>,
    from_ms: Option<i64>,
    before_ms: Option<i64>,
    merge: Merge,
    allow_truncated: bool,
}

/// In which order the records of several partitions come. Within a partition it is always that of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Merge {
    /// All of the lowest partition, then all of the next.
    #[default]
    PartitionByPartition,
    /// The partitions side by side: of their next records that with the lowest timestamp, and of equal ones that of the lowest
    /// partition. Where the timestamps of a partition go back, the record comes as soon as it is its partition's next.
    ByTimestamp,
}

impl Replay {
    /// All records of a topic.
    pub fn topic(topic: impl Into<String>) -> Self {
        Self {
            topic: topic.into(),
            offsets: None,
            from_ms: None,
            before_ms: None,
            merge: Merge::default(),
            allow_truncated: false,
        }
    }

    /// Only these partitions, each from one offset to another, such as `[(0, 17..40)]`. A range without a beginning has offset 0, one
    /// without an end has the end when the replay starts.
    #[must_use]
    pub fn offsets<R: RangeBounds<i64>>(mut self, offsets: impl IntoIterator<Item = (i32, R)>) -> Self {
        let range = |(partition, range): (i32, R)| {
            let from = match range.start_bound() {
                Bound::Included(from) => *from,
                Bound::Excluded(before) => before.saturating_add(1),
                Bound::Unbounded => 0,
            };
            let to = match range.end_bound() {
                Bound::Included(last) => Some(last.saturating_add(1)),
                Bound::Excluded(to) => Some(*to),
                Bound::Unbounded => None,
            };
            (partition, (from, to))
        };
        self.offsets = Some(offsets.into_iter().map(range).collect());
        self
    }

    /// Only records whose timestamp is this or later, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn from_ms(mut self, from_ms: i64) -> Self {
        self.from_ms = Some(from_ms);
        self
    }

    /// Only records whose timestamp is before this, in milliseconds since the Unix epoch. Timestamps may go back, so it is read on to
    /// the end all the same.
    #[must_use]
    pub fn before_ms(mut self, before_ms: i64) -> Self {
        self.before_ms = Some(before_ms);
        self
    }

    /// The order of the partitions. Default [`Merge::PartitionByPartition`].
    #[must_use]
    pub fn merge(mut self, merge: Merge) -> Self {
        self.merge = merge;
        self
    }

    /// Passes over what is no longer kept, at the beginning and on the way, in place of [`Error::Truncated`].
    #[must_use]
    pub fn allow_truncated(mut self) -> Self {
        self.allow_truncated = true;
        self
    }

    /// Finds where the range stands now. What is appended later is not in it.
    ///
    /// # Errors
    /// [`Error::Truncated`] when the beginning is no longer kept, or it cannot be told. [`Error::Log`], with
    /// [`log::Error::OffsetOutOfRange`] when an offset lies behind the end of what is committed.
    pub async fn open(self, log: &Log) -> Result<Replaying, Error> {
        let parts = self.parts(log).await?;
        let progress = Progress::new(&parts);
        let offsets = parts
            .iter()
            .map(|part| (part.partition(), part.next..part.to))
            .collect();
        let reader = log.reader(&self.topic).await?;
        let is_side_by_side = self.merge == Merge::ByTimestamp;
        Ok(Replaying {
            records: Merged::new(reader, parts, is_side_by_side),
            log: log.clone(),
            offsets,
            progress,
            times: (
                self.from_ms.map_or(Bound::Unbounded, Bound::Included),
                self.before_ms.map_or(Bound::Unbounded, Bound::Excluded),
            ),
            allow_truncated: self.allow_truncated,
        })
    }

    /// [`Replay::open`] and [`Replaying::fold`].
    ///
    /// # Errors
    /// Those of both.
    pub async fn fold<S>(self, log: &Log, state: S, fold: impl FnMut(&mut S, Replayed)) -> Result<S, Error> {
        self.open(log).await?.fold(state, fold).await
    }

    async fn parts(&self, log: &Log) -> Result<Vec<Part>, Error> {
        let count = log.describe_topic(&self.topic).await?.partitions;
        let topic: Arc<str> = self.topic.as_str().into();
        let wanted: BTreeMap<i32, (i64, Option<i64>)> = match &self.offsets {
            Some(offsets) => offsets.clone(),
            None => (0..count).map(|number| (number, (0, None))).collect(),
        };
        let partitions: Vec<_> = wanted
            .keys()
            .map(|number| TopicPartition::new(topic.clone(), *number))
            .collect();
        let ends = log.offsets(&partitions, StartAt::End).await?;
        // In this order: what is deleted between the questions is then taken for missing, never for kept.
        let found = match self.from_ms {
            Some(from_ms) => log.offsets(&partitions, StartAt::TimeMs(from_ms)).await?,
            None => vec![0; partitions.len()],
        };
        let first = log.offsets(&partitions, StartAt::TimeMs(i64::MIN)).await?;
        let kept = log.offsets(&partitions, StartAt::Start).await?;
        let mut parts = Vec::new();
        for (index, (from, to)) in wanted.into_values().enumerate() {
            let (partition, end, kept) = (partitions[index].clone(), ends[index], kept[index]);
            let to = to.unwrap_or(end);
            if from > end || to > end {
                let (offset, start) = (from.max(to), kept);
                return Err(Error::Log(log::Error::OffsetOutOfRange {
                    partition,
                    offset,
                    start,
                    end,
                }));
            }
            // A kept record from before the time shows that what is deleted was from before it too.
            let is_witnessed = self.from_ms.is_some() && first[index] < found[index];
            if from < to && from < kept && !is_witnessed && !self.allow_truncated {
                return Err(Error::Truncated {
                    partition,
                    wanted: self.from_ms.map_or(StartAt::Offset(from), StartAt::TimeMs),
                    first_kept: kept,
                });
            }
            let mut next = from.max(found[index]);
            if self.allow_truncated {
                next = next.max(kept);
            }
            parts.push(Part::new(partition, next.min(to), to));
        }
        Ok(parts)
    }
}

/// Between which timestamps.
type Times = (Bound<i64>, Bound<i64>);

/// A replay under way. Dropped, it ends.
#[derive(Debug)]
pub struct Replaying {
    records: Merged,
    log: Log,
    offsets: BTreeMap<i32, Range<i64>>,
    progress: Progress,
    times: Times,
    allow_truncated: bool,
}

/// A record of the past. Whoever gets it is in a replay, and has nothing to send from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// Its partition.
    pub partition: i32,
    /// The record as it stands there.
    pub record: Record,
}

impl Deref for Replayed {
    type Target = Record;

    fn deref(&self) -> &Record {
        &self.record
    }
}

impl Replaying {
    /// Where the range stands: with [`Replay::offsets`] these are the places to read again, whatever was appended meanwhile. An empty
    /// range holds nothing. Those of a range by time are read with its times again.
    pub fn offsets(&self) -> &BTreeMap<i32, Range<i64>> {
        &self.offsets
    }

    /// How far it is, to be looked at from wherever one is.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// The next record; `None` when all have been. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Truncated`] when retention has taken what comes next: there is no way on. After any other [`Error::Log`] that is
    /// retriable the next call goes on.
    pub async fn next(&mut self) -> Result<Option<Replayed>, Error> {
        loop {
            match self.records.next(&self.times, &self.progress).await {
                Ok(record) => return Ok(record),
                Err(error @ log::Error::OffsetOutOfRange { .. }) => self.pass_over(error).await?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Goes on behind what was deleted, if that is allowed.
    async fn pass_over(&mut self, error: log::Error) -> Result<(), Error> {
        let log::Error::OffsetOutOfRange { partition, offset, .. } = &error else {
            return Err(error.into());
        };
        let first_kept = self.log.offset(partition, StartAt::Start).await?;
        if first_kept <= *offset {
            // Nothing was deleted there: the partition ends before it.
            return Err(error.into());
        }
        if !self.allow_truncated {
            return Err(Error::Truncated {
                partition: partition.clone(),
                wanted: StartAt::Offset(*offset),
                first_kept,
            });
        }
        self.records.skip(partition.partition, first_kept, &self.progress);
        Ok(())
    }

    /// Folds all that is left into a state. A fold that can fail calls [`Replaying::next`] itself.
    ///
    /// # Errors
    /// Those of [`Replaying::next`].
    pub async fn fold<S>(mut self, mut state: S, mut fold: impl FnMut(&mut S, Replayed)) -> Result<S, Error> {
        while let Some(record) = self.next().await? {
            fold(&mut state, record);
        }
        Ok(state)
    }
}

/// How far a replay has read. Clones see the same.
#[derive(Clone, Debug)]
pub struct Progress(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    read: AtomicU64,
    all: u64,
}

impl Progress {
    fn new(parts: &[Part]) -> Self {
        let all = parts.iter().map(Part::left).sum();
        Self(Arc::new(Counts {
            read: AtomicU64::new(0),
            all,
        }))
    }

    fn add(&self, offsets: u64) {
        self.0.read.fetch_add(offsets, Ordering::Relaxed);
    }

    /// Offsets that lie behind, records or not. Up to some thousand records of them are on their way to the fold.
    pub fn read(&self) -> u64 {
        self.0.read.load(Ordering::Relaxed)
    }

    /// Offsets of the range, records or not.
    pub fn all(&self) -> u64 {
        self.0.all
    }
}
