//! Records that a group could not handle: where they stand, and what operators do with them.
//!
//! ```text
//! {topic} ──▶ group ══ fails ══▶ {topic}.{group}.retry.{delay} ══▶ {topic}.{group}.dlt ── discard
//!               ▲                                                          │
//!               └──────────────── {topic}.{group}.redrive ◀══ redrive ─────┘
//! ```
//! All of these have as many partitions as the topic, and a record stays in its own; other groups see nothing of it. Key, value and
//! headers are kept; the headers of [`header`] say what happened. They are replaced at each step, never appended to, and not believed:
//! where a record goes is known from the topic on which it stands.
//!
//! What became of a dead letter is noted on `{group}.dead-letters` (compacted), in one transaction with what was done: a redrive that
//! is broken off and begun again sends nothing twice.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::atomic_store::commands_topic;
use super::control::{ControlRecord, LettersAction, control_spec};
use super::retry::RetryPolicy;
use super::scan::Scan;
use super::{Error, now_ms};
use crate::log::{
    self, CleanupPolicy, Headers, Log, ProducerRecord, Record, Timestamps, TopicDescription, TopicSpec,
    TransactionalProducer,
};

/// Dead letters that are redriven or discarded in one transaction, and bytes of them behind which it has no more.
const SETTLED_AT_ONCE: usize = 500;
const SETTLED_BYTES: usize = 8 * 1024 * 1024;

/// Bytes of the dead letters of a list behind which it has no more.
const LISTED_BYTES: usize = 8 * 1024 * 1024;

/// The headers of a record on a retry topic or among the dead letters. Numbers are decimal text.
pub mod header {
    /// Attempts made.
    pub const ATTEMPT: &str = "bn-attempt";
    /// When the next attempt is due by the clock of the one who wrote it, in milliseconds since the Unix epoch. It is for people: what
    /// counts is the record's timestamp, which is the log's, and the delay.
    pub const DUE_MS: &str = "bn-due-ms";
    /// The delay before the next attempt, in milliseconds.
    pub const BACK_OFF_MS: &str = "bn-backoff-ms";
    /// The topic on which the record stood first.
    pub const ORIGIN_TOPIC: &str = "bn-origin-topic";
    /// Its partition there.
    pub const ORIGIN_PARTITION: &str = "bn-origin-partition";
    /// Its offset there.
    pub const ORIGIN_OFFSET: &str = "bn-origin-offset";
    /// Its timestamp there, in milliseconds since the Unix epoch.
    pub const ORIGIN_TIMESTAMP: &str = "bn-origin-timestamp";
    /// The consumer group that failed.
    pub const GROUP: &str = "bn-group";
    /// What kind of failure it was, such as `panic`.
    pub const ERROR_KIND: &str = "bn-error-kind";
    /// What the failure said, cut at 1 KB.
    pub const ERROR_MESSAGE: &str = "bn-error-message";

    /// On a retry topic: the record is there to be stamped with the log's time, and stands for nothing.
    pub const CLOCK: &str = "bn-clock";

    /// All of them.
    pub(in crate::patterns) const ALL: [&str; 11] = [
        ATTEMPT,
        DUE_MS,
        BACK_OFF_MS,
        ORIGIN_TOPIC,
        ORIGIN_PARTITION,
        ORIGIN_OFFSET,
        ORIGIN_TIMESTAMP,
        GROUP,
        ERROR_KIND,
        ERROR_MESSAGE,
        CLOCK,
    ];
    /// What says where a record stood first.
    pub(in crate::patterns) const ORIGIN: [&str; 4] = [ORIGIN_TOPIC, ORIGIN_PARTITION, ORIGIN_OFFSET, ORIGIN_TIMESTAMP];
}

/// How long dead letters are kept.
pub(super) const KEEP_DEAD_LETTERS: Duration = Duration::from_secs(28 * 24 * 60 * 60);

/// What the headers of a hop may add to a record; the topics take so much more than the one that they belong to.
pub(super) const HEADER_ROOM: usize = 16 * 1024;

/// The topic of `group`'s dead letters from `topic`.
pub fn dead_letter_topic(topic: &str, group: &str) -> String {
    format!("{topic}.{group}.dlt")
}

/// The topic of which these are `group`'s dead letters; `None`: they are not.
pub fn source_of_letters<'a>(letters: &'a str, group: &str) -> Option<&'a str> {
    letters.strip_suffix(".dlt")?.strip_suffix(group)?.strip_suffix('.')
}

/// The topic by which dead letters of `group` from `topic` come back to its consumers.
pub fn redrive_topic(topic: &str, group: &str) -> String {
    format!("{topic}.{group}.redrive")
}

