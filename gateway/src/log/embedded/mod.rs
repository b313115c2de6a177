//! Engine 1: the embedded log. One SQLite file, one process, no server.
//!
//! ```text
//! producers, transactions ──▶ writer (one thread, group commit) ──▶ log.sqlite ──▶ read pool ──▶ readers, group members
//!                                   │ after each commit                                              ▲
//!                                   └── the partition's end moves ──── wakes ────────────────────────┘
//! ```
//!
//! What is on disk is the truth; memory holds where partitions begin and end, and who owns them. A transaction is a SQLite
//! transaction, so nothing of one that was not committed is ever seen.

mod admin;
mod catalog;
mod cleaner;
mod coordinator;
mod cursor;
mod headers;
mod member;
mod read_pool;
mod reader;
mod schema;
mod settings;
mod transaction;
mod writer;

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::Connection;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub use settings::{Durability, EmbeddedSettings};

use self::catalog::{Catalog, Partition, Topic};
use self::coordinator::Coordinator;
use self::read_pool::ReadPool;
use self::schema::SEGMENT_OFFSETS;
use self::writer::{MemberOffsets, Row, Value, Write};
use super::producer::ProducerEngine;
use super::{
    Acks, Appended, CommittedOffset, Delivery, Error, GroupMember, GroupSettings, Producer, ProducerRecord,
    ProducerSettings, Reader, Result, StartAt, Timestamps, TopicPartition, TransactionalProducer,
};

/// Memory that records waiting for the writer may take, in KiB. When it is taken producers wait.
const WAITING_KIB: u32 = 64 * 1024;

/// A handle to the engine; clones share it.
#[derive(Clone)]
pub(super) struct EmbeddedLog(Arc<Shared>);

/// A handle that does not keep the engine alive.
struct WeakLog(Weak<Shared>);

struct Shared {
    catalog: Catalog,
    coordinator: Arc<Coordinator>,
    read_pool: ReadPool,
    writes: mpsc::Sender<Write>,
    writer: Mutex<Option<JoinHandle<()>>>,
    memory: Arc<Semaphore>,
    stopping: CancellationToken,
    /// Held while memory takes over what the file says of a topic.
    reloading: tokio::sync::Mutex<()>,
}

/// A group member, as its offsets are committed in a transaction.
#[derive(Clone, Debug)]
pub(super) struct EmbeddedGroupMetadata {
    group: String,
    member: u64,
}

/// The engine's side of a [`Producer`].
#[derive(Clone, Debug)]
pub(super) struct EmbeddedProducer {
    log: EmbeddedLog,
    acks: Acks,
    queue_timeout: Duration,
}

impl std::fmt::Debug for EmbeddedLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedLog")
            .field("topics", &self.0.catalog.topics().len())
            .finish()
    }
}

impl WeakLog {
    fn upgrade(&self) -> Option<EmbeddedLog> {
        self.0.upgrade().map(EmbeddedLog)
    }
}

impl EmbeddedLog {
    pub(super) async fn open(settings: EmbeddedSettings) -> Result<Self> {
        let cleanup_interval = settings.cleanup_interval;
        let opened = tokio::task::spawn_blocking(move || Self::open_file(&settings)).await;
        let log = opened.map_err(|error| Error::Storage(error.to_string()))??;
        tokio::spawn(cleaner::run(
            WeakLog(Arc::downgrade(&log.0)),
            cleanup_interval,
            log.0.stopping.clone(),
        ));
        Ok(log)
    }

    fn open_file(settings: &EmbeddedSettings) -> Result<Self> {
        let storage = |error: std::io::Error| Error::Storage(format!("{}: {error}", settings.data_dir.display()));
        std::fs::create_dir_all(&settings.data_dir).map_err(storage)?;
        let lock = lock(&settings.data_dir.join("log.lock"))?;
        let file = settings.data_dir.join("log.sqlite");
        let connection = schema::open_writer(&file, settings.durability)?;
        let catalog = Catalog::load(&connection)?;
        let coordinator = Arc::new(Coordinator::default());
        let (writes, writer) = writer::start(connection, &file, settings.durability, coordinator.clone(), lock)?;
        Ok(Self(Arc::new(Shared {
            catalog,
            coordinator,
            read_pool: ReadPool::new(file),
            writes,
            writer: Mutex::new(Some(writer)),
            memory: Arc::new(Semaphore::new(WAITING_KIB as usize)),
            stopping: CancellationToken::new(),
            reloading: tokio::sync::Mutex::default(),
        })))
    }

