//! How many commands an atomic store applies in a second: `cargo bench -p barnabas --bench atomic_store`, on the embedded log, and with
//! `KAFKA_BROKERS` on Kafka beside a bare rdkafka loop that keeps the same sums in transactions.
//!
//! Commands wait on the log when the store starts, so that nothing but the store is measured: one owner, eight partitions. At the end,
//! what an idle consumer costs.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Log, ProducerRecord, ProducerSettings, Record, StartAt, TopicSpec};
use barnabas::patterns::atomic_store::{
    self, Aggregate, AtomicStore, AtomicStoreSettings, Derived, command_record, commands_topic,
};
use barnabas::patterns::consumer::{ConsumerBuilder, Context, Handler, HandlerError};
use barnabas::patterns::window::{Windowed, Windows};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

const PARTITIONS: i32 = 8;
const KEYS: usize = 1000;
const COMMANDS: usize = 200_000;
const ROUNDS: usize = 3;
const IDLE_CONSUMERS: usize = 20;
const IDLE: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Seen {
    at_ms: i64,
}

/// Counts the commands of each key.
struct Counts;

impl Aggregate for Counts {
    type State = u64;
    type Command = Seen;

    fn apply(&self, _: &str, state: &mut Option<u64>, _: Seen) {
        *state.get_or_insert_default() += 1;
    }

    fn derive(&self, _: &str, _: &mut u64, _: i64) -> Derived {
        Derived::default()
    }
}

#[tokio::main]
async fn main() {
    println!("{COMMANDS} commands of {KEYS} keys in {PARTITIONS} partitions, medians of {ROUNDS}");
    let folder = tempfile::tempdir().expect("a folder");
    let settings = EmbeddedSettings::new(folder.path());
    let log = Log::open_embedded(settings).await.expect("a log");
    measure(&log, "embedded log", None).await;
    log.close().await;
    if let Ok(brokers) = std::env::var("KAFKA_BROKERS")
        && !brokers.is_empty()
    {
        let log = Log::connect_kafka(KafkaSettings::new(&brokers))
            .await
            .expect("a broker");
        measure(&log, "Kafka", Some(&brokers)).await;
        log.close().await;
    }
}

async fn measure(log: &Log, name: &str, brokers: Option<&str>) {
    let (mut counts, mut windows, mut bare) = (Vec::new(), Vec::new(), BTreeMap::<usize, Vec<f64>>::new());
    for _ in 0..ROUNDS {
        let store = fill(log).await;
        counts.push(apply(log, &store, Counts, count_of).await);
        let store = fill(log).await;
        let minutes = Windows::tumbling(Duration::from_secs(60)).grace(Duration::from_secs(10));
        let minutes = Windowed::new(minutes, |seen: &Seen| seen.at_ms, |count: &mut u64, _| *count += 1);
        windows.push(apply(log, &store, minutes, windows_of).await);
        if let Some(brokers) = brokers {
            for window in [500, 4000] {
                let store = fill(log).await;
                let rate = tokio::task::block_in_place(|| bare_counts(brokers, &store, window));
                bare.entry(window).or_default().push(rate);
            }
        }
    }
    let counts = median(counts);
    println!("{name}: counts            {counts:>10.0} commands/s");
    println!("{name}: counts per minute {:>10.0} commands/s", median(windows));
    for (window, rates) in bare {
        let rate = median(rates);
        println!(
            "{name}: bare loop, {window:>4} a transaction {rate:>10.0} commands/s, ratio {:.2}",
            counts / rate
        );
    }
    idle(log, name).await;
}

/// A store whose commands all wait.
async fn fill(log: &Log) -> String {
    let store = format!("bench-{:08x}", rand::random::<u32>());
    let topics = atomic_store::topics(&store, PARTITIONS, Duration::from_secs(3600));
    make(log, &topics).await;
    let producer = log.producer(ProducerSettings::telemetry()).await.expect("a producer");
    let mut deliveries = Vec::new();
    for number in 0..COMMANDS {
        let seen = Seen {
            // Ten minutes in all.
            at_ms: number as i64 * 600_000 / COMMANDS as i64,
        };
        let record = command_record(&store, &format!("key-{}", number % KEYS), &seen).expect("JSON");
        deliveries.push(producer.send(record).await.expect("sent"));
    }
    for delivery in deliveries {
        delivery.await.expect("appended");
    }
    store
}

async fn make(log: &Log, topics: &[TopicSpec]) {
    let plan = log.plan_topics(topics).await.expect("a plan");
    log.apply_topics(&plan).await.expect("topics");
}

fn count_of(state: &serde_json::Value) -> u64 {
    state.as_u64().expect("a number")
}

/// All windows but the open ones are closed and gone; each key has as many as another by then.
fn windows_of(state: &serde_json::Value) -> u64 {
    let latest_ms = state["latest_ms"].as_i64().expect("a time");
    (latest_ms as u64 * COMMANDS as u64).div_ceil(600_000) / KEYS as u64 + 1
}

