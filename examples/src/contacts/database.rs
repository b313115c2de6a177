//! The contacts in SQLite or PostgreSQL.
//!
//! A row remembers the job and line that it comes from, and only a greater (job, line) overwrites it. So it makes no difference
//! in which order chunks arrive, or how often: the last row of the last job wins.

use std::collections::HashMap;
use std::path::Path;
use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{AssertSqlSafe, PgPool, SqlitePool};

use super::chunk::SourcedContact;

/// Rows of a statement. Few sizes, so that each is prepared once.
const STATEMENT_ROWS: [usize; 4] = [512, 64, 8, 1];

/// How long a connection is waited for, and SQLite's lock: as long as others may write.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections to PostgreSQL at most. SQLite has one, because it has one writer.
const POSTGRES_CONNECTIONS: u32 = 8;

/// The table of contacts. Clones share the connections.
#[derive(Clone, Debug)]
pub struct Database {
    pool: Pool,
    /// The statement for each of [`STATEMENT_ROWS`].
    statements: [Arc<str>; STATEMENT_ROWS.len()],
}

#[derive(Clone, Debug)]
enum Pool {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

/// `DATABASE_URL` is none that can be used.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    /// Neither SQLite nor PostgreSQL.
    #[error("neither sqlite: nor postgres:")]
    Scheme,
    /// Not understood. Says nothing of the text, in which a password may stand.
    #[error("cannot be read as an address of a database")]
    Malformed,
}

impl Database {
    /// The database at a `sqlite:` or `postgres:` URL. Connects when it is first used.
    ///
    /// # Errors
    /// The URL is no such URL.
    pub fn at(url: &str) -> Result<Self, UrlError> {
        match url.split(':').next() {
            Some("sqlite") => {
                let options = SqliteConnectOptions::from_str(url).map_err(|_| UrlError::Malformed)?;
                Ok(Self::sqlite(options))
            }
            Some("postgres" | "postgresql") => {
                let options = PgConnectOptions::from_str(url).map_err(|_| UrlError::Malformed)?;
                let pool = PgPoolOptions::new()
                    .max_connections(POSTGRES_CONNECTIONS)
                    .acquire_timeout(ACQUIRE_TIMEOUT)
                    .connect_lazy_with(options);
                Ok(Self::with_pool(Pool::Postgres(pool), |n| format!("${n}")))
            }
            _ => Err(UrlError::Scheme),
        }
    }

    /// SQLite in a file, which is made if it is not there.
    pub fn in_file(path: &Path) -> Self {
        Self::sqlite(SqliteConnectOptions::new().filename(path))
    }

    fn sqlite(options: SqliteConnectOptions) -> Self {
        let options = options
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // What is said to be done must outlive a power cut.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(ACQUIRE_TIMEOUT)
            // KiB when negative: enough for the inner pages of some million contacts.
            .pragma("cache_size", "-65536");
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_lazy_with(options);
        // Without numbers: SQLite looks a numbered one up in a list of all, for each value that is bound.
        Self::with_pool(Pool::Sqlite(pool), |_| "?".to_owned())
    }

    fn with_pool(pool: Pool, placeholder: fn(usize) -> String) -> Self {
        Self {
            pool,
            statements: STATEMENT_ROWS.map(|rows| upsert(rows, placeholder).into()),
        }
    }

    /// Makes the table if it is not there.
    ///
    /// # Errors
    /// The database cannot be reached, or refuses.
    pub async fn prepare(&self) -> sqlx::Result<()> {
        // PostgreSQL compares jobs and keys as bytes, as SQLite does, whatever the database's language.
        let table = |text, number, storage| {
            AssertSqlSafe(format!(
                "CREATE TABLE IF NOT EXISTS contacts (key {text} PRIMARY KEY, name TEXT NOT NULL, email TEXT, phone TEXT, \
                 job {text} NOT NULL, line {number} NOT NULL){storage}"
            ))
        };
        match &self.pool {
            Pool::Sqlite(pool) => sqlx::query(table("TEXT", "INTEGER", " WITHOUT ROWID"))
                .execute(pool)
                .await
                .map(drop),
            Pool::Postgres(pool) => sqlx::query(table("TEXT COLLATE \"C\"", "BIGINT", ""))
                .execute(pool)
                .await
                .map(drop),
        }
    }

