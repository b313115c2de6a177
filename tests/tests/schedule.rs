//! Schedules on real logs: each due time is one event, never early, whatever owners and memory go through.
//!
//! What has fired is read from the log by means that share no code with Barnabas.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{self, Log, ProducerRecord, ProducerSettings, TopicSpec, partition_for_key};
use barnabas::patterns::schedule::{self, Cron, Schedule, Scheduler, SchedulerSettings, When};
use barnabas::patterns::{Error, table};
use barnabas_tests::kafka::brokers;
use barnabas_tests::on_both_logs;
use barnabas_tests::oracle::{OracleRecord, read_embedded, read_kafka};
use barnabas_tests::process::{Process, program};
use barnabas_tests::site::{Engine, wait_for};
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

on_both_logs!(
    each_fires_once_and_never_before_its_time,
    a_cron_schedule_fires_at_each_of_its_times_until_it_is_cancelled,
    what_was_told_last_counts,
    what_is_late_after_a_stop_fires_at_once_in_order,
    commands_that_wait_come_before_what_is_late,
    many_more_than_memory_holds_fire_in_order,
    the_log_lists_what_is_pending_in_pages,
    a_page_of_large_schedules_is_bounded,
    an_event_whose_topic_is_gone_holds_up_nobody,
    an_event_that_its_topic_does_not_take_holds_up_nobody,
    each_fires_once_though_owners_are_killed,
);

const PARTITIONS: i32 = 3;

/// Whatever does not happen within it does not happen.
const DEADLINE: Duration = Duration::from_secs(90);

/// Schedules of a test's own, with a topic for their events.
struct Bench {
    engine: Engine,
    folder: TempDir,
    name: String,
    events: String,
}

impl Bench {
    async fn new(engine: Engine, name: &str) -> (Self, Log) {
        let name = format!("{name}-{:08x}", rand::random::<u32>());
        let bench = Self {
            engine,
            folder: tempfile::tempdir().expect("a folder"),
            events: format!("{name}.events"),
            name,
        };
        let log = bench.open().await;
        let mut topics = schedule::topics(&bench.name, PARTITIONS, Duration::from_secs(3600)).to_vec();
        topics.push(TopicSpec::new(&bench.events, 1));
        bench.make(&log, &topics).await;
        (bench, log)
    }

    async fn make(&self, log: &Log, topics: &[TopicSpec]) {
        let plan = log.plan_topics(topics).await.expect("a plan");
        log.apply_topics(&plan).await.expect("topics");
    }

    async fn open(&self) -> Log {
        let log = match self.engine {
            Engine::Embedded => Log::open_embedded(EmbeddedSettings::new(self.folder.path())).await,
            Engine::Kafka => Log::connect_kafka(KafkaSettings::new(brokers())).await,
        };
        log.expect("a log")
    }

    async fn scheduler(&self, log: &Log) -> Scheduler {
        let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
        Scheduler::new(log.clone(), &self.name, producer)
    }

    fn owner(&self, log: &Log, max_pending: usize) -> Owner {
        self.owner_with(
            log,
            SchedulerSettings {
                max_pending,
                ..SchedulerSettings::new(&self.name)
            },
        )
    }

    fn owner_with(&self, log: &Log, settings: SchedulerSettings) -> Owner {
        let stopping = CancellationToken::new();
        Owner {
            run: tokio::spawn(schedule::run(log.clone(), settings, stopping.clone())),
            stopping,
        }
    }

    fn schedule(&self, id: &str, when: When) -> Schedule {
        let event = ProducerRecord::to(self.events.as_str()).key(id.to_owned()).value("{}");
        Schedule {
            id: id.to_owned(),
            when,
            event,
        }
    }

    /// The committed events.
    fn fired(&self) -> Vec<OracleRecord> {
        self.read(&self.events)
    }

    fn read(&self, topic: &str) -> Vec<OracleRecord> {
        match self.engine {
            Engine::Embedded => read_embedded(self.folder.path(), topic),
            Engine::Kafka => read_kafka(&brokers(), topic),
        }
    }

