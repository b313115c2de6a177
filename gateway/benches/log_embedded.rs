//! The embedded engine beside a bare rusqlite loop that makes the same records durable in the same batches, in turns in the
//! same run: `cargo bench -p barnabas --bench log_embedded`. The files are in a temporary folder: `TMPDIR` chooses the disk.
//!
//! Each line: what the engine does, what the bare loop does, and their ratio (above 1: the engine is better). What has no
//! counterpart in a bare loop stands alone.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::{Delivery, Log, ProducerRecord, ProducerSettings, StartAt, TopicSpec};
use rusqlite::{Connection, params};

const ROUNDS: usize = 3;
const TOPIC: &str = "bench";
const VALUE_BYTES: usize = 200;
const APPENDS: usize = 1000;
const BATCHED: usize = 300_000;
/// Records that wait for their acknowledgement at most, and records in a transaction of the bare loop.
const IN_FLIGHT: usize = 100;
const TRANSACTIONS: usize = 1000;
const BIG_TRANSACTIONS: usize = 200;
const BIG_TRANSACTION_RECORDS: usize = 1000;
const LATENCIES: usize = 1000;
/// A transaction that is staged because it is large.
const HUGE_TRANSACTION_BYTES: usize = 256 * 1024 * 1024;
const HUGE_RECORD_BYTES: usize = 256 * 1024;

#[tokio::main]
async fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = Log::open_embedded(EmbeddedSettings::new(folder.path()))
        .await
        .expect("a log");
    make_topic(&log, TOPIC).await;
    let bare = &mut Bare::open(&folder.path().join("bare.sqlite"));
    let log = &log;
    println!("{ROUNDS} rounds each in turn, medians; one partition, values of {VALUE_BYTES} bytes, synchronous=FULL");

    let mut rows = Rows::default();
    for _ in 0..ROUNDS {
        let engine = append_one_by_one(log, |count| count < APPENDS).await;
        rows.add(median(engine), median(bare.append_one_by_one()));
    }
    rows.print_times("append, one at a time, p50");
    for _ in 0..ROUNDS {
        rows.add(append_in_flight(log).await, bare.append(BATCHED, IN_FLIGHT));
    }
    rows.print_rates("append, one sender, 100 in flight", "records/s");
    for _ in 0..ROUNDS {
        rows.add(append_from_tasks(log).await, bare.append(BATCHED, IN_FLIGHT));
    }
    rows.print_rates("append, 100 senders, 1 in flight", "records/s");
    for _ in 0..ROUNDS {
        rows.add(transactions(log, TRANSACTIONS, 1).await, bare.append(TRANSACTIONS, 1));
    }
    rows.print_rates("transactions of 1 record", "transactions/s");
    for _ in 0..ROUNDS {
        let (count, records) = (BIG_TRANSACTIONS, BIG_TRANSACTION_RECORDS);
        rows.add(
            transactions(log, count, records).await,
            bare.append(count * records, records),
        );
    }
    rows.print_rates("records in transactions of 1000", "records/s");
    for _ in 0..ROUNDS {
        rows.add(read(log).await, bare.read());
    }
    rows.print_rates("read", "records/s");

    let times = latency(log).await;
    print_percentiles("append -> reader", times);
    let times = append_one_by_one(log, |count| count < APPENDS).await;
    print_percentiles("append, nothing beside it", times);
    let (times, seconds) = append_beside_huge_transaction(log).await;
    print_percentiles("append, 256 MiB transaction beside", times);
    println!("{:36} {seconds:.2} s", "  the transaction of 256 MiB");
    log.close().await;
}

/// Results of the rounds: the engine's and the bare loop's.
#[derive(Default)]
struct Rows {
    engine: Vec<f64>,
    bare: Vec<f64>,
}

impl Rows {
    fn add(&mut self, engine: f64, bare: f64) {
        self.engine.push(engine);
        self.bare.push(bare);
    }

    fn medians(&mut self) -> (f64, f64) {
        (
            median(std::mem::take(&mut self.engine)),
            median(std::mem::take(&mut self.bare)),
        )
    }

    fn print_rates(&mut self, what: &str, unit: &str) {
        let (engine, bare) = self.medians();
        println!(
            "{what:36} {engine:>10.0} {bare:>10.0} {unit:15} ratio {:.2}",
            engine / bare
        );
    }

