//! What schedules cost: `cargo bench -p barnabas --bench schedule`, on the embedded log, and with `KAFKA_BROKERS` on Kafka beside a bare
//! rdkafka loop that writes in transactions what firing writes: the events, and that their schedules have ended.
//!
//! One owner, eight partitions. How many fire in a second when all are due at once; how late they are that are due one after the
//! other; and what memory holds when very many are pending. `SCHEDULES_PENDING` is how many that are, a million if it is not set.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Log, ProducerRecord, ProducerSettings, Reader, StartAt, TopicPartition, TopicSpec};
use barnabas::patterns::Error;
use barnabas::patterns::schedule::{self, Schedule, Scheduler, SchedulerSettings, When};
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const PARTITIONS: i32 = 8;

/// Due at the same time.
const AT_ONCE: usize = 100_000;

/// Due one after the other, and from one to the next.
const PACED: usize = 2000;
const PACE: Duration = Duration::from_millis(5);

/// Submitted at a time.
const IN_FLIGHT: usize = 2000;

#[tokio::main]
async fn main() {
    let folder = tempfile::tempdir().expect("a folder");
    let settings = EmbeddedSettings::new(folder.path());
    let log = Log::open_embedded(settings).await.expect("a log");
    println!("embedded log");
    measure(&Bench::new(&log)).await;
    log.close().await;
    if let Ok(brokers) = std::env::var("KAFKA_BROKERS")
        && !brokers.is_empty()
    {
        let log = Log::connect_kafka(KafkaSettings::new(&brokers))
            .await
            .expect("a broker");
        println!("Kafka");
        let bench = Bench::new(&log);
        let fired = measure(&bench).await;
        for window in [500, 4000] {
            let bare = tokio::task::block_in_place(|| bare_fires(&brokers, &bench, window));
            println!(
                "bare loop, {window:>4} in a transaction {bare:>7.0} fired/s, ratio {:.2}",
                fired / bare
            );
        }
        log.close().await;
    }
}

/// A log, and topics on it that no other run has: of schedules, and of what they fire.
struct Bench {
    log: Log,
    schedules: String,
    events: String,
}

impl Bench {
    fn new(log: &Log) -> Self {
        let run: u32 = rand::random();
        Self {
            log: log.clone(),
            schedules: format!("bench-{run:08x}-schedules"),
            events: format!("bench-{run:08x}-events"),
        }
    }

    fn start(&self, stopping: &CancellationToken) -> JoinHandle<Result<(), Error>> {
        let settings = SchedulerSettings::new(&self.schedules);
        tokio::spawn(schedule::run(self.log.clone(), settings, stopping.clone()))
    }
}

/// Measures all of it, and returns how many fired in a second.
async fn measure(bench: &Bench) -> f64 {
    let Bench {
        log,
        schedules,
        events: topic,
    } = bench;
    let mut topics = schedule::topics(schedules, PARTITIONS, Duration::from_secs(3600)).to_vec();
    topics.push(TopicSpec::new(topic, PARTITIONS));
    let plan = log.plan_topics(&topics).await.expect("a plan");
    log.apply_topics(&plan).await.expect("topics");
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let scheduler = Scheduler::new(log.clone(), schedules, producer);
    let stopping = CancellationToken::new();
    let owner = bench.start(&stopping);
    let mut events = log.reader(topic).await.expect("a reader");
    for partition in 0..PARTITIONS {
        events.assign(partition, StartAt::End).await.expect("assigned");
    }

    let due = SystemTime::now() + Duration::from_secs(15);
    submit(&scheduler, topic, AT_ONCE, |_| due).await;
    written(bench, AT_ONCE as i64).await;
    let left = due
        .duration_since(SystemTime::now())
        .expect("all are pending before they are due");
    tokio::time::sleep(left).await;
    let start = Instant::now();
    read(&mut events, AT_ONCE).await;
    let fired = AT_ONCE as f64 / start.elapsed().as_secs_f64();
    println!("{AT_ONCE} due at once    {fired:>10.0} fired/s");

    let first = SystemTime::now() + Duration::from_secs(3);
    submit(&scheduler, topic, PACED, |number| {
        first + PACE * u32::try_from(number).expect("few")
    })
    .await;
    let mut late = read(&mut events, PACED).await;
    late.sort_unstable();
    let of = |part: usize| late[late.len() * part / 100];
    println!(
        "{PACED} paced by {PACE:?}  lateness p50 {} ms, p99 {} ms, most {} ms",
        of(50),
        of(99),
        late[late.len() - 1]
    );

    let pending = std::env::var("SCHEDULES_PENDING")
        .ok()
        .and_then(|pending| pending.parse().ok());
    let pending: usize = pending.unwrap_or(1_000_000);
    let (end, before) = (written_end(bench).await, resident_mib());
    let start = Instant::now();
    submit(&scheduler, topic, pending, |number| {
        SystemTime::now() + Duration::from_secs(86_400 + number as u64)
    })
    .await;
    written(bench, end + pending as i64).await;
    println!(
        "{pending} pending         {:>10.0} taken/s, memory {before} MiB before, {} MiB with them",
        pending as f64 / start.elapsed().as_secs_f64(),
        resident_mib()
    );
    let start = Instant::now();
    submit(&scheduler, topic, 1, |_| UNIX_EPOCH).await;
    read(&mut events, 1).await;
    println!("one more, due now      fired after {:?}", start.elapsed());
    stopping.cancel();
    owner.await.expect("no panic").expect("a clean end");

    let start = Instant::now();
    let stopping = CancellationToken::new();
    let owner = bench.start(&stopping);
    submit(&scheduler, topic, 1, |_| UNIX_EPOCH).await;
    read(&mut events, 1).await;
    println!(
        "a new owner            fired after {:?}, memory {} MiB",
        start.elapsed(),
        resident_mib()
    );
    stopping.cancel();
    owner.await.expect("no panic").expect("a clean end");
    fired
}

