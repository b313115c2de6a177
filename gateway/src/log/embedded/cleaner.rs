//! Retention and compaction, now and then, in steps so small that they do not hold up the writer.
//!
//! Compaction works as Kafka's log cleaner does: it notes the newest offset of each key in what was written since the last
//! time, as far as its memory reaches, then deletes the older records of those keys. The end never moves, and an offset is
//! never used again.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::Connection;
use tokio_util::sync::CancellationToken;

use super::catalog::{Partition, Topic};
use super::schema::{SEGMENT_OFFSETS, offset_of, row_id};
use super::{EmbeddedLog, WeakLog, now_ms, offset_at_time};
use crate::log::{CleanupPolicy, Error, Result};

/// Records deleted in one SQLite transaction.
const STEP_RECORDS: i64 = 500;
/// Keys that one pass of compaction keeps in memory; what is written behind them waits for the next pass.
const KEYS_IN_MEMORY: usize = 500_000;
/// Records read at a time when keys are looked at.
const KEYS_READ: i64 = 10_000;
/// How long a tombstone is kept at least, counted from when what it deletes was removed: so that who has read that sees it (Kafka's
/// `delete.retention.ms`).
const TOMBSTONE_RETENTION: Duration = Duration::from_secs(24 * 60 * 60);

/// Runs until the log closes or is dropped.
pub(super) async fn run(log: WeakLog, interval: Duration, stopping: CancellationToken) {
    loop {
        tokio::select! {
            () = stopping.cancelled() => return,
            () = tokio::time::sleep(interval) => {}
        }
        let Some(log) = log.upgrade() else { return };
        for topic in log.topics() {
            match clean(&log, &topic).await {
                // A topic deleted in between is nobody's loss.
                Ok(()) | Err(Error::UnknownTopic(_)) => {}
                Err(Error::Closed) => return,
                Err(error) => tracing::warn!(%error, topic = %topic.name, "cleanup of topic {}: {error}", topic.name),
            }
        }
    }
}

async fn clean(log: &EmbeddedLog, topic: &Topic) -> Result<()> {
    let cleanup = topic.settings.cleanup;
    for partition in &topic.partitions {
        if cleanup != CleanupPolicy::Compact
            && let Some(retention) = topic.settings.retention
        {
            expire(log, partition, retention).await?;
        }
        if cleanup != CleanupPolicy::Delete {
            compact(log, partition).await?;
        }
    }
    Ok(())
}

/// Deletes what is older than retention, up to the first record that is not. Where little is written it goes as soon as elsewhere: what
/// is to be kept for longer than something else, is.
async fn expire(log: &EmbeddedLog, partition: &Arc<Partition>, retention: Duration) -> Result<()> {
    let (row, start, end) = (partition.row, partition.start(), partition.end());
    let cutoff_ms = now_ms().saturating_sub(i64::try_from(retention.as_millis()).unwrap_or(i64::MAX));
    let kept = log
        .read_pool()
        .run(move |connection| offset_at_time(connection, row, start, end, cutoff_ms));
    delete_before(log, partition, kept.await?).await
}

/// Moves the start of a partition, then deletes what lies before it.
pub(super) async fn delete_before(log: &EmbeddedLog, partition: &Arc<Partition>, before: i64) -> Result<()> {
    let from = partition.start();
    if before <= from {
        return Ok(());
    }
    let row = partition.row;
    let segment = before / SEGMENT_OFFSETS;
    log.write(move |connection| {
        connection.execute("UPDATE partitions SET start_offset = ?2 WHERE id = ?1", [row, before])?;
        connection.execute(
            "DELETE FROM segments WHERE partition = ?1 AND segment < ?2",
            [row, segment],
        )?;
        Ok(())
    })
    .await?;
    partition.publish_start(before);
    delete_rows(log, row_id(row, 0), row_id(row, before)).await
}

/// Deletes records by row id, step by step.
pub(super) async fn delete_rows(log: &EmbeddedLog, from: i64, before: i64) -> Result<()> {
    loop {
        let step = log.read_pool().run(move |connection| {
            let mut select =
                connection.prepare_cached("SELECT id FROM records WHERE id >= ?1 AND id < ?2 ORDER BY id LIMIT ?3")?;
            let ids = select.query_map([from, before, STEP_RECORDS], |row| row.get::<_, i64>(0))?;
            Ok(ids.collect::<rusqlite::Result<Vec<i64>>>()?)
        });
        let ids = step.await?;
        if ids.is_empty() {
            return Ok(());
        }
        log.write(move |connection| delete_ids(connection, &ids)).await?;
    }
}