    fn print_times(&mut self, what: &str) {
        let (engine, bare) = self.medians();
        println!(
            "{what:36} {engine:>10.3} {bare:>10.3} {:15} ratio {:.2}",
            "ms",
            bare / engine
        );
    }
}

fn print_percentiles(what: &str, mut times_ms: Vec<f64>) {
    times_ms.sort_by(f64::total_cmp);
    let count = times_ms.len();
    println!(
        "{what:36} p50 {:.3} ms, p99 {:.3} ms, most {:.3} ms, of {count}",
        times_ms[count / 2],
        times_ms[count * 99 / 100],
        times_ms[count - 1]
    );
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn rate(count: usize, since: Instant) -> f64 {
    count as f64 / since.elapsed().as_secs_f64()
}

fn ms_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}

async fn make_topic(log: &Log, name: &str) {
    let plan = log.plan_topics(&[TopicSpec::new(name, 1)]).await.expect("a plan");
    log.apply_topics(&plan).await.expect("the topic");
}

fn record(topic: &Arc<str>) -> ProducerRecord {
    ProducerRecord::to(topic.clone())
        .partition(0)
        .value(vec![b'x'; VALUE_BYTES])
}

/// How long each append takes, in milliseconds, for as long as `more` of their count.
async fn append_one_by_one(log: &Log, more: impl Fn(usize) -> bool) -> Vec<f64> {
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let topic: Arc<str> = TOPIC.into();
    let mut times = Vec::new();
    while more(times.len()) {
        let start = Instant::now();
        producer.append(record(&topic)).await.expect("appended");
        times.push(ms_since(start));
    }
    times
}

async fn append_in_flight(log: &Log) -> f64 {
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let topic: Arc<str> = TOPIC.into();
    let start = Instant::now();
    let mut deliveries: VecDeque<Delivery> = VecDeque::with_capacity(IN_FLIGHT);
    for _ in 0..BATCHED {
        if deliveries.len() == IN_FLIGHT
            && let Some(oldest) = deliveries.pop_front()
        {
            oldest.await.expect("appended");
        }
        deliveries.push_back(producer.send(record(&topic)).await.expect("sent"));
    }
    for delivery in deliveries {
        delivery.await.expect("appended");
    }
    rate(BATCHED, start)
}

async fn append_from_tasks(log: &Log) -> f64 {
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let start = Instant::now();
    let senders = (0..IN_FLIGHT).map(|_| {
        let producer = producer.clone();
        tokio::spawn(async move {
            let topic: Arc<str> = TOPIC.into();
            for _ in 0..BATCHED / IN_FLIGHT {
                producer.append(record(&topic)).await.expect("appended");
            }
        })
    });
    for sender in senders.collect::<Vec<_>>() {
        sender.await.expect("all appended");
    }
    rate(BATCHED, start)
}

/// Records a second.
async fn transactions(log: &Log, count: usize, records: usize) -> f64 {
    let mut producer = log.transactional_producer("bench").await.expect("a producer");
    let topic: Arc<str> = TOPIC.into();
    let start = Instant::now();
    for _ in 0..count {
        let mut transaction = producer.begin();
        for _ in 0..records {
            transaction.send(record(&topic)).await.expect("sent");
        }
        transaction.commit().await.expect("committed");
    }
    rate(count * records, start)
}

/// Reads everything that the other measurements have written.
async fn read(log: &Log) -> f64 {
    let mut reader = log.reader(TOPIC).await.expect("a reader");
    reader.assign(0, StartAt::Start).await.expect("assigned");
    let start = Instant::now();
    let mut count = 0;
    loop {
        let batch = reader.next().await.expect("a batch");
        count += batch.records.len();
        if batch.caught_up {
            return rate(count, start);
        }
    }
}