/// Where dead letters of `group` from `topic` come back to it: to consumers on [`redrive_topic`], and to an atomic store, which has none,
/// with its commands. `None`: they do not. A projection is built anew instead, and meets them in their place.
pub fn way_back(topic: &str, group: &str, has_redrive_topic: bool) -> Option<String> {
    match has_redrive_topic {
        true => Some(redrive_topic(topic, group)),
        false => (topic == commands_topic(group)).then(|| topic.to_owned()),
    }
}

/// The topic that says what became of a group's dead letters.
pub fn marks_topic(group: &str) -> String {
    format!("{group}.dead-letters")
}

/// The topics by which operators settle dead letters of a group that are kept for `retention`: who did what, and the marks.
pub(super) fn settling(group: &str, retention: Duration) -> [TopicSpec; 2] {
    let marks = TopicSpec {
        fixed_partitions: true,
        cleanup: CleanupPolicy::CompactDelete,
        // A mark is younger than its letter. It must not be forgotten first, and segments end when they like.
        retention: Some(retention * 2),
        ..TopicSpec::new(marks_topic(group), 1)
    };
    [control_spec(group), marks]
}

/// The topics that a group needs beside `topic`: for each retry delay one, that of dead letters, and that by which they come back.
/// They keep records for as long as `topic`, retry topics for a day longer than they wait at least, and dead letters for `retention`.
/// Retry topics stamp records themselves: the delay counts from then.
pub(super) fn topics(
    topic: &TopicDescription,
    group: &str,
    retry: &RetryPolicy,
    retention: Duration,
) -> Vec<TopicSpec> {
    let spec = |name: String, retention| beside(topic, name, retention);
    let day = Duration::from_secs(24 * 60 * 60);
    let mut specs = Vec::new();
    if let Some(retry) = retry.topics() {
        for (name, delay) in retry.names(&topic.name, group).into_iter().zip(retry.delays()) {
            let retention = topic.retention.map(|retention| retention.max(*delay + day));
            specs.push(TopicSpec {
                timestamps: Timestamps::LogAppend,
                ..spec(name, retention)
            });
        }
    }
    specs.push(letters(topic, group, retention));
    specs.push(spec(redrive_topic(&topic.name, group), topic.retention));
    specs
}

/// The topic of `group`'s dead letters from `topic`, kept for `retention`.
pub(super) fn letters(topic: &TopicDescription, group: &str, retention: Duration) -> TopicSpec {
    beside(topic, dead_letter_topic(&topic.name, group), Some(retention))
}

/// A topic for records of `topic` with the headers of a hop.
fn beside(topic: &TopicDescription, name: String, retention: Option<Duration>) -> TopicSpec {
    TopicSpec {
        cleanup: CleanupPolicy::Delete,
        retention,
        max_message_bytes: topic.max_message_bytes.saturating_add(HEADER_ROOM),
        ..TopicSpec::new(name, topic.partitions)
    }
}

/// A dead letter.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    /// Its partition.
    pub partition: i32,
    /// The record.
    pub record: Record,
    /// What became of it; `None`: it waits.
    pub settled: Option<Settled>,
}

/// What became of a dead letter, as its mark says in JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// What was done.
    pub action: LettersAction,
    /// Who did it.
    pub by: String,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: i64,
}

/// Which dead letters are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// Those at these partitions and offsets.
    Records(Vec<(i32, i64)>),
    /// Those with this text in key, value or the value of a header; the empty text is in all of them.
    Containing(String),
}

impl Selection {
    /// Whether a dead letter is meant.
    pub fn contains(&self, partition: i32, record: &Record) -> bool {
        match self {
            Self::Records(records) => records.contains(&(partition, record.offset)),
            Self::Containing(text) => {
                let has =
                    |bytes: &Bytes| text.is_empty() || bytes.windows(text.len()).any(|part| part == text.as_bytes());
                let own = record.key.iter().chain(&record.value).any(has);
                own || text.is_empty() || record.headers.iter().any(|(_, value)| has(value))
            }
        }
    }
}

/// Partition and offset.
type Place = (i32, i64);

/// Where a list of dead letters goes on: for each partition the offset before which they stand.
pub type Before = BTreeMap<i32, i64>;