    /// Inserts contacts or brings them up to date, all in one transaction.
    ///
    /// # Errors
    /// The database cannot be reached, or refuses; nothing is written then.
    pub async fn upsert(&self, contacts: &[SourcedContact]) -> sqlx::Result<()> {
        let contacts = fold(contacts);
        // The two drivers share no type that could be bound to, so the loop stands here for both.
        macro_rules! upsert_in {
            ($pool:expr) => {{
                let mut transaction = $pool.begin().await?;
                let mut rest = contacts.as_slice();
                for (rows, statement) in STATEMENT_ROWS.into_iter().zip(&self.statements) {
                    while let Some((some, others)) = rest.split_at_checked(rows) {
                        let mut query = sqlx::query(AssertSqlSafe(Arc::clone(statement)));
                        for SourcedContact { job, line, contact } in some {
                            query = query
                                .bind(&contact.key)
                                .bind(&contact.name)
                                .bind(contact.email.as_deref())
                                .bind(contact.phone.as_deref())
                                .bind(job)
                                .bind(line.cast_signed());
                        }
                        query.execute(&mut *transaction).await?;
                        rest = others;
                    }
                }
                transaction.commit().await
            }};
        }
        match &self.pool {
            Pool::Sqlite(pool) => upsert_in!(pool),
            Pool::Postgres(pool) => upsert_in!(pool),
        }
    }

    /// How many contacts there are.
    ///
    /// # Errors
    /// The database cannot be reached, or refuses.
    pub async fn count(&self) -> sqlx::Result<u64> {
        const COUNT: &str = "SELECT count(*) FROM contacts";
        let count: i64 = match &self.pool {
            Pool::Sqlite(pool) => sqlx::query_scalar(COUNT).fetch_one(pool).await?,
            Pool::Postgres(pool) => sqlx::query_scalar(COUNT).fetch_one(pool).await?,
        };
        Ok(count.cast_unsigned())
    }

    /// The name of the contact with this key.
    ///
    /// # Errors
    /// The database cannot be reached, or refuses.
    pub async fn name(&self, key: &str) -> sqlx::Result<Option<String>> {
        match &self.pool {
            Pool::Sqlite(pool) => {
                let name = sqlx::query_scalar("SELECT name FROM contacts WHERE key = ?1");
                name.bind(key).fetch_optional(pool).await
            }
            Pool::Postgres(pool) => {
                let name = sqlx::query_scalar("SELECT name FROM contacts WHERE key = $1");
                name.bind(key).fetch_optional(pool).await
            }
        }
    }

    /// Closes the connections; what runs on them ends first.
    pub async fn close(&self) {
        match &self.pool {
            Pool::Sqlite(pool) => pool.close().await,
            Pool::Postgres(pool) => pool.close().await,
        }
    }
}

fn upsert(rows: usize, placeholder: fn(usize) -> String) -> String {
    let row = |row: usize| {
        let values: Vec<_> = (1..=6).map(|column| placeholder(row * 6 + column)).collect();
        format!("({})", values.join(", "))
    };
    format!(
        "INSERT INTO contacts (key, name, email, phone, job, line) VALUES {} ON CONFLICT (key) DO UPDATE SET \
         name = excluded.name, email = excluded.email, phone = excluded.phone, job = excluded.job, line = excluded.line \
         WHERE (excluded.job, excluded.line) > (contacts.job, contacts.line)",
        (0..rows).map(row).collect::<Vec<_>>().join(", ")
    )
}

/// One contact for each key, the one that wins, because PostgreSQL updates no row twice in a statement. Sorted by key, so that
/// two importers lock rows in the same order and never wait for each other in a circle.
fn fold(contacts: &[SourcedContact]) -> Vec<&SourcedContact> {
    let mut by_key: HashMap<&str, &SourcedContact> = HashMap::with_capacity(contacts.len());
    for contact in contacts {
        let winner = by_key.entry(&contact.contact.key).or_insert(contact);
        if (&contact.job, contact.line) > (&winner.job, winner.line) {
            *winner = contact;
        }
    }
    let mut folded: Vec<_> = by_key.into_values().collect();
    folded.sort_unstable_by(|a, b| a.contact.key.cmp(&b.contact.key));
    folded
}
