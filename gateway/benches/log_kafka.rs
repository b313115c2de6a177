//! The Kafka engine beside a bare rdkafka loop of the same settings, in turns in the same run.
//!
//! `KAFKA_BROKERS=… cargo bench -p barnabas --bench log_kafka`; `cargo run -p barnabas-tests --bin kafka-node` starts a broker.
//! Each line: what the engine does, what the bare loop does, and their ratio (above 1: the engine is better).

use std::collections::VecDeque;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Delivery, Log, ProducerRecord, ProducerSettings, StartAt, TopicSpec};
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext};
use rdkafka::{ClientConfig, ClientContext, Offset, TopicPartitionList};

const ROUNDS: usize = 3;
const VALUE_BYTES: usize = 200;
const APPENDS: usize = 1000;
const BATCHED: usize = 300_000;
/// How long a record waits for others when appends are batched.
const BATCH_LINGER: Duration = Duration::from_millis(5);
/// Records that wait for their acknowledgement at most.
const IN_FLIGHT: usize = 20_000;
const TRANSACTIONS: usize = 300;
const BIG_TRANSACTIONS: usize = 100;
const BIG_TRANSACTION_RECORDS: usize = 1000;
const LATENCIES: usize = 1000;

fn main() -> ExitCode {
    let Ok(brokers) = std::env::var("KAFKA_BROKERS") else {
        eprintln!("KAFKA_BROKERS is not set; `cargo run -p barnabas-tests --bin kafka-node` starts a broker");
        return ExitCode::from(64);
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(run(&brokers));
    ExitCode::SUCCESS
}

async fn run(brokers: &str) {
    let log = Log::connect_kafka(KafkaSettings::new(brokers)).await.expect("a broker");
    let topic = make_topic(&log).await;
    let (log, topic) = (&log, topic.as_str());
    println!(
        "{ROUNDS} rounds each in turn, medians; one partition, values of {VALUE_BYTES} bytes, acks=all, idempotent"
    );

    let mut rows = Rows::default();
    for _ in 0..ROUNDS {
        rows.add(
            append_one_by_one(log, topic).await,
            bare_append_one_by_one(brokers, topic),
        );
    }
    rows.print_times("append, one at a time, p50");
    for _ in 0..ROUNDS {
        rows.add(append_batched(log, topic).await, bare_append_batched(brokers, topic));
    }
    rows.print_rates("append, batched", "records/s");
    for _ in 0..ROUNDS {
        rows.add(
            transactions(log, topic, TRANSACTIONS, 1).await,
            bare_transactions(brokers, topic, TRANSACTIONS, 1),
        );
    }
    rows.print_rates("transactions of 1 record", "transactions/s");
    for _ in 0..ROUNDS {
        let (count, records) = (BIG_TRANSACTIONS, BIG_TRANSACTION_RECORDS);
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let each = records as f64;
        rows.add(
            transactions(log, topic, count, records).await * each,
            bare_transactions(brokers, topic, count, records) * each,
        );
    }
    rows.print_rates("records in transactions of 1000", "records/s");
    let fresh = make_topic(log).await;
    for _ in 0..ROUNDS {
        rows.add(latency(log, &fresh).await, bare_latency(brokers, &fresh));
    }
    rows.print_times("append -> reader, p50");
    for _ in 0..ROUNDS {
        rows.add(read(log, topic).await, bare_read(brokers, topic));
    }
    rows.print_rates("read", "records/s");
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
            "{what:34} {engine:>10.0} {bare:>10.0} {unit:15} ratio {:.2}",
            engine / bare
        );
    }

    fn print_times(&mut self, what: &str) {
        let (engine, bare) = self.medians();
        println!(
            "{what:34} {engine:>10.3} {bare:>10.3} {:15} ratio {:.2}",
            "ms",
            bare / engine
        );
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn rate(count: usize, since: Instant) -> f64 {
    count as f64 / since.elapsed().as_secs_f64()
}

async fn make_topic(log: &Log) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock")
        .as_micros();
    let name = format!("bench-{now}");
    let plan = log.plan_topics(&[TopicSpec::new(&name, 1)]).await.expect("a plan");
    log.apply_topics(&plan).await.expect("the topic");
    name
}

fn record(topic: &Arc<str>) -> ProducerRecord {
    ProducerRecord::to(topic.clone())
        .partition(0)
        .value(vec![b'x'; VALUE_BYTES])
}

