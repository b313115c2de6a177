//! Windows on real logs: each command counts in every window of its time or as late, whatever order the commands have and whatever
//! becomes of the owners. The oracle folds the commands topic itself, by looking at every window there is.

use std::collections::BTreeMap;
use std::time::Duration;

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Log, ProducerRecord, ProducerSettings, TopicSpec};
use barnabas::patterns::atomic_store::{self, AtomicStore, AtomicStoreSettings, command_record};
use barnabas::patterns::window::{Windowed, Windows};
use barnabas_tests::on_both_logs;
use barnabas_tests::oracle::{OracleRecord, read_embedded, read_kafka};
use barnabas_tests::site::{Engine, wait_for};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

on_both_logs!(
    hopping_windows_count_what_the_oracle_counts_though_owners_are_killed,
    windows_are_told_once_when_nothing_more_comes,
);

const PARTITIONS: i32 = 4;
const KEYS: usize = 5;
const COMMANDS: usize = 4000;

const SIZE_MS: i64 = 20_000;
const HOP_MS: i64 = 10_000;
const GRACE_MS: i64 = 15_000;

const DEADLINE: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Happened {
    at_ms: i64,
}

/// What is known of a key: the values of its open windows, those of the closed ones, and how many came late.
#[derive(Debug, Default, PartialEq)]
struct Fold {
    open: BTreeMap<i64, u64>,
    closed: BTreeMap<i64, u64>,
    late: u64,
}

struct Bench {
    log: Log,
    brokers: Option<String>,
    folder: TempDir,
    store: String,
    results: String,
}

impl Bench {
    async fn new(engine: Engine) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let brokers = (engine == Engine::Kafka).then(barnabas_tests::kafka::brokers);
        let log = match &brokers {
            Some(brokers) => Log::connect_kafka(KafkaSettings::new(brokers)).await,
            None => Log::open_embedded(EmbeddedSettings::new(folder.path())).await,
        };
        let log = log.expect("a log");
        let store = format!("windows-{:08x}", rand::random::<u32>());
        let results = format!("{store}.results");
        let mut wanted = atomic_store::topics(&store, PARTITIONS, Duration::from_secs(3600)).to_vec();
        wanted.push(TopicSpec::new(&results, 2));
        let plan = log.plan_topics(&wanted).await.expect("a plan");
        log.apply_topics(&plan).await.expect("topics");
        Self {
            log,
            brokers,
            folder,
            store,
            results,
        }
    }

    fn owner(&self, windows: Windows, idle: Duration, stopping: &CancellationToken) -> JoinHandle<()> {
        let results = self.results.clone();
        let counts = Windowed::new(
            windows,
            |happened: &Happened| happened.at_ms,
            |count: &mut u64, _| *count += 1,
        )
        .idle(idle)
        .on_close(move |window| {
            let json = serde_json::to_vec(&window).expect("JSON");
            ProducerRecord::to(results.as_str())
                .key(window.key.to_owned())
                .value(json)
        });
        let settings = AtomicStoreSettings {
            window_commands: 20,
            session_timeout: Duration::from_secs(6),
            ..AtomicStoreSettings::new(&self.store)
        };
        let run = AtomicStore::run(self.log.clone(), settings, counts, stopping.clone());
        tokio::spawn(async move { run.await.expect("a clean end") })
    }

    async fn submit(&self, commands: impl IntoIterator<Item = (usize, i64)>) {
        let producer = self
            .log
            .producer(ProducerSettings::default())
            .await
            .expect("a producer");
        let mut deliveries = Vec::new();
        for (key, at_ms) in commands {
            let record = command_record(&self.store, &format!("type-{key}"), &Happened { at_ms }).expect("JSON");
            deliveries.push(producer.send(record).await.expect("sent"));
        }
        for delivery in deliveries {
            delivery.await.expect("appended");
        }
    }

    fn records(&self, topic: &str) -> Vec<OracleRecord> {
        match &self.brokers {
            Some(brokers) => read_kafka(brokers, topic),
            None => read_embedded(self.folder.path(), topic),
        }
    }

    /// What the states and results say.
    fn written(&self) -> BTreeMap<String, Fold> {
        let mut folds: BTreeMap<String, Fold> = BTreeMap::new();
        for record in self.records(&self.store) {
            let fold = folds.entry(record.key_text()).or_default();
            let state = record.json();
            let open = state["open"].as_object().expect("an object").iter();
            let number = |value: &serde_json::Value| value.as_u64().expect("a number");
            fold.open = open
                .map(|(start, value)| (start.parse().expect("a time"), number(value)))
                .collect();
            fold.late = number(&state["late"]);
        }
        for record in self.records(&self.results) {
            let result = record.json();
            assert_eq!(result["key"], record.key_text());
            let (start, end) = (
                result["start_ms"].as_i64().expect("a time"),
                result["end_ms"].as_i64().expect("a time"),
            );
            assert_eq!(end - start, SIZE_MS);
            let fold = folds.entry(record.key_text()).or_default();
            let earlier = fold.closed.insert(start, result["value"].as_u64().expect("a number"));
            assert_eq!(earlier, None, "a result is told once: {record:?}");
        }
        folds
    }

    /// What the commands say.
    fn expected(&self) -> BTreeMap<String, Fold> {
        let mut folds: BTreeMap<String, (Fold, i64)> = BTreeMap::new();
        for record in self.records(&atomic_store::commands_topic(&self.store)) {
            let at_ms = record.json()["at_ms"].as_i64().expect("a time");
            let (fold, latest) = folds.entry(record.key_text()).or_insert((Fold::default(), i64::MIN));
            *latest = at_ms.max(*latest);
            let mut is_late = false;
            // Every window that there is.
            for start in (-100..1000).map(|nth| nth * HOP_MS) {
                if start <= at_ms && at_ms < start + SIZE_MS {
                    match start + SIZE_MS + GRACE_MS <= *latest {
                        true => is_late = true,
                        false => *fold.open.entry(start).or_default() += 1,
                    }
                }
            }
            fold.late += u64::from(is_late);
        }
        let close = |(key, (mut fold, latest)): (String, (Fold, i64))| {
            let still_open = fold
                .open
                .iter()
                .filter(|(start, _)| *start + SIZE_MS + GRACE_MS > latest);
            let still_open: BTreeMap<i64, u64> = still_open.map(|(start, value)| (*start, *value)).collect();
            fold.closed = std::mem::replace(&mut fold.open, still_open);
            fold.closed.retain(|start, _| !fold.open.contains_key(start));
            (key, fold)
        };
        folds.into_iter().map(close).collect()
    }
}

