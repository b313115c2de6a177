//! What stands on the log, read by means that share no code with Barnabas: plain rdkafka, or SQLite.

use std::collections::HashSet;
use std::ffi::CString;
use std::path::Path;
use std::time::{Duration, Instant};

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Header, Headers as _, Message as _};
use rdkafka::{Offset, TopicPartitionList};
use rusqlite::{Connection, OpenFlags, OptionalExtension as _};

/// Reading a topic to its end takes longer only when something is wrong.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Before a question that got no answer is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// One question to a broker.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long transactions that are open are waited for. One that stays open longer, since its producer was killed, is not committed.
const UNDER_WAY: Duration = Duration::from_secs(15);

/// A record, as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OracleRecord {
    /// Its partition.
    pub partition: i32,
    /// Its place there.
    pub offset: i64,
    /// Its time, in milliseconds since the Unix epoch.
    pub timestamp_ms: i64,
    /// The key, empty if there is none.
    pub key: Vec<u8>,
    /// The value, empty if there is none.
    pub value: Vec<u8>,
    /// The headers that are text, in order.
    pub headers: Vec<(String, String)>,
}

impl OracleRecord {
    fn read(message: &BorrowedMessage<'_>) -> Self {
        let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
        let header = |header: Header<'_, &[u8]>| {
            let value = header.value.map(String::from_utf8_lossy).unwrap_or_default();
            (header.key.to_owned(), value.into_owned())
        };
        Self {
            partition: message.partition(),
            offset: message.offset(),
            timestamp_ms: message.timestamp().to_millis().unwrap_or_default(),
            key: message.key().unwrap_or_default().to_owned(),
            value: message.payload().unwrap_or_default().to_owned(),
            headers: headers.map(header).collect(),
        }
    }

    /// A header's value, empty if there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map_or("", |(_, value)| value.as_str())
    }

    /// The key as text.
    pub fn key_text(&self) -> String {
        String::from_utf8_lossy(&self.key).into_owned()
    }

    /// The value as a number.
    ///
    /// # Panics
    /// If it is not one.
    pub fn number(&self) -> u64 {
        let text = String::from_utf8_lossy(&self.value);
        text.parse().unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The value as JSON.
    ///
    /// # Panics
    /// If it is not.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.value).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// All committed records of a topic of Kafka, up to its end as it is now.
///
/// # Panics
/// If they cannot be read.
pub fn read_kafka(brokers: &str, topic: &str) -> Vec<OracleRecord> {
    read_kafka_as(brokers, topic, "read_committed")
}

/// As [`read_kafka`], with what open and aborted transactions have written.
///
/// # Panics
/// If they cannot be read.
pub fn read_kafka_uncommitted(brokers: &str, topic: &str) -> Vec<OracleRecord> {
    read_kafka_as(brokers, topic, "read_uncommitted")
}

/// What a group has committed for the partitions of a topic, in their order: the offset, 0 if there is none, and the metadata.
///
/// # Panics
/// If it cannot be read.
pub fn committed_kafka(brokers: &str, group: &str, topic: &str, partitions: i32) -> Vec<(i64, String)> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", group)
        // What is committed now, without waiting for what a transaction that a killed process left open would still commit.
        .set("isolation.level", "read_uncommitted")
        .create()
        .expect("a consumer");
    let mut wanted = TopicPartitionList::new();
    for partition in 0..partitions {
        wanted.add_partition(topic, partition);
    }
    let deadline = Instant::now() + READ_TIMEOUT;
    let committed = insist(brokers, &consumer, topic, deadline, |consumer| {
        consumer.committed_offsets(wanted.clone(), REQUEST_TIMEOUT)
    });
    let of = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match element.offset() {
        Offset::Offset(offset) => (offset, element.metadata().to_owned()),
        _ => (0, String::new()),
    };
    committed.elements().iter().map(of).collect()
}

/// How far a topic of Kafka is written and committed, to be asked again and again.
pub struct TopicEnds {
    committed: BaseConsumer,
    written: BaseConsumer,
    topic: String,
    partitions: i32,
}