/// Commands per second, from the first state to the last.
async fn apply<A: Aggregate>(log: &Log, store: &str, aggregate: A, applied: fn(&serde_json::Value) -> u64) -> f64 {
    let mut reader = log.reader(store).await.expect("a reader");
    for partition in 0..PARTITIONS {
        reader.assign(partition, StartAt::Start).await.expect("assigned");
    }
    let stopping = CancellationToken::new();
    let run = AtomicStore::run(
        log.clone(),
        AtomicStoreSettings::new(store),
        aggregate,
        stopping.clone(),
    );
    let running = tokio::spawn(run);
    let mut seen: HashMap<Vec<u8>, u64> = HashMap::new();
    let (mut all, mut start) = (0, None);
    while all < COMMANDS as u64 {
        for record in reader.next().await.expect("a batch").records {
            start.get_or_insert_with(Instant::now);
            let key = record.key.expect("a key").to_vec();
            let state = serde_json::from_slice(&record.value.expect("a state")).expect("JSON");
            let now = applied(&state);
            all += now - seen.insert(key, now).unwrap_or(0);
        }
    }
    let rate = COMMANDS as f64 / start.expect("a state").elapsed().as_secs_f64();
    stopping.cancel();
    running.await.expect("no panic").expect("a clean end");
    rate
}

/// The same counts by rdkafka alone: consume a window, write the sum of each key that it touches and the offsets in a transaction.
fn bare_counts(brokers: &str, store: &str, window: usize) -> f64 {
    let common = || {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", brokers)
            .set("socket.nagle.disable", "true");
        config
    };
    let group = format!("{store}-bare");
    let consumer: BaseConsumer = common()
        .set("group.id", &group)
        .set("isolation.level", "read_committed")
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        .create()
        .expect("a consumer");
    let producer: BaseProducer = common()
        .set("transactional.id", &group)
        .set("linger.ms", "0")
        .set("partitioner", "murmur2_random")
        .create()
        .expect("a producer");
    let within = Duration::from_secs(10);
    producer.init_transactions(within).expect("initialised");
    let commands = commands_topic(store);
    consumer.subscribe(&[&commands]).expect("subscribed");
    let mut counts: HashMap<Vec<u8>, u64> = HashMap::new();
    let (mut done, mut start) = (0, None);
    while done < COMMANDS {
        let mut touched: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        let mut offsets: HashMap<i32, i64> = HashMap::new();
        let mut records = 0;
        while records < window.min(COMMANDS - done) {
            let Some(message) = consumer.poll(Duration::from_millis(100)) else {
                continue;
            };
            let message = message.expect("a record");
            start.get_or_insert_with(Instant::now);
            let _: Seen = serde_json::from_slice(message.payload().expect("a command")).expect("JSON");
            let key = message.key().expect("a key").to_vec();
            let count = counts.entry(key.clone()).or_default();
            *count += 1;
            touched.insert(key, *count);
            offsets.insert(message.partition(), message.offset() + 1);
            records += 1;
        }
        producer.begin_transaction().expect("begun");
        for (key, count) in &touched {
            let state = serde_json::to_vec(count).expect("JSON");
            let record = BaseRecord::to(store).key(key).payload(&state);
            producer.send(record).map_err(|(error, _)| error).expect("sent");
        }
        let mut consumed = TopicPartitionList::new();
        for (partition, offset) in offsets {
            let offset = Offset::Offset(offset);
            consumed
                .add_partition_offset(&commands, partition, offset)
                .expect("an offset");
        }
        let metadata = consumer.group_metadata().expect("a member");
        producer
            .send_offsets_to_transaction(&consumed, &metadata, within)
            .expect("sent");
        // A commit by rdkafka waits 100 ms for what is in flight.
        while producer.in_flight_count() > 0 {
            producer.poll(Duration::from_millis(1));
        }
        producer.commit_transaction(within).expect("committed");
        done += records;
    }
    COMMANDS as f64 / start.expect("a record").elapsed().as_secs_f64()
}

struct Nothing;

impl Handler for Nothing {
    async fn handle(&self, _: &mut Context, _: &Record) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// Processor time of this process while consumers have nothing to do.
async fn idle(log: &Log, name: &str) {
    let mut consumers = Vec::new();
    for _ in 0..IDLE_CONSUMERS {
        let topic = format!("idle-{:08x}", rand::random::<u32>());
        make(log, &[TopicSpec::new(&topic, PARTITIONS)]).await;
        let builder = ConsumerBuilder::new(format!("{topic}-group"), [&topic]);
        make(log, &builder.topics(log).await.expect("topics")).await;
        let consumer = builder.start(log, Nothing).await.expect("a consumer");
        let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
        producer
            .append(ProducerRecord::to(topic).value("1"))
            .await
            .expect("appended");
        consumers.push(consumer);
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (before, begin) = (processor_seconds(), Instant::now());
    tokio::time::sleep(IDLE).await;
    let part = (processor_seconds() - before) / begin.elapsed().as_secs_f64();
    println!(
        "{name}: {IDLE_CONSUMERS} idle consumers take {:.2} % of a processor, {:.3} % each",
        100.0 * part,
        100.0 * part / IDLE_CONSUMERS as f64
    );
    for consumer in consumers {
        consumer.shutdown().await.expect("a good end");
    }
}

/// User and system time of this process.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux says it");
    // Behind the name, which may have spaces: state is the first field, utime and stime are the 12th and 13th.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: f64 = fields[11..13]
        .iter()
        .map(|field| field.parse::<f64>().expect("a number"))
        .sum();
    ticks / 100.0
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
