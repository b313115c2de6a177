//! How operators see what stands still in a running group, and what they can do about it.
//!
//! ```text
//! owner of a partition ══▶ {group}.blocked (compacted) ══▶ command line, dashboard, the partition's next owner
//!        ▲                                                              │
//!        └──────────────── {group}.control ◀══ commands ◀───────────────┘
//!                                          ══▶ outcomes, kept as the record of who did what
//! ```
//! A command names the offset that its author has seen, and is refused when another record stands there by then. It is carried out
//! by the owner of the partition, which answers on the same topic: [`operate`] waits for that.

use std::collections::BTreeMap;
use std::time::Duration;

use data_encoding::BASE64;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Error;
use super::scan::Scan;
use crate::log::{CleanupPolicy, Log, ProducerRecord, ProducerSettings, Record, StartAt, Timestamps, TopicSpec};

/// How long commands and their outcomes are kept.
const KEEP_COMMANDS: Duration = Duration::from_secs(28 * 24 * 60 * 60);

/// The topic that says what stands still in a group.
pub fn blocked_topic(group: &str) -> String {
    format!("{group}.blocked")
}

/// The topic of commands for a group, and of their outcomes.
pub fn control_topic(group: &str) -> String {
    format!("{group}.control")
}

/// The topic of what stands still, of one partition.
pub(super) fn blocked_spec(group: &str) -> TopicSpec {
    TopicSpec {
        fixed_partitions: true,
        cleanup: CleanupPolicy::Compact,
        retention: None,
        timestamps: Timestamps::LogAppend,
        ..TopicSpec::new(blocked_topic(group), 1)
    }
}

/// The topic of commands and of who did what, of one partition.
pub(super) fn control_spec(group: &str) -> TopicSpec {
    TopicSpec {
        fixed_partitions: true,
        retention: Some(KEEP_COMMANDS),
        ..TopicSpec::new(control_topic(group), 1)
    }
}

/// What must stay in order and stands still, or is told not to: a key, or the whole partition, or a record by itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The topic, which may be a retry topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The key, in key order.
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Key>,
}

impl Place {
    /// The key of its record on [`blocked_topic`]; `by_itself`: the offset of a record that has no order.
    pub(super) fn record_key(&self, by_itself: Option<i64>) -> String {
        let Self { topic, partition, key } = self;
        match (key, by_itself) {
            (Some(Key::Text(key)), _) => format!("{topic}/{partition}/key/{key}"),
            (Some(Key::Base64(key)), _) => format!("{topic}/{partition}/base64/{key}"),
            (None, Some(offset)) => format!("{topic}/{partition}/offset/{offset}"),
            (None, None) => format!("{topic}/{partition}"),
        }
    }
}

/// A record's key as JSON has it: `"key"` if it is text, else `"key_base64"`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Key {
    /// The key, which is UTF-8.
    #[serde(rename = "key")]
    Text(String),
    /// The key in base64 (RFC 4648, section 4).
    #[serde(rename = "key_base64")]
    Base64(String),
}

impl Key {
    /// The key of these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Base64(BASE64.encode(bytes)),
        }
    }

    /// Its bytes; `None`: it is not base64.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        match self {
            Self::Text(text) => Some(text.clone().into_bytes()),
            Self::Base64(text) => BASE64.decode(text.as_bytes()).ok(),
        }
    }
}

/// What stands on [`blocked_topic`] for a place, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocked {
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// Whether a record there waits, or failures there are ignored.
    pub state: BlockedState,
    /// The record that waits; of an ignored place: the first that was not to be waited for.
    pub offset: i64,
    /// Attempts made at it.
    #[serde(default)]
    pub attempts: u32,
    /// What kind of failure the last one was, such as `timeout`.
    #[serde(default)]
    pub kind: String,
    /// What it said, cut at 1 KB.
    #[serde(default)]
    pub message: String,
    /// When the first attempt failed, in milliseconds since the Unix epoch by the owner's clock.
    #[serde(default)]
    pub since_ms: i64,
    /// When the next attempt is due, in milliseconds since the Unix epoch by the owner's clock; 0: none is, without an operator.
    #[serde(default)]
    pub due_ms: i64,
    /// How long it was until then when this was written, in milliseconds: the next owner waits for it from the record's timestamp on,
    /// which is the log's.
    #[serde(default)]
    pub wait_ms: i64,
    /// Records that waited behind it in memory when this was written.
    #[serde(default)]
    pub waiting: usize,
    /// Which of the group's consumers wrote it.
    pub owner: String,
}

/// How a place stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockedState {
    /// Its first record waits for another attempt.
    Blocked,
    /// What fails there is passed over, until it is told to block again.
    Ignoring,
}

/// What an operator wants done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// What.
    pub action: Action,
    /// Where.
    #[serde(flatten)]
    pub place: Place,
    /// The record that the operator has seen there.
    pub offset: i64,
    /// Who asks.
    pub by: String,
}

/// What can be done about a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Its record is tried again now.
    Retry,
    /// Its record is passed over, this once.
    Skip,
    /// Its record goes to the dead letters now.
    DeadLetter,
    /// Its record is passed over, and so is whatever fails there later.
    Ignore,
    /// What fails there is waited for again.
    Block,
}

/// What became of a command, by the consumer that had to carry it out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether it was carried out.
    pub done: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Who answers.
    pub owner: String,
}

/// A record of the control topic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ControlRecord {
    /// `{"command": …}`, with its id as the record's key.
    Command(Command),
    /// `{"outcome": …}`, with the command's id as the record's key.
    Outcome(Outcome),
    /// `{"letters": …}`: dead letters were redriven or discarded.
    Letters {
        /// What was done with them.
        action: LettersAction,
        /// The topic on which they stand.
        topic: String,
        /// How many they were.
        records: usize,
        /// Who did it.
        by: String,
    },
}

