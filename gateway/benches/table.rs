//! Tables: how fast a million keys are loaded, and how fast they are read.
//!
//! `cargo bench -p barnabas --bench table` measures on the embedded log; with `KAFKA_BROKERS=…` on Kafka too, beside a bare rdkafka loop
//! that reads the same partitions into a `HashMap`, in turns in the same run.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Log, ProducerSettings};
use barnabas::patterns::table::{self, Table, TableSettings, put_record};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use serde::{Deserialize, Serialize};

const ROUNDS: usize = 3;
const PARTITIONS: i32 = 6;
const KEYS: usize = 1_000_000;
const READ_FOR: Duration = Duration::from_secs(2);
const WRITES: usize = 1000;

#[derive(Serialize, Deserialize)]
struct Customer {
    name: String,
    city: String,
    balance: u64,
}

type Customers = Table<String, Customer>;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        println!(
            "{KEYS} keys in {PARTITIONS} partitions, values of about 70 bytes of JSON; medians of {ROUNDS} rounds"
        );
        let folder = tempfile::TempDir::new().expect("a folder");
        let log = Log::open_embedded(EmbeddedSettings::new(folder.path()))
            .await
            .expect("a log");
        embedded(&log).await;
        log.close().await;
        if let Ok(brokers) = std::env::var("KAFKA_BROKERS") {
            let log = Log::connect_kafka(KafkaSettings::new(&brokers))
                .await
                .expect("a broker");
            kafka(&log, &brokers).await;
        }
    });
}

async fn embedded(log: &Log) {
    let topic = fill(log).await;
    let before = rss_mib();
    let mut rates = Vec::new();
    let mut kept = None;
    for _ in 0..ROUNDS {
        drop(kept.take());
        let (table, rate) = load(log, &topic).await;
        rates.push(rate);
        kept = Some(table);
    }
    println!("embedded: load {:>39.0} keys/s", median(rates));
    if let Some(table) = kept {
        println!(
            "embedded: resident memory of the table {:>15.0} MiB",
            rss_mib() - before
        );
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for (threads, busy) in [(1, false), (cores, false), (1, true)] {
            let gets = gets(&table, threads, busy).await;
            let writer = if busy { ", beside a writer" } else { "" };
            println!(
                "get, {threads} threads{writer:17} {:>22.2} million/s per thread",
                gets / 1e6
            );
        }
        writes(log, &topic, table, "embedded").await;
    }
}

async fn kafka(log: &Log, brokers: &str) {
    let topic = fill(log).await;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    let mut kept = None;
    for _ in 0..ROUNDS {
        drop(kept.take());
        let (table, rate) = load(log, &topic).await;
        ours.push(rate);
        kept = Some(table);
        bare.push(bare_load(brokers, &topic));
    }
    let (ours, bare) = (median(ours), median(bare));
    println!(
        "Kafka: load, beside a bare loop {ours:>22.0} {bare:>10.0} keys/s  ratio {:.2}",
        ours / bare
    );
    if let Some(table) = kept {
        writes(log, &topic, table, "Kafka").await;
    }
    log.delete_topic(&topic).await.expect("deleted");
}

/// A topic with all keys, each once.
async fn fill(log: &Log) -> String {
    let topic = format!("bench-table-{:08x}", rand::random::<u32>());
    let plan = log
        .plan_topics(&[table::topic(&topic, PARTITIONS)])
        .await
        .expect("a plan");
    log.apply_topics(&plan).await.expect("applied");
    let settings = ProducerSettings {
        linger: Duration::from_millis(5),
        ..ProducerSettings::default()
    };
    let producer = log.producer(settings).await.expect("a producer");
    let mut last = Vec::new();
    for number in 0..KEYS {
        let record = put_record(&topic, &key(number), &customer(number)).expect("JSON");
        last.push(producer.send(record).await.expect("sent"));
        if last.len() == 10_000 {
            for delivery in last.drain(..) {
                delivery.await.expect("appended");
            }
        }
    }
    for delivery in last {
        delivery.await.expect("appended");
    }
    topic
}

fn key(number: usize) -> String {
    format!("customer-{number}")
}

fn customer(number: usize) -> Customer {
    Customer {
        name: format!("Customer number {number}"),
        city: "Juba".to_owned(),
        balance: number as u64,
    }
}

/// Keys per second from opening to ready.
async fn load(log: &Log, topic: &str) -> (Customers, f64) {
    let start = Instant::now();
    let table = Customers::open(log, TableSettings::new(topic)).await.expect("a table");
    table.ready().await.expect("ready");
    let rate = rate(KEYS, start);
    assert_eq!(table.state().keys, KEYS);
    (table, rate)
}

