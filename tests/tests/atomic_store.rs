//! The atomic store on real logs: each command counts once, whatever owners, writers and transactions go through.
//!
//! The oracle folds the commands topic itself and compares that with the states topic and the events: it asks nothing of the
//! store.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{Batch, Log, ProducerRecord, ProducerSettings, StartAt, TopicSpec};
use barnabas::patterns::Error;
use barnabas::patterns::atomic_store::{self, Aggregate, AtomicStore, AtomicStoreSettings, Derived, Submitter};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const PARTITIONS: i32 = 8;
const RETENTION: Duration = Duration::from_secs(3600);

/// Whatever does not happen within it does not happen.
const DEADLINE: Duration = Duration::from_secs(120);

/// A request that is complete when all its parts are in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Request {
    total: u32,
    parts: BTreeSet<u32>,
    /// Every command that was applied, repeated ones too: it shows what was applied twice or not at all.
    applied: u64,
    #[serde(default)]
    completed: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Part {
    index: u32,
    total: u32,
}

/// One completion event for each request. With `abort_every` a derived record does not fit into its topic each time that many
/// keys were derived, so that the transaction with it is aborted by the log.
#[derive(Debug)]
struct Requests {
    completions: Arc<str>,
    abort_every: Option<u64>,
    derived: AtomicU64,
    aborted: Arc<AtomicU64>,
}

impl Aggregate for Requests {
    type State = Request;
    type Command = Part;

    fn apply(&self, _: &str, state: &mut Option<Request>, part: Part) {
        apply(state.get_or_insert_default(), part);
    }

    fn derive(&self, key: &str, state: &mut Request, _: i64) -> Derived {
        let mut derived = Derived::default();
        if !state.completed && state.parts.len() == state.total as usize {
            state.completed = true;
            let event = ProducerRecord::to(self.completions.clone())
                .key(key.to_owned())
                .value("complete");
            derived.events.push(event);
        }
        let count = self.derived.fetch_add(1, Ordering::Relaxed) + 1;
        if self.abort_every.is_some_and(|every| count.is_multiple_of(every)) {
            self.aborted.fetch_add(1, Ordering::Relaxed);
            let too_large = vec![b'x'; 2 * TopicSpec::DEFAULT_MAX_MESSAGE_BYTES];
            derived.events.push(
                ProducerRecord::to(self.completions.clone())
                    .key("too large")
                    .value(too_large),
            );
        }
        derived
    }
}

fn apply(state: &mut Request, part: Part) {
    state.total = part.total;
    state.parts.insert(part.index);
    state.applied += 1;
}

/// A store's topics on a log, under names of their own, so that all tests share a log.
struct Bench {
    log: Log,
    store: String,
    completions: String,
    aborted: Arc<AtomicU64>,
}

impl Bench {
    async fn new(log: Log, name: &str) -> Self {
        let store = format!("{name}-{}", rand::rng().random::<u32>());
        let completions = format!("{store}.completions");
        let mut wanted = atomic_store::topics(&store, PARTITIONS, RETENTION).to_vec();
        wanted.push(TopicSpec::new(&completions, 3));
        let plan = log.plan_topics(&wanted).await.expect("a plan");
        log.apply_topics(&plan).await.expect("topics");
        Self {
            log,
            store,
            completions,
            aborted: Arc::default(),
        }
    }

    async fn submitter(&self) -> Submitter {
        let producer = self
            .log
            .producer(ProducerSettings::default())
            .await
            .expect("a producer");
        Submitter::new(&self.store, producer)
    }

