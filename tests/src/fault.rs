//! Faults that last as long as a value.

use std::path::Path;
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::kafka::KafkaNode;

/// Whoever writes to the file lets go of it within this time.
const TAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// The write lock on an SQLite file, as another program takes it that has the file open: readers go on, writers wait. Dropped,
/// it lets them go on.
#[derive(Debug)]
pub struct SqliteLock {
    /// Its transaction ends with it.
    _connection: Connection,
}

impl SqliteLock {
    /// Takes the lock, as soon as the present writer has it no longer.
    ///
    /// # Panics
    /// If the file is not there, or cannot be locked.
    pub fn take(file: &Path) -> Self {
        let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_WRITE)
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        // SQLite's own waiting sleeps too long to find the short pauses of a busy writer.
        connection
            .busy_timeout(Duration::ZERO)
            .expect("a connection can be told not to wait");
        let deadline = Instant::now() + TAKE_TIMEOUT;
        loop {
            match connection.execute_batch("BEGIN IMMEDIATE") {
                Ok(()) => {
                    return Self {
                        _connection: connection,
                    };
                }
                Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {
                    assert!(Instant::now() < deadline, "{} is always locked", file.display());
                    std::thread::sleep(Duration::from_micros(100));
                }
                Err(error) => panic!("{}: {error}", file.display()),
            }
        }
    }
}

/// A topic of Kafka that refuses all records: each is too large for it.
#[derive(Debug)]
pub struct TopicRefused {
    brokers: String,
    topic: String,
}

impl TopicRefused {
    /// The topic takes nothing from now on.
    ///
    /// # Panics
    /// If the brokers do not do it; so for the other.
    pub async fn new(brokers: &str, topic: &str) -> Self {
        let refused = Self {
            brokers: brokers.to_owned(),
            topic: topic.to_owned(),
        };
        refused.take_records_of("1").await;
        refused
    }

    /// It takes records again.
    pub async fn accept(self) {
        self.take_records_of("1048588").await;
    }

    async fn take_records_of(&self, bytes: &str) {
        let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .create()
            .expect("a client");
        let config = AlterConfig::new(ResourceSpecifier::Topic(&self.topic)).set("max.message.bytes", bytes);
        let altered = admin.alter_configs([&config], &AdminOptions::new()).await;
        for topic in altered.expect("Kafka answers") {
            topic.expect("the topic is altered");
        }
    }
}

/// A log that is away: nothing can be written to it, and who tries waits. Dropped, it is back.
#[derive(Debug)]
pub enum LogAway<'a> {
    /// Another program has the embedded log's file locked.
    Embedded(SqliteLock),
    /// The broker is stopped; connections stay open and nothing answers.
    KafkaSilent(&'a KafkaNode),
    /// The broker was killed.
    KafkaDead(&'a KafkaNode),
}

impl Drop for LogAway<'_> {
    fn drop(&mut self) {
        match self {
            Self::Embedded(_) => {}
            Self::KafkaSilent(node) => node.resume(),
            Self::KafkaDead(node) => node.restart(),
        }
    }
}
