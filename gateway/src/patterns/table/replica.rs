//! The task that reads all partitions in no group and applies what it reads to the map.
//!
//! Invariant: it is ready when each partition has been read to where it ended when the table was opened, or to its end. It never waits
//! for a certain record: at the end may stand markers, what was aborted, or what compaction has taken.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::entry::{Key, Revision};
use super::error::Error;
use super::map::Said;
use super::{Shared, lane};
use crate::log::{
    self, Batch, CleanupPolicy, Reader, Record, StartAt, TopicDescription, TopicId, TopicPartition, partition_for_key,
};
use crate::patterns::MISSED_LOOKS;

/// Before what failed in passing is tried again.
const REST: Duration = Duration::from_millis(200);

/// Assigns all partitions, then reads on in a task until `stopping`, or until the topic or the log is gone.
pub(super) async fn start<K: Key, V: DeserializeOwned + Send + Sync + 'static>(
    shared: Arc<Shared<K, V>>,
    topic: &TopicDescription,
    stopping: CancellationToken,
) -> Result<(), Error> {
    let mut reader = shared.log.reader(&topic.name).await?;
    let partitions: Vec<_> = (0..topic.partitions)
        .map(|number| TopicPartition::new(shared.topic.clone(), number))
        .collect();
    let ends = shared.log.offsets(&partitions, StartAt::End).await?;
    let mut unread = HashMap::new();
    for (partition, end) in partitions.iter().zip(ends) {
        let start = reader.assign(partition.partition, StartAt::Start).await?;
        shared.progress.reach(partition.partition, start);
        if start < end {
            unread.insert(partition.partition, end);
        }
    }
    let mut replica = Replica {
        shared,
        reader,
        topic: topic.id,
        assigned: topic.partitions,
        is_ready: false,
        unread,
        deleted: HashSet::new(),
        missed_looks: 0,
    };
    replica.check_ready();
    tokio::spawn(replica.run(stopping));
    Ok(())
}

struct Replica<K, V> {
    shared: Arc<Shared<K, V>>,
    reader: Reader,
    topic: TopicId,
    /// Partitions that are read; the topic may have more already.
    assigned: i32,
    is_ready: bool,
    /// Where each partition ended when the table was opened, of those not read that far.
    unread: HashMap<i32, i64>,
    /// While loading: keys deleted at home, of which older records may turn up in other partitions.
    deleted: HashSet<K>,
    missed_looks: u32,
}

type Look = Pin<Box<dyn Future<Output = log::Result<TopicDescription>> + Send>>;

