//! Windows on real logs: each command counts in every window of its time or as late, whatever order the commands have and whatever
//! becomes of the owners. The oracle folds the commands topic itself, by looking at every window there is.

use std::collections::BTreeMap;
use std::time::Duration;

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Log, ProducerRecord, TopicSpec};
use barnabas::patterns::atomic_store::{self, AtomicStore, AtomicStoreSettings};
use barnabas::patterns::window::Windows;
use barnabas_tests::conformance::append_all;
use barnabas_tests::on_both_logs;
use barnabas_tests::oracle::{OracleRecord, read_embedded, read_kafka};
use barnabas_tests::site::{Engine, wait_for};
use barnabas_tests::windows::{self, Fold, SIZE_MS, command, counts, hopping, random_commands};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

on_both_logs!(
    hopping_windows_count_what_the_oracle_counts_though_owners_are_killed,
    windows_are_told_once_when_nothing_more_comes,
);

const PARTITIONS: i32 = 4;
const COMMANDS: i64 = 4000;

const DEADLINE: Duration = Duration::from_secs(120);

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
        let settings = AtomicStoreSettings {
            window_commands: 20,
            session_timeout: Duration::from_secs(6),
            ..AtomicStoreSettings::new(&self.store)
        };
        let counts = counts(windows, idle, &self.results);
        let run = AtomicStore::run(self.log.clone(), settings, counts, stopping.clone());
        tokio::spawn(async move { run.await.expect("a clean end") })
    }

    fn records(&self, topic: &str) -> Vec<OracleRecord> {
        match &self.brokers {
            Some(brokers) => read_kafka(brokers, topic),
            None => read_embedded(self.folder.path(), topic),
        }
    }

    fn written(&self) -> BTreeMap<String, Fold> {
        windows::written(&self.records(&self.store), &self.records(&self.results))
    }

    fn expected(&self) -> BTreeMap<String, Fold> {
        windows::expected(&self.records(&atomic_store::commands_topic(&self.store)))
    }
}

async fn hopping_windows_count_what_the_oracle_counts_though_owners_are_killed(engine: Engine) {
    let bench = Bench::new(engine).await;
    // Nothing is closed because nothing comes.
    let owner = |stopping: &CancellationToken| bench.owner(hopping(), Duration::from_secs(3600), stopping);
    let stopping = CancellationToken::new();
    let mut owners = vec![owner(&stopping), owner(&stopping)];
    let mut random = StdRng::seed_from_u64(11);
    for round in 0..4 {
        let numbers = round * COMMANDS / 4..(round + 1) * COMMANDS / 4;
        append_all(&bench.log, random_commands(&mut random, &bench.store, numbers)).await;
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
    let commands = |start_ms: i64| -> Vec<ProducerRecord> {
        (0..50)
            .map(|number| command(&bench.store, number, start_ms + number as i64))
            .collect()
    };
    append_all(&bench.log, [commands(0), commands(5 * SIZE_MS)].concat()).await;
    let told = || {
        bench
            .written()
            .values()
            .map(|fold| fold.closed.values().sum::<u64>())
            .sum::<u64>()
    };
    wait_for("all are told", DEADLINE, || told() == 100).await;
    // Each of these windows is closed by now.
    append_all(&bench.log, commands(0)).await;
    let late = || bench.written().values().map(|fold| fold.late).sum::<u64>();
    wait_for("all are late", DEADLINE, || late() == 50).await;
    stopping.cancel();
    owner.await.expect("no panic");
    assert_eq!((told(), late()), (100, 50));
    assert!(bench.written().values().all(|fold| fold.open.is_empty()));
    bench.log.close().await;
}
