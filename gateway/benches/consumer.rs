//! The consumer runtime beside a bare rdkafka loop of the same settings, in turns in the same run.
//!
//! `KAFKA_BROKERS=… cargo bench -p barnabas --bench consumer`; `cargo run -p barnabas-tests --bin kafka-node` starts a broker.
//! Each line: the runtime, the bare loop, and their ratio (above 1: the runtime is better).

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Log, ProducerRecord, ProducerSettings, Record, StartAt, TopicPartition, TopicSpec};
use barnabas::patterns::consumer::{
    ConsumerBuilder, Context, DeliveryGuarantee, Handler, HandlerError, ProcessingOrder,
};
use barnabas::patterns::retry::{BackOff, RetryPolicy};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::sync::Notify;

const ROUNDS: usize = 3;
const PARTITIONS: i32 = 6;
const RECORDS: usize = 1_000_000;
const KEYS: usize = 10_000;
const POISONED_KEYS: usize = 2_000;
const VALUE_BYTES: usize = 200;
const COPIED: usize = 300_000;
const LATENCIES: usize = 1000;
/// How often both commit.
const COMMIT_INTERVAL: Duration = Duration::from_millis(500);

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
    let bench = Bench {
        brokers,
        topic: make_topic(&log, "in").await,
        out: make_topic(&log, "out").await,
        log: &log,
    };
    println!(
        "{ROUNDS} rounds each in turn, medians; {PARTITIONS} partitions, {RECORDS} records of {VALUE_BYTES} bytes and {KEYS} keys; \
         a handler that does nothing, a pool of 16"
    );
    let cases = [
        (
            "at least once, partition order",
            ProcessingOrder::Partition,
            DeliveryGuarantee::AtLeastOnce,
        ),
        (
            "at least once, key order",
            ProcessingOrder::Key,
            DeliveryGuarantee::AtLeastOnce,
        ),
        (
            "at least once, no order",
            ProcessingOrder::Unordered,
            DeliveryGuarantee::AtLeastOnce,
        ),
        (
            "at most once, partition order",
            ProcessingOrder::Partition,
            DeliveryGuarantee::AtMostOnce,
        ),
        (
            "at most once, key order",
            ProcessingOrder::Key,
            DeliveryGuarantee::AtMostOnce,
        ),
    ];
    let only = std::env::args().nth(1).unwrap_or_default();
    if only == "rebalances" {
        return bench.rebalances().await;
    }
    bench.fill().await;
    if only == "still" {
        return bench.standing_still().await;
    }
    for (name, order, guarantee) in cases {
        if !name.contains(only.trim_start_matches("--bench")) {
            continue;
        }
        let mut rows = Rows::default();
        for _ in 0..ROUNDS {
            rows.add(bench.consume(order, guarantee).await, bench.bare_consume());
        }
        rows.print_rates(name);
    }
    for (name, order) in [
        ("exactly once, partition order", ProcessingOrder::Partition),
        ("exactly once, key order", ProcessingOrder::Key),
    ] {
        let mut rows = Rows::default();
        let mut window = 0;
        for _ in 0..ROUNDS {
            let (rate, records) = bench.copy(order).await;
            window = records;
            rows.add(rate, bench.bare_copy(records));
        }
        rows.print_rates(&format!("{name}, {window} a window"));
    }
    let mut rows = Rows::default();
    for _ in 0..ROUNDS {
        rows.add(bench.latency().await, bench.bare_latency());
    }
    rows.print_times("append -> handler, p50");
    bench.standing_still().await;
    bench.rebalances().await;
    bench.poisoned().await;
}

struct Bench<'a> {
    brokers: &'a str,
    log: &'a Log,
    topic: String,
    out: String,
}

/// Counts what it handles and says when it has handled all.
struct Count {
    seen: Arc<AtomicUsize>,
    all: usize,
    done: Arc<Notify>,
}

impl Count {
    fn new(all: usize) -> Self {
        Self {
            seen: Arc::default(),
            all,
            done: Arc::default(),
        }
    }

