//! Aggregation on an atomic store: commands of a key are applied in order, each once, and what follows from them is said once.
//!
//! ```text
//! submit(key, command) ══ {store}.commands ══▶ the partition's owner: apply, derive
//!                                                 │ one transaction: states + derived events + consumed offset
//!                                                 ├══ {store} (compacted; the same partition) ══▶ projections, the next owner
//!                                                 ├══ {store}.commands.{store}.dlt: commands that cannot be read
//!                                                 └══ whatever topics the events name
//! ```
//!
//! Invariant: what an owner holds in memory is what the log says at the offset that its group has committed. Whatever stands
//! in between (a transaction that aborts, is fenced, or whose outcome is not known) is undone or restored from the log before
//! the next command is applied.
//!
//! A command that cannot be read (no key, not JSON, not of the aggregate's type), or makes the aggregate panic, becomes a dead letter with the headers of all of
//! them ([`super::dead_letter::header`]), in the transaction that consumes it: it must not hold up the commands of others.
//!
//! A state or an event that its topic refuses, such as one that is too large, holds up its partition, loudly, for there is
//! nobody else to write it: an aggregate must bound its state. So does a state that cannot be read, which the next command would overwrite.
//!
//! Memory of an owner is bounded by the open keys. An ended key ([`Aggregate::is_ended`]) leaves memory
//! [`AtomicStoreSettings::keep_ended`] after its last change, and any other key when the state topic's retention has passed
//! since its last change, for then the log forgets it too. Commands for a key that has left find no state.

mod states;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use self::states::{Bounds, States};
use super::dead_letter::{self, HEADER_ROOM, KEEP_DEAD_LETTERS, dead_letter_topic};
use super::owner::{self, OwnerSettings};
use super::scan::Scan;
use super::{Error, millis, now_ms};
use crate::log::{Appended, CleanupPolicy, Log, Producer, ProducerRecord, TopicPartition, TopicSpec};

/// What a store keeps, and what commands do to it. Both functions are pure: the same commands give the same state.
pub trait Aggregate: Send + Sync + 'static {
    /// The state of a key, kept as JSON.
    type State: Clone + PartialEq + Serialize + DeserializeOwned + Send + 'static;
    /// What is submitted for a key, as JSON.
    type Command: DeserializeOwned + Send + 'static;

    /// Applies a command to the state of its key, which is `None` before the first. Leaving `None` behind removes the key.
    fn apply(&self, key: &str, state: &mut Option<Self::State>, command: Self::Command);

    /// What follows from the state now. Called once for each window of commands that touched the key, however many they were;
    /// once the time comes that it asked for; and once when a new owner has restored the key. What it says is remembered by
    /// changing the state, which is written in the same transaction.
    fn derive(&self, key: &str, state: &mut Self::State, now_ms: i64) -> Derived;

    /// Whether nothing can change the key any more, so that memory may forget it. Default: never.
    fn is_ended(&self, _state: &Self::State) -> bool {
        false
    }
}

/// What follows from a state.
#[derive(Debug, Default)]
pub struct Derived {
    /// Records to append in the transaction that writes the state, in this order.
    pub events: Vec<ProducerRecord>,
    /// When to derive again even if no command comes, in milliseconds since the Unix epoch.
    pub again_at_ms: Option<i64>,
}

/// How a store runs.
#[derive(Clone, Debug)]
pub struct AtomicStoreSettings {
    /// The store's name: its state topic, the consumer group of its owners, and the stem of their transactional ids.
    pub store: String,
    /// Most commands applied in one transaction. Nothing waits for a window to fill; between two that are not full there is a
    /// pause as long as the first took, and of 20 ms at most. Default 500.
    pub window_commands: usize,
    /// How long an ended key stays in memory after its last change, so that a command submitted twice finds it. Default 10 min.
    pub keep_ended: Duration,
    /// After it the partitions of an owner that cannot be heard go to another. Default 10 s.
    pub session_timeout: Duration,
}

impl AtomicStoreSettings {
    /// The store `store`, everything else at its default.
    pub fn new(store: impl Into<String>) -> Self {
        Self {
            store: store.into(),
            window_commands: 500,
            keep_ended: Duration::from_secs(600),
            session_timeout: Duration::from_secs(10),
        }
    }
}

/// A store's owner in this process: it takes its share of the partitions among all owners of the store.
pub struct AtomicStore<A> {
    log: Log,
    store: String,
    aggregate: Arc<A>,
    bounds: Bounds,
}

