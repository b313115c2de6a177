//! The database that a view stands in: SQLite, or PostgreSQL with the feature `postgres`.
//!
//! Both do two things only: [`Database::transact`] carries out a list of statements in one transaction, and [`Database::query`] reads.
//! The statements are the same text for both, so that everything else knows nothing of the difference but [`Database::replace_view`].
//!
//! Invariant: a transaction is carried out as a whole or not at all. Nobody is told which when an answer got lost: whoever repeats one must
//! name the rows that it expects to change ([`Statement::must_change`]).

#[cfg(feature = "postgres")]
mod postgres;
mod sqlite;

use std::path::PathBuf;
use std::sync::Arc;

use self::sqlite::Sqlite;

/// A SQLite file, or a PostgreSQL database. Clones share the connections.
#[derive(Clone, Debug)]
pub struct Database {
    engine: Engine,
}

#[derive(Clone, Debug)]
enum Engine {
    Sqlite(Sqlite),
    #[cfg(feature = "postgres")]
    Postgres(postgres::Postgres),
}

/// The database did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// SQLite says so.
    #[error("SQLite: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// PostgreSQL, or the way there.
    #[cfg(feature = "postgres")]
    #[error("PostgreSQL: {0}")]
    Postgres(#[from] sqlx::Error),
    /// It did not answer in time.
    #[error("the database did not answer within {after_ms} ms")]
    TimedOut {
        /// How long it was waited for.
        after_ms: u64,
    },
    /// Its own tables have something in them that cannot be there.
    #[error("the database: {0}")]
    Broken(String),
}

/// A value on its way to or from a column; `None` is NULL.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cell {
    Text(Option<String>),
    Integer(Option<i64>),
    Real(Option<f64>),
    Boolean(Option<bool>),
}

/// One statement of a transaction, its values named `$1`, `$2` and so on, in this order.
#[derive(Clone, Debug)]
pub(super) struct Statement {
    sql: Arc<str>,
    cells: Vec<Cell>,
    /// How many rows it has to change, or nothing of the transaction is done.
    must_change: Option<u64>,
}

impl Statement {
    pub(super) fn new(sql: impl Into<Arc<str>>) -> Self {
        Self {
            sql: sql.into(),
            cells: Vec::new(),
            must_change: None,
        }
    }

    pub(super) fn cell(mut self, cell: impl Into<Cell>) -> Self {
        self.cells.push(cell.into());
        self
    }

    pub(super) fn cells(mut self, cells: impl IntoIterator<Item = Cell>) -> Self {
        self.cells.extend(cells);
        self
    }

    #[cfg(test)]
    pub(super) fn sql(&self) -> &str {
        &self.sql
    }

    /// How many values it has.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.cells.len()
    }

    /// Nothing of the transaction is done unless this changes so many rows.
    pub(super) fn must_change(mut self, rows: u64) -> Self {
        self.must_change = Some(rows);
        self
    }
}

impl From<i64> for Cell {
    fn from(number: i64) -> Self {
        Self::Integer(Some(number))
    }
}

impl From<i32> for Cell {
    fn from(number: i32) -> Self {
        Self::Integer(Some(number.into()))
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(Some(text.to_owned()))
    }
}

impl Cell {
    /// The text of a column that is never NULL.
    pub(super) fn text(self) -> Result<String, DatabaseError> {
        match self {
            Self::Text(Some(text)) => Ok(text),
            other => Err(DatabaseError::Broken(format!("{other:?} stands where a text should"))),
        }
    }

    /// The number of a column that is never NULL.
    pub(super) fn integer(self) -> Result<i64, DatabaseError> {
        match self {
            Self::Integer(Some(number)) => Ok(number),
            other => Err(DatabaseError::Broken(format!("{other:?} stands where a number should"))),
        }
    }
}

impl Database {
    /// A SQLite file, which is made if it is not there. It is opened when it is first used, and kept in WAL mode: whoever reads it does not
    /// wait for the projection.
    pub fn sqlite(path: impl Into<PathBuf>) -> Self {
        Self {
            engine: Engine::Sqlite(Sqlite::new(path.into())),
        }
    }

    /// The database at a `postgres:` URL. Connects when it is first used, with four connections at most.
    ///
    /// # Errors
    /// The URL is none of PostgreSQL's.
    #[cfg(feature = "postgres")]
    pub fn postgres(url: &str) -> Result<Self, DatabaseError> {
        Ok(Self {
            engine: Engine::Postgres(postgres::Postgres::new(url)?),
        })
    }

    /// Carries the statements out in one transaction, in their order. False: one of them would have changed another number of rows than it
    /// must, so nothing was done.
    pub(super) async fn transact(&self, statements: Vec<Statement>) -> Result<bool, DatabaseError> {
        match &self.engine {
            Engine::Sqlite(sqlite) => sqlite.transact(statements).await,
            #[cfg(feature = "postgres")]
            Engine::Postgres(postgres) => postgres.transact(statements).await,
        }
    }

    /// The rows of an answer, whose columns are texts and whole numbers.
    pub(super) async fn query(&self, statement: Statement) -> Result<Vec<Vec<Cell>>, DatabaseError> {
        match &self.engine {
            Engine::Sqlite(sqlite) => sqlite.query(statement).await,
            #[cfg(feature = "postgres")]
            Engine::Postgres(postgres) => postgres.query(statement).await,
        }
    }

    /// The statements that make the SQL view `name` be `select`, whether it is there or not.
    pub(super) fn replace_view(&self, name: &str, select: &str) -> Vec<Statement> {
        match &self.engine {
            Engine::Sqlite(_) => vec![
                Statement::new(format!("DROP VIEW IF EXISTS {name}")),
                Statement::new(format!("CREATE VIEW {name} AS {select}")),
            ],
            // A view that is replaced keeps the rights given to it. That works unless columns have changed or gone.
            #[cfg(feature = "postgres")]
            Engine::Postgres(_) => vec![Statement::new(format!(
                "DO $do$ BEGIN CREATE OR REPLACE VIEW {name} AS {select}; \
                 EXCEPTION WHEN invalid_table_definition THEN DROP VIEW {name}; CREATE VIEW {name} AS {select}; END $do$"
            ))],
        }
    }
}

impl DatabaseError {
    /// Whether the database has refused a value, and will refuse it again.
    pub(super) fn is_about_a_value(&self) -> bool {
        match self {
            Self::Sqlite(error) => sqlite::is_about_a_value(error),
            #[cfg(feature = "postgres")]
            Self::Postgres(error) => postgres::is_about_a_value(error),
            Self::TimedOut { .. } | Self::Broken(_) => false,
        }
    }
}