    pub(super) async fn producer(&self, settings: ProducerSettings) -> Result<Producer> {
        let ProducerSettings {
            acks, delivery_timeout, ..
        } = settings;
        let producer = EmbeddedProducer {
            log: self.clone(),
            acks,
            queue_timeout: delivery_timeout,
        };
        Ok(Producer {
            engine: ProducerEngine::Embedded(producer),
        })
    }

    pub(super) async fn transactional_producer(&self, transactional_id: &str) -> Result<TransactionalProducer> {
        transaction::start(self.clone(), transactional_id).await
    }

    pub(super) async fn reader(&self, topic: &str) -> Result<Reader> {
        let topic = self.topic(topic)?.name.clone();
        Ok(reader::start(self.clone(), topic))
    }

    pub(super) async fn join_group(&self, settings: GroupSettings) -> Result<GroupMember> {
        member::start(self.clone(), settings)
    }

    pub(super) async fn offsets(&self, partitions: &[TopicPartition], at: StartAt) -> Result<Vec<i64>> {
        let mut offsets = Vec::with_capacity(partitions.len());
        for partition in partitions {
            offsets.push(self.offset_in(&self.partition(partition)?, at).await?);
        }
        Ok(offsets)
    }

    pub(super) async fn close(&self) {
        self.0.stopping.cancel();
        // A writer that has ended already needs no telling.
        let _ = self.0.writes.send(Write::Close).await;
        let writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(writer) = writer else { return };
        if let Ok(Err(_)) = tokio::task::spawn_blocking(|| writer.join()).await {
            tracing::error!("the embedded log's writer ended in a panic");
        }
    }

    fn topic(&self, name: &str) -> Result<Arc<Topic>> {
        self.0.catalog.topic(name)
    }

    fn topics(&self) -> Vec<Arc<Topic>> {
        self.0.catalog.topics()
    }

    fn partition(&self, name: &TopicPartition) -> Result<Arc<Partition>> {
        self.0.catalog.partition(name)
    }

    fn coordinator(&self) -> &Coordinator {
        &self.0.coordinator
    }

    fn read_pool(&self) -> &ReadPool {
        &self.0.read_pool
    }

    fn stopping(&self) -> &CancellationToken {
        &self.0.stopping
    }

    /// A record as it will stand in the file, when its topic takes it.
    fn row(&self, record: ProducerRecord) -> Result<Row> {
        let (partition, timestamps) = self.0.catalog.partition_for(&record)?;
        let ProducerRecord {
            key,
            value,
            headers,
            timestamp_ms,
            ..
        } = record;
        Ok(Row {
            partition,
            timestamp_ms: timestamp_ms.filter(|_| timestamps == Timestamps::Create),
            key,
            headers: headers::encode(&headers),
            value: Value::Inline(value),
        })
    }

    async fn offset_in(&self, partition: &Arc<Partition>, at: StartAt) -> Result<i64> {
        match at {
            StartAt::Start => Ok(partition.start()),
            StartAt::End => Ok(partition.end()),
            StartAt::Offset(offset) => Ok(offset),
            StartAt::TimeMs(time_ms) => {
                let (row, start, end) = (partition.row, partition.start(), partition.end());
                self.read_pool()
                    .run(move |connection| offset_at_time(connection, row, start, end, time_ms))
                    .await
            }
        }
    }

    async fn committed(&self, group: &str, partitions: Vec<Arc<Partition>>) -> Result<Vec<Option<CommittedOffset>>> {
        let group = group.to_owned();
        let (sender, answer) = oneshot::channel();
        // Asked of the writer, behind commits of an earlier owner that are on their way.
        self.write(move |connection| {
            let found = partitions
                .iter()
                .map(|partition| writer::committed(connection, &group, partition.row));
            // An asker that is gone needs no answer.
            let _ = sender.send(found.collect::<Result<Vec<_>>>()?);
            Ok(())
        })
        .await?;
        answer.await.map_err(|_| Error::Closed)
    }

