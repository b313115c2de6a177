//! The atomic store on real logs: each command counts once, whatever owners, writers and transactions go through.
//!
//! The oracle folds the commands topic itself and compares that with the states topic and the events: it asks nothing of the
//! store.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Batch, Log, ProducerRecord, ProducerSettings, StartAt, TopicSpec};
use barnabas::patterns::Error;
use barnabas::patterns::atomic_store::{self, AtomicStore, AtomicStoreSettings};
use barnabas::patterns::dead_letter::header;
use barnabas_tests::oracle::{OracleRecord, read_embedded, read_kafka};
use barnabas_tests::process::{Process, program};
use barnabas_tests::site::wait_for;
use barnabas_tests::store::{Load, Part, Request, Requests, StoreWorkerSettings, folded, owner_settings, submit_all};
use rand::RngExt;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const PARTITIONS: i32 = 8;
const RETENTION: Duration = Duration::from_secs(3600);

/// Whatever does not happen within it does not happen.
const DEADLINE: Duration = Duration::from_secs(120);

/// A log, and how the oracle reads it.
struct Ground {
    log: Log,
    brokers: Option<String>,
    folder: TempDir,
}

impl Ground {
    async fn embedded() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let settings = EmbeddedSettings::new(folder.path());
        Self {
            log: Log::open_embedded(settings).await.expect("a log"),
            brokers: None,
            folder,
        }
    }

    async fn kafka() -> Self {
        let brokers = barnabas_tests::kafka::brokers();
        Self {
            log: Log::connect_kafka(KafkaSettings::new(&brokers)).await.expect("a log"),
            brokers: Some(brokers),
            folder: tempfile::tempdir().expect("a folder"),
        }
    }
}

/// A store's topics on a log, under names of their own, so that all tests share a log.
struct Bench {
    ground: Ground,
    log: Log,
    store: String,
    completions: String,
    aborted: Arc<AtomicU64>,
}

impl Bench {
    async fn new(ground: Ground, name: &str) -> Self {
        let log = ground.log.clone();
        let store = format!("{name}-{}", rand::rng().random::<u32>());
        let completions = format!("{store}.completions");
        let mut wanted = atomic_store::topics(&store, PARTITIONS, RETENTION).to_vec();
        wanted.push(TopicSpec::new(&completions, 3));
        let plan = log.plan_topics(&wanted).await.expect("a plan");
        log.apply_topics(&plan).await.expect("topics");
        Self {
            ground,
            log,
            store,
            completions,
            aborted: Arc::default(),
        }
    }

    fn owner(&self, window_commands: usize, abort_every: Option<u64>) -> Owner {
        let requests = Requests::new(&self.completions).aborting(abort_every, self.aborted.clone());
        let settings = owner_settings(&self.store, window_commands);
        let stopping = CancellationToken::new();
        let run = AtomicStore::run(self.log.clone(), settings, requests, stopping.clone());
        Owner {
            stopping,
            run: tokio::spawn(run),
        }
    }

    /// Calls `each` with every batch of a topic, those to come too, until it says that it has seen enough.
    async fn read(&self, topic: &str, partitions: i32, mut each: impl FnMut(&Batch) -> bool) {
        let mut reader = self.log.reader(topic).await.expect("a reader");
        for partition in 0..partitions {
            reader.assign(partition, StartAt::Start).await.expect("assigned");
        }
        within(async {
            loop {
                let batch = reader.next().await.expect("a batch");
                if each(&batch) {
                    return;
                }
            }
        })
        .await;
    }

    /// What stands on a topic now, as the oracle reads it.
    fn records(&self, topic: &str) -> Vec<OracleRecord> {
        match &self.ground.brokers {
            Some(brokers) => read_kafka(brokers, topic),
            None => read_embedded(self.ground.folder.path(), topic),
        }
    }

    /// Waits until so many requests are complete.
    async fn completed(&self, requests: usize) {
        let mut seen = 0;
        self.read(&self.completions, 3, |batch| {
            seen += batch.records.len();
            seen >= requests
        })
        .await;
    }

    /// Waits until so many commands are in the states.
    async fn applied(&self, commands: u64) {
        let mut applied: HashMap<Vec<u8>, u64> = HashMap::new();
        self.read(&self.store, PARTITIONS, |batch| {
            for record in &batch.records {
                let (key, value) = (
                    record.key.as_ref().expect("a key"),
                    record.value.as_ref().expect("a state"),
                );
                let state: Request = serde_json::from_slice(value).expect("JSON");
                applied.insert(key.to_vec(), state.applied);
            }
            applied.values().sum::<u64>() >= commands
        })
        .await;
    }