async fn hopping_windows_count_what_the_oracle_counts_though_owners_are_killed(engine: Engine) {
    let bench = Bench::new(engine).await;
    let windows = Windows::hopping(
        Duration::from_millis(SIZE_MS as u64),
        Duration::from_millis(HOP_MS as u64),
    )
    .grace(Duration::from_millis(GRACE_MS as u64));
    // Nothing is closed because nothing comes.
    let owner = |stopping: &CancellationToken| bench.owner(windows, Duration::from_secs(3600), stopping);
    let stopping = CancellationToken::new();
    let mut owners = vec![owner(&stopping), owner(&stopping)];
    let mut random = StdRng::seed_from_u64(11);
    for round in 0..4 {
        let commands = (0..COMMANDS / 4).map(|number| {
            let time = (round * COMMANDS / 4 + number) as i64 * 100;
            // Most are a little out of order, and some come far too late.
            let behind = match random.random_range(0..50) {
                0 => random.random_range(0..120_000),
                _ => random.random_range(0..20_000),
            };
            (random.random_range(0..KEYS), time - behind)
        });
        bench.submit(commands.collect::<Vec<_>>()).await;
        if round < 3 {
            let killed = owners.remove(0);
            killed.abort();
            // It has nothing to say: it was cancelled.
            let _ = killed.await;
            owners.push(owner(&stopping));
        }
    }
    let expected = bench.expected();
    wait_for("all is counted", DEADLINE, || bench.written() == expected).await;
    stopping.cancel();
    for owner in owners {
        owner.await.expect("no panic");
    }
    assert_eq!(bench.written(), expected);
    let late: u64 = expected.values().map(|fold| fold.late).sum();
    let closed: usize = expected.values().map(|fold| fold.closed.len()).sum();
    assert!(late > 20 && closed > 100, "{late} late, {closed} closed");
    bench.log.close().await;
}

async fn windows_are_told_once_when_nothing_more_comes(engine: Engine) {
    let bench = Bench::new(engine).await;
    let stopping = CancellationToken::new();
    let windows = Windows::tumbling(Duration::from_millis(SIZE_MS as u64));
    let owner = bench.owner(windows, Duration::from_millis(500), &stopping);
    let times = |start: i64| (0..50).map(move |number| (number % KEYS, start + number as i64));
    bench.submit(times(0).chain(times(5 * SIZE_MS))).await;
    let told = || {
        bench
            .written()
            .values()
            .map(|fold| fold.closed.values().sum::<u64>())
            .sum::<u64>()
    };
    wait_for("all are told", DEADLINE, || told() == 100).await;
    // Each of these windows is closed by now.
    bench.submit(times(0)).await;
    let late = || bench.written().values().map(|fold| fold.late).sum::<u64>();
    wait_for("all are late", DEADLINE, || late() == 50).await;
    stopping.cancel();
    owner.await.expect("no panic");
    assert_eq!((told(), late()), (100, 50));
    assert!(bench.written().values().all(|fold| fold.open.is_empty()));
    bench.log.close().await;
}