fn delete_ids(connection: &Connection, ids: &[i64]) -> Result<()> {
    let mut blob = connection
        .prepare_cached("DELETE FROM blobs WHERE id = (SELECT blob FROM records WHERE id = ?1 AND blob IS NOT NULL)")?;
    let mut record = connection.prepare_cached("DELETE FROM records WHERE id = ?1")?;
    for id in ids {
        blob.execute([id])?;
        record.execute([id])?;
    }
    Ok(())
}

/// Keeps the last record of each key. Runs when at least as much was written since the last time as was left then (Kafka's
/// `min.cleanable.dirty.ratio` of 0.5), and once after the log was opened.
async fn compact(log: &EmbeddedLog, partition: &Arc<Partition>) -> Result<()> {
    let (start, end) = (partition.start(), partition.end());
    let cleaned = partition.cleaned.load(Ordering::Acquire).max(start);
    if end == cleaned || end - cleaned < partition.left.load(Ordering::Acquire) {
        return Ok(());
    }
    let mut newest: HashMap<Bytes, i64> = HashMap::new();
    let mut from = cleaned;
    while from < end && newest.len() < KEYS_IN_MEMORY {
        let keys = read_keys(log, partition, from, end).await?;
        from = keys.next;
        newest.extend(keys.records.into_iter().map(|record| (record.key, record.offset)));
    }
    let noted = from;
    let row = partition.row;
    let settled = log.read_pool().run(move |connection| {
        let select = "SELECT settled_offset, settled_ms FROM partitions WHERE id = ?1";
        Ok(connection.query_row(select, [row], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)))?)
    });
    let (settled, settled_ms) = settled.await?;
    let is_seen = settled_ms <= now_ms() - TOMBSTONE_RETENTION.as_millis() as i64;
    let (mut from, mut left) = (start, 0);
    while from < noted {
        let keys = read_keys(log, partition, from, noted).await?;
        from = keys.next;
        left += keys.records.len();
        let old = keys.records.into_iter().filter(|record| {
            newest.get(&record.key).is_some_and(|newest| *newest > record.offset)
                || is_seen && record.is_tombstone && record.offset < settled
        });
        let ids: Vec<i64> = old.map(|record| row_id(partition.row, record.offset)).collect();
        left -= ids.len();
        for step in ids.chunks(STEP_RECORDS as usize).map(<[i64]>::to_vec) {
            log.write(move |connection| delete_ids(connection, &step)).await?;
        }
    }
    let now_ms = now_ms();
    log.write(move |connection| {
        connection.execute("UPDATE partitions SET cleaned_offset = ?2 WHERE id = ?1", [row, noted])?;
        if is_seen {
            let update = "UPDATE partitions SET settled_offset = ?2, settled_ms = ?3 WHERE id = ?1";
            connection.execute(update, [row, noted, now_ms])?;
        }
        Ok(())
    })
    .await?;
    partition.cleaned.store(noted, Ordering::Release);
    partition.left.store(left as i64, Ordering::Release);
    Ok(())
}

/// What compaction looks at.
struct Keys {
    records: Vec<KeyedRecord>,
    /// The offset to go on from.
    next: i64,
}

struct KeyedRecord {
    offset: i64,
    key: Bytes,
    is_tombstone: bool,
}

async fn read_keys(log: &EmbeddedLog, partition: &Partition, from: i64, before: i64) -> Result<Keys> {
    let row = partition.row;
    let read = log.read_pool().run(move |connection| {
        let mut select = connection.prepare_cached(
            "SELECT id, key, value IS NULL AND blob IS NULL FROM records
             WHERE id >= ?1 AND id < ?2 ORDER BY id LIMIT ?3",
        )?;
        let records = select.query_map([row_id(row, from), row_id(row, before), KEYS_READ], |row| {
            Ok(KeyedRecord {
                offset: offset_of(row.get(0)?),
                key: row.get::<_, Option<Vec<u8>>>(1)?.unwrap_or_default().into(),
                is_tombstone: row.get(2)?,
            })
        })?;
        let records = records.collect::<rusqlite::Result<Vec<_>>>()?;
        let next = match records.last() {
            Some(last) if records.len() as i64 == KEYS_READ => last.offset + 1,
            _ => before,
        };
        Ok(Keys { records, next })
    });
    read.await
}