/// Writes the records of as many firings with rdkafka alone, so many firings in a transaction, and returns how many in a second.
fn bare_fires(brokers: &str, bench: &Bench, window: usize) -> f64 {
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("socket.nagle.disable", "true")
        .set("transactional.id", "bare-schedules")
        .set("linger.ms", "0")
        .set("partitioner", "murmur2_random")
        .create()
        .expect("a producer");
    let within = Duration::from_secs(10);
    producer.init_transactions(within).expect("initialised");
    let start = Instant::now();
    let ids: Vec<_> = (0..AT_ONCE).map(|number| format!("bare-{number}")).collect();
    for ids in ids.chunks(window) {
        producer.begin_transaction().expect("begun");
        for id in ids {
            let event = BaseRecord::<_, [u8]>::to(&bench.events)
                .key(id)
                .payload(&[b'x'; 100][..]);
            let ended = BaseRecord::to(&bench.schedules).key(id);
            for record in [event, ended] {
                producer.send(record).map_err(|(error, _)| error).expect("sent");
            }
        }
        // A commit by rdkafka waits 100 ms for what is in flight.
        while producer.in_flight_count() > 0 {
            producer.poll(Duration::from_millis(1));
        }
        producer.commit_transaction(within).expect("committed");
    }
    AT_ONCE as f64 / start.elapsed().as_secs_f64()
}

async fn submit(scheduler: &Scheduler, topic: &str, count: usize, at: impl Fn(usize) -> SystemTime) {
    for chunk in 0..count.div_ceil(IN_FLIGHT) {
        let numbers = chunk * IN_FLIGHT..count.min((chunk + 1) * IN_FLIGHT);
        let submitted = numbers.map(|number| {
            let id = format!("{count}-{number}");
            let event = ProducerRecord::to(topic).key(id.clone()).value(vec![b'x'; 100]);
            let when = When::At(at(number));
            scheduler.submit(Schedule { id, when, event })
        });
        for submitted in futures_util::future::join_all(submitted).await {
            submitted.expect("submitted");
        }
    }
}

/// Reads so many events, and says how late each is, in milliseconds.
async fn read(events: &mut Reader, count: usize) -> Vec<i64> {
    let mut late = Vec::with_capacity(count);
    while late.len() < count {
        let batch = events.next().await.expect("a batch");
        let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        let now_ms = i64::try_from(since.as_millis()).expect("a time");
        late.extend(batch.records.iter().map(|record| {
            let due_ms = record.headers.last_str(schedule::DUE_MS).expect("a due time");
            now_ms - due_ms.parse::<i64>().expect("a number")
        }));
    }
    late
}

/// How many records stand on the topic of schedules.
async fn written_end(bench: &Bench) -> i64 {
    let mut written = 0;
    for partition in 0..PARTITIONS {
        let end = bench
            .log
            .offset(&TopicPartition::new(bench.schedules.as_str(), partition), StartAt::End)
            .await;
        written += end.expect("an end");
    }
    written
}

/// Waits until owners have written so many.
async fn written(bench: &Bench, count: i64) {
    while written_end(bench).await < count {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What the process holds.
fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line
        .and_then(|line| line.split_whitespace().next())
        .and_then(|kib| kib.parse().ok());
    kib.unwrap_or(0u64) / 1024
}
