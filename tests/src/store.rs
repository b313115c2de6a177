//! An atomic store of requests, each complete when all its parts are in, for tests that run its owners here and in processes of their
//! own (`store-worker`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use barnabas::log::{Log, ProducerRecord, ProducerSettings, TopicSpec};
use barnabas::patterns::atomic_store::{Aggregate, AtomicStoreSettings, Derived, Submitter};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::oracle::OracleRecord;

/// What a `store-worker` is told, as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreWorkerSettings {
    /// None: the embedded log in `data_dir`.
    pub brokers: Option<String>,
    /// The folder of an embedded log.
    pub data_dir: PathBuf,
    /// The store, whose topics exist.
    pub store: String,
    /// The topic of completions.
    pub completions: String,
    /// Owners that the process runs.
    pub owners: usize,
    /// Most commands of a window.
    pub window_commands: usize,
    /// What it submits when it starts, if anything.
    pub submit: Option<Load>,
}

/// Every part of every request once, every tenth twice, in any order.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Load {
    /// Who share the work.
    pub writers: usize,
    /// The requests.
    pub requests: usize,
    /// Parts of each.
    pub parts: u32,
    /// Decides the order.
    pub seed: u64,
}

/// A request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// How many parts it has.
    pub total: u32,
    /// Those that are in.
    pub parts: BTreeSet<u32>,
    /// Every command that was applied, repeated ones too: it shows what was applied twice or not at all.
    pub applied: u64,
    /// Whether its completion was told.
    #[serde(default)]
    pub completed: bool,
}

/// What is submitted for a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Part {
    /// Which part is in; `None`: the request begins.
    pub index: Option<u32>,
    /// How many there are.
    pub total: u32,
}

impl Request {
    /// What a command does to it. A part that the request does not have is none.
    pub fn apply(&mut self, part: Part) {
        self.total = part.total;
        self.parts.extend(part.index.filter(|index| *index < part.total));
        self.applied += 1;
    }

    /// Whether all its parts are in.
    pub fn is_complete(&self) -> bool {
        self.parts.len() == self.total as usize
    }
}

/// The states that commands make, by key. Records that are no commands count for nothing.
pub fn folded(commands: Vec<OracleRecord>) -> BTreeMap<String, Request> {
    let mut requests: BTreeMap<String, Request> = BTreeMap::new();
    for record in commands {
        if let Ok(part) = serde_json::from_slice(&record.value)
            && let Ok(key) = String::from_utf8(record.key)
            && !key.is_empty()
        {
            requests.entry(key).or_default().apply(part);
        }
    }
    for request in requests.values_mut() {
        request.completed = request.is_complete();
    }
    requests
}

/// One completion event for each request. With `abort_every` a derived record does not fit into its topic each time that many
/// keys were derived, so that the transaction with it is aborted by the log.
#[derive(Debug)]
pub struct Requests {
    completions: Arc<str>,
    abort_every: Option<u64>,
    derived: AtomicU64,
    aborted: Arc<AtomicU64>,
}

impl Requests {
    /// Completions go to a topic.
    pub fn new(completions: &str) -> Self {
        Self {
            completions: completions.into(),
            abort_every: None,
            derived: AtomicU64::new(0),
            aborted: Arc::default(),
        }
    }

    /// Makes the log abort transactions, and counts them.
    #[must_use]
    pub fn aborting(mut self, every: Option<u64>, aborted: Arc<AtomicU64>) -> Self {
        (self.abort_every, self.aborted) = (every, aborted);
        self
    }
}

impl Aggregate for Requests {
    type State = Request;
    type Command = Part;

    fn apply(&self, _: &str, state: &mut Option<Request>, part: Part) {
        state.get_or_insert_default().apply(part);
    }

    fn derive(&self, key: &str, state: &mut Request, _: i64) -> Derived {
        let mut derived = Derived::default();
        if !state.completed && state.is_complete() {
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

/// Settings of an owner. Others have what it owned six seconds after it was killed, the soonest that Kafka allows.
pub fn owner_settings(store: &str, window_commands: usize) -> AtomicStoreSettings {
    AtomicStoreSettings {
        window_commands,
        session_timeout: Duration::from_secs(6),
        ..AtomicStoreSettings::new(store)
    }
}

/// A submitter.
///
/// # Panics
/// If there is no producer to be had.
pub async fn submitter(log: &Log, store: &str) -> Submitter {
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    Submitter::new(store, producer)
}

/// Submits all of a load.
///
/// # Panics
/// If the log refuses.
pub async fn submit_all(log: &Log, store: &str, load: Load) {
    let mut all: Vec<(usize, u32)> = (0..load.requests)
        .flat_map(|request| (0..load.parts).map(move |index| (request, index)))
        .collect();
    let is_repeated = |(request, index): &(usize, u32)| (request + *index as usize).is_multiple_of(10);
    let repeated: Vec<_> = all.iter().copied().filter(is_repeated).collect();
    all.extend(repeated);
    all.shuffle(&mut StdRng::seed_from_u64(load.seed));
    let mut running = Vec::new();
    for share in all.chunks(all.len().div_ceil(load.writers)) {
        let (submitter, share) = (submitter(log, store).await, share.to_vec());
        running.push(tokio::spawn(async move {
            // Many in flight at a time, as many importers would have.
            for some in share.chunks(64) {
                let submitted = some.iter().map(|(request, index)| {
                    let (submitter, key) = (submitter.clone(), format!("request-{request}"));
                    let part = Part {
                        index: Some(*index),
                        total: load.parts,
                    };
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