    async fn until_fired(&self, count: usize) {
        wait_for(&format!("{count} events"), DEADLINE, || self.fired().len() >= count).await;
    }

    /// The ids of schedules that stand on the log, as their owners have written them.
    fn pending(&self) -> Vec<String> {
        let mut last = BTreeMap::new();
        for record in self.read(&self.name) {
            last.insert(record.key_text(), record.header("bn-schedule").to_owned());
        }
        let pending = last.into_iter().filter(|(_, envelope)| !envelope.is_empty());
        pending.map(|(id, _)| id).collect()
    }

    async fn until_pending(&self, count: usize) {
        wait_for(&format!("{count} are pending"), DEADLINE, || {
            self.pending().len() == count
        })
        .await;
    }
}

struct Owner {
    stopping: CancellationToken,
    run: JoinHandle<Result<(), Error>>,
}

impl Owner {
    async fn stop(self) {
        self.stopping.cancel();
        let ended = tokio::time::timeout(DEADLINE, self.run).await.expect("an end in time");
        ended.expect("no panic").expect("a clean end");
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    i64::try_from(since.as_millis()).expect("a time")
}

fn at_ms(time_ms: i64) -> When {
    When::At(UNIX_EPOCH + Duration::from_millis(u64::try_from(time_ms).expect("after 1970")))
}

fn due_ms(event: &OracleRecord) -> i64 {
    event.header("bn-due-ms").parse().expect("a due time")
}

/// Checks that of the schedules with these due times each has fired once, as due, not early, and in the order of due times in its
/// partition.
fn check(fired: &[OracleRecord], expected: &HashMap<String, i64>) {
    let mut last_due: HashMap<i32, i64> = HashMap::new();
    let mut seen = HashMap::new();
    for event in fired {
        let id = event.header("bn-schedule-id").to_owned();
        let due_ms = due_ms(event);
        assert!(event.timestamp_ms >= due_ms, "{id} is early: {event:?}");
        let last = last_due
            .entry(partition_for_key(id.as_bytes(), PARTITIONS))
            .or_default();
        assert!(*last <= due_ms, "{id} fires after one that was due later");
        *last = due_ms;
        assert!(seen.insert(id.clone(), due_ms).is_none(), "{id} has fired twice");
    }
    assert_eq!(&seen, expected);
}

async fn each_fires_once_and_never_before_its_time(engine: Engine) {
    let (bench, log) = Bench::new(engine, "once").await;
    let owner = bench.owner(&log, 1000);
    let scheduler = bench.scheduler(&log).await;
    // So that it is the clock that holds them back, and not the owner that is not there yet.
    scheduler
        .submit(bench.schedule("first", at_ms(0)))
        .await
        .expect("submitted");
    bench.until_fired(1).await;
    let mut expected = HashMap::from([("first".to_owned(), 0)]);
    let mut delays: Vec<u64> = (0..60).map(|number| number * 25).collect();
    delays.shuffle(&mut StdRng::seed_from_u64(7));
    for delay_ms in delays {
        let id = format!("after-{delay_ms}");
        let when = When::After(Duration::from_millis(delay_ms));
        let before_ms = now_ms();
        let submitted = scheduler.submit(bench.schedule(&id, when)).await.expect("submitted");
        assert!(submitted.due_ms >= before_ms + i64::try_from(delay_ms).expect("small"));
        expected.insert(id, submitted.due_ms);
    }
    bench.until_fired(61).await;
    owner.stop().await;
    let fired = bench.fired();
    let seen: HashMap<String, i64> = fired.iter().map(|event| (event.key_text(), due_ms(event))).collect();
    assert_eq!((fired.len(), seen), (61, expected));
    for event in &fired {
        assert!(event.timestamp_ms >= due_ms(event), "early: {event:?}");
    }
    assert!(bench.pending().is_empty(), "what has fired is over");
    log.close().await;
}

async fn a_cron_schedule_fires_at_each_of_its_times_until_it_is_cancelled(engine: Engine) {
    let (bench, log) = Bench::new(engine, "cron").await;
    let owner = bench.owner(&log, 1000);
    let scheduler = bench.scheduler(&log).await;
    let every_second = Cron::new("* * * * * *", "Europe/Berlin").expect("cron");
    let mut schedule = bench.schedule("tick", When::Cron(every_second));
    schedule.event = schedule.event.header("ce_id", "tick");
    scheduler.submit(schedule).await.expect("submitted");
    bench.until_fired(3).await;
    scheduler.cancel("tick").await.expect("cancelled");
    bench.until_pending(0).await;
    let fired = bench.fired();
    scheduler
        .submit(bench.schedule("later", When::After(Duration::from_millis(1100))))
        .await
        .expect("submitted");
    bench.until_fired(fired.len() + 1).await;
    owner.stop().await;
    let dues: Vec<i64> = fired.iter().map(due_ms).collect();
    for pair in dues.windows(2) {
        assert!(pair[0] + 1000 == pair[1] && pair[1] % 1000 == 0, "{dues:?}");
    }
    for event in &fired {
        assert_eq!(
            event.header("ce_id"),
            format!("tick/{}", due_ms(event)),
            "each is an event of its own"
        );
        assert!(event.timestamp_ms >= due_ms(event));
    }
    assert_eq!(
        bench.fired().last().expect("events").key_text(),
        "later",
        "nothing fires once it is cancelled"
    );
    log.close().await;
}

async fn what_was_told_last_counts(engine: Engine) {
    let (bench, log) = Bench::new(engine, "last").await;
    let scheduler = bench.scheduler(&log).await;
    for (id, value) in [("cancelled", "1"), ("replaced", "1"), ("replaced", "2"), ("kept", "1")] {
        let mut schedule = bench.schedule(id, at_ms(1000));
        schedule.event = schedule.event.value(value);
        scheduler.submit(schedule).await.expect("submitted");
    }
    scheduler.cancel("cancelled").await.expect("cancelled");
    scheduler.cancel("unknown").await.expect("no error");
    // All of these commands wait when the owner comes.
    let owner = bench.owner(&log, 1000);
    bench.until_fired(2).await;
    let hour = When::After(Duration::from_secs(3600));
    for id in ["forgotten", "moved"] {
        scheduler
            .submit(bench.schedule(id, hour.clone()))
            .await
            .expect("submitted");
    }
    bench.until_pending(2).await;
    scheduler.cancel("forgotten").await.expect("cancelled");
    scheduler
        .submit(bench.schedule("moved", at_ms(2000)))
        .await
        .expect("submitted");
    bench.until_fired(3).await;
    bench.until_pending(0).await;
    owner.stop().await;
    let mut fired: Vec<(String, Vec<u8>)> = bench
        .fired()
        .into_iter()
        .map(|event| (event.key_text(), event.value))
        .collect();
    fired.sort();
    let expected = [("kept", "1"), ("moved", "{}"), ("replaced", "2")];
    assert_eq!(
        fired,
        expected.map(|(id, value)| (id.to_owned(), value.as_bytes().to_vec()))
    );
    log.close().await;
}

async fn what_is_late_after_a_stop_fires_at_once_in_order(engine: Engine) {
    let (bench, log) = Bench::new(engine, "late").await;
    let scheduler = bench.scheduler(&log).await;
    let owner = bench.owner(&log, 1000);
    let base_ms = now_ms() + 12_000;
    let mut numbers: Vec<i64> = (0..200).collect();
    numbers.shuffle(&mut StdRng::seed_from_u64(8));
    let mut expected = HashMap::new();
    for number in numbers {
        // Three are due at the same time.
        let schedule = bench.schedule(&number.to_string(), at_ms(base_ms + number / 3));
        expected.insert(schedule.id.clone(), base_ms + number / 3);
        scheduler.submit(schedule).await.expect("submitted");
    }
    let every_second = Cron::new("* * * * * *", "UTC").expect("cron");
    scheduler
        .submit(bench.schedule("tick", When::Cron(every_second)))
        .await
        .expect("submitted");
    bench.until_pending(201).await;
    owner.stop().await;
    let ticks_before = bench.fired().len();
    assert!(now_ms() < base_ms, "the owner is stopped before they are due");
    wait_for("all are due", DEADLINE, || now_ms() > base_ms + 3000).await;
    let owner = bench.owner(&log, 1000);
    bench.until_fired(ticks_before + 201).await;
    scheduler.cancel("tick").await.expect("cancelled");
    bench.until_pending(0).await;
    owner.stop().await;
    let (ticks, fired): (Vec<_>, Vec<_>) = bench.fired().into_iter().partition(|event| event.key_text() == "tick");
    check(&fired, &expected);
    let missed = ticks
        .iter()
        .map(due_ms)
        .filter(|due_ms| (base_ms..base_ms + 2000).contains(due_ms));
    assert_eq!(missed.count(), 0, "of the missed times only the last fires");
    log.close().await;
}

async fn commands_that_wait_come_before_what_is_late(engine: Engine) {
    // With room for all that is pending, and with so little that the partition is restored again and again.
    tokio::join!(
        commands_come_before_what_is_late(engine, 1000),
        commands_come_before_what_is_late(engine, 2)
    );
}

async fn commands_come_before_what_is_late(engine: Engine, max_pending: usize) {
    let (bench, log) = Bench::new(engine, "waiting").await;
    let scheduler = bench.scheduler(&log).await;
    let owner = || {
        let settings = SchedulerSettings {
            window: 20,
            max_pending,
            ..SchedulerSettings::new(&bench.name)
        };
        bench.owner_with(&log, settings)
    };
    // All of one partition, so that commands stand one behind the other.
    let is_beside =
        |id: &String| partition_for_key(id.as_bytes(), PARTITIONS) == partition_for_key(b"cancelled", PARTITIONS);
    let ids = |name: &'static str| (0..).map(move |number| format!("{name}-{number}")).filter(is_beside);
    let (moved, mut others) = (ids("moved").next().expect("one"), ids("other"));
    let (late, later) = {
        let mut late = ids("late");
        (late.next().expect("one"), late.next().expect("one"))
    };
    let due_ms = now_ms() + 6_000;
    let first = owner();
    for id in ["cancelled", &moved] {
        scheduler
            .submit(bench.schedule(id, at_ms(due_ms)))
            .await
            .expect("submitted");
    }
    bench.until_pending(2).await;
    first.stop().await;

    let hour = When::After(Duration::from_secs(3600));
    // What is due first is told last.
    for (id, time_ms) in [(&later, 2000), (&late, 1000)] {
        for id in others.by_ref().take(100) {
            scheduler
                .submit(bench.schedule(&id, hour.clone()))
                .await
                .expect("submitted");
        }
        scheduler
            .submit(bench.schedule(id, at_ms(time_ms)))
            .await
            .expect("submitted");
    }
    scheduler.cancel("cancelled").await.expect("cancelled");
    scheduler
        .submit(bench.schedule(&moved, at_ms(due_ms + 1500)))
        .await
        .expect("submitted");
    assert!(now_ms() < due_ms, "all of it is told before they are due");
    wait_for("they are due", DEADLINE, || now_ms() > due_ms).await;

    let second = owner();
    bench.until_fired(3).await;
    bench.until_pending(200).await;
    second.stop().await;
    check(
        &bench.fired(),
        &HashMap::from([(late, 1000), (later, 2000), (moved, due_ms + 1500)]),
    );
    log.close().await;
}

async fn many_more_than_memory_holds_fire_in_order(engine: Engine) {
    let (bench, log) = Bench::new(engine, "many").await;
    let scheduler = bench.scheduler(&log).await;
    let mut random = StdRng::seed_from_u64(9);
    let mut expected = HashMap::new();
    let mut submitting = Vec::new();
    for number in 0..1500 {
        let id = number.to_string();
        // Many are due at the same time.
        let time_ms = 1_000_000 + random.random_range(0..100);
        expected.insert(id.clone(), time_ms);
        let (scheduler, schedule) = (scheduler.clone(), bench.schedule(&id, at_ms(time_ms)));
        submitting.push(tokio::spawn(async move { scheduler.submit(schedule).await }));
    }
    for submitted in submitting {
        submitted.await.expect("no panic").expect("submitted");
    }
    // All wait on the log when the owner comes.
    let owner = bench.owner(&log, 40);
    bench.until_fired(1500).await;
    bench.until_pending(0).await;
    owner.stop().await;
    check(&bench.fired(), &expected);
    log.close().await;

    // What is pending for later is all known when its time comes.
    let (bench, log) = Bench::new(engine, "many-later").await;
    let scheduler = bench.scheduler(&log).await;
    let base_ms = now_ms() + 12_000;
    let owner = bench.owner(&log, 40);
    let mut expected = HashMap::new();
    let mut submitting = Vec::new();
    for number in 0..1500 {
        let id = number.to_string();
        let time_ms = base_ms + random.random_range(0..100);
        expected.insert(id.clone(), time_ms);
        let (scheduler, schedule) = (scheduler.clone(), bench.schedule(&id, at_ms(time_ms)));
        submitting.push(tokio::spawn(async move { scheduler.submit(schedule).await }));
    }
    for submitted in submitting {
        submitted.await.expect("no panic").expect("submitted");
    }
    bench.until_fired(1500).await;
    bench.until_pending(0).await;
    owner.stop().await;
    check(&bench.fired(), &expected);
    log.close().await;
}

async fn the_log_lists_what_is_pending_in_pages(engine: Engine) {
    let (bench, log) = Bench::new(engine, "list").await;
    let scheduler = bench.scheduler(&log).await;
    let base_ms = now_ms() + 3_600_000;
    for number in 0..25 {
        let schedule = bench.schedule(&format!("{number:02}"), at_ms(base_ms + number));
        scheduler.submit(schedule).await.expect("submitted");
    }
    scheduler
        .submit(bench.schedule("over", at_ms(0)))
        .await
        .expect("submitted");
    let owner = bench.owner(&log, 1000);
    bench.until_pending(25).await;
    let (mut ids, mut from, mut pages) = (Vec::new(), None, 0);
    loop {
        let page = scheduler.list(from, 10).await.expect("a page");
        assert!(page.schedules.len() <= 10);
        ids.extend(page.schedules.iter().map(|pending| pending.id.to_string()));
        from = page.next;
        pages += 1;
        if from.is_none() {
            break;
        }
    }
    assert_eq!(ids, (0..25).map(|number| format!("{number:02}")).collect::<Vec<_>>());
    assert_eq!(pages, 3);
    let one = scheduler.get("07").await.expect("looked up").expect("it is there");
    assert_eq!(
        (one.due_ms, one.event.value.as_deref()),
        (base_ms + 7, Some(&b"{}"[..]))
    );
    assert!(scheduler.get("over").await.expect("looked up").is_none());
    owner.stop().await;
    log.close().await;
}

async fn a_page_of_large_schedules_is_bounded(engine: Engine) {
    let (bench, log) = Bench::new(engine, "large").await;
    let scheduler = bench.scheduler(&log).await;
    let base_ms = now_ms() + 3_600_000;
    let event = "x".repeat(900_000);
    for number in 0..10 {
        let mut schedule = bench.schedule(&number.to_string(), at_ms(base_ms + number));
        schedule.event = schedule.event.value(event.clone());
        scheduler.submit(schedule).await.expect("submitted");
    }
    let owner = bench.owner(&log, 1000);
    bench.until_pending(10).await;
    let (mut ids, mut from) = (Vec::new(), None);
    loop {
        let page = scheduler.list(from, 100).await.expect("a page");
        assert!((1..=4).contains(&page.schedules.len()), "{}", page.schedules.len());
        ids.extend(page.schedules.iter().map(|pending| pending.id.to_string()));
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    assert_eq!(ids, (0..10).map(|number| number.to_string()).collect::<Vec<_>>());
    owner.stop().await;
    log.close().await;
}

async fn an_event_whose_topic_is_gone_holds_up_nobody(engine: Engine) {
    let (bench, log) = Bench::new(engine, "refused").await;
    let scheduler = bench.scheduler(&log).await;
    let gone = format!("{}.gone", bench.name);
    bench.make(&log, &[TopicSpec::new(&gone, 1)]).await;
    let owner = bench.owner(&log, 1000);
    let due_ms = now_ms() + 3_600_000;
    for number in 0..6 {
        let mut schedule = bench.schedule(&format!("gone-{number}"), at_ms(due_ms));
        schedule.event.topic = gone.as_str().into();
        scheduler.submit(schedule).await.expect("submitted");
    }
    bench.until_pending(6).await;
    owner.stop().await;
    log.delete_topic(&gone).await.expect("deleted");
    let unknown = Schedule {
        event: ProducerRecord::to(gone.as_str()),
        ..bench.schedule("too late", at_ms(0))
    };
    wait_for_unknown(&bench, &log, unknown).await;
    // The same schedules, due now, as an owner reads them.
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    for number in 0..6 {
        let envelope = format!(r#"{{"due_ms":1000,"topic":"{gone}"}}"#);
        let command = ProducerRecord::to(schedule::commands_topic(&bench.name))
            .key(format!("gone-{number}"))
            .value("{}")
            .header("bn-schedule", envelope);
        producer.append(command).await.expect("appended");
        scheduler
            .submit(bench.schedule(&format!("good-{number}"), at_ms(1000)))
            .await
            .expect("submitted");
    }
    let owner = bench.owner(&log, 1000);
    bench.until_fired(6).await;
    wait_for("six are set aside", DEADLINE, || {
        let last: HashMap<String, String> = bench
            .read(&bench.name)
            .into_iter()
            .map(|record| (record.key_text(), record.header("bn-schedule").to_owned()))
            .collect();
        last.values().filter(|envelope| envelope.contains("refused")).count() == 6
    })
    .await;
    let set_aside = async {
        loop {
            let page = scheduler.list(None, 100).await.expect("a page");
            if page.schedules.len() == 6 && page.schedules.iter().all(|pending| pending.refused.is_some()) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(DEADLINE, set_aside)
        .await
        .expect("six are listed as set aside");
    owner.stop().await;
    log.close().await;
}

async fn an_event_that_its_topic_does_not_take_holds_up_nobody(engine: Engine) {
    let (bench, log) = Bench::new(engine, "keyless").await;
    let scheduler = bench.scheduler(&log).await;
    let compacted = format!("{}.compacted", bench.name);
    bench.make(&log, &[table::topic(&compacted, 1)]).await;
    let keyless = Schedule {
        event: ProducerRecord::to(compacted.as_str()).value("{}"),
        ..bench.schedule("keyless", at_ms(1000))
    };
    let refused = scheduler.submit(keyless).await.expect_err("it is refused");
    assert!(
        matches!(&refused, Error::Log(log::Error::InvalidTopic { topic, .. }) if *topic == compacted),
        "{refused}"
    );
    // One that was submitted when the topic still took it, as an owner reads it.
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let command = ProducerRecord::to(schedule::commands_topic(&bench.name))
        .key("keyless")
        .value("{}")
        .header("bn-schedule", format!(r#"{{"due_ms":1000,"topic":"{compacted}"}}"#));
    producer.append(command).await.expect("appended");
    // Of its partition, and to the same topic, before it and behind it.
    let ids = (0..).map(|number| format!("keyed-{number}"));
    let ids =
        ids.filter(|id| partition_for_key(id.as_bytes(), PARTITIONS) == partition_for_key(b"keyless", PARTITIONS));
    for (id, due_ms) in ids.zip([500, 1000, 1500]) {
        let mut schedule = bench.schedule(&id, at_ms(due_ms));
        schedule.event.topic = compacted.as_str().into();
        scheduler.submit(schedule).await.expect("submitted");
    }
    let owner = bench.owner(&log, 1000);
    wait_for("the others have fired", DEADLINE, || bench.read(&compacted).len() == 3).await;
    wait_for("it is set aside", DEADLINE, || {
        let schedules = bench.read(&bench.name);
        let last = schedules.iter().rfind(|record| record.key_text() == "keyless");
        last.is_some_and(|record| record.header("bn-schedule").contains("refused"))
    })
    .await;
    owner.stop().await;
    log.close().await;
}

/// Asks by handles that have not asked before: one that has does not ask again.
async fn wait_for_unknown(bench: &Bench, log: &Log, schedule: Schedule) {
    let asking = async {
        while bench.scheduler(log).await.submit(schedule.clone()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(DEADLINE, asking)
        .await
        .expect("the topic is known to be gone");
}

/// An owner in a process of its own.
fn worker(bench: &Bench, slot: usize) -> Process {
    let (engine, at) = match bench.engine {
        Engine::Embedded => ("embedded", bench.folder.path().display().to_string()),
        Engine::Kafka => ("kafka", brokers()),
    };
    let arguments = [bench.name.clone(), "50".to_owned(), engine.to_owned(), at];
    Process::start(
        &program("schedule-worker"),
        &arguments,
        &[],
        &output(bench.folder.path(), slot),
    )
}

fn output(folder: &Path, slot: usize) -> PathBuf {
    folder.join(format!("worker-{slot}.output"))
}

async fn each_fires_once_though_owners_are_killed(engine: Engine) {
    let (bench, log) = Bench::new(engine, "killed").await;
    let seed = std::env::var("BARNABAS_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(rand::random);
    println!("BARNABAS_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let scheduler = bench.scheduler(&log).await;
    let base_ms = now_ms() + 1500;
    let mut expected = HashMap::new();
    let mut submitting = Vec::new();
    for number in 0..900 {
        let id = number.to_string();
        let time_ms = base_ms + random.random_range(0..6000);
        expected.insert(id.clone(), time_ms);
        let (scheduler, schedule) = (scheduler.clone(), bench.schedule(&id, at_ms(time_ms)));
        submitting.push(tokio::spawn(async move { scheduler.submit(schedule).await }));
    }
    for submitted in submitting {
        submitted.await.expect("no panic").expect("submitted");
    }
    let every_second = Cron::new("* * * * * *", "UTC").expect("cron");
    scheduler
        .submit(bench.schedule("tick", When::Cron(every_second)))
        .await
        .expect("submitted");
    // The embedded log serves one process at a time.
    log.close().await;
    let slots = if engine == Engine::Kafka { 2 } else { 1 };
    let mut workers: Vec<Process> = (0..slots).map(|slot| worker(&bench, slot)).collect();
    for _ in 0..12 {
        tokio::time::sleep(Duration::from_millis(random.random_range(50..900))).await;
        let slot = random.random_range(0..slots);
        workers.swap_remove(slot).kill();
        workers.push(worker(&bench, slot));
    }
    // By then there is an owner again, whoever was the last to be killed: no time is missed any more.
    let quiet_ms = now_ms() + 5000;
    let is_over = |fired: &[OracleRecord]| {
        let (ticks, others): (Vec<_>, Vec<_>) = fired.iter().partition(|event| event.key_text() == "tick");
        let quiet = ticks.iter().filter(|tick| due_ms(tick) >= quiet_ms);
        others.len() >= 900 && quiet.count() > 2
    };
    wait_for("all have fired", DEADLINE, || is_over(&bench.fired())).await;
    workers.into_iter().for_each(Process::kill);
    let (ticks, fired): (Vec<_>, Vec<_>) = bench.fired().into_iter().partition(|event| event.key_text() == "tick");
    let seen: HashMap<String, i64> = fired.iter().map(|event| (event.key_text(), due_ms(event))).collect();
    assert_eq!(fired.len(), 900, "each fires once");
    assert_eq!(seen, expected);
    for event in fired.iter().chain(&ticks) {
        assert!(event.timestamp_ms >= due_ms(event), "early: {event:?}");
    }
    let dues: Vec<i64> = ticks.iter().map(due_ms).collect();
    assert!(
        dues.len() > 2 && dues.is_sorted_by(|a, b| a < b),
        "each time fires once: {dues:?}"
    );
    let quiet: Vec<i64> = dues.iter().copied().filter(|due_ms| *due_ms >= quiet_ms).collect();
    for pair in quiet.windows(2) {
        assert_eq!(pair[0] + 1000, pair[1], "none is missed: {dues:?}");
    }
}