    fn one(&self) {
        if self.seen.fetch_add(1, Ordering::Relaxed) + 1 == self.all {
            self.done.notify_one();
        }
    }
}

impl Handler for Count {
    async fn handle(&self, _: &mut Context, _: &Record) -> Result<(), HandlerError> {
        self.one();
        Ok(())
    }
}

/// Sends each record on to another topic.
struct Copy {
    count: Count,
    out: Arc<str>,
}

impl Handler for Copy {
    async fn handle(&self, context: &mut Context, record: &Record) -> Result<(), HandlerError> {
        context.send(ProducerRecord {
            key: record.key.clone(),
            value: record.value.clone(),
            ..ProducerRecord::to(self.out.clone())
        });
        self.count.one();
        Ok(())
    }
}

impl Bench<'_> {
    async fn fill(&self) {
        let settings = ProducerSettings {
            linger: Duration::from_millis(5),
            ..ProducerSettings::default()
        };
        let producer = self.log.producer(settings).await.expect("a producer");
        let topic: Arc<str> = self.topic.as_str().into();
        let mut last = None;
        for number in 0..RECORDS {
            let record = ProducerRecord::to(topic.clone())
                .key(format!("key-{}", number % KEYS))
                .value(vec![b'x'; VALUE_BYTES]);
            last = Some(producer.send(record).await.expect("sent"));
            if number % 10_000 == 0
                && let Some(last) = last.take()
            {
                last.await.expect("appended");
            }
        }
        if let Some(last) = last {
            last.await.expect("appended");
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }

    fn builder(&self, group: &str) -> ConsumerBuilder {
        ConsumerBuilder::new(group, [&self.topic]).commit_interval(COMMIT_INTERVAL)
    }

    async fn make_topics(&self, builder: &ConsumerBuilder) {
        let wanted = builder.topics(self.log).await.expect("topics");
        let plan = self.log.plan_topics(&wanted).await.expect("a plan");
        self.log.apply_topics(&plan).await.expect("applied");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }

    /// Records per second, from the first to the last.
    async fn consume(&self, order: ProcessingOrder, guarantee: DeliveryGuarantee) -> f64 {
        let builder = self.builder(&unique("consume")).order(order).guarantee(guarantee);
        self.make_topics(&builder).await;
        let count = Count::new(RECORDS);
        let (seen, done) = (count.seen.clone(), count.done.clone());
        let consumer = builder.start(self.log, count).await.expect("a consumer");
        while seen.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let start = Instant::now();
        done.notified().await;
        let rate = rate(RECORDS, start);
        consumer.shutdown().await.expect("a good end");
        rate
    }

    fn bare_consume(&self) -> f64 {
        let consumer = bare_consumer(self.brokers, &unique("bare"));
        consumer.subscribe(&[&self.topic]).expect("subscribed");
        let (mut count, mut start, mut committed) = (0, Instant::now(), Instant::now());
        let mut offsets = TopicPartitionList::new();
        while count < RECORDS {
            match consumer.poll(Duration::from_millis(100)) {
                Some(Ok(message)) => {
                    if count == 0 {
                        start = Instant::now();
                    }
                    count += 1;
                    note(&mut offsets, &self.topic, message.partition(), message.offset());
                    if committed.elapsed() >= COMMIT_INTERVAL {
                        consumer.commit(&offsets, CommitMode::Async).expect("committed");
                        committed = Instant::now();
                    }
                }
                Some(Err(KafkaError::PartitionEOF(_))) | None => {}
                Some(Err(error)) => panic!("{error}"),
            }
        }
        rate(count, start)
    }

    /// Records per second through transactions, and records of one of them.
    async fn copy(&self, order: ProcessingOrder) -> (f64, usize) {
        let group = unique("copy");
        let builder = self
            .builder(&group)
            .order(order)
            .guarantee(DeliveryGuarantee::ExactlyOnce);
        self.make_topics(&builder).await;
        let count = Count::new(COPIED);
        let (seen, done) = (count.seen.clone(), count.done.clone());
        let handler = Copy {
            count,
            out: self.out.as_str().into(),
        };
        let consumer = builder.start(self.log, handler).await.expect("a consumer");
        while seen.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let start = Instant::now();
        let before = consumer.state().await.expect("a state").commits;
        done.notified().await;
        let rate = rate(COPIED, start);
        let commits = consumer.state().await.expect("a state").commits - before;
        consumer.shutdown().await.expect("a good end");
        (rate, COPIED / usize::try_from(commits.max(1)).expect("not that many"))
    }

    fn bare_copy(&self, window: usize) -> f64 {
        let group = unique("bare-copy");
        let consumer = bare_consumer(self.brokers, &group);
        consumer.subscribe(&[&self.topic]).expect("subscribed");
        let producer: BaseProducer = common_config(self.brokers)
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("linger.ms", "0")
            .set("batch.size", "524288")
            .set("sticky.partitioning.linger.ms", "0")
            .set("partitioner", "murmur2_random")
            .set("queue.buffering.max.messages", "100000")
            .set("transactional.id", &group)
            .create()
            .expect("a producer");
        let within = Duration::from_secs(10);
        producer.init_transactions(within).expect("initialised");
        let (mut count, mut start) = (0, Instant::now());
        while count < COPIED {
            let mut offsets = TopicPartitionList::new();
            let mut records = 0;
            while records < window {
                match consumer.poll(Duration::from_millis(100)) {
                    Some(Ok(message)) => {
                        if count == 0 && records == 0 {
                            start = Instant::now();
                        }
                        if records == 0 {
                            producer.begin_transaction().expect("begun");
                        }
                        records += 1;
                        note(&mut offsets, &self.topic, message.partition(), message.offset());
                        let mut record = BaseRecord::to(&self.out)
                            .key(message.key().unwrap_or_default())
                            .payload(message.payload().unwrap_or_default());
                        while let Err((_, refused)) = producer.send(record) {
                            record = refused;
                            producer.poll(Duration::from_millis(1));
                        }
                    }
                    Some(Err(KafkaError::PartitionEOF(_))) | None => {}
                    Some(Err(error)) => panic!("{error}"),
                }
            }
            let metadata = consumer.group_metadata().expect("a member");
            producer
                .send_offsets_to_transaction(&offsets, &metadata, within)
                .expect("sent");
            while producer.in_flight_count() > 0 {
                producer.poll(Duration::from_millis(1));
            }
            producer.commit_transaction(within).expect("committed");
            count += records;
        }
        rate(count, start)
    }

    async fn latency(&self) -> f64 {
        let topic = make_topic(self.log, "latency").await;
        let builder = ConsumerBuilder::new(unique("latency"), [&topic]);
        self.make_topics(&builder).await;
        let times = Arc::new(Mutex::new(Vec::new()));
        let epoch = Instant::now();
        let handler = Since {
            epoch,
            times: times.clone(),
        };
        let consumer = builder.start(self.log, handler).await.expect("a consumer");
        let producer = self
            .log
            .producer(ProducerSettings::default())
            .await
            .expect("a producer");
        let send = async || {
            let sent_us = epoch.elapsed().as_micros().to_string();
            producer
                .append(ProducerRecord::to(topic.as_str()).value(sent_us))
                .await
                .expect("appended");
        };
        while times.lock().expect("no panic").is_empty() {
            send().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        times.lock().expect("no panic").clear();
        for _ in 0..LATENCIES {
            tokio::time::sleep(Duration::from_millis(2)).await;
            send().await;
        }
        while times.lock().expect("no panic").len() < LATENCIES {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        consumer.shutdown().await.expect("a good end");
        median(times.lock().expect("no panic").clone())
    }

    fn bare_latency(&self) -> f64 {
        let consumer = bare_consumer(self.brokers, &unique("bare-latency"));
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.out, 0, Offset::End).expect("an offset");
        consumer.assign(&list).expect("assigned");
        let producer: BaseProducer = common_config(self.brokers)
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("linger.ms", "0")
            .create()
            .expect("a producer");
        let epoch = Instant::now();
        let stop = Arc::new(AtomicUsize::new(0));
        let sending = std::thread::spawn({
            let (topic, stop) = (self.out.clone(), stop.clone());
            move || {
                while stop.load(Ordering::Relaxed) == 0 {
                    let sent_us = epoch.elapsed().as_micros().to_string();
                    let record: BaseRecord<'_, [u8], [u8]> =
                        BaseRecord::to(&topic).partition(0).payload(sent_us.as_bytes());
                    producer.send(record).map_err(|(error, _)| error).expect("sent");
                    while producer.in_flight_count() > 0 {
                        producer.poll(Duration::from_millis(1));
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        });
        let mut times = Vec::new();
        // The first ones find cold connections.
        while times.len() < LATENCIES + 100 {
            if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
                times.push(since_ms(message.payload(), epoch));
            }
        }
        stop.store(1, Ordering::Relaxed);
        sending.join().expect("all sent");
        median(times.split_off(100))
    }

    /// What it costs the others when a partition, or another group, stands still.
    async fn standing_still(&self) {
        let mut rows = Rows::default();
        for _ in 0..ROUNDS {
            rows.add(self.beside(Some(0), false).await, self.beside(None, false).await);
        }
        rows.print_shares("the other partitions, beside one that stands still");
        let mut rows = Rows::default();
        for _ in 0..ROUNDS {
            rows.add(self.beside(None, true).await, self.beside(None, false).await);
        }
        rows.print_shares("a group, beside one that stands still");
    }

    /// Records per second of all partitions but the first, with this one failing for ever, or another group of which all fail.
    async fn beside(&self, failing: Option<i32>, beside_group: bool) -> f64 {
        let back_off = BackOff::exponential(Duration::from_millis(100), 2.0, Duration::from_secs(2)).infinite();
        let others: Vec<_> = (1..PARTITIONS)
            .map(|number| TopicPartition::new(self.topic.as_str(), number))
            .collect();
        let ends = self.log.offsets(&others, StartAt::End).await.expect("the ends");
        let all = usize::try_from(ends.iter().sum::<i64>()).expect("not that many");
        let start = async |failing: Failing, count: Count| {
            let builder = self
                .builder(&unique("beside"))
                .retry(RetryPolicy::Blocking(back_off.clone()));
            self.make_topics(&builder).await;
            builder
                .start(self.log, StandingStill { failing, count })
                .await
                .expect("a consumer")
        };
        let other = match beside_group {
            true => Some(start(Failing::All, Count::new(usize::MAX)).await),
            false => None,
        };
        let count = Count::new(all);
        let (seen, done) = (count.seen.clone(), count.done.clone());
        let consumer = start(failing.map_or(Failing::None, Failing::Partition), count).await;
        while seen.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let start = Instant::now();
        done.notified().await;
        let rate = rate(all, start);
        consumer.shutdown().await.expect("a good end");
        if let Some(other) = other {
            other.shutdown().await.expect("a good end");
        }
        rate
    }

    /// How long the partitions stand still that stay where they are while another member comes and goes, at 1,000 records/s.
    async fn rebalances(&self) {
        let topic = make_topic(self.log, "rebalances").await;
        let builder = ConsumerBuilder::new(unique("rebalances"), [&topic]);
        self.make_topics(&builder).await;
        let producer = self
            .log
            .producer(ProducerSettings::default())
            .await
            .expect("a producer");
        let (sent_to, gaps) = (topic.clone(), Arc::new(Mutex::new(Gaps::default())));
        let sending = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_millis(1));
            for number in 0.. {
                tick.tick().await;
                let record = ProducerRecord::to(sent_to.as_str()).partition(number % PARTITIONS);
                drop(producer.send(record).await.expect("sent"));
            }
        });
        let stays = PausesOf { gaps: gaps.clone() };
        let stays = builder.clone().start(self.log, stays).await.expect("a consumer");
        let owned = async || {
            let state = stays.state().await.expect("a state");
            let all = state.partitions.into_iter().map(|state| state.partition);
            let own: Vec<_> = all.filter(|partition| *partition.topic == *topic).collect();
            own
        };
        let owns = async |count: usize| {
            while owned().await.len() != count {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        let all = usize::try_from(PARTITIONS).expect("few");
        owns(all).await;
        let (mut coming, mut going) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            gaps.lock().expect("no panic").clear();
            let other = PausesOf { gaps: Arc::default() };
            let other = builder.clone().start(self.log, other).await.expect("a consumer");
            owns(all / 2).await;
            let kept = owned().await;
            coming.push(gaps.lock().expect("no panic").longest(&kept));
            gaps.lock().expect("no panic").clear();
            other.shutdown().await.expect("a good end");
            owns(all).await;
            going.push(gaps.lock().expect("no panic").longest(&kept));
        }
        sending.abort();
        stays.shutdown().await.expect("a good end");
        println!("longest pause of partitions that stay, ms: {coming:.0?} as a member comes, {going:.0?} as it goes");
    }

    /// Memory while a fifth of the keys fail for ever.
    async fn poisoned(&self) {
        let back_off = BackOff::exponential(Duration::from_millis(100), 2.0, Duration::from_secs(10)).infinite();
        let builder = self
            .builder(&unique("poisoned"))
            .order(ProcessingOrder::Key)
            .retry(RetryPolicy::Blocking(back_off));
        self.make_topics(&builder).await;
        let before = rss_mib();
        let handled = Arc::new(AtomicUsize::new(0));
        let handler = Poisoned {
            handled: handled.clone(),
        };
        let consumer = builder.start(self.log, handler).await.expect("a consumer");
        let mut most = before;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(Duration::from_millis(100)).await;
            most = most.max(rss_mib());
        }
        let state = consumer.state().await.expect("a state");
        let blocked: usize = state.partitions.iter().map(|partition| partition.blocked.len()).sum();
        println!(
            "{POISONED_KEYS} of {KEYS} keys fail: {blocked} blocked, {} of {} good records handled, {:.0} MiB over {before:.0}",
            handled.load(Ordering::Relaxed),
            RECORDS / KEYS * (KEYS - POISONED_KEYS),
            most - before
        );
        consumer.shutdown().await.expect("a good end");
    }
}

