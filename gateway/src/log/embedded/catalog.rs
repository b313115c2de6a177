//! The topics and partitions that exist, as memory knows them. The writer changes the file first, then this.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::Notify;

use crate::log::{
    CleanupPolicy, Error, ProducerRecord, Result, Timestamps, TopicDescription, TopicId, TopicPartition,
    partition_for_key,
};

/// All topics by name.
#[derive(Debug, Default)]
pub(super) struct Catalog {
    topics: RwLock<HashMap<Arc<str>, Arc<Topic>>>,
}

/// A topic.
#[derive(Debug)]
pub(super) struct Topic {
    pub(super) row: i64,
    pub(super) name: Arc<str>,
    pub(super) id: TopicId,
    pub(super) settings: TopicSettings,
    pub(super) partitions: Vec<Arc<Partition>>,
    /// Where the next record without a key goes.
    next_partition: AtomicU32,
}

/// What can be changed about a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TopicSettings {
    pub(super) cleanup: CleanupPolicy,
    pub(super) retention: Option<Duration>,
    pub(super) max_message_bytes: usize,
    pub(super) timestamps: Timestamps,
}

/// A partition: what is kept of it, and who waits for more.
#[derive(Debug)]
pub(super) struct Partition {
    pub(super) row: i64,
    pub(super) name: TopicPartition,
    start: AtomicI64,
    end: AtomicI64,
    /// Offsets before it have been compacted.
    pub(super) cleaned: AtomicI64,
    /// Records that compaction has left of them; 0 before it has run.
    pub(super) left: AtomicI64,
    /// The topic was deleted: nothing more can be written or read.
    deleted: AtomicBool,
    waiting: Mutex<Vec<Weak<Notify>>>,
}

impl Catalog {
    /// Reads what the file holds.
    pub(super) fn load(connection: &Connection) -> Result<Self> {
        let catalog = Self::default();
        let mut topics = connection.prepare("SELECT name FROM topics")?;
        for name in topics.query_map([], |row| row.get::<_, String>(0))? {
            catalog.reload(connection, &name?)?;
        }
        drop(topics);
        Ok(catalog)
    }

