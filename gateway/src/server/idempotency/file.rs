//! The SQLite file of the ledger: what each key stands for, and how far each partition has been read.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension, Transaction, params};

use super::note::{Answered, Claim};
use crate::log::{NextOffset, TopicId};

/// The version of the tables. A file of another version is built anew.
const VERSION: i64 = 1;

/// How long one connection waits for the other's lock, which is held for a batch at most.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Keys removed in one transaction, so that the ledger is never held up for long.
const FORGET_AT_ONCE: i64 = 1000;

const TABLES: &str = "
    DROP TABLE IF EXISTS claims;
    DROP TABLE IF EXISTS answers;
    DROP TABLE IF EXISTS positions;
    DROP TABLE IF EXISTS source;
    CREATE TABLE claims (key TEXT PRIMARY KEY, claim TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE answers (key TEXT PRIMARY KEY, answered TEXT NOT NULL, until_ms INTEGER NOT NULL);
    CREATE INDEX answers_by_end ON answers (until_ms);
    CREATE TABLE positions (partition INTEGER PRIMARY KEY, next_offset INTEGER NOT NULL);
    CREATE TABLE source (topic_id BLOB NOT NULL);
";

/// The file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// SQLite failed.
    #[error("the file of idempotency keys: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// It, or its folder, cannot be replaced.
    #[error("the file of idempotency keys: {0}")]
    Io(#[from] std::io::Error),
    /// What stands in it cannot be read.
    #[error("the file of idempotency keys: {0}")]
    Json(#[from] serde_json::Error),
}

/// One connection to the file.
#[derive(Debug)]
pub(super) struct LedgerFile {
    connection: Connection,
}

/// Changes that are written together.
pub(super) struct Changes<'a> {
    transaction: Transaction<'a>,
}

impl LedgerFile {
    /// Opens the file, or makes it. One that is no SQLite file of ours is replaced: the log has all that stood in it.
    pub(super) fn open(path: &Path) -> Result<Self, FileError> {
        match Self::try_open(path) {
            Err(FileError::Sqlite(error)) if is_unreadable(&error) => {
                tracing::warn!(file = %path.display(), %error, "the file of idempotency keys cannot be read; it is built anew");
                for suffix in ["", "-wal", "-shm"] {
                    let mut file = path.as_os_str().to_owned();
                    file.push(suffix);
                    match std::fs::remove_file(&file) {
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                        _ => {}
                    }
                }
                Self::try_open(path)
            }
            opened => opened,
        }
    }

    fn try_open(path: &Path) -> Result<Self, FileError> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        // After a power cut the last transactions may be missing, positions and keys alike; they are read again.
        connection.pragma_update(None, "synchronous", "normal")?;
        let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let mut file = Self { connection };
        if version != VERSION {
            file.make_anew()?;
        }
        Ok(file)
    }

    /// Where to read on in each partition of the topic with this identity. Keys of another topic are dropped.
    pub(super) fn positions(&mut self, topic: TopicId) -> Result<HashMap<i32, i64>, FileError> {
        let source: Option<Vec<u8>> = self
            .connection
            .query_row("SELECT topic_id FROM source", [], |row| row.get(0))
            .optional()?;
        if source.as_deref() != Some(topic.0.as_slice()) {
            self.make_anew()?;
            self.connection
                .execute("INSERT INTO source (topic_id) VALUES (?1)", params![topic.0.as_slice()])?;
        }
        let mut statement = self
            .connection
            .prepare("SELECT partition, next_offset FROM positions")?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// The claims that nothing has ended, by key.
    pub(super) fn claims(&self) -> Result<Vec<(String, Claim)>, FileError> {
        let mut statement = self.connection.prepare("SELECT key, claim FROM claims")?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, String>(1)?)))?;
        rows.map(|row| {
            let (key, claim) = row?;
            Ok((key, serde_json::from_str(&claim)?))
        })
        .collect()
    }

    /// What was answered under a key, also when its time has passed.
    pub(super) fn find(&self, key: &str) -> Result<Option<Answered>, FileError> {
        find(&self.connection, key)
    }

    /// Begins changes.
    pub(super) fn begin(&mut self) -> Result<Changes<'_>, FileError> {
        let transaction = self.connection.transaction()?;
        Ok(Changes { transaction })
    }

    /// Removes answers whose time ended before another.
    pub(super) fn forget(&mut self, before_ms: i64) -> Result<(), FileError> {
        let statement = "DELETE FROM answers WHERE rowid IN (SELECT rowid FROM answers WHERE until_ms < ?1 LIMIT ?2)";
        while self.connection.execute(statement, params![before_ms, FORGET_AT_ONCE])? > 0 {}
        Ok(())
    }

    fn make_anew(&mut self) -> Result<(), FileError> {
        let transaction = self.connection.transaction()?;
        transaction.execute_batch(TABLES)?;
        transaction.pragma_update(None, "user_version", VERSION)?;
        Ok(transaction.commit()?)
    }
}

impl Changes<'_> {
    /// As [`LedgerFile::find`], with the changes so far.
    pub(super) fn find(&self, key: &str) -> Result<Option<Answered>, FileError> {
        find(&self.transaction, key)
    }

    /// Notes a claim.
    pub(super) fn claim(&self, key: &str, claim: &Claim) -> Result<(), FileError> {
        self.transaction
            .prepare_cached("INSERT OR REPLACE INTO claims (key, claim) VALUES (?1, ?2)")?
            .execute(params![key, serde_json::to_string(claim)?])?;
        Ok(())
    }

    /// Ends a key's claim.
    pub(super) fn end_claim(&self, key: &str) -> Result<(), FileError> {
        self.transaction
            .prepare_cached("DELETE FROM claims WHERE key = ?1")?
            .execute([key])?;
        Ok(())
    }

    /// Notes an answer.
    pub(super) fn answer(&self, key: &str, answered: &Answered) -> Result<(), FileError> {
        self.transaction
            .prepare_cached("INSERT OR REPLACE INTO answers (key, answered, until_ms) VALUES (?1, ?2, ?3)")?
            .execute(params![key, serde_json::to_string(answered)?, answered.until_ms])?;
        Ok(())
    }

    /// Makes the changes and the position behind them permanent.
    pub(super) fn commit(self, partition: i32, next_offset: NextOffset) -> Result<(), FileError> {
        self.transaction
            .prepare_cached("INSERT OR REPLACE INTO positions (partition, next_offset) VALUES (?1, ?2)")?
            .execute(params![partition, next_offset.0])?;
        Ok(self.transaction.commit()?)
    }
}

fn find(connection: &Connection, key: &str) -> Result<Option<Answered>, FileError> {
    let found: Option<String> = connection
        .prepare_cached("SELECT answered FROM answers WHERE key = ?1")?
        .query_row([key], |row| row.get(0))
        .optional()?;
    Ok(found.map(|answered| serde_json::from_str(&answered)).transpose()?)
}

fn is_unreadable(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt)
    )
}