impl TopicEnds {
    /// Of a topic.
    ///
    /// # Panics
    /// If it is not there.
    pub fn new(brokers: &str, topic: &str) -> Self {
        let committed = reader(brokers, "read_committed");
        let deadline = Instant::now() + READ_TIMEOUT;
        let metadata = insist(brokers, &committed, topic, deadline, |committed| {
            committed.fetch_metadata(Some(topic), REQUEST_TIMEOUT)
        });
        let partitions = metadata.topics()[0].partitions().len();
        Self {
            committed,
            written: reader(brokers, "read_uncommitted"),
            topic: topic.to_owned(),
            partitions: i32::try_from(partitions).expect("a small number"),
        }
    }

    /// The last stable offsets of its partitions together: 0 until a transaction has ended.
    ///
    /// # Panics
    /// If they cannot be asked for.
    pub fn committed(&self) -> i64 {
        self.sum(&self.committed)
    }

    /// Whether a transaction is open that has written to it.
    ///
    /// # Panics
    /// If its ends cannot be asked for.
    pub fn is_open(&self) -> bool {
        // In this order: what is appended in between does not look open.
        let written = self.sum(&self.written);
        self.committed() < written
    }

    fn sum(&self, reader: &BaseConsumer) -> i64 {
        let end = |partition| {
            let watermarks = reader.fetch_watermarks(&self.topic, partition, REQUEST_TIMEOUT);
            watermarks.expect("the ends can be asked for").1
        };
        (0..self.partitions).map(end).sum()
    }
}

fn reader(brokers: &str, isolation: &str) -> BaseConsumer {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        // Required by librdkafka; nothing is committed.
        .set("group.id", "oracle")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("isolation.level", isolation)
        .create()
        .expect("a consumer")
}

fn read_kafka_as(brokers: &str, topic: &str, isolation: &str) -> Vec<OracleRecord> {
    let (consumer, uncommitted) = (reader(brokers, isolation), reader(brokers, "read_uncommitted"));
    let deadline = Instant::now() + READ_TIMEOUT;
    let partitions = insist(brokers, &consumer, topic, deadline, |consumer| {
        let metadata = consumer.fetch_metadata(Some(topic), REQUEST_TIMEOUT)?;
        Ok(metadata.topics()[0].partitions().len())
    });
    // What is appended from now on is not read: others may append for ever.
    let mut ends = Vec::new();
    let mut assignment = TopicPartitionList::new();
    for partition in 0..i32::try_from(partitions).expect("a small number") {
        // A producer hears that it has committed before all partitions show it: what is under way is waited for.
        let ask = |consumer: &BaseConsumer| {
            insist(brokers, consumer, topic, deadline, |consumer| {
                consumer.fetch_watermarks(topic, partition, REQUEST_TIMEOUT)
            })
        };
        let (_, last) = ask(&uncommitted);
        let patience = Instant::now() + UNDER_WAY;
        let (start, end) = loop {
            match ask(&consumer) {
                (_, end) if end < last && Instant::now() < patience => std::thread::sleep(Duration::from_millis(10)),
                kept => break kept,
            }
        };
        ends.push(end);
        if start < end {
            assignment
                .add_partition_offset(topic, partition, Offset::Beginning)
                .expect("a valid offset");
        }
    }
    consumer.assign(&assignment).expect("an assignment");
    let end_of = |partition: i32| ends[usize::try_from(partition).expect("no negative number")];
    let mut unread: HashSet<i32> = assignment.elements().iter().map(|of| of.partition()).collect();
    let mut records = Vec::new();
    while !unread.is_empty() {
        assert!(Instant::now() < deadline, "{topic} cannot be read to its end");
        match consumer.poll(Duration::from_millis(500)) {
            None => look_again(brokers, &consumer, topic),
            // Also where what is behind the last record are the marks of transactions.
            Some(Err(KafkaError::PartitionEOF(partition))) => drop(unread.remove(&partition)),
            // A broker that is away for a moment is waited for.
            Some(Err(error)) => eprintln!("{topic}: {error}"),
            Some(Ok(message)) => {
                if message.offset() + 1 >= end_of(message.partition()) {
                    unread.remove(&message.partition());
                }
                if message.offset() < end_of(message.partition()) {
                    records.push(OracleRecord::read(&message));
                }
            }
        }
    }
    records.sort_by_key(|record| (record.partition, record.offset));
    records
}