    /// Reads one topic anew, keeping the partitions that are known, or forgets it if it is gone.
    pub(super) fn reload(&self, connection: &Connection, name: &str) -> Result<()> {
        let known = self.topic(name).ok();
        let row = connection.query_row(
            "SELECT id, topic_id, cleanup, retention_ms, max_message_bytes, timestamps FROM topics WHERE name = ?1",
            [name],
            |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get(1)?,
                    row.get::<_, String>(2)?,
                    row.get::<_, Option<i64>>(3)?,
                    row.get::<_, i64>(4)?,
                    row.get::<_, String>(5)?,
                ))
            },
        );
        let (row, id, cleanup, retention_ms, max_message_bytes, timestamps) = match row {
            Err(rusqlite::Error::QueryReturnedNoRows) => {
                self.write().remove(name);
                return Ok(());
            }
            row => row?,
        };
        let name: Arc<str> = name.into();
        let mut partitions = Vec::new();
        let mut rows = connection.prepare(
            "SELECT id, partition, start_offset, end_offset, cleaned_offset FROM partitions WHERE topic = ?1 ORDER BY partition",
        )?;
        let rows = rows.query_map([row], |row| {
            let partition = Partition::new(row.get(0)?, TopicPartition::new(name.clone(), row.get(1)?));
            partition.start.store(row.get(2)?, Ordering::Release);
            partition.end.store(row.get(3)?, Ordering::Release);
            partition.cleaned.store(row.get(4)?, Ordering::Release);
            Ok(partition)
        })?;
        for partition in rows {
            let partition = partition?;
            let known = known
                .iter()
                .flat_map(|topic| &topic.partitions)
                .find(|known| known.row == partition.row);
            partitions.push(known.cloned().unwrap_or_else(|| Arc::new(partition)));
        }
        let topic = Topic {
            row,
            name: name.clone(),
            id: TopicId(id),
            settings: TopicSettings {
                cleanup: CleanupPolicy::parse(&cleanup)
                    .ok_or_else(|| Error::Storage(format!("cleanup {cleanup:?}")))?,
                retention: retention_ms.map(|ms| Duration::from_millis(ms.unsigned_abs())),
                max_message_bytes: max_message_bytes.unsigned_abs() as usize,
                timestamps: Timestamps::parse(&timestamps)
                    .ok_or_else(|| Error::Storage(format!("timestamps {timestamps:?}")))?,
            },
            partitions,
            next_partition: AtomicU32::new(0),
        };
        self.write().insert(name, Arc::new(topic));
        Ok(())
    }

    pub(super) fn topic(&self, name: &str) -> Result<Arc<Topic>> {
        self.read()
            .get(name)
            .cloned()
            .ok_or_else(|| Error::UnknownTopic(name.to_owned()))
    }

    pub(super) fn topics(&self) -> Vec<Arc<Topic>> {
        self.read().values().cloned().collect()
    }

    pub(super) fn partition(&self, name: &TopicPartition) -> Result<Arc<Partition>> {
        self.topic(&name.topic)?.partition(name.partition)
    }

    /// The topic of a record, when it takes the record.
    pub(super) fn topic_for(&self, record: &ProducerRecord) -> Result<Arc<Topic>> {
        let topic = self.topic(&record.topic)?;
        let size_bytes = record.size_bytes();
        if size_bytes > topic.settings.max_message_bytes {
            let max_bytes = topic.settings.max_message_bytes;
            return Err(Error::RecordTooLarge {
                topic: topic.name.to_string(),
                size_bytes,
                max_bytes,
            });
        }
        if record.key.is_none() && topic.settings.cleanup.compacts() {
            return Err(Error::keyless(&topic.name));
        }
        if let Some(partition) = record.partition {
            topic.partition(partition)?;
        }
        Ok(topic)
    }

    /// The partition that a record goes to, when its topic takes it, and whose clock says when it was written.
    pub(super) fn partition_for(&self, record: &ProducerRecord) -> Result<(Arc<Partition>, Timestamps)> {
        let topic = self.topic_for(record)?;
        let count = topic.partitions.len() as i32;
        let partition = match (&record.key, record.partition) {
            (_, Some(partition)) => topic.partition(partition),
            (Some(key), None) => topic.partition(partition_for_key(key, count)),
            (None, None) => {
                let next = topic.next_partition.fetch_add(1, Ordering::Relaxed);
                topic.partition((next % count.unsigned_abs()).cast_signed())
            }
        }?;
        Ok((partition, topic.settings.timestamps))
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, HashMap<Arc<str>, Arc<Topic>>> {
        self.topics.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<Arc<str>, Arc<Topic>>> {
        self.topics.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Topic {
    pub(super) fn partition(&self, partition: i32) -> Result<Arc<Partition>> {
        let found = usize::try_from(partition)
            .ok()
            .and_then(|index| self.partitions.get(index));
        found
            .cloned()
            .ok_or_else(|| Error::UnknownPartition(TopicPartition::new(self.name.clone(), partition)))
    }

    pub(super) fn description(&self) -> TopicDescription {
        TopicDescription {
            name: self.name.to_string(),
            id: self.id,
            partitions: self.partitions.len() as i32,
            cleanup: self.settings.cleanup,
            retention: self.settings.retention,
            max_message_bytes: self.settings.max_message_bytes,
            timestamps: self.settings.timestamps,
        }
    }
}

impl Partition {
    pub(super) fn new(row: i64, name: TopicPartition) -> Self {
        Self {
            row,
            name,
            start: AtomicI64::new(0),
            end: AtomicI64::new(0),
            cleaned: AtomicI64::new(0),
            left: AtomicI64::new(0),
            deleted: AtomicBool::new(false),
            waiting: Mutex::default(),
        }
    }

    /// From now on writes are refused, and whoever reads or waits is told.
    pub(super) fn delete(&self) {
        self.deleted.store(true, Ordering::Release);
        self.wake();
    }

    pub(super) fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire)
    }

    pub(super) fn deleted(&self) -> Error {
        Error::UnknownTopic(self.name.topic.to_string())
    }

    /// The first kept offset.
    pub(super) fn start(&self) -> i64 {
        self.start.load(Ordering::Acquire)
    }

    /// The offset of the next record.
    pub(super) fn end(&self) -> i64 {
        self.end.load(Ordering::Acquire)
    }

    /// Moves the end behind what was committed, and wakes those who wait for it.
    pub(super) fn publish_end(&self, end: i64) {
        self.end.store(end, Ordering::Release);
        self.wake();
    }

    pub(super) fn publish_start(&self, start: i64) {
        self.start.fetch_max(start, Ordering::AcqRel);
    }

    /// Has `waiter` notified whenever the end moves, for as long as the waiter lives.
    pub(super) fn notify(&self, waiter: &Arc<Notify>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        waiting.retain(|known| known.strong_count() > 0 && !std::ptr::eq(known.as_ptr(), Arc::as_ptr(waiter)));
        waiting.push(Arc::downgrade(waiter));
    }

    pub(super) fn out_of_range(&self, offset: i64) -> Error {
        Error::OffsetOutOfRange {
            partition: self.name.clone(),
            offset,
            start: self.start(),
            end: self.end(),
        }
    }

    fn wake(&self) {
        let waiting = self.waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        waiting
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|waiter| waiter.notify_one());
    }
}
