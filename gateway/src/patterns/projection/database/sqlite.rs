//! SQLite, with one connection: it has one writer anyway. It works on tokio's threads for what blocks.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::types::{ToSql, ToSqlOutput, Value, ValueRef};
use rusqlite::{Connection, ErrorCode, TransactionBehavior, params_from_iter};

use super::{Cell, DatabaseError, Statement};

/// How long another program's write lock is waited for, before the transaction has failed.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Statements that stay prepared.
const PREPARED: usize = 64;

#[derive(Clone, Debug)]
pub(super) struct Sqlite(Arc<File>);

#[derive(Debug)]
struct File {
    path: PathBuf,
    /// `None`: not opened yet, or to be opened anew after a failure.
    connection: Mutex<Option<Connection>>,
}

impl Sqlite {
    pub(super) fn new(path: PathBuf) -> Self {
        Self(Arc::new(File {
            path,
            connection: Mutex::new(None),
        }))
    }

    pub(super) async fn transact(&self, statements: Vec<Statement>) -> Result<bool, DatabaseError> {
        self.run(move |connection| {
            // With the write lock from the beginning, so that what is read in it stays so.
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            for statement in &statements {
                let cells = params_from_iter(&statement.cells);
                let changed = transaction.prepare_cached(&statement.sql)?.execute(cells)?;
                if statement.must_change.is_some_and(|rows| rows != changed as u64) {
                    return Ok(false);
                }
            }
            transaction.commit()?;
            Ok(true)
        })
        .await
    }

    pub(super) async fn query(&self, statement: Statement) -> Result<Vec<Vec<Cell>>, DatabaseError> {
        self.run(move |connection| {
            let mut prepared = connection.prepare_cached(&statement.sql)?;
            let columns = prepared.column_count();
            let rows = prepared.query_map(params_from_iter(&statement.cells), |row| {
                (0..columns).map(|column| read(row.get_ref(column)?)).collect()
            })?;
            rows.collect()
        })
        .await
    }

    /// What has begun goes on to its end when nobody waits for it any more.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, DatabaseError> {
        let file = self.0.clone();
        let run = move || {
            // Whatever a panic has left open is rolled back with its transaction.
            let mut slot = file.connection.lock().unwrap_or_else(PoisonError::into_inner);
            let mut connection = match slot.take() {
                Some(connection) => connection,
                None => open(&file.path)?,
            };
            let done = work(&mut connection);
            if done.as_ref().err().is_none_or(is_about_a_value) {
                *slot = Some(connection);
            }
            Ok(done?)
        };
        let ended = tokio::task::spawn_blocking(run).await;
        ended.map_err(|error| DatabaseError::Broken(error.to_string()))?
    }
}

fn open(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    // After a power cut the last transactions may be missing, rows and offsets alike: the events are read again.
    connection.pragma_update(None, "synchronous", "normal")?;
    connection.set_prepared_statement_cache_capacity(PREPARED);
    Ok(connection)
}

pub(super) fn is_about_a_value(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::ConstraintViolation | ErrorCode::TooBig | ErrorCode::TypeMismatch)
    )
}

fn read(value: ValueRef<'_>) -> rusqlite::Result<Cell> {
    Ok(match value {
        ValueRef::Integer(number) => Cell::Integer(Some(number)),
        ValueRef::Real(number) => Cell::Real(Some(number)),
        ValueRef::Null => Cell::Text(None),
        ValueRef::Text(_) | ValueRef::Blob(_) => Cell::Text(Some(value.as_str()?.to_owned())),
    })
}

impl ToSql for Cell {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        let null = ToSqlOutput::Owned(Value::Null);
        Ok(match self {
            Self::Text(text) => text.as_deref().map_or(null, ToSqlOutput::from),
            Self::Integer(number) => number.map_or(null, ToSqlOutput::from),
            Self::Real(number) => number.map_or(null, ToSqlOutput::from),
            Self::Boolean(yes) => yes.map_or(null, ToSqlOutput::from),
        })
    }
}