    async fn commit_offsets(&self, offsets: MemberOffsets, reply: oneshot::Sender<Result<()>>) {
        if let Err(mpsc::error::SendError(Write::Offsets { reply, .. })) =
            self.0.writes.send(Write::Offsets { offsets, reply }).await
        {
            // The asker may have given up waiting; nothing was committed.
            let _ = reply.send(Err(Error::Closed));
        }
    }

    /// Has the writer do something in a SQLite transaction of its own.
    async fn write(&self, run: impl FnOnce(&Connection) -> Result<()> + Send + 'static) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.send(Write::Run {
            run: Box::new(run),
            reply,
        })
        .await?;
        answer.await.map_err(|_| Error::Closed)?
    }

    async fn send(&self, write: Write) -> Result<()> {
        self.0.writes.send(write).await.map_err(|_| Error::Closed)
    }
}

impl EmbeddedProducer {
    pub(super) fn check(&self, record: &ProducerRecord) -> Result<()> {
        self.log.0.catalog.topic_for(record).map(drop)
    }

    pub(super) async fn send(&self, record: ProducerRecord) -> Result<Delivery> {
        let kib = u32::try_from(record.size_bytes() / 1024)
            .unwrap_or(u32::MAX)
            .saturating_add(1)
            .min(WAITING_KIB);
        let row = self.log.row(record)?;
        let (reply, answer) = oneshot::channel();
        let reply = match self.acks {
            Acks::None => {
                let appended = Appended {
                    partition: row.partition.name.clone(),
                    offset: -1,
                    timestamp_ms: row.timestamp_ms.unwrap_or_else(now_ms),
                };
                // The other end is held just below.
                let _ = reply.send(Ok(appended));
                None
            }
            Acks::Leader | Acks::All => Some(reply),
        };
        let shared = &self.log.0;
        let waited = async {
            let permit = shared
                .memory
                .clone()
                .acquire_many_owned(kib)
                .await
                .map_err(|_| Error::Closed)?;
            self.log.send(Write::Append { row, permit, reply }).await
        };
        let after_ms = u64::try_from(self.queue_timeout.as_millis()).unwrap_or(u64::MAX);
        let full = || Error::Timeout {
            operation: "room in the producer's queue",
            after_ms,
        };
        tokio::time::timeout(self.queue_timeout, waited)
            .await
            .map_err(|_| full())??;
        Ok(Delivery(answer))
    }
}

/// The first offset whose record's timestamp is not before a time, else the end.
fn offset_at_time(connection: &Connection, partition: i64, start: i64, end: i64, time_ms: i64) -> Result<i64> {
    let mut segment = connection.prepare_cached(
        "SELECT min(segment) FROM segments WHERE partition = ?1 AND segment >= ?2 AND max_timestamp_ms >= ?3",
    )?;
    let segment: Option<i64> = segment.query_row([partition, start / SEGMENT_OFFSETS, time_ms], |row| row.get(0))?;
    let Some(segment) = segment else { return Ok(end) };
    // The record that made the segment's maximum may be gone by compaction: then the search goes on behind it.
    let from = start.max(segment * SEGMENT_OFFSETS);
    let mut record = connection.prepare_cached(
        "SELECT id FROM records WHERE id >= ?1 AND id < ?2 AND timestamp_ms >= ?3 ORDER BY id LIMIT 1",
    )?;
    let mut found = record.query([schema::row_id(partition, from), schema::row_id(partition, end), time_ms])?;
    Ok(match found.next()? {
        Some(row) => schema::offset_of(row.get(0)?),
        None => end,
    })
}

/// Takes the lock file, which goes with the process however it ends.
fn lock(path: &Path) -> Result<File> {
    let storage = |error: std::io::Error| Error::Storage(format!("{}: {error}", path.display()));
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(storage)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::Locked(path.display().to_string())),
        Err(std::fs::TryLockError::Error(error)) => Err(storage(error)),
    }
}

/// Milliseconds since the Unix epoch.
fn now_ms() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}
