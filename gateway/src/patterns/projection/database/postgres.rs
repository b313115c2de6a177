//! PostgreSQL, with a small pool of connections.

use std::str::FromStr as _;
use std::time::Duration;

use sqlx::postgres::{PgArguments, PgConnectOptions, PgPoolOptions, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Column as _, PgPool, Row as _, TypeInfo as _};
use tokio::time::timeout;

use super::{Cell, DatabaseError, Statement};

/// The live view and one that is built beside it have one each, and reads are short.
const CONNECTIONS: u32 = 4;

/// How long a connection is waited for.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// A transaction that takes longer has lost its connection, or waits for somebody else's lock. It is given up and tried again.
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub(super) struct Postgres {
    pool: PgPool,
}

impl Postgres {
    pub(super) fn new(url: &str) -> Result<Self, DatabaseError> {
        let options = PgConnectOptions::from_str(url)?;
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_lazy_with(options);
        Ok(Self { pool })
    }

    pub(super) async fn transact(&self, statements: Vec<Statement>) -> Result<bool, DatabaseError> {
        within(async {
            let mut transaction = self.pool.begin().await?;
            for statement in statements {
                let must_change = statement.must_change;
                let changed = bound(statement).execute(&mut *transaction).await?.rows_affected();
                if must_change.is_some_and(|rows| rows != changed) {
                    transaction.rollback().await?;
                    return Ok(false);
                }
            }
            transaction.commit().await?;
            Ok(true)
        })
        .await
    }

    pub(super) async fn query(&self, statement: Statement) -> Result<Vec<Vec<Cell>>, DatabaseError> {
        within(async {
            let rows = bound(statement).fetch_all(&self.pool).await?;
            rows.iter().map(read).collect()
        })
        .await
    }
}

async fn within<T>(work: impl Future<Output = sqlx::Result<T>>) -> Result<T, DatabaseError> {
    match timeout(TRANSACTION_TIMEOUT, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(DatabaseError::TimedOut {
            after_ms: TRANSACTION_TIMEOUT.as_millis() as u64,
        }),
    }
}

fn bound(statement: Statement) -> Query<'static, sqlx::Postgres, PgArguments> {
    // The text is made of checked names and of what stands in this crate.
    let query = sqlx::query(AssertSqlSafe(statement.sql));
    statement.cells.into_iter().fold(query, |query, cell| match cell {
        Cell::Text(text) => query.bind(text),
        Cell::Integer(number) => query.bind(number),
        Cell::Real(number) => query.bind(number),
        Cell::Boolean(yes) => query.bind(yes),
    })
}

fn read(row: &PgRow) -> sqlx::Result<Vec<Cell>> {
    let cell = |(index, column): (usize, &sqlx::postgres::PgColumn)| match column.type_info().name() {
        "INT8" => Ok(Cell::Integer(row.try_get(index)?)),
        _ => Ok(Cell::Text(row.try_get(index)?)),
    };
    row.columns().iter().enumerate().map(cell).collect()
}

/// SQLSTATE 22: the value is none of its column's; 23: a constraint; 54000: too large, such as for an index.
pub(super) fn is_about_a_value(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| code.starts_with("22") || code.starts_with("23") || code == "54000")
}
