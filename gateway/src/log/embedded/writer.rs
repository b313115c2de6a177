//! The one thread that writes the file. It takes all that waits, writes it in one SQLite transaction, and answers when that is
//! on disk (group commit): many appends share one fsync.
//!
//! Invariant: memory (ends of partitions, answers) changes only after the file has.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::catalog::Partition;
use super::coordinator::Coordinator;
use super::now_ms;
use super::schema::{self, SEGMENT_OFFSETS, row_id};
use super::settings::Durability;
use crate::log::{Appended, CommittedOffset, Error, Result};

/// Commands that wait for the writer. When the queue is full its senders wait.
const WAITING_WRITES: usize = 4096;
/// What one SQLite transaction takes at most; more waits for the next.
const GROUP_COMMANDS: usize = 4096;
const GROUP_BYTES: usize = 2 * 1024 * 1024;
/// Bytes after which the checkpointer is woken.
const CHECKPOINT_BYTES: usize = 4 * 1024 * 1024;
/// Bytes after which the writer itself waits for a checkpoint, so that the write-ahead log stays bounded. SQLite syncs the file
/// only when nothing of the write-ahead log is left behind, so all of this is synced then: the more, the longer appends wait.
const WAL_LIMIT_BYTES: usize = 16 * 1024 * 1024;

/// What a [`Write::Run`] is taken to write: about as much as a step of the cleaner, which they mostly are.
const RUN_BYTES: usize = 256 * 1024;

/// What the writer can be asked to do.
pub(super) enum Write {
    Append {
        row: Row,
        /// Its share of the memory that waiting records may take.
        permit: OwnedSemaphorePermit,
        reply: Option<oneshot::Sender<Result<Appended>>>,
    },
    Transaction {
        transaction: TransactionRows,
        reply: oneshot::Sender<Result<()>>,
    },
    /// Write values of a transaction that is not committed yet; answers with where they are.
    Stage {
        values: Vec<Bytes>,
        reply: oneshot::Sender<Result<Vec<i64>>>,
    },
    /// Commit offsets of a group member.
    Offsets {
        offsets: MemberOffsets,
        reply: oneshot::Sender<Result<()>>,
    },
    /// Anything else, in a SQLite transaction of its own.
    Run {
        run: Box<dyn FnOnce(&Connection) -> Result<()> + Send>,
        reply: oneshot::Sender<Result<()>>,
    },
    /// Finish what came before, then end.
    Close,
}

/// A record on its way into the file.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) partition: Arc<Partition>,
    /// `None`: the time of the append.
    pub(super) timestamp_ms: Option<i64>,
    pub(super) key: Option<Bytes>,
    /// As they stand in their column.
    pub(super) headers: Option<Vec<u8>>,
    pub(super) value: Value,
}

/// The value of a [`Row`].
#[derive(Debug)]
pub(super) enum Value {
    Inline(Option<Bytes>),
    Staged(i64),
}

/// A transaction that is ready to be committed.
#[derive(Debug)]
pub(super) struct TransactionRows {
    pub(super) transactional_id: String,
    pub(super) epoch: u64,
    pub(super) rows: Vec<Row>,
    pub(super) offsets: Vec<MemberOffsets>,
}

/// Offsets that a group member commits.
#[derive(Debug)]
pub(super) struct MemberOffsets {
    pub(super) group: String,
    pub(super) member: u64,
    pub(super) offsets: Vec<(Arc<Partition>, CommittedOffset)>,
}

impl Row {
    fn size_bytes(&self) -> usize {
        let value = match &self.value {
            Value::Inline(value) => value.as_ref().map_or(0, Bytes::len),
            Value::Staged(_) => 0,
        };
        value + self.key.as_ref().map_or(0, Bytes::len) + self.headers.as_ref().map_or(0, Vec::len) + 64
    }
}

