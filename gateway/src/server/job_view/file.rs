//! The SQLite file of the job view: states by job id, and how far each partition has been read.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, OptionalExtension, params};
use uuid::Uuid;

use super::{Job, JobViewError};
use crate::log::{NextOffset, TopicId};

/// The version of the tables. A file of another version is built anew.
const VERSION: i64 = 1;

/// How long one connection waits for the other's lock, which is held for a batch at most.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Jobs removed in one transaction, so that the projection is never held up for long.
const FORGET_AT_ONCE: i64 = 1000;

const TABLES: &str = "
    DROP TABLE IF EXISTS jobs;
    DROP TABLE IF EXISTS positions;
    DROP TABLE IF EXISTS source;
    CREATE TABLE jobs (id TEXT PRIMARY KEY, state TEXT NOT NULL, updated_ms INTEGER NOT NULL);
    CREATE INDEX jobs_by_update ON jobs (updated_ms);
    CREATE TABLE positions (partition INTEGER PRIMARY KEY, next_offset INTEGER NOT NULL);
    CREATE TABLE source (topic_id BLOB NOT NULL);
";

/// One connection to the file.
#[derive(Debug)]
pub(super) struct JobFile {
    connection: Connection,
}

/// The last state of a job in a batch; `None`: removed.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) state: Option<Bytes>,
    pub(super) updated_ms: i64,
}