/// Asks until there is an answer.
fn insist<T>(
    brokers: &str,
    consumer: &BaseConsumer,
    topic: &str,
    deadline: Instant,
    ask: impl Fn(&BaseConsumer) -> KafkaResult<T>,
) -> T {
    loop {
        match ask(consumer) {
            Ok(answer) => return answer,
            Err(error) => assert!(Instant::now() < deadline, "{topic}: {error}"),
        }
        // A broker that is not ready is not helped by being asked at once.
        std::thread::sleep(ASK_AGAIN);
        look_again(brokers, consumer, topic);
    }
}

/// Has a client find brokers and leaders again: one that asked just when there were none believes that for a quarter of an hour, and
/// of itself asks nobody else.
fn look_again(brokers: &str, consumer: &BaseConsumer, topic: &str) {
    let brokers = CString::new(brokers).expect("addresses");
    // SAFETY: the client is alive, and copies the C string.
    unsafe { rdkafka::bindings::rd_kafka_brokers_add(consumer.client().native_ptr(), brokers.as_ptr()) };
    if let Err(error) = consumer.fetch_metadata(Some(topic), REQUEST_TIMEOUT) {
        eprintln!("{topic}: {error}");
    }
}

/// All records of a topic of an embedded log, whose file is `log.sqlite` in its data folder. What is not committed is in no
/// transaction of SQLite that this can see.
///
/// # Panics
/// If they cannot be read.
pub fn read_embedded(data_dir: &Path, topic: &str) -> Vec<OracleRecord> {
    let log = open_embedded(data_dir);
    let mut query = log
        .prepare(
            "SELECT p.partition, r.id & 1099511627775, r.key, coalesce(r.value, b.value), r.headers, r.timestamp_ms
             FROM topics t JOIN partitions p ON p.topic = t.id
                  JOIN records r ON r.id >= p.id << 40 AND r.id < (p.id + 1) << 40
                  LEFT JOIN blobs b ON b.id = r.blob
             WHERE t.name = ?1 ORDER BY p.partition, r.id",
        )
        .expect("the embedded log has its tables");
    query
        .query_map([topic], |row| {
            Ok(OracleRecord {
                partition: row.get(0)?,
                offset: row.get(1)?,
                timestamp_ms: row.get(5)?,
                key: row.get::<_, Option<Vec<u8>>>(2)?.unwrap_or_default(),
                value: row.get::<_, Option<Vec<u8>>>(3)?.unwrap_or_default(),
                headers: headers(&row.get::<_, Option<Vec<u8>>>(4)?.unwrap_or_default()),
            })
        })
        .expect("records are read")
        .collect::<Result<_, _>>()
        .expect("records are as they were written")
}

/// What a group has committed on an embedded log for the partitions of a topic, as [`committed_kafka`] has it.
///
/// # Panics
/// If it cannot be read.
pub fn committed_embedded(data_dir: &Path, group: &str, topic: &str, partitions: i32) -> Vec<(i64, String)> {
    let log = open_embedded(data_dir);
    let mut query = log
        .prepare(
            "SELECT c.next_offset, c.metadata
             FROM committed c JOIN partitions p ON p.id = c.partition JOIN topics t ON t.id = p.topic
             WHERE c.group_id = ?1 AND t.name = ?2 AND p.partition = ?3",
        )
        .expect("the embedded log has its tables");
    let mut of = |partition| {
        let committed = query.query_row((group, topic, partition), |row| Ok((row.get(0)?, row.get(1)?)));
        committed.optional().expect("it can be read").unwrap_or_default()
    };
    (0..partitions).map(&mut of).collect()
}

fn open_embedded(data_dir: &Path) -> Connection {
    let file = data_dir.join("log.sqlite");
    Connection::open_with_flags(&file, OpenFlags::SQLITE_OPEN_READ_ONLY)
        .unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// Names and values, each after its length in four little-endian bytes.
fn headers(mut encoded: &[u8]) -> Vec<(String, String)> {
    let mut part = || -> Option<String> {
        let (length, rest) = encoded.split_first_chunk::<4>()?;
        let (part, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        encoded = rest;
        Some(String::from_utf8_lossy(part).into_owned())
    };
    let mut headers = Vec::new();
    while let (Some(name), Some(value)) = (part(), part()) {
        headers.push((name, value));
    }
    headers
}
