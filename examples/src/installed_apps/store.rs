//! The database of the service, as the projection writes it and as everybody else reads it: with plain SQL.

use std::path::PathBuf;
use std::str::FromStr as _;
use std::time::Duration;

use barnabas::patterns::projection::{Database, Projection};
use barnabas::server::program::Failure;
use barnabas::server::{Config, ConfigError};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use sqlx::{PgPool, Row as _, SqlitePool};

use super::projector::{InstalledApp, VIEW};

/// File of the default database, in the data folder.
const FILE: &str = "installed-apps.sqlite";

/// Readers at a time; more wait.
const READERS: u32 = 4;

/// How long a reader waits for its turn.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// The database. Clones share the connections.
#[derive(Clone, Debug)]
pub struct Store {
    /// As the projection writes it.
    pub database: Database,
    readers: Readers,
}

#[derive(Clone, Debug)]
enum Readers {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

impl Store {
    /// The database that `DATABASE_URL` names; if it is not set, a SQLite file in the data folder.
    ///
    /// # Errors
    /// `DATABASE_URL` is no URL of a database that can be used.
    pub fn from_env(config: &Config) -> Result<Self, ConfigError> {
        match std::env::var("DATABASE_URL") {
            Ok(url) => Self::at(&url),
            Err(_) => Ok(Self::in_data_folder(config)),
        }
    }

    /// A SQLite file in the data folder.
    pub fn in_data_folder(config: &Config) -> Self {
        Self::sqlite(config.data.dir.join(FILE))
    }

    /// The database at a `sqlite:` or `postgres:` URL.
    ///
    /// # Errors
    /// It is no such URL.
    pub fn at(url: &str) -> Result<Self, ConfigError> {
        let invalid = |reason: &str| ConfigError {
            setting: "DATABASE_URL".to_owned(),
            reason: reason.to_owned(),
        };
        // What is wrong with it is not said: a password may stand in it.
        let malformed = || invalid("cannot be read as an address of a database");
        match url.split(':').next() {
            Some("sqlite") => {
                let options = SqliteConnectOptions::from_str(url).map_err(|_| malformed())?;
                Ok(Self::sqlite(options.get_filename().to_owned()))
            }
            Some("postgres" | "postgresql") => {
                let options = PgConnectOptions::from_str(url).map_err(|_| malformed())?;
                let pool = PgPoolOptions::new()
                    .max_connections(READERS)
                    .acquire_timeout(ACQUIRE_TIMEOUT);
                Ok(Self {
                    database: Database::postgres(url).map_err(|_| malformed())?,
                    readers: Readers::Postgres(pool.connect_lazy_with(options)),
                })
            }
            _ => Err(invalid("neither sqlite: nor postgres:")),
        }
    }

    fn sqlite(file: PathBuf) -> Self {
        let options = SqliteConnectOptions::new()
            .filename(&file)
            .busy_timeout(ACQUIRE_TIMEOUT);
        let pool = SqlitePoolOptions::new()
            .max_connections(READERS)
            .acquire_timeout(ACQUIRE_TIMEOUT);
        Self {
            database: Database::sqlite(file),
            readers: Readers::Sqlite(pool.connect_lazy_with(options)),
        }
    }

    /// The apps of a site.
    ///
    /// # Errors
    /// The database cannot be reached, or there is no view yet.
    pub async fn of_site(&self, site: &str) -> sqlx::Result<Vec<InstalledApp>> {
        self.select(
            "SELECT * FROM installed_apps WHERE site = $1 ORDER BY site, app",
            Some(site),
        )
        .await
    }

    /// The sites that have an app.
    ///
    /// # Errors
    /// As [`Store::of_site`].
    pub async fn of_app(&self, app: &str) -> sqlx::Result<Vec<InstalledApp>> {
        self.select(
            "SELECT * FROM installed_apps WHERE app = $1 ORDER BY site, app",
            Some(app),
        )
        .await
    }

    /// Everything.
    ///
    /// # Errors
    /// As [`Store::of_site`].
    pub async fn all(&self) -> sqlx::Result<Vec<InstalledApp>> {
        self.select("SELECT * FROM installed_apps", None).await
    }

    async fn select(&self, sql: &'static str, value: Option<&str>) -> sqlx::Result<Vec<InstalledApp>> {
        // The two drivers share no row type, so the reading stands here for both. The columns change when the view is switched to a new
        // version: a statement that stays prepared would still have the old ones.
        macro_rules! select_in {
            ($pool:expr) => {{
                let query = sqlx::query(sql).persistent(false);
                let query = match value {
                    Some(value) => query.bind(value),
                    None => query,
                };
                let rows = query.fetch_all($pool).await?;
                let mut apps = Vec::with_capacity(rows.len());
                for row in &rows {
                    apps.push(InstalledApp {
                        site: row.try_get("site")?,
                        app: row.try_get("app")?,
                        version: row.try_get("version")?,
                        major: row.try_get("major").ok(),
                    });
                }
                Ok(apps)
            }};
        }
        match &self.readers {
            Readers::Sqlite(pool) => select_in!(pool),
            Readers::Postgres(pool) => select_in!(pool),
        }
    }

    /// Removes the view and all that is known of it.
    ///
    /// # Errors
    /// The database cannot be reached, or refuses.
    pub async fn clear(&self) -> Result<(), Failure> {
        Ok(Projection::remove(&self.database, VIEW).await?)
    }
}
