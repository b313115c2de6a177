//! Entries that are set and removed, and projections of them: in this process, or in processes of their own (`projection-worker`). What
//! views should have is folded here from what the oracle reads on the log, and what they have is asked of the databases themselves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Log, ProducerRecord};
use barnabas::patterns::consumer::Cause;
use barnabas::patterns::projection::{Change, ColumnType, Database, ProjectionSettings, Projector, ViewSpec};
use rand::RngExt as _;
use rand::rngs::StdRng;
use rusqlite::Connection;
use rusqlite::types::ValueRef;
use serde::{Deserialize, Serialize};

use crate::oracle::OracleRecord;
use crate::postgres::Postgres;

/// An event.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Entry {
    Set {
        key: String,
        value: String,
        number: i64,
    },
    Removed {
        key: String,
    },
    /// The projector panics at it.
    Panicking,
    /// The projector returns an error.
    Hopeless,
}

impl Entry {
    /// The entry as a record, with the key of the entry.
    pub fn record(&self, topic: &str) -> ProducerRecord {
        let key = match self {
            Self::Set { key, .. } | Self::Removed { key } => key,
            Self::Panicking | Self::Hopeless => "poison",
        };
        let value = serde_json::to_vec(self).expect("an entry is JSON");
        ProducerRecord::to(topic).key(key.to_owned()).value(value)
    }
}

/// Events numbered `from` to `to`, of so many keys; one in five removes its key.
pub fn random_entries(random: &mut StdRng, numbers: std::ops::Range<i64>, keys: u32) -> Vec<Entry> {
    let entry = |number| {
        let key = format!("k{}", random.random_range(0..keys));
        match random.random_range(0..5) {
            0 => Entry::Removed { key },
            _ => Entry::Set {
                key,
                value: format!("v{number}"),
                number,
            },
        }
    };
    numbers.map(entry).collect()
}

/// A row of the view. Only later versions of it know what is twice the number.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct Row {
    key: String,
    value: String,
    number: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    doubled: Option<i64>,
}

/// Projects entries.
#[derive(Clone, Copy, Debug)]
pub struct Entries {
    /// Of the projection: from 2 on there is a column more.
    pub version: u32,
}

impl Projector for Entries {
    type Event = Entry;
    type Row = Row;

    fn project(&self, event: Entry) -> Result<Vec<Change<Row>>, Cause> {
        Ok(vec![match event {
            Entry::Set { key, value, number } => Change::Upsert(Row {
                key,
                value,
                number,
                doubled: (self.version > 1).then_some(number * 2),
            }),
            Entry::Removed { key } => Change::delete([key]),
            Entry::Panicking => panic!("told to panic"),
            Entry::Hopeless => return Err("told to fail".into()),
        }])
    }
}

/// What one `projection-worker` does, and what a test does in its own process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProjectionWork {
    /// Brokers, or the folder of an embedded log if it begins with `/`.
    pub log: String,
    /// A `postgres:` URL, or the path of a SQLite file.
    pub database: String,
    /// The group.
    pub group: String,
    /// The topic.
    pub topic: String,
    /// The name of the view.
    pub view: String,
    /// The version.
    pub version: u32,
}

impl ProjectionWork {
    /// The log.
    ///
    /// # Errors
    /// Those of the log.
    pub async fn open_log(&self) -> barnabas::log::Result<Log> {
        match self.log.starts_with('/') {
            true => Log::open_embedded(EmbeddedSettings::new(&self.log)).await,
            false => Log::connect_kafka(KafkaSettings::new(&self.log)).await,
        }
    }

    /// The database.
    ///
    /// # Panics
    /// If its URL is none.
    pub fn open_database(&self) -> Database {
        match self.database.starts_with("postgres:") {
            true => Database::postgres(&self.database).expect("a URL"),
            false => Database::sqlite(&self.database),
        }
    }

    /// The settings.
    pub fn settings(&self) -> ProjectionSettings {
        let view = ViewSpec::new(&self.view)
            .key("key", ColumnType::Text)
            .column("value", ColumnType::Text)
            .column("number", ColumnType::Integer)
            .index(["number"]);
        ProjectionSettings {
            version: self.version,
            // The members that are killed are replaced soon.
            session_timeout: Duration::from_secs(1),
            ..ProjectionSettings::new(
                &self.group,
                [&self.topic],
                match self.version {
                    1 => view,
                    _ => view.column("doubled", ColumnType::Integer),
                },
            )
        }
    }

    /// The projector.
    pub fn projector(&self) -> Entries {
        Entries { version: self.version }
    }
}

/// The rows that a view should have, `key|value|number` in the order of the keys. Records that are no entries count for nothing.
pub fn fold(records: &[OracleRecord]) -> Vec<String> {
    let mut rows = BTreeMap::new();
    for record in records {
        let Ok(event) = serde_json::from_slice::<serde_json::Value>(&record.value) else {
            continue;
        };
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        match event["event"].as_str() {
            Some("set") => drop(rows.insert(text("key"), (text("value"), event["number"].to_string()))),
            Some("removed") => drop(rows.remove(&text("key"))),
            _ => {}
        }
    }
    let row = |(key, (value, number))| format!("{key}|{value}|{number}");
    rows.into_iter().map(row).collect()
}

/// A database as whoever reads the view asks it: without a line of the library's.
#[derive(Debug)]
pub enum Asked {
    /// The file.
    Sqlite(PathBuf),
    /// The server.
    Postgres(Box<Postgres>),
}

impl Asked {
    /// The rows of an answer, with `|` between the columns; `None`: the database refuses, as for a view that is not there.
    pub fn try_query(&self, sql: &str) -> Option<Vec<String>> {
        match self {
            Self::Sqlite(file) => query_sqlite(file, sql).ok(),
            Self::Postgres(postgres) => postgres.try_query(sql),
        }
    }

    /// The rows of an answer.
    ///
    /// # Panics
    /// If there is none.
    pub fn query(&self, sql: &str) -> Vec<String> {
        self.try_query(sql).unwrap_or_else(|| panic!("refused: {sql}"))
    }

    /// Carries out statements.
    ///
    /// # Panics
    /// If the database refuses.
    pub fn execute(&self, sql: &str) {
        match self {
            Self::Sqlite(file) => open(file)
                .and_then(|connection| connection.execute_batch(sql))
                .unwrap_or_else(|error| panic!("{sql}: {error}")),
            Self::Postgres(postgres) => drop(postgres.query(sql)),
        }
    }
}

fn open(file: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(file)?;
    connection.busy_timeout(Duration::from_secs(30))?;
    Ok(connection)
}

fn query_sqlite(file: &Path, sql: &str) -> rusqlite::Result<Vec<String>> {
    let connection = open(file)?;
    let mut statement = connection.prepare(sql)?;
    let columns = statement.column_count();
    let cell = |value: ValueRef<'_>| match value {
        ValueRef::Null => String::new(),
        ValueRef::Integer(number) => number.to_string(),
        ValueRef::Real(number) => number.to_string(),
        ValueRef::Text(text) | ValueRef::Blob(text) => String::from_utf8_lossy(text).into_owned(),
    };
    let rows = statement.query_map([], |row| {
        let cells = (0..columns).map(|column| row.get_ref(column).map(cell));
        Ok(cells.collect::<rusqlite::Result<Vec<_>>>()?.join("|"))
    })?;
    rows.collect()
}