impl JobFile {
    /// Opens the file, or makes it. One that is no SQLite file of ours is replaced: the log has all that stood in it.
    pub(super) fn open(path: &Path) -> Result<Self, JobViewError> {
        match Self::try_open(path) {
            Err(JobViewError::File(error)) if is_unreadable(&error) => {
                tracing::warn!(file = %path.display(), %error, "the job view's file cannot be read; it is built anew");
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

    fn try_open(path: &Path) -> Result<Self, JobViewError> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        // After a power cut the last transactions may be missing, positions and states alike; they are read again.
        connection.pragma_update(None, "synchronous", "normal")?;
        let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let mut file = Self { connection };
        if version != VERSION {
            file.make_anew()?;
        }
        Ok(file)
    }

    /// Where to read on in each partition of the topic with this identity. States of another topic are dropped.
    pub(super) fn positions(&mut self, topic: TopicId) -> Result<HashMap<i32, i64>, JobViewError> {
        let source: Option<Vec<u8>> = self
            .connection
            .query_row("SELECT topic_id FROM source", [], |row| row.get(0))
            .optional()?;
        if source.as_deref() != Some(topic.0.as_slice()) {
            if source.is_some() {
                tracing::warn!("the topic of job states was made anew; so is the job view");
            }
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

    /// Writes changes and the position behind them.
    pub(super) fn apply(
        &mut self,
        partition: i32,
        next_offset: NextOffset,
        changes: HashMap<Uuid, Change>,
    ) -> Result<(), JobViewError> {
        let transaction = self.connection.transaction()?;
        {
            let mut put = transaction.prepare_cached(
                "INSERT INTO jobs (id, state, updated_ms) VALUES (?1, ?2, ?3)
                 ON CONFLICT (id) DO UPDATE SET state = excluded.state, updated_ms = excluded.updated_ms",
            )?;
            let mut remove = transaction.prepare_cached("DELETE FROM jobs WHERE id = ?1")?;
            for (id, change) in changes {
                let id = id.to_string();
                let Some(state) = change.state else {
                    remove.execute([id])?;
                    continue;
                };
                match std::str::from_utf8(&state) {
                    Ok(state) => put.execute(params![id, state, change.updated_ms])?,
                    Err(_) => {
                        tracing::warn!(job = id, "passing over a state that is not UTF-8");
                        continue;
                    }
                };
            }
            transaction
                .prepare_cached(
                    "INSERT INTO positions (partition, next_offset) VALUES (?1, ?2)
                     ON CONFLICT (partition) DO UPDATE SET next_offset = excluded.next_offset",
                )?
                .execute(params![partition, next_offset.0])?;
        }
        Ok(transaction.commit()?)
    }

    /// Removes jobs last changed before a time, and says how many.
    pub(super) fn forget(&mut self, before_ms: i64) -> Result<usize, JobViewError> {
        let mut removed = 0;
        loop {
            let now = self.connection.execute(
                "DELETE FROM jobs WHERE rowid IN (SELECT rowid FROM jobs WHERE updated_ms < ?1 LIMIT ?2)",
                params![before_ms, FORGET_AT_ONCE],
            )?;
            removed += now;
            if now == 0 {
                return Ok(removed);
            }
        }
    }

    /// The job, if it is there.
    pub(super) fn find(&self, id: Uuid) -> Result<Option<Job>, JobViewError> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT state, updated_ms FROM jobs WHERE id = ?1")?;
        let found: Option<(String, i64)> = statement
            .query_row([id.to_string()], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        let Some((state, updated_ms)) = found else {
            return Ok(None);
        };
        let state = serde_json::from_str(&state)
            .map_err(|error| JobViewError::Broken(format!("the state of job {id} cannot be read: {error}")))?;
        Ok(Some(Job { state, updated_ms }))
    }

    fn make_anew(&mut self) -> Result<(), JobViewError> {
        let transaction = self.connection.transaction()?;
        transaction.execute_batch(TABLES)?;
        transaction.pragma_update(None, "user_version", VERSION)?;
        Ok(transaction.commit()?)
    }
}

fn is_unreadable(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::job_state::JobState;

    const TOPIC: TopicId = TopicId([1; 16]);

    fn change(chunks: u32, updated_ms: i64) -> Change {
        let state = JobState::new("import-contacts".into(), "c".into(), 1, chunks, 10);
        Change {
            state: Some(serde_json::to_vec(&state).expect("JSON").into()),
            updated_ms,
        }
    }

    #[test]
    fn states_and_positions_survive_a_restart_together() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("jobs.sqlite");
        let (kept, removed) = (Uuid::now_v7(), Uuid::now_v7());
        let mut file = JobFile::open(&path).expect("a file");
        assert!(file.positions(TOPIC).expect("positions").is_empty());
        let changes = HashMap::from([(kept, change(1, 5)), (removed, change(2, 5))]);
        file.apply(3, NextOffset(10), changes).expect("applied");
        let changes = HashMap::from([
            (kept, change(7, 6)),
            (
                removed,
                Change {
                    state: None,
                    updated_ms: 6,
                },
            ),
        ]);
        file.apply(3, NextOffset(12), changes).expect("applied");
        drop(file);
        let mut file = JobFile::open(&path).expect("a file");
        assert_eq!(file.positions(TOPIC).expect("positions"), HashMap::from([(3, 12)]));
        let job = file.find(kept).expect("read").expect("a job");
        assert_eq!((job.state.chunks, job.updated_ms), (7, 6));
        assert_eq!(file.find(removed).expect("read"), None);
    }

    #[test]
    fn another_topic_starts_an_empty_view() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut file = JobFile::open(&folder.path().join("jobs.sqlite")).expect("a file");
        let id = Uuid::now_v7();
        file.positions(TOPIC).expect("positions");
        file.apply(0, NextOffset(1), HashMap::from([(id, change(1, 5))]))
            .expect("applied");
        assert!(file.positions(TopicId([2; 16])).expect("positions").is_empty());
        assert_eq!(file.find(id).expect("read"), None);
    }

    #[test]
    fn jobs_past_retention_are_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut file = JobFile::open(&folder.path().join("jobs.sqlite")).expect("a file");
        let changes = (0..2500).map(|n| (Uuid::now_v7(), change(1, n))).collect();
        file.apply(0, NextOffset(2500), changes).expect("applied");
        assert_eq!(file.forget(2400).expect("removed"), 2400);
        assert_eq!(file.forget(2400).expect("removed"), 0);
    }

    #[test]
    fn a_file_that_is_no_database_is_built_anew() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("jobs.sqlite");
        std::fs::write(&path, vec![b'x'; 8192]).expect("a file");
        let mut file = JobFile::open(&path).expect("a file");
        assert!(file.positions(TOPIC).expect("positions").is_empty());
    }
}