/// What can be done with dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LettersAction {
    /// They come to the group again.
    Redrive,
    /// They are done with.
    Discard,
}

impl ControlRecord {
    /// Reads a record of the control topic; `None` for one that is not of this format.
    pub fn read(record: &Record) -> Option<(Uuid, Self)> {
        let id = Uuid::parse_str(std::str::from_utf8(record.key.as_ref()?).ok()?).ok()?;
        Some((id, serde_json::from_slice(record.value.as_ref()?).ok()?))
    }

    /// The record that carries it.
    ///
    /// # Errors
    /// [`Error::Encode`].
    pub fn into_record(self, group: &str, id: Uuid) -> Result<ProducerRecord, Error> {
        Ok(ProducerRecord::to(control_topic(group))
            .partition(0)
            .key(id.to_string())
            .value(serde_json::to_vec(&self)?))
    }
}

/// Has a command carried out by the owner of its partition, and waits for the outcome.
///
/// # Errors
/// [`Error::NoAnswer`] when no consumer of the group answers in time: it may still be carried out. [`Error::Log`], as with a
/// group that has no control topic.
pub async fn operate(log: &Log, group: &str, command: Command, within: Duration) -> Result<Outcome, Error> {
    let id = Uuid::now_v7();
    let record = ControlRecord::Command(command).into_record(group, id)?;
    let mut reader = log.reader(&control_topic(group)).await?;
    reader.assign(0, StartAt::End).await?;
    log.producer(ProducerSettings::default()).await?.append(record).await?;
    let answer = async {
        loop {
            let batch = reader.next().await?;
            let outcome = batch
                .records
                .iter()
                .find_map(|record| match ControlRecord::read(record)? {
                    (of, ControlRecord::Outcome(outcome)) if of == id => Some(outcome),
                    _ => None,
                });
            if let Some(outcome) = outcome {
                return Ok(outcome);
            }
        }
    };
    match tokio::time::timeout(within, answer).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::NoAnswer {
            group: group.to_owned(),
            after_ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX),
        }),
    }
}

/// What stands still in a group now.
///
/// # Errors
/// [`Error::Log`], as with a group that has no such topic.
pub async fn blocked(log: &Log, group: &str) -> Result<Vec<Blocked>, Error> {
    Ok(blocked_places(log, group).await?.into_values().collect())
}

/// What stands still in a group now, by the keys of the records that say so: what tells the places apart.
pub(crate) async fn blocked_places(log: &Log, group: &str) -> Result<BTreeMap<String, Blocked>, Error> {
    let mut places = BTreeMap::new();
    let mut scan = Scan::new(log, &blocked_topic(group)).await?;
    while let Some(batch) = scan.next().await? {
        for record in batch.records {
            let Some(key) = record.key.as_deref().and_then(|key| std::str::from_utf8(key).ok()) else {
                continue;
            };
            match record
                .value
                .and_then(|value| serde_json::from_slice::<Blocked>(&value).ok())
            {
                Some(blocked) => drop(places.insert(key.to_owned(), blocked)),
                None => drop(places.remove(key)),
            }
        }
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked(key: Option<Key>) -> Blocked {
        Blocked {
            place: Place {
                topic: "renewals".to_owned(),
                partition: 3,
                key,
            },
            state: BlockedState::Blocked,
            offset: 17,
            attempts: 2,
            kind: "timeout".to_owned(),
            message: "slow".to_owned(),
            since_ms: 1,
            due_ms: 2,
            wait_ms: 1,
            waiting: 4,
            owner: "me".to_owned(),
        }
    }

    #[test]
    fn keys_of_any_bytes_go_through_json() {
        for bytes in [&b"user-1"[..], b"", "ä".as_bytes(), &[0xff, 0x00]] {
            let before = blocked(Some(Key::new(bytes)));
            let json = serde_json::to_string(&before).expect("JSON");
            let after: Blocked = serde_json::from_str(&json).expect("the same");
            assert_eq!(after, before, "{json}");
            assert_eq!(after.place.key.and_then(|key| key.bytes()).as_deref(), Some(bytes));
        }
        let json = serde_json::to_value(blocked(None)).expect("JSON");
        assert_eq!(json.get("key"), None);
        assert_eq!(
            serde_json::from_value::<Blocked>(json).expect("the same"),
            blocked(None)
        );
    }

    #[test]
    fn each_place_has_a_record_of_its_own() {
        let keys = [
            blocked(None).place.record_key(None),
            blocked(None).place.record_key(Some(17)),
            blocked(Some(Key::new(b"a"))).place.record_key(None),
            blocked(Some(Key::new(&[0xff]))).place.record_key(None),
        ];
        assert_eq!(
            keys,
            [
                "renewals/3",
                "renewals/3/offset/17",
                "renewals/3/key/a",
                "renewals/3/base64//w=="
            ]
        );
    }

    #[test]
    fn commands_and_outcomes_are_told_apart() {
        let command = ControlRecord::Command(Command {
            action: Action::DeadLetter,
            place: blocked(Some(Key::new(b"a"))).place,
            offset: 17,
            by: "eve".to_owned(),
        });
        let json = serde_json::to_string(&command).expect("JSON");
        assert_eq!(
            json,
            r#"{"command":{"action":"dead-letter","topic":"renewals","partition":3,"key":"a","offset":17,"by":"eve"}}"#
        );
        assert_eq!(serde_json::from_str::<ControlRecord>(&json).expect("the same"), command);
    }
}