impl<A: Aggregate> AtomicStore<A> {
    /// Owns partitions of the store until `stopping`, then finishes what is begun, commits, and lets go of them. Dropped
    /// before that, it stops as a killed process does: what is open is undone by the next owner.
    ///
    /// # Errors
    /// [`Error::PartitionCounts`] when the store's topics differ; [`Error::Log`] when they do not exist, when the group cannot be
    /// joined, or when the log has ended. Troubles of a transaction are not errors: they are undone and tried again.
    pub async fn run(
        log: Log,
        settings: AtomicStoreSettings,
        aggregate: A,
        stopping: CancellationToken,
    ) -> Result<(), Error> {
        let commands = commands_topic(&settings.store);
        let states = owner::topic_beside(&log, &commands, &settings.store).await?;
        owner::topic_beside(&log, &commands, &dead_letters_topic(&settings.store)).await?;
        let retention_ms = match states.cleanup {
            CleanupPolicy::Compact => None,
            CleanupPolicy::Delete | CleanupPolicy::CompactDelete => states.retention.map(millis),
        };
        let window_commands = settings.window_commands.max(1);
        let bounds = Bounds {
            window_commands,
            keep_ended_ms: millis(settings.keep_ended),
            retention_ms,
        };
        let owners = OwnerSettings {
            name: settings.store.clone(),
            commands,
            window_commands,
            session_timeout: settings.session_timeout,
        };
        let store = Self {
            log: log.clone(),
            store: settings.store,
            aggregate: Arc::new(aggregate),
            bounds,
        };
        owner::run(log, owners, store, stopping).await
    }
}

impl<A: Aggregate> owner::Store for AtomicStore<A> {
    type State = States<A>;

    async fn restore(&self, partition: i32, _: &str) -> Result<States<A>, Error> {
        let states = TopicPartition::new(self.store.as_str(), partition);
        let mut states = States::new(self.aggregate.clone(), self.bounds, states);
        owner::read_partition(&self.log, &self.store, partition, |record| {
            states.restore(record, now_ms());
        })
        .await?;
        states.restored()
    }
}

/// The topics of a store: commands, kept for `retention`; states, the last of each key kept for `retention`; dead letters, kept
/// for four weeks; and the two by which operators settle those. The partition count is fixed: another one would part keys from their
/// states.
pub fn topics(store: &str, partitions: i32, retention: Duration) -> [TopicSpec; 5] {
    let topic = |name, cleanup| TopicSpec {
        fixed_partitions: true,
        cleanup,
        retention: Some(retention),
        ..TopicSpec::new(name, partitions)
    };
    let commands = topic(commands_topic(store), CleanupPolicy::Delete);
    let states = topic(store.to_owned(), CleanupPolicy::CompactDelete);
    let dead_letters = TopicSpec {
        retention: Some(KEEP_DEAD_LETTERS),
        max_message_bytes: commands.max_message_bytes + HEADER_ROOM,
        ..topic(dead_letters_topic(store), CleanupPolicy::Delete)
    };
    let [control, marks] = dead_letter::settling(store, KEEP_DEAD_LETTERS);
    [commands, states, dead_letters, control, marks]
}

/// The topic on which commands for a store are submitted.
pub fn commands_topic(store: &str) -> String {
    format!("{store}.commands")
}

/// The topic of a store's commands that could not be read. Their partitions are those of the commands.
pub fn dead_letters_topic(store: &str) -> String {
    dead_letter_topic(&commands_topic(store), store)
}

/// The states of all keys as the log has them now, for any process. It reads the whole state topic; who wants to follow it reads the
/// topic itself.
///
/// # Errors
/// [`Error::Log`] when the topic cannot be read, [`Error::Decode`] when a state is not of type `S`.
pub async fn states<S: DeserializeOwned>(log: &Log, store: &str) -> Result<BTreeMap<String, S>, Error> {
    let mut states = BTreeMap::new();
    let mut scan = Scan::new(log, store).await?;
    while let Some(batch) = scan.next().await? {
        for record in batch.records {
            let Some(key) = record.key.and_then(|key| String::from_utf8(key.to_vec()).ok()) else {
                continue;
            };
            match record.value {
                Some(value) => states.insert(key, value),
                None => states.remove(&key),
            };
        }
    }
    let decode = |(key, value): (String, Bytes)| match serde_json::from_slice(&value) {
        Ok(state) => Ok((key, state)),
        Err(cause) => Err(Error::Decode { key, cause }),
    };
    states.into_iter().map(decode).collect()
}

/// The record that submits a command, for producers that write it in a transaction of their own.
///
/// # Errors
/// [`Error::Encode`].
pub fn command_record(store: &str, key: &str, command: &impl Serialize) -> Result<ProducerRecord, Error> {
    Ok(ProducerRecord::to(commands_topic(store))
        .key(key.to_owned())
        .value(serde_json::to_vec(command)?))
}

/// Submits commands to a store, from any process. Clones share the producer.
#[derive(Clone, Debug)]
pub struct Submitter {
    store: Arc<str>,
    producer: Producer,
}

impl Submitter {
    /// A submitter for the store `store`. Use a producer with all acks: a lost command is lost to the state.
    pub fn new(store: &str, producer: Producer) -> Self {
        Self {
            store: store.into(),
            producer,
        }
    }

    /// Submits a command and waits until the log has it. Commands of one key submitted one after the other are applied in that
    /// order.
    ///
    /// # Errors
    /// [`Error::Log`] as [`Producer::append`]: after a timeout the command may still have been written, so it must be harmless
    /// to submit it again.
    pub async fn submit(&self, key: &str, command: &impl Serialize) -> Result<Appended, Error> {
        Ok(self.producer.append(command_record(&self.store, key, command)?).await?)
    }
}
