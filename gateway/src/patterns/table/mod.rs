//! A table in memory on a compacted topic: every instance has all of it, reads cost nothing, and the log is what they agree on.
//!
//! ```text
//! put, delete ══ topic (compacted) ══▶ replica (one task, no group, all partitions from the start) ──▶ map ──▶ get, entry
//!      ▲                                    └──▶ watchers                                               │
//!      └── create, update: one lane for each partition, which checks what the map has ◀─────────────────┘
//! ```
//! Keys are text ([`Key`]), values JSON. A tombstone ends a key.
//!
//! Invariants: the map says what stands on the topic, in whatever order instances start. [`Table::ready`] asks only for what stood
//! there when the table was opened, so it never waits for a record that may not come. Nothing but the replica changes the map.
//!
//! A record without a key, or with one that is no `K`, is passed over with a warning that names its place. A value that is no `V` is
//! warned about too and takes the place of what its key had before, as it does in an instance that starts later: [`Table::get`] finds
//! nothing, [`Table::entry`] says why.

mod entry;
mod error;
mod lane;
mod map;
mod progress;
mod replica;
mod watch;

use std::borrow::Borrow;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::{CancellationToken, DropGuard};

pub use entry::{Entry, Key, Revision};
pub use error::Error;
pub use watch::{Update, Watch, WatchAll};

use self::lane::{Expect, Lanes};
use self::map::{Kept, Map, Said};
use self::progress::Progress;
use self::watch::Watchers;
use crate::log::{CleanupPolicy, Log, Producer, ProducerRecord, ProducerSettings, TopicSpec, partition_for_key};

/// How a table's writes treat each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Writes {
    /// The last write of a key wins, whoever it is from. There is no [`Table::create`] and no [`Table::update`].
    #[default]
    LastWins,
    /// All writes of this process go through one transactional producer for each partition, which shuts out that of any other
    /// process, so that what a write expects still holds when it is made. Everything that writes to the topic has to be a table with
    /// this setting.
    Checked,
}

/// How a table is kept.
#[derive(Clone, Debug)]
pub struct TableSettings {
    /// The topic. See [`topic`].
    pub topic: String,
    /// Default [`Writes::LastWins`].
    pub writes: Writes,
    /// How often it is looked for partitions that were added. Default 5 s.
    pub partition_interval: Duration,
    /// A write that has not been made by then fails. Default 30 s.
    pub write_timeout: Duration,
}

impl TableSettings {
    /// A table on `topic`, everything else at its default.
    pub fn new(topic: impl Into<String>) -> Self {
        Self {
            topic: topic.into(),
            writes: Writes::default(),
            partition_interval: Duration::from_secs(5),
            write_timeout: Duration::from_secs(30),
        }
    }

    /// The same with writes that are checked.
    #[must_use]
    pub fn checked(mut self) -> Self {
        self.writes = Writes::Checked;
        self
    }
}

/// The topic of a table: the last record of each key is kept, for ever.
pub fn topic(name: impl Into<String>, partitions: i32) -> TopicSpec {
    TopicSpec {
        cleanup: CleanupPolicy::Compact,
        retention: None,
        ..TopicSpec::new(name, partitions)
    }
}

/// The record that puts a value, for handlers that send it to a table whose last write wins.
///
/// # Errors
/// [`Error::Encode`].
pub fn put_record(topic: &str, key: &impl Key, value: &impl Serialize) -> Result<ProducerRecord, Error> {
    let value = serde_json::to_vec(value).map_err(|error| Error::Encode(error.to_string()))?;
    Ok(delete_record(topic, key).value(value))
}

/// The record that deletes a key: a tombstone.
pub fn delete_record(topic: &str, key: &impl Key) -> ProducerRecord {
    ProducerRecord::to(topic).key(key.to_string())
}

/// How a table stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableState {
    /// Keys that have a record.
    pub keys: usize,
    /// Those of them whose value cannot be read.
    pub unreadable: usize,
    /// Records since the table was opened that have no key, or one that cannot be read.
    pub passed_over: u64,
    /// Where reading goes on in each partition.
    pub next_offsets: Vec<i64>,
}

/// A table. Clones are cheap and share the map; its tasks end with the last of them.
#[derive(Debug)]
pub struct Table<K, V> {
    shared: Arc<Shared<K, V>>,
    own: Arc<Own<K>>,
}