    async fn submit_all(&self, writers: usize, requests: usize, parts: u32, seed: u64) {
        let load = Load {
            writers,
            requests,
            parts,
            seed,
        };
        submit_all(&self.log, &self.store, load).await;
    }

    /// Compares what the store has written with what the commands say, and returns the states.
    async fn fold(&self) -> BTreeMap<String, Request> {
        let expected = folded(self.records(&atomic_store::commands_topic(&self.store)));
        let mut states: BTreeMap<String, Request> = BTreeMap::new();
        for record in self.records(&self.store) {
            states.insert(
                record.key_text(),
                serde_json::from_value(record.json()).expect("a state"),
            );
        }
        assert_eq!(states, expected, "the states are the fold of the commands");
        let read = within(atomic_store::states::<Request>(&self.log, &self.store)).await;
        assert_eq!(read.expect("states"), states, "and are read as they stand");
        states
    }

    /// Checks that all requests are complete, and that each was told once.
    async fn check(&self, requests: usize, parts: u32) {
        let states = self.fold().await;
        assert_eq!(states.len(), requests);
        assert!(states.values().all(|request| request.parts.len() == parts as usize));
        self.check_completions(requests);
    }

    fn check_completions(&self, requests: usize) {
        let mut completions: HashMap<String, usize> = HashMap::new();
        for record in self.records(&self.completions) {
            *completions.entry(record.key_text()).or_default() += 1;
        }
        assert_eq!(completions.len(), requests);
        assert!(
            completions.values().all(|count| *count == 1),
            "each completes once: {completions:?}"
        );
    }
}

struct Owner {
    stopping: CancellationToken,
    run: JoinHandle<Result<(), Error>>,
}

impl Owner {
    async fn stop(self) {
        self.stopping.cancel();
        within(self.run).await.expect("no panic").expect("a clean end");
    }