    fn owner(&self, window_commands: usize, abort_every: Option<u64>) -> Owner {
        let requests = Requests {
            completions: self.completions.as_str().into(),
            abort_every,
            derived: AtomicU64::new(0),
            aborted: self.aborted.clone(),
        };
        let settings = AtomicStoreSettings {
            window_commands,
            ..AtomicStoreSettings::new(&self.store)
        };
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

    /// Every record that stands on a topic now.
    async fn read_all(&self, topic: &str, partitions: i32) -> Vec<(String, Option<Vec<u8>>)> {
        let (mut records, mut ended) = (Vec::new(), BTreeSet::new());
        self.read(topic, partitions, |batch| {
            records.extend(batch.records.iter().filter_map(|record| {
                let key = String::from_utf8(record.key.as_ref()?.to_vec()).ok()?;
                Some((key, record.value.as_ref().map(|value| value.to_vec())))
            }));
            if batch.caught_up {
                ended.insert(batch.partition.partition);
            }
            ended.len() == partitions as usize
        })
        .await;
        records
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

    /// Compares what the store has written with what the commands say.
    async fn check(&self, requests: usize, parts: u32) {
        let mut expected: BTreeMap<String, Request> = BTreeMap::new();
        for (key, value) in self.read_all(&format!("{}.commands", self.store), PARTITIONS).await {
            let command = value.and_then(|value| serde_json::from_slice(&value).ok());
            if let Some(part) = command {
                apply(expected.entry(key).or_default(), part);
            }
        }
        for request in expected.values_mut() {
            request.completed = request.parts.len() == request.total as usize;
        }
        let mut states: BTreeMap<String, Request> = BTreeMap::new();
        for (key, value) in self.read_all(&self.store, PARTITIONS).await {
            let state = serde_json::from_slice(&value.expect("a state")).expect("JSON");
            states.insert(key, state);
        }
        assert_eq!(states, expected, "the states are the fold of the commands");
        assert_eq!(states.len(), requests);
        assert!(states.values().all(|request| request.parts.len() == parts as usize));
        let mut completions: HashMap<String, usize> = HashMap::new();
        for (key, _) in self.read_all(&self.completions, 3).await {
            *completions.entry(key).or_default() += 1;
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

/// Submits every part of every request once, and every tenth twice, in any order, shared among writers.
async fn submit_all(bench: &Bench, writers: usize, requests: usize, parts: u32, seed: u64) {
    let mut all: Vec<(usize, u32)> = (0..requests)
        .flat_map(|request| (0..parts).map(move |index| (request, index)))
        .collect();
    let repeated: Vec<_> = all
        .iter()
        .copied()
        .filter(|(request, index)| (request + *index as usize).is_multiple_of(10))
        .collect();
    all.extend(repeated);
    all.shuffle(&mut StdRng::seed_from_u64(seed));
    let mut running = Vec::new();
    for share in all.chunks(all.len().div_ceil(writers)) {
        let (submitter, share) = (bench.submitter().await, share.to_vec());
        running.push(tokio::spawn(async move {
            // Many in flight at a time, as many importers would have.
            for some in share.chunks(64) {
                let submitted = some.iter().map(|(request, index)| {
                    let submitter = submitter.clone();
                    let (key, part) = (
                        format!("request-{request}"),
                        Part {
                            index: *index,
                            total: parts,
                        },
                    );
                    tokio::spawn(async move { submitter.submit(&key, &part).await })
                });
                for submitted in submitted.collect::<Vec<_>>() {
                    submitted.await.expect("no panic").expect("submitted");
                }
            }
        }));
    }
    for writer in running {
        writer.await.expect("no panic");
    }
}

async fn every_request_completes_once(log: Log) {
    let bench = Bench::new(log, "requests").await;
    let owners = [bench.owner(500, None), bench.owner(500, None), bench.owner(500, None)];
    submit_all(&bench, 6, 100, 200, 1).await;
    bench.completed(100).await;
    for owner in owners {
        owner.stop().await;
    }
    bench.check(100, 200).await;
}

async fn killed_owners_are_replaced_and_nothing_counts_twice(log: Log) {
    let bench = Bench::new(log, "killed").await;
    let mut owners = vec![bench.owner(20, None), bench.owner(20, None), bench.owner(20, None)];
    let submitting = submit_all(&bench, 6, 60, 100, 2);
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

async fn an_aborted_transaction_leaves_no_trace_in_memory(log: Log) {
    let bench = Bench::new(log, "aborted").await;
    let owners = [bench.owner(4, Some(23)), bench.owner(4, Some(23))];
    submit_all(&bench, 3, 20, 50, 3).await;
    bench.completed(20).await;
    for owner in owners {
        owner.stop().await;
    }
    assert!(bench.aborted.load(Ordering::Relaxed) >= 10, "transactions were aborted");
    bench.check(20, 50).await;
}

async fn owners_come_and_go_without_a_doubled_or_missing_command(log: Log) {
    let bench = Bench::new(log, "scaled").await;
    let mut owners = vec![bench.owner(20, None)];
    let submitting = submit_all(&bench, 4, 40, 100, 4);
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

async fn a_command_that_cannot_be_read_stops_nobody(log: Log) {
    let bench = Bench::new(log, "unreadable").await;
    let producer = bench
        .log
        .producer(ProducerSettings::default())
        .await
        .expect("a producer");
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
            producer.append(record).await.expect("appended");
        }
    }
    let owner = bench.owner(500, None);
    submit_all(&bench, 1, 16, 2, 5).await;
    bench.completed(16).await;
    owner.stop().await;
    bench.check(16, 2).await;
}

async fn topics_of_different_partition_counts_are_refused(log: Log) {
    let store = format!("uneven-{}", rand::rng().random::<u32>());
    let [commands, mut states] = atomic_store::topics(&store, 4, RETENTION);
    states.partitions = 3;
    let plan = log.plan_topics(&[commands, states]).await.expect("a plan");
    log.apply_topics(&plan).await.expect("topics");
    let requests = Requests {
        completions: "none".into(),
        abort_every: None,
        derived: AtomicU64::new(0),
        aborted: Arc::default(),
    };
    let run = AtomicStore::run(
        log,
        AtomicStoreSettings::new(&store),
        requests,
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

/// Each case on each engine.
macro_rules! on_both_engines {
    ($($case:ident),* $(,)?) => {
        mod embedded {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    let folder = tempfile::tempdir().expect("a folder");
                    let settings = super::EmbeddedSettings::new(folder.path());
                    let log = super::Log::open_embedded(settings).await.expect("a log");
                    super::$case(log.clone()).await;
                    log.close().await;
                }
            )*
        }
        mod kafka {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    let settings = super::KafkaSettings::new(barnabas_tests::kafka::brokers());
                    let log = super::Log::connect_kafka(settings).await.expect("a log");
                    super::$case(log.clone()).await;
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
    a_command_that_cannot_be_read_stops_nobody,
    topics_of_different_partition_counts_are_refused,
);