/// Starts the writer and its checkpointer on an open connection. The lock is held until nothing is written any more, whoever has a handle:
/// one process at a time.
pub(super) fn start(
    connection: Connection,
    file: &Path,
    durability: Durability,
    coordinator: Arc<Coordinator>,
    lock: File,
) -> Result<(mpsc::Sender<Write>, thread::JoinHandle<()>)> {
    let checkpoints = schema::open_checkpointer(file, durability)?;
    let (sender, receiver) = mpsc::channel(WAITING_WRITES);
    let io = |error: std::io::Error| Error::Storage(error.to_string());
    let (wake, woken) = std::sync::mpsc::sync_channel(1);
    thread::Builder::new()
        .name("log-checkpoint".to_owned())
        .spawn(move || {
            // Ends with the writer, which holds the other end.
            while woken.recv().is_ok() {
                if let Err(error) = checkpoint(&checkpoints) {
                    tracing::warn!(%error, "checkpoint of the embedded log: {error}");
                }
            }
        })
        .map_err(io)?;
    let writer = Writer {
        connection,
        coordinator,
        wake,
        since_wake: 0,
        wal_bytes: 0,
    };
    let thread = thread::Builder::new()
        .name("log-writer".to_owned())
        .spawn(move || {
            writer.run(receiver);
            drop(lock);
        })
        .map_err(io)?;
    Ok((sender, thread))
}

/// Moves what it can of the write-ahead log into the file without waiting for anybody. Returns whether that was all of it.
fn checkpoint(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
        let (busy, written, moved): (i64, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
        Ok(busy == 0 && written == moved)
    })
}

struct Writer {
    connection: Connection,
    coordinator: Arc<Coordinator>,
    wake: std::sync::mpsc::SyncSender<()>,
    /// Bytes written since the checkpointer was woken.
    since_wake: usize,
    /// Bytes written since the write-ahead log was last seen to be empty.
    wal_bytes: usize,
}

impl Writer {
    fn run(mut self, mut commands: mpsc::Receiver<Write>) {
        while let Some(first) = commands.blocking_recv() {
            let mut next = Some(first);
            let mut group = Group::default();
            while let Some(command) = next.take() {
                match command {
                    Write::Run { run, reply } => {
                        self.finish(std::mem::take(&mut group));
                        // The asker may have gone; what it asked for is done all the same.
                        let _ = reply.send(self.in_transaction(|connection| run(connection)));
                        self.after_writing(RUN_BYTES);
                    }
                    Write::Close => {
                        self.finish(group);
                        return;
                    }
                    command => group.take(command, &self.coordinator),
                }
                if group.rows.len() < GROUP_COMMANDS
                    && group.bytes < GROUP_BYTES
                    && group.answers.len() < GROUP_COMMANDS
                {
                    next = commands.try_recv().ok();
                }
            }
            self.finish(group);
        }
    }

    /// Writes a group, publishes it, and answers everybody in it.
    fn finish(&mut self, group: Group) {
        if group.answers.is_empty() && group.rows.is_empty() {
            return;
        }
        let Group {
            rows,
            offsets,
            stages,
            answers,
            bytes,
        } = group;
        let written = self.in_transaction(|connection| write_group(connection, rows, &offsets, &stages));
        let (ends, placed, staged) = match written {
            Ok(written) => written,
            Err(error) => {
                answers.into_iter().for_each(|answer| answer.fail(&error));
                return;
            }
        };
        for (partition, end) in ends {
            partition.publish_end(end);
        }
        for answer in answers {
            // An asker may have gone; its records are written all the same.
            match answer {
                Answer::Appended { row, partition, reply } => {
                    let _ = reply.send(Ok(Appended {
                        partition: partition.name.clone(),
                        offset: placed[row].0,
                        timestamp_ms: placed[row].1,
                    }));
                }
                Answer::Staged { stage, reply } => {
                    let _ = reply.send(Ok(staged[stage].clone()));
                }
                Answer::Done(reply) => {
                    let _ = reply.send(Ok(()));
                }
            }
        }
        self.after_writing(bytes);
    }

    fn after_writing(&mut self, bytes: usize) {
        self.since_wake += bytes;
        self.wal_bytes += bytes;
        if self.since_wake >= CHECKPOINT_BYTES {
            self.since_wake = 0;
            // Full: the checkpointer has been woken already.
            let _ = self.wake.try_send(());
        }
        if self.wal_bytes >= WAL_LIMIT_BYTES {
            match checkpoint(&self.connection) {
                Ok(true) => self.wal_bytes = 0,
                // A reader or the checkpointer is in the way. Ask again after some more, not with every group.
                Ok(false) => self.wal_bytes -= CHECKPOINT_BYTES,
                Err(error) => tracing::warn!(%error, "checkpoint of the embedded log: {error}"),
            }
        }
    }