/// From before the append to the record in the reader's hands, in milliseconds.
async fn latency(log: &Log) -> Vec<f64> {
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let mut reader = log.reader(TOPIC).await.expect("a reader");
    reader.assign(0, StartAt::End).await.expect("assigned");
    let epoch = Instant::now();
    let sending = tokio::spawn(async move {
        for _ in 0..LATENCIES {
            tokio::time::sleep(Duration::from_millis(2)).await;
            let sent_us = epoch.elapsed().as_micros().to_string();
            let record = ProducerRecord::to(TOPIC).partition(0).value(sent_us);
            producer.append(record).await.expect("appended");
        }
    });
    let mut times = Vec::with_capacity(LATENCIES);
    while times.len() < LATENCIES {
        let batch = reader.next().await.expect("a batch");
        let now = epoch.elapsed();
        for record in batch.records {
            let sent_us = record.value.as_deref().map(std::str::from_utf8);
            let sent_us: u64 = sent_us.expect("a value").expect("text").parse().expect("a time");
            times.push((now - Duration::from_micros(sent_us)).as_secs_f64() * 1000.0);
        }
    }
    sending.await.expect("all sent");
    times
}

/// How long small appends take while a large transaction is staged and published, and how many seconds that takes.
async fn append_beside_huge_transaction(log: &Log) -> (Vec<f64>, f64) {
    const HUGE: &str = "bench-huge";
    make_topic(log, HUGE).await;
    let committed = Arc::new(AtomicBool::new(false));
    let huge = tokio::spawn({
        let (log, committed) = (log.clone(), committed.clone());
        async move {
            let mut producer = log.transactional_producer("bench-huge").await.expect("a producer");
            let value = bytes::Bytes::from(vec![b'x'; HUGE_RECORD_BYTES]);
            let start = Instant::now();
            let mut transaction = producer.begin();
            for _ in 0..HUGE_TRANSACTION_BYTES / HUGE_RECORD_BYTES {
                let record = ProducerRecord::to(HUGE).value(value.clone());
                transaction.send(record).await.expect("sent");
            }
            transaction.commit().await.expect("committed");
            committed.store(true, Ordering::Relaxed);
            start.elapsed().as_secs_f64()
        }
    });
    let times = append_one_by_one(log, |_| !committed.load(Ordering::Relaxed)).await;
    (times, huge.await.expect("committed"))
}

/// What a program would write without the engine: one thread, one table, one transaction a batch.
struct Bare {
    connection: Connection,
    next: i64,
}

impl Bare {
    fn open(file: &Path) -> Self {
        let connection = Connection::open(file).expect("a file");
        connection.pragma_update(None, "journal_mode", "wal").expect("a log");
        connection.pragma_update(None, "synchronous", "full").expect("set");
        connection.pragma_update(None, "cache_size", -16_384).expect("set");
        connection
            .execute_batch(
                "CREATE TABLE records (id INTEGER PRIMARY KEY, timestamp_ms INTEGER NOT NULL, key BLOB, value BLOB)",
            )
            .expect("a table");
        Self { connection, next: 0 }
    }

    fn append_batch(&mut self, records: usize) {
        let transaction = self.connection.transaction().expect("begun");
        let mut insert = transaction
            .prepare_cached("INSERT INTO records (id, timestamp_ms, key, value) VALUES (?1, ?2, NULL, ?3)")
            .expect("a statement");
        for _ in 0..records {
            let value = vec![b'x'; VALUE_BYTES];
            insert.execute(params![self.next, 0, value]).expect("inserted");
            self.next += 1;
        }
        drop(insert);
        transaction.commit().expect("committed");
    }

    fn append_one_by_one(&mut self) -> Vec<f64> {
        let append = |_| {
            let start = Instant::now();
            self.append_batch(1);
            ms_since(start)
        };
        (0..APPENDS).map(append).collect()
    }

    /// Records a second.
    fn append(&mut self, count: usize, batch: usize) -> f64 {
        let start = Instant::now();
        for _ in 0..count / batch {
            self.append_batch(batch);
        }
        rate(count, start)
    }

    fn read(&self) -> f64 {
        let start = Instant::now();
        let mut select = self
            .connection
            .prepare("SELECT id, timestamp_ms, key, value FROM records ORDER BY id")
            .expect("a statement");
        let read = select.query_map([], |row| {
            Ok((
                row.get::<_, i64>(0)?,
                row.get::<_, i64>(1)?,
                row.get::<_, Option<Vec<u8>>>(2)?,
                row.get::<_, Option<Vec<u8>>>(3)?,
            ))
        });
        let mut count = 0;
        for record in read.expect("rows") {
            std::hint::black_box(record.expect("a row"));
            count += 1;
        }
        rate(count, start)
    }
}