impl<K, V> Clone for Table<K, V> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            own: self.own.clone(),
        }
    }
}

/// What handles and tasks share.
#[derive(Debug)]
struct Shared<K, V> {
    log: Log,
    settings: TableSettings,
    topic: Arc<str>,
    map: Map<K, V>,
    progress: Progress,
    watchers: Watchers<K>,
}

/// What the handles alone have, so that the tasks end with them.
#[derive(Debug)]
struct Own<K> {
    producer: Producer,
    /// `None`: the last write wins.
    lanes: Option<Lanes<K>>,
    _stopping: DropGuard,
}

impl<K: Key, V: Serialize + DeserializeOwned + Send + Sync + 'static> Table<K, V> {
    /// Opens a table and begins to read it, in tasks of the current tokio runtime.
    ///
    /// # Errors
    /// [`Error::NotCompacted`]; [`Error::Log`] when the topic does not exist or cannot be read.
    pub async fn open(log: &Log, settings: TableSettings) -> Result<Self, Error> {
        let topic = log.describe_topic(&settings.topic).await?;
        if topic.cleanup != CleanupPolicy::Compact {
            return Err(Error::NotCompacted {
                topic: topic.name,
                cleanup: topic.cleanup,
            });
        }
        let producer = ProducerSettings {
            delivery_timeout: settings.write_timeout,
            ..ProducerSettings::default()
        };
        let producer = log.producer(producer).await?;
        let stopping = CancellationToken::new();
        let shared = Arc::new(Shared {
            log: log.clone(),
            topic: settings.topic.as_str().into(),
            settings,
            map: Map::new(),
            progress: Progress::new(topic.partitions),
            watchers: Watchers::default(),
        });
        replica::start(shared.clone(), &topic, stopping.clone()).await?;
        let lanes = match shared.settings.writes {
            Writes::LastWins => None,
            Writes::Checked => Some(Lanes::new(topic.partitions)),
        };
        Ok(Self {
            shared,
            own: Arc::new(Own {
                producer,
                lanes,
                _stopping: stopping.drop_guard(),
            }),
        })
    }

    /// Waits until everything is here that stood on the topic when the table was opened.
    ///
    /// # Errors
    /// Those with which the table has ended: [`Error::Log`], [`Error::Replaced`].
    pub async fn ready(&self) -> Result<(), Error> {
        self.shared.progress.ready().await
    }

    /// The value of a key, from memory: it never waits for the log.
    pub fn get<Q>(&self, key: &Q) -> Option<Arc<V>>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.shared.map.get(key)
    }

    /// The value of a key and where it stands.
    ///
    /// # Errors
    /// [`Error::Unreadable`].
    pub fn entry<Q>(&self, key: &Q) -> Result<Option<Entry<V>>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToString + ?Sized,
    {
        self.shared.entry(key)
    }

    /// All keys that can be read, with their entries, in no order. It is not one instant: what is applied meanwhile may be in it or not.
    pub fn entries(&self) -> Vec<(K, Entry<V>)> {
        let all = self.shared.map.all().into_iter();
        all.filter_map(|(key, kept)| Some((key, read(kept).ok()?))).collect()
    }

    /// How many keys there are, and how far they are read.
    pub fn state(&self) -> TableState {
        TableState {
            keys: self.shared.map.keys(),
            unreadable: self.shared.map.unreadable(),
            passed_over: self.shared.progress.passed_over(),
            next_offsets: self.shared.progress.next_offsets(),
        }
    }

    /// Puts a value under a key, and returns where it stands when the log has it; [`Table::wait_applied`] then waits until it can
    /// be read here. On a checked table it can be read at once.
    ///
    /// # Errors
    /// [`Error::Log`]; [`Error::Encode`], [`Error::Key`]; of a checked table also [`Error::Unknown`] and [`Error::PartitionsRaised`].
    pub async fn put(&self, key: &K, value: &V) -> Result<Revision, Error> {
        self.write(key, Some(value), Expect::Anything).await
    }

    /// Deletes a key, whether it is there or not.
    ///
    /// # Errors
    /// Those of [`Table::put`].
    pub async fn delete(&self, key: &K) -> Result<Revision, Error> {
        self.write(key, None, Expect::Anything).await
    }

    /// Puts a value under a key that is not there.
    ///
    /// # Errors
    /// [`Error::Conflict`] when it is; [`Error::NotChecked`]; those of [`Table::put`].
    pub async fn create(&self, key: &K, value: &V) -> Result<Revision, Error> {
        self.conditional(key, Some(value), Expect::Absent).await
    }

    /// Puts a value under a key that stands at `expected` still.
    ///
    /// # Errors
    /// [`Error::Conflict`] when it does not; [`Error::NotChecked`]; those of [`Table::put`].
    pub async fn update(&self, key: &K, value: &V, expected: Revision) -> Result<Revision, Error> {
        self.conditional(key, Some(value), Expect::At(expected)).await
    }

    /// Deletes a key that stands at `expected` still.
    ///
    /// # Errors
    /// Those of [`Table::update`].
    pub async fn delete_at(&self, key: &K, expected: Revision) -> Result<Revision, Error> {
        self.conditional(key, None, Expect::At(expected)).await
    }

    /// Waits until a write, from wherever, can be read here.
    ///
    /// # Errors
    /// Those with which the table has ended.
    pub async fn wait_applied(&self, revision: Revision) -> Result<(), Error> {
        self.shared.progress.wait_applied(revision).await
    }

    /// Follows one key: how it stands now, then each time it has changed. Who is slow is told the last state only.
    pub fn watch(&self, key: K) -> Watch<K, V> {
        Watch::new(self.clone(), key)
    }

    /// Follows all keys: how they stand now, then what changes. Who is slow is told the last state of a key only; who is behind by
    /// more than 10,000 keys is told anew how all stand.
    pub fn watch_all(&self) -> WatchAll<K, V> {
        WatchAll::new(self.clone())
    }

    async fn conditional(&self, key: &K, value: Option<&V>, expect: Expect) -> Result<Revision, Error> {
        match &self.own.lanes {
            Some(_) => self.write(key, value, expect).await,
            None => Err(Error::NotChecked),
        }
    }

    async fn write(&self, key: &K, value: Option<&V>, expect: Expect) -> Result<Revision, Error> {
        let text = key.to_string();
        if !text.parse::<K>().is_ok_and(|read| read == *key) {
            return Err(Error::Key(text));
        }
        let value = value.map(serde_json::to_vec).transpose();
        let value = value.map_err(|error| Error::Encode(error.to_string()))?;
        if let Some(lanes) = &self.own.lanes {
            return lanes.write(&self.shared, key.clone(), text, value, expect).await;
        }
        let home = partition_for_key(text.as_bytes(), self.shared.progress.partitions());
        let mut record = ProducerRecord::to(self.shared.topic.clone()).partition(home).key(text);
        record.value = value.map(Into::into);
        let elsewhere = self.shared.elsewhere(key, &record, home);
        let appended = self.own.producer.append(record).await?;
        if let Some(tombstone) = elsewhere {
            self.own.producer.append(tombstone).await?;
        }
        Ok(Revision {
            partition: appended.partition.partition,
            offset: appended.offset,
        })
    }
}

impl<K: Key, V> Shared<K, V> {
    fn entry<Q>(&self, key: &Q) -> Result<Option<Entry<V>>, Error>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ToString + ?Sized,
    {
        let kept = self.map.kept(key).map(read).transpose();
        kept.map_err(|(revision, reason)| Error::Unreadable {
            key: key.to_string(),
            revision,
            reason: reason.as_ref().to_owned(),
        })
    }

    /// The tombstone for what stands of a key in another partition than its home, since the topic had fewer when it was written.
    fn elsewhere(&self, key: &K, record: &ProducerRecord, home: i32) -> Option<ProducerRecord> {
        let other = self.map.kept(key)?.revision.partition;
        (other != home).then(|| ProducerRecord {
            partition: Some(other),
            value: None,
            headers: crate::log::Headers::new(),
            ..record.clone()
        })
    }
}

/// The entry, or where the value stands that cannot be read, and why.
fn read<V>(kept: Kept<V>) -> Result<Entry<V>, (Revision, Arc<str>)> {
    match kept.said {
        Said::Value(value) => Ok(Entry {
            value,
            revision: kept.revision,
        }),
        Said::Unreadable(reason) => Err((kept.revision, reason)),
    }
}