    fn in_transaction<T>(&self, write: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        let connection = &self.connection;
        connection.execute_batch("BEGIN IMMEDIATE")?;
        let written = write(connection).and_then(|written| Ok(connection.execute_batch("COMMIT").map(|()| written)?));
        if written.is_err()
            && !connection.is_autocommit()
            && let Err(error) = connection.execute_batch("ROLLBACK")
        {
            tracing::error!(%error, "roll back of the embedded log: {error}");
        }
        written
    }
}

/// What shares one SQLite transaction.
#[derive(Default)]
struct Group {
    rows: Vec<Row>,
    offsets: Vec<MemberOffsets>,
    stages: Vec<Vec<Bytes>>,
    answers: Vec<Answer>,
    bytes: usize,
}

/// Who is answered when the group is on disk.
enum Answer {
    Appended {
        row: usize,
        partition: Arc<Partition>,
        reply: oneshot::Sender<Result<Appended>>,
    },
    Staged {
        stage: usize,
        reply: oneshot::Sender<Result<Vec<i64>>>,
    },
    Done(oneshot::Sender<Result<()>>),
}

impl Answer {
    fn fail(self, error: &Error) {
        // An asker may have gone: then nobody needs the answer.
        match self {
            Self::Appended { reply, .. } => {
                let _ = reply.send(Err(error.clone()));
            }
            Self::Staged { reply, .. } => {
                let _ = reply.send(Err(error.clone()));
            }
            Self::Done(reply) => {
                let _ = reply.send(Err(error.clone()));
            }
        }
    }
}

impl Group {
    /// Adds a command, or answers at once if it must not be carried out.
    fn take(&mut self, command: Write, coordinator: &Coordinator) {
        match command {
            Write::Append { row, permit, reply } => {
                drop(permit);
                if row.partition.is_deleted() {
                    if let Some(reply) = reply {
                        Answer::Appended {
                            row: 0,
                            partition: row.partition.clone(),
                            reply,
                        }
                        .fail(&row.partition.deleted());
                    }
                    return;
                }
                if let Some(reply) = reply {
                    let partition = row.partition.clone();
                    self.answers.push(Answer::Appended {
                        row: self.rows.len(),
                        partition,
                        reply,
                    });
                }
                self.push(row);
            }
            Write::Transaction { transaction, reply } => {
                let TransactionRows {
                    transactional_id,
                    epoch,
                    rows,
                    offsets,
                } = transaction;
                let allowed = coordinator
                    .check_epoch(&transactional_id, epoch)
                    .and_then(|()| offsets.iter().try_for_each(|offsets| coordinator.check_owner(offsets)))
                    .and_then(|()| match rows.iter().find(|row| row.partition.is_deleted()) {
                        Some(row) => Err(row.partition.deleted()),
                        None => Ok(()),
                    });
                if let Err(error) = allowed {
                    Answer::Done(reply).fail(&error);
                    return;
                }
                rows.into_iter().for_each(|row| self.push(row));
                self.offsets.extend(offsets);
                self.answers.push(Answer::Done(reply));
            }
            Write::Stage { values, reply } => {
                self.bytes += values.iter().map(Bytes::len).sum::<usize>();
                self.answers.push(Answer::Staged {
                    stage: self.stages.len(),
                    reply,
                });
                self.stages.push(values);
            }
            Write::Offsets { offsets, reply } => match coordinator.check_owner(&offsets) {
                Ok(()) => {
                    self.offsets.push(offsets);
                    self.answers.push(Answer::Done(reply));
                }
                Err(error) => Answer::Done(reply).fail(&error),
            },
            Write::Run { .. } | Write::Close => unreachable!("handled by the writer's loop"),
        }
    }

    fn push(&mut self, row: Row) {
        self.bytes += row.size_bytes();
        self.rows.push(row);
    }
}

type Written = (Vec<(Arc<Partition>, i64)>, Vec<(i64, i64)>, Vec<Vec<i64>>);