/// How many dead letters of `group` from `topic` there are, and how many of them wait. It reads all of them, and keeps none.
///
/// # Errors
/// [`Error::Log`], as for a group without these topics.
pub async fn count(log: &Log, topic: &str, group: &str) -> Result<(usize, usize), Error> {
    let letters = dead_letter_topic(topic, group);
    let marks = read_marks(log, group, &letters).await?;
    let mut scan = Scan::new(log, &letters).await?;
    let (mut all, mut waiting) = (0, 0);
    while let Some(batch) = scan.next().await? {
        let partition = batch.partition.partition;
        let waits = |record: &&Record| !marks.contains_key(&(partition, record.offset));
        all += batch.records.len();
        waiting += batch.records.iter().filter(waits).count();
    }
    Ok((all, waiting))
}

/// The newest dead letters of `group` from `topic`, `most` at most and fewer when they are large, before those of an earlier list, and where the list goes on;
/// `None`: nothing is left. It reads all dead letters of the topic.
///
/// # Errors
/// [`Error::Log`], as for a group without these topics.
pub async fn list(
    log: &Log,
    topic: &str,
    group: &str,
    before: &Before,
    most: usize,
    is_wanted: impl Fn(&DeadLetter) -> bool,
) -> Result<(Vec<DeadLetter>, Option<Before>), Error> {
    let letters = dead_letter_topic(topic, group);
    let mut marks = read_marks(log, group, &letters).await?;
    // The oldest of the newest is on top, to make room.
    let mut newest: BinaryHeap<Reverse<(i64, Place)>> = BinaryHeap::new();
    let mut found: HashMap<Place, DeadLetter> = HashMap::new();
    let (mut is_more, mut bytes) = (false, 0);
    // The times of a partition may go back, as its owners' clocks differ. Its records do not: where the list goes on is an offset.
    let mut times: HashMap<i32, i64> = HashMap::new();
    let mut scan = Scan::new(log, &letters).await?;
    while let Some(batch) = scan.next().await? {
        let partition = batch.partition.partition;
        let end = before.get(&partition).copied().unwrap_or(i64::MAX);
        for record in batch.records.into_iter().filter(|record| record.offset < end) {
            let place = (partition, record.offset);
            let letter = DeadLetter {
                partition,
                settled: marks.remove(&place),
                record,
            };
            if !is_wanted(&letter) {
                continue;
            }
            let time = times.entry(partition).or_insert(i64::MIN);
            *time = letter.record.timestamp_ms.max(*time);
            newest.push(Reverse((*time, place)));
            bytes += letter.record.size_bytes();
            found.insert(place, letter);
            while (newest.len() > most || bytes > LISTED_BYTES && newest.len() > 1)
                && let Some(Reverse((_, oldest))) = newest.pop()
            {
                bytes -= found.remove(&oldest).map_or(0, |letter| letter.record.size_bytes());
                is_more = true;
            }
        }
    }
    let order = newest.into_sorted_vec();
    let page: Vec<_> = order
        .into_iter()
        .filter_map(|Reverse((_, place))| found.remove(&place))
        .collect();
    let next = is_more.then(|| {
        let mut next = before.clone();
        for letter in &page {
            let before = next.entry(letter.partition).or_insert(letter.record.offset);
            *before = letter.record.offset.min(*before);
        }
        next
    });
    Ok((page, next))
}

/// Redrives or discards dead letters of `group` from `topic` that wait, and says how many they were. Redriven, a record comes to the
/// group again, and to nobody else, with its attempts counted anew; its order among others of its key is given up.
///
/// # Errors
/// [`Error::NoWayBack`] for a redrive of what its group does not take back; [`Error::Log`]; with [`log::Error::Fenced`] when another
/// redrive of the group has begun meanwhile. What was done until then is done, and is not done again.
pub async fn settle(
    log: &Log,
    topic: &str,
    group: &str,
    selection: &Selection,
    action: LettersAction,
    by: &str,
) -> Result<usize, Error> {
    let letters = dead_letter_topic(topic, group);
    let back_to = match action {
        LettersAction::Discard => None,
        LettersAction::Redrive => {
            let has_redrive_topic = match log.describe_topic(&redrive_topic(topic, group)).await {
                Ok(_) => true,
                Err(log::Error::UnknownTopic(_) | log::Error::InvalidTopic { .. }) => false,
                Err(error) => return Err(error.into()),
            };
            let back_to = way_back(topic, group, has_redrive_topic);
            Some(back_to.ok_or_else(|| Error::NoWayBack(letters.clone()))?)
        }
    };
    // First the producer: it ends whatever an earlier one had open, so that the marks are all there.
    let mut producer = log.transactional_producer(&format!("{group}-redrive")).await?;
    let marks = read_marks(log, group, &letters).await?;
    // What fails again at once comes back behind the end of the scan: it is left for the next time.
    let mut scan = Scan::new(log, &letters).await?;
    let settling = Settling {
        back_to,
        group,
        letters: &letters,
        action,
        by,
    };
    let (mut waiting, mut bytes, mut count) = (Vec::new(), 0, 0);
    loop {
        let batch = scan.next().await?;
        let is_last = batch.is_none();
        if let Some(batch) = batch {
            let partition = batch.partition.partition;
            for record in batch.records {
                if !marks.contains_key(&(partition, record.offset)) && selection.contains(partition, &record) {
                    bytes += record.size_bytes();
                    waiting.push((partition, record));
                }
            }
        }
        while waiting.len() >= SETTLED_AT_ONCE || bytes >= SETTLED_BYTES || is_last && !waiting.is_empty() {
            let some: Vec<(i32, Record)> = waiting.drain(..waiting.len().min(SETTLED_AT_ONCE)).collect();
            bytes -= some.iter().map(|(_, record)| record.size_bytes()).sum::<usize>();
            count += some.len();
            settling.commit(&mut producer, some).await?;
        }
        if is_last {
            return Ok(count);
        }
    }
}