impl<K: Key, V: DeserializeOwned + Send + Sync + 'static> Replica<K, V> {
    async fn run(mut self, stopping: CancellationToken) {
        let ended = tokio::select! {
            () = stopping.cancelled() => Error::Log(log::Error::Closed),
            error = self.read() => {
                match &error {
                    Error::Log(log::Error::Closed) => tracing::debug!(topic = %self.shared.topic, "the table has ended"),
                    error => tracing::error!(topic = %self.shared.topic, %error, "the table has ended: {error}"),
                }
                error
            }
        };
        self.shared.progress.end(ended);
    }

    /// Reads until it cannot go on, and says why.
    async fn read(&mut self) -> Error {
        let mut look = self.look();
        loop {
            // Looking goes before reading, or it would never have its turn on a topic that is written to all the time.
            let done = tokio::select! {
                biased;
                found = &mut look => {
                    look = self.look();
                    self.found(found).await
                }
                batch = self.reader.next() => match batch {
                    Ok(batch) => {
                        self.apply(batch);
                        Ok(())
                    }
                    Err(error) => self.recover(error).await,
                },
            };
            if let Err(error) = done {
                return error;
            }
        }
    }

    fn look(&self) -> Look {
        let shared = &self.shared;
        let (log, topic, after) = (
            shared.log.clone(),
            shared.topic.clone(),
            shared.settings.partition_interval,
        );
        Box::pin(async move {
            sleep(after).await;
            log.describe_topic(&topic).await
        })
    }

    async fn found(&mut self, found: log::Result<TopicDescription>) -> Result<(), Error> {
        let topic = match found {
            Ok(topic) => topic,
            Err(log::Error::UnknownTopic(_)) => {
                self.missed_looks += 1;
                return match self.missed_looks < MISSED_LOOKS {
                    true => Ok(()),
                    false => Err(self.replaced()),
                };
            }
            Err(error) => {
                tracing::debug!(topic = %self.shared.topic, %error, "the topic cannot be looked at");
                return Ok(());
            }
        };
        self.missed_looks = 0;
        if topic.id != self.topic {
            return Err(self.replaced());
        }
        if topic.cleanup != CleanupPolicy::Compact {
            tracing::error!(
                topic = topic.name,
                cleanup = topic.cleanup.as_str(),
                "the topic of a table is no longer exactly compacted"
            );
        }
        self.shared.progress.set_partitions(topic.partitions);
        while self.assigned < topic.partitions {
            // From its start: what was written before this look belongs to the table too.
            match self.reader.assign(self.assigned, StartAt::Start).await {
                Ok(start) => self.shared.progress.reach(self.assigned, start),
                Err(log::Error::Closed) => return Err(log::Error::Closed.into()),
                Err(error) => {
                    tracing::warn!(
                        topic = topic.name, partition = self.assigned, %error, "a new partition cannot be read yet: {error}"
                    );
                    return Ok(());
                }
            }
            tracing::info!(topic = topic.name, partition = self.assigned, "a new partition is read");
            self.assigned += 1;
        }
        Ok(())
    }

    fn apply(&mut self, batch: Batch) {
        let shared = self.shared.clone();
        let (partition, partitions) = (batch.partition.partition, shared.progress.partitions());
        let mut seen = Vec::new();
        for record in &batch.records {
            let at = Revision {
                partition,
                offset: record.offset,
            };
            if let Some(write) = record
                .headers
                .last(lane::WRITE)
                .and_then(|id| Uuid::from_slice(id).ok())
            {
                seen.push((write, at));
            }
            match read_key::<K>(record) {
                Ok((bytes, key)) => self.apply_record(key, partition_for_key(bytes, partitions), record, at),
                Err(reason) => {
                    shared.progress.pass_over();
                    tracing::warn!(
                        topic = %shared.topic, partition, offset = record.offset, reason,
                        "passing over a record whose key cannot be read: {reason}"
                    );
                }
            }
        }
        if !seen.is_empty() {
            let mut applied = shared.progress.applied();
            if applied.awaits() {
                seen.into_iter().for_each(|(write, at)| applied.saw(write, at));
            }
        }
        let next_offset = batch.next_offset.0;
        shared.progress.reach(partition, next_offset);
        if self
            .unread
            .get(&partition)
            .is_some_and(|end| batch.caught_up || next_offset >= *end)
        {
            self.unread.remove(&partition);
            self.check_ready();
        }
    }

    fn apply_record(&mut self, key: K, home: i32, record: &Record, at: Revision) {
        let said = record.value.as_ref().map(|value| {
            serde_json::from_slice(value).map_or_else(
                |error| {
                    tracing::warn!(
                        topic = %self.shared.topic, partition = at.partition, offset = at.offset, %error,
                        "a value cannot be read: {error}"
                    );
                    Said::Unreadable(error.to_string().into())
                },
                |value| Said::Value(Arc::new(value)),
            )
        });
        if !self.is_ready {
            match (at.partition == home, &said) {
                (true, None) => drop(self.deleted.insert(key.clone())),
                (true, Some(_)) => drop(self.deleted.remove(&key)),
                (false, _) if self.deleted.contains(&key) => return,
                (false, _) => {}
            }
        }
        if self.shared.map.apply(key.clone(), said, at, home) {
            self.shared.watchers.tell(&key);
        }
    }

    fn check_ready(&mut self) {
        if self.unread.is_empty() && !self.is_ready {
            self.is_ready = true;
            self.deleted = HashSet::new();
            self.shared.progress.set_ready();
        }
    }

    /// Goes on after an error of the reader, if that can be.
    async fn recover(&mut self, error: log::Error) -> Result<(), Error> {
        match error {
            log::Error::OffsetOutOfRange { partition, .. } => match self.restart(partition.partition).await? {
                true => Ok(()),
                false => self.assign_again().await,
            },
            error @ (log::Error::Closed | log::Error::Unauthorized(_)) => Err(error.into()),
            // The reader has let go of a partition without saying which.
            log::Error::UnknownTopic(_) | log::Error::UnknownPartition(_) => self.assign_again().await,
            error => {
                tracing::warn!(topic = %self.shared.topic, %error, "the table cannot be read; trying on");
                sleep(REST).await;
                Ok(())
            }
        }
    }

    /// Reads all partitions from where they stand. Nothing else would do it for one that cannot be read now, so it goes on until all are,
    /// or until the topic is found to be gone.
    async fn assign_again(&mut self) -> Result<(), Error> {
        loop {
            // A topic that was missed is looked for as patiently as by every other look.
            sleep(match self.missed_looks {
                0 => REST,
                _ => self.shared.settings.partition_interval,
            })
            .await;
            let found = self.shared.log.describe_topic(&self.shared.topic).await;
            self.found(found).await?;
            if self.missed_looks == 0 && self.try_assign_again().await? {
                return Ok(());
            }
        }
    }

    /// Whether all of them could be assigned.
    async fn try_assign_again(&mut self) -> Result<bool, Error> {
        let next_offsets = self.shared.progress.next_offsets();
        for (partition, next_offset) in (0..self.assigned).zip(next_offsets) {
            let is_assigned = match self.reader.assign(partition, StartAt::Offset(next_offset)).await {
                Ok(_) => true,
                Err(log::Error::OffsetOutOfRange { .. }) => self.restart(partition).await?,
                Err(error) if is_unknown(&error) || error.is_retriable() => false,
                Err(error) => return Err(error.into()),
            };
            if !is_assigned {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads a partition anew whose next record is gone: somebody has deleted records. What they said is forgotten, as an instance
    /// that starts now would not know it. `false`: the log does not know the partition now.
    async fn restart(&mut self, partition: i32) -> Result<bool, Error> {
        let start = loop {
            match self.reader.assign(partition, StartAt::Start).await {
                Ok(start) => break start,
                Err(error) if is_unknown(&error) => return Ok(false),
                Err(error) if error.is_retriable() => sleep(REST).await,
                Err(error) => return Err(error.into()),
            }
        };
        for key in self.shared.map.forget_before(partition, start) {
            self.shared.watchers.tell(&key);
        }
        self.shared.progress.reach(partition, start);
        if self.unread.get(&partition).is_some_and(|end| start >= *end) {
            self.unread.remove(&partition);
            self.check_ready();
        }
        Ok(true)
    }

    fn replaced(&self) -> Error {
        Error::Replaced(self.shared.topic.as_ref().to_owned())
    }
}

/// Whether the topic may be gone, or the log does not know it yet.
fn is_unknown(error: &log::Error) -> bool {
    matches!(error, log::Error::UnknownTopic(_) | log::Error::UnknownPartition(_))
}

fn read_key<K: Key>(record: &Record) -> Result<(&[u8], K), &'static str> {
    let bytes = record.key.as_deref().ok_or("it has none")?;
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8")?;
    let key = text.parse().map_err(|_| "it is not of the table's type")?;
    Ok((bytes, key))
}