/// Gets per second of each thread, of keys at random.
async fn gets(table: &Customers, threads: usize, beside_a_writer: bool) -> f64 {
    let stop = Arc::new(AtomicBool::new(false));
    let writer = beside_a_writer.then(|| {
        let (table, stop) = (table.clone(), stop.clone());
        tokio::spawn(async move {
            for number in (0..KEYS).cycle() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                table.put(&key(number), &customer(number)).await.expect("put");
            }
        })
    });
    // The keys are made before, for formatting them takes longer than the get.
    let keys: Arc<Vec<String>> = Arc::new((0..100_000).map(|number| key(number * 10)).collect());
    let readers: Vec<_> = (0..threads)
        .map(|seed| {
            let (table, keys) = (table.clone(), keys.clone());
            std::thread::spawn(move || {
                let mut random = StdRng::seed_from_u64(seed as u64);
                let (start, mut count) = (Instant::now(), 0);
                while start.elapsed() < READ_FOR {
                    for _ in 0..1000 {
                        let key = &keys[random.random_range(0..keys.len())];
                        std::hint::black_box(table.get(key.as_str()).expect("it is there"));
                    }
                    count += 1000;
                }
                rate(count, start)
            })
        })
        .collect();
    let join = move || {
        let rates = readers.into_iter().map(|reader| reader.join().expect("no panic"));
        rates.sum::<f64>() / threads as f64
    };
    let rate = tokio::task::spawn_blocking(join).await.expect("no panic");
    stop.store(true, Ordering::Relaxed);
    if let Some(writer) = writer {
        writer.await.expect("no panic");
    }
    rate
}

/// How long a write takes until it can be read here, and how many checked ones a second there are when many wait.
async fn writes(log: &Log, topic: &str, table: Customers, engine: &str) {
    let mut times = Vec::new();
    for number in 0..WRITES {
        let start = Instant::now();
        let revision = table.put(&key(number), &customer(number)).await.expect("put");
        table.wait_applied(revision).await.expect("applied");
        times.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    println!("{engine}: put until it can be read, p50 {:>16.3} ms", median(times));
    drop(table);
    let settings = TableSettings::new(topic).checked();
    let table = Customers::open(log, settings).await.expect("a table");
    table.ready().await.expect("ready");
    for number in 0..PARTITIONS as usize * 10 {
        table
            .put(&key(number), &customer(number))
            .await
            .expect("the lanes are taken");
    }
    let start = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    for number in 0..WRITES * 10 {
        let table = table.clone();
        running.spawn(async move {
            let at = table.entry(&key(number)).expect("readable").expect("there").revision;
            table
                .update(&key(number), &customer(number), at)
                .await
                .expect("updated");
        });
    }
    running.join_all().await;
    println!(
        "{engine}: checked updates, {} at once {:>15.0} /s",
        WRITES * 10,
        rate(WRITES * 10, start)
    );
}

/// What a program without the library would do: read all partitions to their ends into a map.
fn bare_load(brokers: &str, topic: &str) -> f64 {
    let start = Instant::now();
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "bench-bare")
        .set("isolation.level", "read_committed")
        .set("enable.partition.eof", "true")
        .set("enable.auto.commit", "false")
        .set("queued.max.messages.kbytes", "16384")
        .set("fetch.queue.backoff.ms", "10")
        .set("fetch.wait.max.ms", "100")
        .create()
        .expect("a consumer");
    let mut assignment = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        assignment
            .add_partition_offset(topic, partition, Offset::Beginning)
            .expect("an offset");
    }
    consumer.assign(&assignment).expect("assigned");
    let mut map: HashMap<String, Customer> = HashMap::new();
    let mut ended = 0;
    while ended < PARTITIONS {
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => {
                let key = std::str::from_utf8(message.key().expect("a key")).expect("text");
                let value = serde_json::from_slice(message.payload().expect("a value")).expect("JSON");
                map.insert(key.to_owned(), value);
            }
            Some(Err(KafkaError::PartitionEOF(_))) => ended += 1,
            Some(Err(error)) => panic!("{error}"),
            None => {}
        }
    }
    assert_eq!(map.len(), KEYS);
    rate(KEYS, start)
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn rate(count: usize, since: Instant) -> f64 {
    count as f64 / since.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn rss_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .expect("a line");
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib / 1024.0
}