/// What is done with dead letters, whoever they are.
struct Settling<'a> {
    /// Where they are redriven to; `None`: they are discarded.
    back_to: Option<String>,
    group: &'a str,
    letters: &'a str,
    action: LettersAction,
    by: &'a str,
}

impl Settling<'_> {
    /// Does it with some of them, with their marks and the record of it, in one transaction.
    async fn commit(&self, producer: &mut TransactionalProducer, some: Vec<(i32, Record)>) -> Result<(), Error> {
        let settled = Settled {
            action: self.action,
            by: self.by.to_owned(),
            at_ms: now_ms(),
        };
        let mark = Bytes::from(serde_json::to_vec(&settled)?);
        let action = ControlRecord::Letters {
            action: self.action,
            topic: self.letters.to_owned(),
            records: some.len(),
            by: self.by.to_owned(),
        };
        let mut transaction = producer.begin();
        for (partition, record) in some {
            let key = mark_key(self.letters, (partition, record.offset));
            let mark = ProducerRecord::to(marks_topic(self.group))
                .partition(0)
                .key(key)
                .value(mark.clone());
            transaction.send(mark).await?;
            if let Some(topic) = &self.back_to {
                transaction.send(redriven(topic, partition, record)).await?;
            }
        }
        transaction
            .send(action.into_record(self.group, Uuid::now_v7())?)
            .await?;
        Ok(transaction.commit().await?)
    }
}

/// The record as it comes back: where it stood first is kept, what happened since is not.
fn redriven(topic: &str, partition: i32, record: Record) -> ProducerRecord {
    let mut headers = Headers::new();
    for (name, value) in record.headers.iter() {
        if !header::ALL.contains(&name) || header::ORIGIN.contains(&name) {
            headers.push(name, value.clone());
        }
    }
    ProducerRecord {
        topic: topic.into(),
        partition: Some(partition),
        key: record.key,
        value: record.value,
        headers,
        timestamp_ms: None,
    }
}

/// What became of the dead letters of a topic.
async fn read_marks(log: &Log, group: &str, letters: &str) -> Result<HashMap<Place, Settled>, Error> {
    let mut marks = HashMap::new();
    let mut scan = Scan::new(log, &marks_topic(group)).await?;
    while let Some(batch) = scan.next().await? {
        for record in batch.records {
            let place = record.key.as_deref().and_then(|key| marked_place(key, letters));
            let settled = record.value.and_then(|value| serde_json::from_slice(&value).ok());
            if let (Some(place), Some(settled)) = (place, settled) {
                marks.insert(place, settled);
            }
        }
    }
    Ok(marks)
}

fn mark_key(letters: &str, (partition, offset): Place) -> String {
    format!("{letters}/{partition}/{offset}")
}

fn marked_place(key: &[u8], letters: &str) -> Option<Place> {
    let rest = std::str::from_utf8(key)
        .ok()?
        .strip_prefix(letters)?
        .strip_prefix('/')?;
    let (partition, offset) = rest.split_once('/')?;
    Some((partition.parse().ok()?, offset.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_letters_of_consumers_come_back_on_a_topic_of_their_own_though_they_consume_commands() {
        let back = |topic, has_redrive_topic| way_back(topic, "billing", has_redrive_topic);
        assert_eq!(back("orders", true).as_deref(), Some("orders.billing.redrive"));
        assert_eq!(
            back("billing.commands", true).as_deref(),
            Some("billing.commands.billing.redrive")
        );
        assert_eq!(back("billing.commands", false).as_deref(), Some("billing.commands"));
        assert_eq!(back("orders", false), None);
    }
}
