//! What schedules cost, on the embedded log: `cargo bench -p barnabas --bench schedule`.
//!
//! One owner, eight partitions. How many fire in a second when all are due at once; how late they are that are due one after the
//! other; and what memory holds when very many are pending. `SCHEDULES_PENDING` is how many that are, a million if it is not set.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::{Log, ProducerRecord, ProducerSettings, Reader, StartAt, TopicPartition, TopicSpec};
use barnabas::patterns::schedule::{self, Schedule, Scheduler, SchedulerSettings, When};
use tokio_util::sync::CancellationToken;

const NAME: &str = "schedules";
const EVENTS: &str = "events";
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
    let log = Log::open_embedded(EmbeddedSettings::new(folder.path()))
        .await
        .expect("a log");
    let mut topics = schedule::topics(NAME, PARTITIONS, Duration::from_secs(3600)).to_vec();
    topics.push(TopicSpec::new(EVENTS, PARTITIONS));
    let plan = log.plan_topics(&topics).await.expect("a plan");
    log.apply_topics(&plan).await.expect("topics");
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let scheduler = Scheduler::new(log.clone(), NAME, producer);
    let stopping = CancellationToken::new();
    let owner = tokio::spawn(schedule::run(
        log.clone(),
        SchedulerSettings::new(NAME),
        stopping.clone(),
    ));
    let mut events = log.reader(EVENTS).await.expect("a reader");
    for partition in 0..PARTITIONS {
        events.assign(partition, StartAt::End).await.expect("assigned");
    }

    let due = SystemTime::now() + Duration::from_secs(15);
    submit(&scheduler, AT_ONCE, |_| due).await;
    written(&log, AT_ONCE as i64).await;
    let left = due
        .duration_since(SystemTime::now())
        .expect("all are pending before they are due");
    tokio::time::sleep(left).await;
    let start = Instant::now();
    read(&mut events, AT_ONCE).await;
    let fired = start.elapsed();
    println!(
        "{AT_ONCE} due at once    {:>10.0} fired/s",
        AT_ONCE as f64 / fired.as_secs_f64()
    );

    let first = SystemTime::now() + Duration::from_secs(3);
    submit(&scheduler, PACED, |number| {
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
    let (end, before) = (written_end(&log).await, resident_mib());
    let start = Instant::now();
    submit(&scheduler, pending, |number| {
        SystemTime::now() + Duration::from_secs(86_400 + number as u64)
    })
    .await;
    written(&log, end + pending as i64).await;
    println!(
        "{pending} pending         {:>10.0} taken/s, memory {before} MiB before, {} MiB with them",
        pending as f64 / start.elapsed().as_secs_f64(),
        resident_mib()
    );
    let start = Instant::now();
    submit(&scheduler, 1, |_| UNIX_EPOCH).await;
    read(&mut events, 1).await;
    println!("one more, due now      fired after {:?}", start.elapsed());
    stopping.cancel();
    owner.await.expect("no panic").expect("a clean end");

    let start = Instant::now();
    let stopping = CancellationToken::new();
    let owner = tokio::spawn(schedule::run(
        log.clone(),
        SchedulerSettings::new(NAME),
        stopping.clone(),
    ));
    submit(&scheduler, 1, |_| UNIX_EPOCH).await;
    read(&mut events, 1).await;
    println!(
        "a new owner            fired after {:?}, memory {} MiB",
        start.elapsed(),
        resident_mib()
    );
    stopping.cancel();
    owner.await.expect("no panic").expect("a clean end");
    log.close().await;
}

async fn submit(scheduler: &Scheduler, count: usize, at: impl Fn(usize) -> SystemTime) {
    for chunk in 0..count.div_ceil(IN_FLIGHT) {
        let numbers = chunk * IN_FLIGHT..count.min((chunk + 1) * IN_FLIGHT);
        let submitted = numbers.map(|number| {
            let id = format!("{count}-{number}");
            let event = ProducerRecord::to(EVENTS).key(id.clone()).value(vec![b'x'; 100]);
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
async fn written_end(log: &Log) -> i64 {
    let mut written = 0;
    for partition in 0..PARTITIONS {
        let end = log.offset(&TopicPartition::new(NAME, partition), StartAt::End).await;
        written += end.expect("an end");
    }
    written
}

/// Waits until owners have written so many.
async fn written(log: &Log, count: i64) {
    while written_end(log).await < count {
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
