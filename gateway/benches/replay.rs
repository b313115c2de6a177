//! A replay beside a bare loop that reads the same, in turns in the same run.
//!
//! `cargo bench -p barnabas --bench replay` measures the embedded log, beside its own reader; with `KAFKA_BROKERS=…` also Kafka, beside
//! rdkafka with the same settings. Each line: the replay, the bare loop, and their ratio (above 1: the replay is better).

use std::sync::Arc;
use std::time::{Duration, Instant};

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Log, ProducerRecord, ProducerSettings, StartAt, TopicSpec};
use barnabas::patterns::replay::{Merge, Replay};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

const ROUNDS: usize = 5;
const PARTITIONS: i32 = 6;
const RECORDS: usize = 1_000_000;
const VALUE_BYTES: usize = 200;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    println!(
        "{ROUNDS} rounds each in turn, medians; {PARTITIONS} partitions, {RECORDS} records of {VALUE_BYTES} bytes"
    );
    let folder = tempfile::tempdir().expect("a folder");
    runtime.block_on(async {
        let log = Log::open_embedded(EmbeddedSettings::new(folder.path()))
            .await
            .expect("a log");
        let topic = fill(&log).await;
        for (name, merge) in MERGES {
            let (mut ours, mut bare) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                ours.push(replay(&log, &topic, merge).await);
                bare.push(read(&log, &topic).await);
            }
            print(&format!("embedded log, {name}"), ours, bare);
        }
        log.close().await;
    });
    let Ok(brokers) = std::env::var("KAFKA_BROKERS") else {
        println!("KAFKA_BROKERS is not set: Kafka was not measured");
        return;
    };
    runtime.block_on(async {
        let log = Log::connect_kafka(KafkaSettings::new(&brokers))
            .await
            .expect("a broker");
        let topic = fill(&log).await;
        for (name, merge) in MERGES {
            let (mut ours, mut bare) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                ours.push(replay(&log, &topic, merge).await);
                bare.push(bare_read(&brokers, &topic));
            }
            print(&format!("Kafka, {name}"), ours, bare);
        }
        log.delete_topic(&topic).await.expect("deleted");
        log.close().await;
    });
}

const MERGES: [(&str, Merge); 2] = [
    ("partition by partition", Merge::PartitionByPartition),
    ("by timestamp", Merge::ByTimestamp),
];

async fn fill(log: &Log) -> String {
    let name = format!("bench-replay-{:08x}", rand::random::<u32>());
    let spec = TopicSpec::new(&name, PARTITIONS);
    let plan = log.plan_topics(&[spec]).await.expect("a plan");
    log.apply_topics(&plan).await.expect("applied");
    let settings = ProducerSettings {
        linger: Duration::from_millis(5),
        ..ProducerSettings::default()
    };
    let producer = log.producer(settings).await.expect("a producer");
    let topic: Arc<str> = name.as_str().into();
    let mut deliveries = Vec::new();
    for number in 0..RECORDS {
        let record = ProducerRecord::to(topic.clone())
            .key(format!("key-{}", number % 10_000))
            .value(vec![b'x'; VALUE_BYTES]);
        deliveries.push(producer.send(record).await.expect("sent"));
        if deliveries.len() == 10_000 {
            for delivery in deliveries.drain(..) {
                delivery.await.expect("appended");
            }
        }
    }
    name
}

/// Records per second, from the opening to the last.
async fn replay(log: &Log, topic: &str, merge: Merge) -> f64 {
    let start = Instant::now();
    let sum = |sum: &mut (usize, usize), record: &barnabas::log::Record| {
        sum.0 += 1;
        sum.1 += record.value.as_ref().map_or(0, |value| value.len());
    };
    let replay = Replay::topic(topic).merge(merge);
    let sums = replay.fold(log, (0, 0), |sums, record| sum(sums, &record)).await;
    let rate = rate(start);
    assert_eq!(sums.expect("all of it"), (RECORDS, RECORDS * VALUE_BYTES));
    rate
}

/// The same with a reader alone, in the order in which it comes.
async fn read(log: &Log, topic: &str) -> f64 {
    let start = Instant::now();
    let mut reader = log.reader(topic).await.expect("a reader");
    for partition in 0..PARTITIONS {
        reader.assign(partition, StartAt::Start).await.expect("assigned");
    }
    let (mut count, mut bytes) = (0, 0);
    while count < RECORDS {
        for record in reader.next().await.expect("a batch").records {
            count += 1;
            bytes += record.value.as_ref().map_or(0, |value| value.len());
        }
    }
    let rate = rate(start);
    assert_eq!(bytes, RECORDS * VALUE_BYTES);
    rate
}

fn bare_read(brokers: &str, topic: &str) -> f64 {
    let start = Instant::now();
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "bench-replay")
        .set("socket.nagle.disable", "true")
        .set("isolation.level", "read_committed")
        .set("enable.partition.eof", "true")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("queued.max.messages.kbytes", "16384")
        .set("fetch.queue.backoff.ms", "10")
        .set("fetch.wait.max.ms", "100")
        .create()
        .expect("a consumer");
    let mut list = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        list.add_partition_offset(topic, partition, Offset::Beginning)
            .expect("an offset");
    }
    consumer.assign(&list).expect("assigned");
    let (mut count, mut bytes) = (0, 0);
    while count < RECORDS {
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => {
                count += 1;
                bytes += message.payload().map_or(0, <[u8]>::len);
            }
            Some(Err(KafkaError::PartitionEOF(_))) | None => {}
            Some(Err(error)) => panic!("{error}"),
        }
    }
    let rate = rate(start);
    assert_eq!(bytes, RECORDS * VALUE_BYTES);
    rate
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn rate(since: Instant) -> f64 {
    RECORDS as f64 / since.elapsed().as_secs_f64()
}

fn print(what: &str, ours: Vec<f64>, bare: Vec<f64>) {
    let (ours, bare) = (median(ours), median(bare));
    println!(
        "{what:40} {ours:>10.0} {bare:>10.0} records/s  ratio {:.2}",
        ours / bare
    );
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
