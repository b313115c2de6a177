//! A topic, tables on it, and what an oracle says that they must hold.

use std::collections::BTreeMap;
use std::time::Duration;

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Log, ProducerRecord, ProducerSettings};
use barnabas::patterns::table::{self, TableSettings};
use barnabas_tests::conformance::{make_topic, unique};
use barnabas_tests::oracle;
use barnabas_tests::site::Engine;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use tempfile::TempDir;

pub use barnabas_tests::conformance::within;

/// How often something that has not happened yet is looked at again.
pub const LOOK_AGAIN: Duration = Duration::from_millis(20);

pub type Numbers = table::Table<String, u64>;

pub struct Bench {
    pub log: Log,
    pub topic: String,
    brokers: Option<String>,
    folder: TempDir,
}

impl Bench {
    pub async fn new(engine: Engine, partitions: i32) -> Self {
        let brokers = (engine == Engine::Kafka).then(barnabas_tests::kafka::brokers);
        Self::on(brokers, partitions).await
    }

    /// On these brokers; `None`: on an embedded log whose cleaner is busy.
    pub async fn on(brokers: Option<String>, partitions: i32) -> Self {
        let folder = TempDir::new().expect("a folder");
        let log = match &brokers {
            None => {
                let mut settings = EmbeddedSettings::new(folder.path());
                settings.cleanup_interval = Duration::from_millis(20);
                Log::open_embedded(settings).await
            }
            Some(brokers) => Log::connect_kafka(KafkaSettings::new(brokers)).await,
        };
        let log = log.expect("a log");
        let topic = make_topic(&log, table::topic(unique("table"), partitions)).await;
        Self {
            log,
            topic,
            brokers,
            folder,
        }
    }

    /// The log as another process has it; the embedded log has one process.
    pub async fn another_log(&self) -> Log {
        match &self.brokers {
            None => self.log.clone(),
            Some(brokers) => Log::connect_kafka(KafkaSettings::new(brokers)).await.expect("a log"),
        }
    }

    pub fn settings(&self) -> TableSettings {
        TableSettings {
            partition_interval: Duration::from_millis(100),
            ..TableSettings::new(&self.topic)
        }
    }

    pub async fn open(&self) -> Numbers {
        self.open_with(self.settings()).await
    }

    pub async fn open_checked(&self) -> Numbers {
        self.open_with(self.settings().checked()).await
    }

    /// A table of another process, which is ready.
    pub async fn open_with(&self, settings: TableSettings) -> Numbers {
        let table = Numbers::open(&self.another_log().await, settings)
            .await
            .expect("a table");
        within("the table is ready", table.ready()).await.expect("ready");
        table
    }

    pub fn record(&self, key: impl Into<String>, value: impl ToString) -> ProducerRecord {
        ProducerRecord::to(self.topic.as_str())
            .key(key.into())
            .value(value.to_string())
    }

    /// Appends records in order, and waits for all of them.
    pub async fn append(&self, records: impl IntoIterator<Item = ProducerRecord>) {
        let settings = ProducerSettings {
            linger: Duration::from_millis(2),
            ..ProducerSettings::default()
        };
        let producer = self.log.producer(settings).await.expect("a producer");
        let mut deliveries = Vec::new();
        for record in records {
            deliveries.push(producer.send(record).await.expect("sent"));
        }
        for delivery in deliveries {
            within("an acknowledgement", delivery).await.expect("appended");
        }
    }

    /// What stands on the topic, read by other means: partition, offset, key, and value, empty for a tombstone.
    pub fn records(&self) -> Vec<(i32, i64, String, String)> {
        let records = match &self.brokers {
            None => oracle::read_embedded(self.folder.path(), &self.topic),
            Some(brokers) => oracle::read_kafka(brokers, &self.topic),
        };
        let of = |record: &oracle::OracleRecord| {
            let value = String::from_utf8_lossy(&record.value).into_owned();
            (record.partition, record.offset, record.key_text(), value)
        };
        records.iter().map(of).collect()
    }

    /// The last value of each key on the topic.
    pub fn expected(&self) -> BTreeMap<String, u64> {
        let mut last = BTreeMap::new();
        for (_, _, key, value) in self.records() {
            last.insert(key, value);
        }
        let values = last.into_iter().filter(|(_, value)| !value.is_empty());
        values
            .map(|(key, value)| (key, value.parse().expect("a number")))
            .collect()
    }

    /// Kafka compacts what lies before the newest segment, so segments end soon. The embedded log's cleaner is busy already.
    pub async fn hurry_compaction(&self) {
        let Some(brokers) = &self.brokers else { return };
        let settings = [("min.cleanable.dirty.ratio", "0.01"), ("segment.ms", "100")];
        alter_topic(brokers, &self.topic, "compact", &settings).await;
    }

    /// Gives the topic more partitions.
    pub async fn set_partitions(&self, partitions: i32) {
        make_topic(&self.log, table::topic(&self.topic, partitions)).await;
    }
}

async fn alter_topic(brokers: &str, topic: &str, cleanup: &str, settings: &[(&str, &str)]) {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()
        .expect("a client");
    let mut change = AlterConfig::new(ResourceSpecifier::Topic(topic)).set("cleanup.policy", cleanup);
    for (name, value) in settings {
        change = change.set(name, value);
    }
    let answer = admin.alter_configs(&[change], &AdminOptions::new()).await;
    let answer = answer.expect("an answer");
    assert!(answer.iter().all(Result::is_ok), "{answer:?}");
}

/// What a table holds.
pub fn held(table: &Numbers) -> BTreeMap<String, u64> {
    let entries = table.entries().into_iter();
    entries.map(|(key, entry)| (key, *entry.value)).collect()
}

/// Waits until something is so.
pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    within(what, async {
        while !is_so() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    })
    .await;
}