/// Writes a group: returns the partitions' new ends, offset and timestamp of each row, and the place of each staged value.
fn write_group(
    connection: &Connection,
    rows: Vec<Row>,
    offsets: &[MemberOffsets],
    stages: &[Vec<Bytes>],
) -> Result<Written> {
    let mut ends: HashMap<i64, (Arc<Partition>, i64)> = HashMap::new();
    let mut newest: HashMap<(i64, i64), i64> = HashMap::new();
    let mut placed = Vec::with_capacity(rows.len());
    let mut insert = connection.prepare_cached(
        "INSERT INTO records (id, timestamp_ms, key, headers, value, blob) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    let mut publish = connection.prepare_cached("DELETE FROM staged WHERE blob = ?1")?;
    let now_ms = now_ms();
    for row in rows {
        let Row {
            partition,
            timestamp_ms,
            key,
            headers,
            value,
        } = row;
        let timestamp_ms = timestamp_ms.unwrap_or(now_ms);
        let (_, end) = ends
            .entry(partition.row)
            .or_insert_with(|| (partition.clone(), partition.end()));
        let offset = *end;
        *end += 1;
        let (value, blob) = match &value {
            Value::Inline(value) => (value.as_deref(), None),
            Value::Staged(blob) => (None, Some(blob)),
        };
        if let Some(blob) = blob {
            publish.execute([blob])?;
        }
        insert.execute(params![
            row_id(partition.row, offset),
            timestamp_ms,
            key.as_deref(),
            headers,
            value,
            blob
        ])?;
        let newest = newest
            .entry((partition.row, offset / SEGMENT_OFFSETS))
            .or_insert(timestamp_ms);
        *newest = timestamp_ms.max(*newest);
        placed.push((offset, timestamp_ms));
    }
    let mut segment = connection.prepare_cached(
        "INSERT INTO segments (partition, segment, max_timestamp_ms) VALUES (?1, ?2, ?3)
         ON CONFLICT DO UPDATE SET max_timestamp_ms = max(max_timestamp_ms, excluded.max_timestamp_ms)",
    )?;
    for ((partition, number), timestamp_ms) in newest {
        segment.execute(params![partition, number, timestamp_ms])?;
    }
    let mut end = connection.prepare_cached("UPDATE partitions SET end_offset = ?2 WHERE id = ?1")?;
    for (row, (_, offset)) in &ends {
        end.execute([row, offset])?;
    }
    let mut commit = connection.prepare_cached(
        "INSERT INTO committed (group_id, partition, next_offset, metadata) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT DO UPDATE SET next_offset = excluded.next_offset, metadata = excluded.metadata",
    )?;
    for MemberOffsets { group, offsets, .. } in offsets {
        for (partition, committed) in offsets {
            commit.execute(params![
                group,
                partition.row,
                committed.next_offset.0,
                committed.metadata
            ])?;
        }
    }
    let mut stage = connection.prepare_cached("INSERT INTO blobs (value) VALUES (?1)")?;
    let mut note = connection.prepare_cached("INSERT INTO staged (blob) VALUES (?1)")?;
    let mut staged = Vec::with_capacity(stages.len());
    for values in stages {
        let mut blobs = Vec::with_capacity(values.len());
        for value in values {
            let blob = stage.insert([value.as_ref()])?;
            note.execute([blob])?;
            blobs.push(blob);
        }
        staged.push(blobs);
    }
    Ok((ends.into_values().collect(), placed, staged))
}

/// Deletes the staged values of a transaction that was not committed.
pub(super) fn unstage(connection: &Connection, blobs: &[i64]) -> Result<()> {
    let mut blob_row = connection.prepare_cached("DELETE FROM blobs WHERE id = ?1")?;
    let mut staged_row = connection.prepare_cached("DELETE FROM staged WHERE blob = ?1")?;
    for blob in blobs {
        blob_row.execute([blob])?;
        staged_row.execute([blob])?;
    }
    Ok(())
}

/// What a group has committed for a partition.
pub(super) fn committed(connection: &Connection, group: &str, partition: i64) -> Result<Option<CommittedOffset>> {
    let mut select = connection
        .prepare_cached("SELECT next_offset, metadata FROM committed WHERE group_id = ?1 AND partition = ?2")?;
    let found = select.query_row(params![group, partition], |row| {
        Ok(CommittedOffset {
            next_offset: crate::log::NextOffset(row.get(0)?),
            metadata: row.get(1)?,
        })
    });
    Ok(found.optional()?)
}