async fn append_one_by_one(log: &Log, topic: &str) -> f64 {
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let topic: Arc<str> = topic.into();
    let mut times = Vec::with_capacity(APPENDS);
    for _ in 0..APPENDS {
        let start = Instant::now();
        producer.append(record(&topic)).await.expect("appended");
        times.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    median(times)
}

fn bare_append_one_by_one(brokers: &str, topic: &str) -> f64 {
    let (acked, acks) = mpsc::channel();
    let producer = Arc::new(bare_producer(brokers, Duration::ZERO, Ack { acked }));
    let stop = poll_in_background(&producer);
    let value = vec![b'x'; VALUE_BYTES];
    let mut times = Vec::with_capacity(APPENDS);
    // The first waits for the producer id.
    for i in 0..=APPENDS {
        let start = Instant::now();
        send_bare(&*producer, topic, &value);
        acks.recv().expect("an acknowledgement");
        if i > 0 {
            times.push(start.elapsed().as_secs_f64() * 1000.0);
        }
    }
    stop();
    median(times)
}

async fn append_batched(log: &Log, topic: &str) -> f64 {
    let settings = ProducerSettings {
        linger: BATCH_LINGER,
        ..ProducerSettings::default()
    };
    let producer = log.producer(settings).await.expect("a producer");
    let topic: Arc<str> = topic.into();
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

fn bare_append_batched(brokers: &str, topic: &str) -> f64 {
    let (acked, acks) = mpsc::channel();
    let producer = Arc::new(bare_producer(brokers, BATCH_LINGER, Ack { acked }));
    let stop = poll_in_background(&producer);
    let value = vec![b'x'; VALUE_BYTES];
    send_bare(&*producer, topic, &value);
    acks.recv().expect("the producer id is there");
    let start = Instant::now();
    for _ in 0..BATCHED {
        send_bare(&*producer, topic, &value);
    }
    for _ in 0..BATCHED {
        acks.recv().expect("an acknowledgement");
    }
    let rate = rate(BATCHED, start);
    stop();
    rate
}

async fn transactions(log: &Log, topic: &str, count: usize, records: usize) -> f64 {
    let mut producer = log.transactional_producer("bench-engine").await.expect("a producer");
    let topic: Arc<str> = topic.into();
    let start = Instant::now();
    for _ in 0..count {
        let mut transaction = producer.begin();
        for _ in 0..records {
            transaction.send(record(&topic)).await.expect("sent");
        }
        transaction.commit().await.expect("committed");
    }
    rate(count, start)
}

fn bare_transactions(brokers: &str, topic: &str, count: usize, records: usize) -> f64 {
    let mut config = producer_config(brokers);
    config
        .set("transactional.id", "bench-bare")
        .set("transaction.timeout.ms", "10000");
    config
        .set("message.timeout.ms", "10000")
        .set("socket.timeout.ms", "5000");
    let producer: BaseProducer<Nothing> = BaseProducer::from_config_and_context(&config, Nothing).expect("a producer");
    let within = Duration::from_secs(10);
    producer.init_transactions(within).expect("initialised");
    let value = vec![b'x'; VALUE_BYTES];
    let start = Instant::now();
    for _ in 0..count {
        producer.begin_transaction().expect("begun");
        for _ in 0..records {
            send_bare(&producer, topic, &value);
        }
        while producer.in_flight_count() > 0 {
            producer.poll(Duration::from_millis(1));
        }
        producer.commit_transaction(within).expect("committed");
    }
    rate(count, start)
}

async fn latency(log: &Log, topic: &str) -> f64 {
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let mut reader = log.reader(topic).await.expect("a reader");
    reader.assign(0, StartAt::End).await.expect("assigned");
    let epoch = Instant::now();
    let sending = tokio::spawn({
        let topic: Arc<str> = topic.into();
        async move {
            let mut deliveries = Vec::new();
            for _ in 0..LATENCIES {
                tokio::time::sleep(Duration::from_millis(2)).await;
                let sent_us = epoch.elapsed().as_micros().to_string();
                let record = ProducerRecord::to(topic.clone()).partition(0).value(sent_us);
                deliveries.push(producer.send(record).await.expect("sent"));
            }
            for delivery in deliveries {
                delivery.await.expect("appended");
            }
        }
    });
    let mut times = Vec::with_capacity(LATENCIES);
    while times.len() < LATENCIES {
        let batch = reader.next().await.expect("a batch");
        let now = epoch.elapsed();
        for record in batch.records {
            times.push(since_ms(record.value.as_deref(), now));
        }
    }
    sending.await.expect("all sent");
    median(times)
}

fn bare_latency(brokers: &str, topic: &str) -> f64 {
    let consumer: BaseConsumer = consumer_config(brokers).create().expect("a consumer");
    assign_bare(&consumer, topic, Offset::End);
    let (acked, _acks) = mpsc::channel();
    let producer = Arc::new(bare_producer(brokers, Duration::ZERO, Ack { acked }));
    let stop = poll_in_background(&producer);
    // Both are warm when the first record has come through.
    while consumer.poll(Duration::from_millis(100)).is_none() {
        send_bare(&*producer, topic, b"0");
    }
    while consumer.poll(Duration::from_millis(500)).is_some() {}
    let epoch = Instant::now();
    let sending = thread::spawn({
        let (producer, topic) = (producer.clone(), topic.to_owned());
        move || {
            for _ in 0..LATENCIES {
                thread::sleep(Duration::from_millis(2));
                let sent_us = epoch.elapsed().as_micros().to_string();
                send_bare(&*producer, &topic, sent_us.as_bytes());
            }
        }
    });
    let mut times = Vec::with_capacity(LATENCIES);
    while times.len() < LATENCIES {
        if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
            times.push(since_ms(message.payload(), epoch.elapsed()));
        }
    }
    sending.join().expect("all sent");
    stop();
    median(times)
}

fn since_ms(sent_us: Option<&[u8]>, now: Duration) -> f64 {
    let sent_us: u64 = std::str::from_utf8(sent_us.unwrap_or_default())
        .ok()
        .and_then(|text| text.parse().ok())
        .expect("a time");
    (now.saturating_sub(Duration::from_micros(sent_us))).as_secs_f64() * 1000.0
}

/// Reads everything that the other measurements have written.
async fn read(log: &Log, topic: &str) -> f64 {
    let mut reader = log.reader(topic).await.expect("a reader");
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

fn bare_read(brokers: &str, topic: &str) -> f64 {
    let consumer: BaseConsumer = consumer_config(brokers).create().expect("a consumer");
    assign_bare(&consumer, topic, Offset::Beginning);
    let start = Instant::now();
    let mut count = 0;
    loop {
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(message)) => count += usize::from(message.payload().is_some()),
            Some(Err(KafkaError::PartitionEOF(_))) => return rate(count, start),
            Some(Err(error)) => panic!("{error}"),
            None => {}
        }
    }
}

