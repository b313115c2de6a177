//! The file: its tables, and how connections to it are opened.
//!
//! A record's row id is its partition's id and its offset in one number, so a partition's records lie side by side in the
//! order of their offsets. The view `log` shows them to a person.

use std::path::Path;

use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::settings::Durability;
use crate::log::{Error, Result};

/// Bits of a record's row id that are its offset: 10^12 records a partition, 8 million partitions.
const OFFSET_BITS: u32 = 40;

/// Offsets of one segment of the time index.
pub(super) const SEGMENT_OFFSETS: i64 = 1024;

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS topics (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        topic_id BLOB NOT NULL,
        cleanup TEXT NOT NULL,
        retention_ms INTEGER,
        max_message_bytes INTEGER NOT NULL,
        timestamps TEXT NOT NULL DEFAULT 'CreateTime'
    );
    CREATE TABLE IF NOT EXISTS partitions (
        -- AUTOINCREMENT: rows of a deleted topic's partition must never show up in a new one.
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        topic INTEGER NOT NULL,
        partition INTEGER NOT NULL,
        start_offset INTEGER NOT NULL,
        end_offset INTEGER NOT NULL,
        cleaned_offset INTEGER NOT NULL,
        -- What tombstones before this offset delete was gone by this time.
        settled_offset INTEGER NOT NULL DEFAULT 0,
        settled_ms INTEGER NOT NULL DEFAULT 0,
        UNIQUE (topic, partition)
    );
    CREATE TABLE IF NOT EXISTS records (
        id INTEGER PRIMARY KEY,
        timestamp_ms INTEGER NOT NULL,
        key BLOB,
        headers BLOB,
        value BLOB,
        blob INTEGER -- where the value is, if it was staged
    );
    -- Values of large transactions, written before the transaction is committed.
    CREATE TABLE IF NOT EXISTS blobs (id INTEGER PRIMARY KEY AUTOINCREMENT, value BLOB NOT NULL);
    -- Those of them whose transaction is not committed yet.
    CREATE TABLE IF NOT EXISTS staged (blob INTEGER PRIMARY KEY);
    CREATE TABLE IF NOT EXISTS segments (
        partition INTEGER NOT NULL,
        segment INTEGER NOT NULL,
        max_timestamp_ms INTEGER NOT NULL,
        PRIMARY KEY (partition, segment)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS committed (
        group_id TEXT NOT NULL,
        partition INTEGER NOT NULL,
        next_offset INTEGER NOT NULL,
        metadata TEXT NOT NULL,
        PRIMARY KEY (group_id, partition)
    ) WITHOUT ROWID;
    CREATE VIEW IF NOT EXISTS log AS
        SELECT t.name AS topic, p.partition, r.id & 1099511627775 AS offset, r.timestamp_ms,
               CAST(r.key AS TEXT) AS key, CAST(coalesce(r.value, b.value) AS TEXT) AS value
        FROM partitions p JOIN topics t ON t.id = p.topic
             JOIN records r ON r.id >= p.id << 40 AND r.id < (p.id + 1) << 40
             LEFT JOIN blobs b ON b.id = r.blob;
    -- What a crash left of transactions that were not committed.
    DELETE FROM blobs WHERE id IN (SELECT blob FROM staged);
    DELETE FROM staged;
";

/// Columns that older files lack.
const ADDED_COLUMNS: [(&str, &str, &str); 3] = [
    ("topics", "timestamps", "TEXT NOT NULL DEFAULT 'CreateTime'"),
    ("partitions", "settled_offset", "INTEGER NOT NULL DEFAULT 0"),
    ("partitions", "settled_ms", "INTEGER NOT NULL DEFAULT 0"),
];

/// The row id of the record at `offset`; of the partition's first with 0.
pub(super) fn row_id(partition_id: i64, offset: i64) -> i64 {
    partition_id << OFFSET_BITS | offset
}

/// The offset in a row id.
pub(super) fn offset_of(row_id: i64) -> i64 {
    row_id & ((1 << OFFSET_BITS) - 1)
}

/// The writer's connection. Makes the tables that are missing, and the columns that older files lack.
pub(super) fn open_writer(file: &Path, durability: Durability) -> Result<Connection> {
    let connection = Connection::open(file)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", durability.synchronous())?;
    // Checkpoints are the checkpointer's: they would hold up the writer.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.pragma_update(None, "cache_size", -16_384)?;
    connection.set_prepared_statement_cache_capacity(32);
    connection.execute_batch(TABLES)?;
    for (table, column, definition) in ADDED_COLUMNS {
        let is_there = "SELECT count(*) FROM pragma_table_info(?1) WHERE name = ?2";
        if connection.query_row(is_there, [table, column], |row| row.get::<_, i64>(0))? == 0 {
            connection.execute_batch(&format!("ALTER TABLE {table} ADD COLUMN {column} {definition}"))?;
        }
    }
    Ok(connection)
}

/// A connection that moves the write-ahead log into the file.
pub(super) fn open_checkpointer(file: &Path, durability: Durability) -> Result<Connection> {
    let connection = Connection::open(file)?;
    connection.pragma_update(None, "synchronous", durability.synchronous())?;
    Ok(connection)
}

/// A connection that only reads.
pub(super) fn open_reader(file: &Path) -> Result<Connection> {
    let connection =
        Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.pragma_update(None, "mmap_size", 1i64 << 30)?;
    connection.pragma_update(None, "cache_size", -4096)?;
    Ok(connection)
}

impl From<rusqlite::Error> for Error {
    /// What passes by itself, or when somebody makes room, can be tried again: nothing of it was written. After anything else
    /// what stands in the file is not certain until it is opened anew.
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::DiskFull) => {
                Self::Unavailable(error.to_string())
            }
            _ => Self::Storage(error.to_string()),
        }
    }
}