    /// Ends it wherever it is, as killing its process would.
    async fn kill(self) {
        self.run.abort();
        // It has nothing to say: it was cancelled.
        let _ = self.run.await;
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .expect("it happens in time")
}

async fn every_request_completes_once(ground: Ground) {
    let bench = Bench::new(ground, "requests").await;
    let owners = [bench.owner(500, None), bench.owner(500, None), bench.owner(500, None)];
    bench.submit_all(6, 100, 200, 1).await;
    bench.completed(100).await;
    for owner in owners {
        owner.stop().await;
    }
    bench.check(100, 200).await;
}

async fn killed_owners_are_replaced_and_nothing_counts_twice(ground: Ground) {
    let bench = Bench::new(ground, "killed").await;
    let mut owners = vec![bench.owner(20, None), bench.owner(20, None), bench.owner(20, None)];
    let submitting = bench.submit_all(6, 60, 100, 2);
    let killing = async {
        for round in 1..=6 {
            bench.applied(round * 1000).await;
            owners.remove(0).kill().await;
            owners.push(bench.owner(20, None));
        }
    };
    tokio::join!(submitting, killing);
    bench.completed(60).await;
    for owner in owners {
        owner.stop().await;
    }
    bench.check(60, 100).await;
}

async fn an_aborted_transaction_leaves_no_trace_in_memory(ground: Ground) {
    let bench = Bench::new(ground, "aborted").await;
    // Each command is a transaction, and each fifth fails.
    let owners = [bench.owner(1, Some(5)), bench.owner(1, Some(5))];
    bench.submit_all(3, 20, 50, 3).await;
    bench.completed(20).await;
    for owner in owners {
        owner.stop().await;
    }
    let aborted = bench.aborted.load(Ordering::Relaxed);
    assert!(aborted >= 1100 / 5, "{aborted} transactions were aborted");
    bench.check(20, 50).await;
}

async fn owners_come_and_go_without_a_doubled_or_missing_command(ground: Ground) {
    let bench = Bench::new(ground, "scaled").await;
    let mut owners = vec![bench.owner(20, None)];
    let submitting = bench.submit_all(4, 40, 100, 4);
    let scaling = async {
        bench.applied(500).await;
        owners.extend([bench.owner(20, None), bench.owner(20, None)]);
        bench.applied(2000).await;
        owners.remove(0).stop().await;
        bench.applied(3500).await;
        owners.remove(0).stop().await;
    };
    tokio::join!(submitting, scaling);
    bench.completed(40).await;
    for owner in owners {
        owner.stop().await;
    }
    bench.check(40, 100).await;
}

async fn a_command_that_cannot_be_read_becomes_a_dead_letter_and_stops_nobody(ground: Ground) {
    let bench = Bench::new(ground, "unreadable").await;
    let producer = bench
        .log
        .producer(ProducerSettings::default())
        .await
        .expect("a producer");
    let mut written = Vec::new();
    for partition in 0..PARTITIONS {
        let to = || ProducerRecord::to(atomic_store::commands_topic(&bench.store)).partition(partition);
        let unreadable = [
            to().key("request-0").value("{"),
            to().key("request-0").value(r#"{"another":"command"}"#),
            to().key("request-0"),
            to().value(r#"{"index":0,"total":1}"#),
            to().key(vec![0xff]).value(r#"{"index":0,"total":1}"#),
        ];
        for record in unreadable {
            let value = record.value.clone().unwrap_or_default();
            let appended = producer.append(record).await.expect("appended");
            written.push((partition, appended.offset.to_string(), value.to_vec()));
        }
    }
    // Transactions that are aborted have dead letters in them too.
    bench.submit_all(1, 16, 2, 5).await;
    let owner = bench.owner(8, Some(7));
    bench.completed(16).await;
    owner.stop().await;
    assert!(bench.aborted.load(Ordering::Relaxed) > 0);
    bench.check(16, 2).await;
    let letters = bench.records(&atomic_store::dead_letters_topic(&bench.store));
    let found: Vec<_> = letters
        .iter()
        .map(|letter| {
            let offset = letter.header(header::ORIGIN_OFFSET).to_owned();
            (letter.partition, offset, letter.value.clone())
        })
        .collect();
    assert_eq!(found, written, "each is there once, in its partition and in order");
    for letter in &letters {
        assert_eq!(
            letter.header(header::ORIGIN_TOPIC),
            atomic_store::commands_topic(&bench.store)
        );
        assert_eq!(letter.header(header::GROUP), bench.store);
        assert_eq!(letter.header(header::ERROR_KIND), "non-retriable");
    }
    assert_eq!(letters[3].header(header::ERROR_MESSAGE), "it has no key");
}

async fn requests_of_any_size_end_once_and_late_commands_count_nothing(ground: Ground) {
    const SIZES: [u32; 3] = [0, 1, 10_000];
    let bench = Bench::new(ground, "sizes").await;
    let producer = bench
        .log
        .producer(ProducerSettings::default())
        .await
        .expect("a producer");
    let submit = async |total: u32, indices: &mut dyn Iterator<Item = Option<u32>>| {
        let mut deliveries = Vec::new();
        for index in indices {
            let part = Part { index, total };
            let record = atomic_store::command_record(&bench.store, &format!("of-{total}"), &part).expect("JSON");
            deliveries.push(producer.send(record).await.expect("sent"));
        }
        for delivery in deliveries {
            delivery.await.expect("appended");
        }
    };
    let owner = bench.owner(500, None);
    for total in SIZES {
        submit(total, &mut std::iter::once(None).chain((0..total).map(Some))).await;
    }
    bench.completed(SIZES.len()).await;
    for total in SIZES {
        submit(total, &mut [None, Some(0), Some(total), Some(u32::MAX)].into_iter()).await;
    }
    bench.applied(10_001 + 3 + 3 * 4).await;
    owner.stop().await;
    let states = bench.fold().await;
    let parts: Vec<_> = states
        .values()
        .map(|request| (request.total, request.parts.len()))
        .collect();
    assert_eq!(parts, [(0, 0), (1, 1), (10_000, 10_000)]);
    bench.check_completions(SIZES.len());
}

async fn topics_of_different_partition_counts_are_refused(ground: Ground) {
    let store = format!("uneven-{}", rand::rng().random::<u32>());
    let mut specs = atomic_store::topics(&store, 4, RETENTION);
    let states = specs.iter_mut().find(|spec| spec.name == store);
    states.expect("the topic of states").partitions = 3;
    let plan = ground.log.plan_topics(&specs).await.expect("a plan");
    ground.log.apply_topics(&plan).await.expect("topics");
    let run = AtomicStore::run(
        ground.log.clone(),
        AtomicStoreSettings::new(&store),
        Requests::new("none"),
        CancellationToken::new(),
    );
    let error = within(run).await.expect_err("refused");
    assert!(
        matches!(
            &error,
            Error::PartitionCounts {
                left_partitions: 4,
                right_partitions: 3,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains(&store), "{error}");
}

impl Bench {
    /// A process with owners of the store, which submits what it is told.
    fn worker(&self, name: &str, owners: usize, submit: Option<Load>) -> Process {
        let settings = StoreWorkerSettings {
            brokers: self.ground.brokers.clone(),
            data_dir: self.ground.folder.path().to_owned(),
            store: self.store.clone(),
            completions: self.completions.clone(),
            owners,
            window_commands: 20,
            submit,
        };
        let argument = serde_json::to_string(&settings).expect("JSON");
        let output = self.ground.folder.path().join(format!("{name}.output"));
        Process::start(&program("store-worker"), &[argument], &[], &output)
    }

    fn completions(&self) -> usize {
        self.records(&self.completions).len()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn owners_in_processes_of_their_own_on_kafka_are_killed_and_each_request_completes_once() {
    let bench = Bench::new(Ground::kafka().await, "processes").await;
    let mut owners: Vec<Process> = (0..3).map(|n| bench.worker(&format!("owner-{n}"), 1, None)).collect();
    let submitting = bench.submit_all(6, 100, 200, 6);
    let killing = async {
        for round in 1..=3 {
            bench.applied(round * 5000).await;
            owners.remove(0).kill();
            owners.push(bench.worker(&format!("successor-{round}"), 1, None));
        }
    };
    tokio::join!(submitting, killing);
    bench.completed(100).await;
    bench.applied(22_000).await;
    bench.check(100, 200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_with_owners_and_writers_on_the_embedded_log_is_killed_and_each_request_completes_once() {
    let ground = Ground::embedded().await;
    let bench = Bench::new(ground, "process").await;
    // The log is one process's: from now on it is the worker's.
    bench.log.close().await;
    let load = Load {
        writers: 6,
        requests: 100,
        parts: 200,
        seed: 7,
    };
    for completions in [1, 25, 60] {
        // Each of them submits everything again.
        let worker = bench.worker("worker", 3, Some(load));
        wait_for("completions", DEADLINE, || bench.completions() >= completions).await;
        worker.kill();
    }
    let worker = bench.worker("worker", 3, Some(load));
    wait_for("all is submitted", DEADLINE, || worker.output().contains("submitted")).await;
    let all_are_applied = || {
        let submitted = bench.records(&atomic_store::commands_topic(&bench.store)).len();
        let mut applied = HashMap::new();
        for record in bench.records(&bench.store) {
            applied.insert(record.key_text(), record.json()["applied"].as_u64().expect("a number"));
        }
        applied.values().sum::<u64>() == submitted as u64
    };
    wait_for("all is applied", DEADLINE, all_are_applied).await;
    worker.kill();
    let settings = EmbeddedSettings::new(bench.ground.folder.path());
    let log = Log::open_embedded(settings).await.expect("a log");
    let bench = Bench {
        log: log.clone(),
        ..bench
    };
    bench.check(100, 200).await;
    log.close().await;
}

/// Each case on each engine.
macro_rules! on_both_engines {
    ($($case:ident),* $(,)?) => {
        mod embedded {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    let ground = super::Ground::embedded().await;
                    let log = ground.log.clone();
                    super::$case(ground).await;
                    log.close().await;
                }
            )*
        }
        mod kafka {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    let ground = super::Ground::kafka().await;
                    let log = ground.log.clone();
                    super::$case(ground).await;
                    log.close().await;
                }
            )*
        }
    };
}

on_both_engines!(
    every_request_completes_once,
    killed_owners_are_replaced_and_nothing_counts_twice,
    an_aborted_transaction_leaves_no_trace_in_memory,
    owners_come_and_go_without_a_doubled_or_missing_command,
    a_command_that_cannot_be_read_becomes_a_dead_letter_and_stops_nobody,
    requests_of_any_size_end_once_and_late_commands_count_nothing,
    topics_of_different_partition_counts_are_refused,
);