fn assign_bare(consumer: &BaseConsumer, topic: &str, at: Offset) {
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, 0, at).expect("an offset");
    consumer.assign(&list).expect("assigned");
}

/// The engine's settings, as a program without it would set them.
fn common_config(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("socket.nagle.disable", "true");
    config
}

fn producer_config(brokers: &str) -> ClientConfig {
    let mut config = common_config(brokers);
    config
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("linger.ms", "0")
        .set("batch.size", "524288")
        .set("sticky.partitioning.linger.ms", "0")
        .set("message.max.bytes", "1000000000")
        .set("queue.buffering.max.messages", "100000")
        .set("queue.buffering.max.kbytes", "65536");
    config
}

fn consumer_config(brokers: &str) -> ClientConfig {
    let mut config = common_config(brokers);
    config
        .set("group.id", "bench")
        .set("isolation.level", "read_committed")
        .set("enable.partition.eof", "true")
        .set("enable.auto.commit", "false")
        .set("queued.max.messages.kbytes", "16384")
        .set("fetch.queue.backoff.ms", "10");
    config
}

fn bare_producer(brokers: &str, linger: Duration, context: Ack) -> BaseProducer<Ack> {
    let mut config = producer_config(brokers);
    config.set("linger.ms", linger.as_millis().to_string());
    BaseProducer::from_config_and_context(&config, context).expect("a producer")
}

fn send_bare<C: ProducerContext<DeliveryOpaque = ()>>(producer: &BaseProducer<C>, topic: &str, value: &[u8]) {
    let mut record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic).partition(0).payload(value);
    while let Err((error, refused)) = producer.send(record) {
        assert_eq!(
            error.rdkafka_error_code(),
            Some(rdkafka::error::RDKafkaErrorCode::QueueFull),
            "{error}"
        );
        record = refused;
        producer.poll(Duration::from_millis(1));
    }
}

/// Polls a producer on a thread until the returned function is called.
fn poll_in_background(producer: &Arc<BaseProducer<Ack>>) -> impl FnOnce() + use<> {
    let stop = Arc::new(AtomicBool::new(false));
    let thread = thread::spawn({
        let (producer, stop) = (producer.clone(), stop.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                producer.poll(Duration::from_millis(100));
            }
        }
    });
    move || {
        stop.store(true, Ordering::Relaxed);
        thread.join().expect("the polling thread");
    }
}

struct Ack {
    acked: mpsc::Sender<()>,
}

impl ClientContext for Ack {}

impl ProducerContext for Ack {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            panic!("{error}");
        }
        // Latencies are measured at the consumer: nobody listens here then.
        let _ = self.acked.send(());
    }
}

struct Nothing;

impl ClientContext for Nothing {}

impl ProducerContext for Nothing {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        assert!(result.is_ok(), "a record was not written");
    }
}