/// The longest time between two records of each partition.
#[derive(Default)]
struct Gaps {
    last: HashMap<TopicPartition, Instant>,
    longest: HashMap<TopicPartition, Duration>,
}

impl Gaps {
    fn clear(&mut self) {
        self.longest.clear();
    }

    fn longest(&self, partitions: &[TopicPartition]) -> f64 {
        let longest = partitions.iter().map(|partition| self.longest[partition]).max();
        longest.expect("some partitions").as_secs_f64() * 1000.0
    }
}

struct PausesOf {
    gaps: Arc<Mutex<Gaps>>,
}

impl Handler for PausesOf {
    async fn handle(&self, context: &mut Context, _: &Record) -> Result<(), HandlerError> {
        let (now, mut gaps) = (Instant::now(), self.gaps.lock().expect("no panic"));
        if let Some(before) = gaps.last.insert(context.partition().clone(), now) {
            let longest = gaps.longest.entry(context.partition().clone()).or_default();
            *longest = (*longest).max(now - before);
        }
        Ok(())
    }
}

/// Whose records fail for ever.
#[derive(Clone, Copy)]
enum Failing {
    None,
    Partition(i32),
    All,
}

/// Counts the records of all partitions but the first.
struct StandingStill {
    failing: Failing,
    count: Count,
}

