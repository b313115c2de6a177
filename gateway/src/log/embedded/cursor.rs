//! Reading partitions in turn, each from its cursor: what readers and group members have in common.
//!
//! Nothing polls: when every cursor stands at the end, the reader waits until one of its partitions' ends moves.

use std::sync::Arc;

use bytes::Bytes;
use rusqlite::Connection;
use tokio::sync::Notify;

use super::catalog::Partition;
use super::headers;
use super::read_pool::ReadPool;
use super::schema::{offset_of, row_id};
use crate::log::{Batch, Error, Headers, NextOffset, Record, Result};

/// Most records of a batch.
const BATCH_RECORDS: usize = 1000;
/// A batch ends when its records have this many bytes.
const BATCH_BYTES: usize = 1024 * 1024;

/// The partitions of one reader.
#[derive(Debug, Default)]
pub(super) struct Cursors {
    cursors: Vec<Cursor>,
    /// Notified when a partition gets records, and by whoever changes something else that the reader must see.
    pub(super) changed: Arc<Notify>,
    /// Where the search for something to read goes on, so that no partition starves.
    turn: usize,
}

/// One partition and how far it has been read.
#[derive(Debug)]
pub(super) struct Cursor {
    pub(super) partition: Arc<Partition>,
    pub(super) position: i64,
    /// What the owner of the cursors knows it by.
    pub(super) tag: u64,
    pub(super) paused: bool,
    /// The end was reached and said, and has not moved since.
    said_caught_up: bool,
}

impl Cursor {
    fn is_readable(&self) -> bool {
        let end = self.partition.end();
        !self.paused && (self.position < end || !self.said_caught_up || self.partition.is_deleted())
    }
}

impl Cursors {
    /// Reads a partition from `position` on; replaces its cursor if there is one.
    pub(super) fn insert(&mut self, partition: Arc<Partition>, position: i64, tag: u64) {
        self.remove(partition.row);
        partition.notify(&self.changed);
        self.cursors.push(Cursor {
            partition,
            position,
            tag,
            paused: false,
            said_caught_up: false,
        });
    }

    pub(super) fn remove(&mut self, partition_row: i64) -> Option<Cursor> {
        let index = self
            .cursors
            .iter()
            .position(|cursor| cursor.partition.row == partition_row)?;
        Some(self.cursors.remove(index))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Cursor> {
        self.cursors.iter()
    }

    pub(super) fn find(&mut self, topic: &str, partition: i32) -> Option<&mut Cursor> {
        self.cursors.iter_mut().find(|cursor| {
            cursor.partition.name.partition == partition && cursor.partition.name.topic.as_ref() == topic
        })
    }

    /// Reads the next batch of a partition that has something to say, and its cursor's tag; `None` when none has.
    ///
    /// # Errors
    /// A partition that is deleted is no longer read. One of which retention has taken what comes next has to be removed or inserted
    /// anew by the caller. Any other failure is of the file, and the next call tries again.
    pub(super) async fn read(&mut self, pool: &ReadPool) -> Result<Option<(u64, Batch)>> {
        let count = self.cursors.len();
        let Some(index) = (0..count)
            .map(|i| (self.turn + i) % count)
            .find(|i| self.cursors[*i].is_readable())
        else {
            return Ok(None);
        };
        self.turn = index + 1;
        let cursor = &self.cursors[index];
        let (partition, position, tag) = (cursor.partition.clone(), cursor.position, cursor.tag);
        // Everything before the end that is seen here is in the file, so a read that finds less than a whole batch has come
        // that far, whatever gaps compaction has left.
        let end = partition.end();
        let failed = if partition.is_deleted() {
            Some(partition.deleted())
        } else if position < partition.start() {
            Some(partition.out_of_range(position))
        } else {
            None
        };
        let read = match failed {
            Some(error) => Err(error),
            None if position >= end => Ok((Vec::new(), end)),
            None => {
                let from = partition.clone();
                pool.run(move |connection| read_records(connection, &from, position, end))
                    .await
            }
        };
        // What was deleted while it was read may be missing in the middle.
        let read = read.and_then(|read| match position < partition.start() {
            true => Err(partition.out_of_range(position)),
            false => Ok(read),
        });
        let Some(index) = self
            .cursors
            .iter()
            .position(|cursor| cursor.partition.row == partition.row)
        else {
            return Ok(None);
        };
        let (records, next) = match read {
            Ok(read) => read,
            Err(error) => {
                if matches!(error, Error::UnknownTopic(_)) {
                    self.cursors.remove(index);
                }
                return Err(error);
            }
        };
        let cursor = &mut self.cursors[index];
        cursor.position = next;
        let caught_up = next >= partition.end();
        cursor.said_caught_up = caught_up;
        let name = partition.name.clone();
        Ok(Some((
            tag,
            Batch {
                partition: name,
                records,
                next_offset: NextOffset(next),
                caught_up,
            },
        )))
    }
}

/// Records from `position` on, before `end`, and the offset to go on from.
fn read_records(connection: &Connection, partition: &Partition, position: i64, end: i64) -> Result<(Vec<Record>, i64)> {
    let mut select = connection.prepare_cached(
        "SELECT id, timestamp_ms, key, headers, value, blob FROM records WHERE id >= ?1 AND id < ?2 ORDER BY id LIMIT ?3",
    )?;
    let mut rows = select.query([
        row_id(partition.row, position),
        row_id(partition.row, end),
        BATCH_RECORDS as i64,
    ])?;
    let mut records = Vec::with_capacity(BATCH_RECORDS.min((end - position).unsigned_abs() as usize));
    let mut bytes = 0;
    while let Some(row) = rows.next()? {
        let blob = |index| -> Result<Option<Bytes>> {
            let value = row.get_ref(index)?.as_blob_or_null().map_err(rusqlite::Error::from)?;
            Ok(value.map(Bytes::copy_from_slice))
        };
        let value = match row.get::<_, Option<i64>>(5)? {
            None => blob(4)?,
            Some(staged) => Some(read_staged(connection, staged)?),
        };
        let record = Record {
            offset: offset_of(row.get(0)?),
            timestamp_ms: row.get(1)?,
            key: blob(2)?,
            value,
            headers: blob(3)?.map(headers::decode).transpose()?.unwrap_or_else(Headers::new),
        };
        bytes += record.key.as_ref().map_or(0, Bytes::len) + record.value.as_ref().map_or(0, Bytes::len);
        records.push(record);
        if bytes >= BATCH_BYTES || records.len() == BATCH_RECORDS {
            let next = records.last().map_or(end, |last| last.offset + 1);
            return Ok((records, next));
        }
    }
    Ok((records, end))
}

fn read_staged(connection: &Connection, blob: i64) -> Result<Bytes> {
    let mut select = connection.prepare_cached("SELECT value FROM blobs WHERE id = ?1")?;
    Ok(select.query_row([blob], |row| row.get::<_, Vec<u8>>(0))?.into())
}