impl Handler for StandingStill {
    async fn handle(&self, context: &mut Context, _: &Record) -> Result<(), HandlerError> {
        let partition = context.partition().partition;
        match self.failing {
            Failing::All => return Err(HandlerError::retriable("it stands still")),
            Failing::Partition(failing) if failing == partition => {
                return Err(HandlerError::retriable("it stands still"));
            }
            Failing::Partition(_) | Failing::None => {}
        }
        if partition != 0 {
            self.count.one();
        }
        Ok(())
    }
}

struct Poisoned {
    handled: Arc<AtomicUsize>,
}

impl Handler for Poisoned {
    async fn handle(&self, _: &mut Context, record: &Record) -> Result<(), HandlerError> {
        let key = record.key.as_deref().unwrap_or_default();
        let number = std::str::from_utf8(key)
            .ok()
            .and_then(|key| key.strip_prefix("key-")?.parse::<usize>().ok());
        if number.is_some_and(|number| number < POISONED_KEYS) {
            return Err(HandlerError::retriable("poisoned"));
        }
        self.handled.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

struct Since {
    epoch: Instant,
    times: Arc<Mutex<Vec<f64>>>,
}

impl Handler for Since {
    async fn handle(&self, _: &mut Context, record: &Record) -> Result<(), HandlerError> {
        let ms = since_ms(record.value.as_deref(), self.epoch);
        self.times.lock().expect("no panic").push(ms);
        Ok(())
    }
}

fn since_ms(sent_us: Option<&[u8]>, epoch: Instant) -> f64 {
    let now = epoch.elapsed();
    let sent_us = std::str::from_utf8(sent_us.unwrap_or_default()).ok();
    let sent_us: u64 = sent_us.and_then(|text| text.parse().ok()).unwrap_or_default();
    now.saturating_sub(Duration::from_micros(sent_us)).as_secs_f64() * 1000.0
}

/// Results of the rounds: the runtime's and the bare loop's.
#[derive(Default)]
struct Rows {
    ours: Vec<f64>,
    bare: Vec<f64>,
}

impl Rows {
    fn add(&mut self, ours: f64, bare: f64) {
        self.ours.push(ours);
        self.bare.push(bare);
    }

    fn print_rates(self, what: &str) {
        let (ours, bare) = (median(self.ours), median(self.bare));
        println!(
            "{what:48} {ours:>10.0} {bare:>10.0} records/s  ratio {:.2}",
            ours / bare
        );
    }

    fn print_shares(self, what: &str) {
        let (beside, alone) = (median(self.ours), median(self.bare));
        println!(
            "{what:48} {beside:>10.0} {alone:>10.0} records/s  {:.0} %",
            beside / alone * 100.0
        );
    }

    fn print_times(self, what: &str) {
        let (ours, bare) = (median(self.ours), median(self.bare));
        println!(
            "{what:48} {ours:>10.3} {bare:>10.3} ms         ratio {:.2}",
            bare / ours
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

fn rss_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .expect("a line");
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib / 1024.0
}

fn unique(stem: &str) -> String {
    format!("bench-{stem}-{:08x}", rand::random::<u32>())
}

async fn make_topic(log: &Log, stem: &str) -> String {
    let name = unique(stem);
    let spec = TopicSpec::new(&name, PARTITIONS);
    let plan = log.plan_topics(&[spec]).await.expect("a plan");
    log.apply_topics(&plan).await.expect("applied");
    tokio::time::sleep(Duration::from_millis(500)).await;
    name
}

fn note(offsets: &mut TopicPartitionList, topic: &str, partition: i32, offset: i64) {
    let next = Offset::Offset(offset + 1);
    match offsets.find_partition(topic, partition) {
        Some(mut element) => element.set_offset(next).expect("an offset"),
        None => offsets.add_partition_offset(topic, partition, next).expect("an offset"),
    }
}

/// The engine's settings, as a program without it would set them.
fn common_config(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("socket.nagle.disable", "true");
    config
}

fn bare_consumer(brokers: &str, group: &str) -> BaseConsumer {
    common_config(brokers)
        .set("group.id", group)
        .set("isolation.level", "read_committed")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("auto.offset.reset", "earliest")
        .set("enable.partition.eof", "true")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("queued.max.messages.kbytes", "16384")
        .set("fetch.queue.backoff.ms", "10")
        .set("fetch.wait.max.ms", "100")
        .create()
        .expect("a consumer")
}
