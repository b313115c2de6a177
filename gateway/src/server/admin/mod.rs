//! `/v1/admin`: what operators see of consumer groups, and what they have them do. The dashboard and the command line stand on it.
//!
//! Everything is read from the log: the groups and their offsets, what stands still, dead letters, and who did what. Commands go to the
//! owner of a partition over the group's control topic. The groups of other programs are shown with their lag; the rest needs the
//! topics that a consumer of [`crate::patterns`] has.

mod dead_letters;
mod entries;
mod groups;
mod live;
mod remembered;
mod retry_topics;
mod tables;

use std::collections::{BTreeMap, BTreeSet};

use axum::Router;
use http::{HeaderMap, HeaderName};
use serde_json::{Map, Value};
use tokio::sync::Semaphore;

use self::dead_letters::Letters;
use self::remembered::Remembered;
use super::{App, Error};
use crate::log::{self, GroupDescription, Log, Record, TopicPartition};
use crate::patterns::control::{Blocked, Key, blocked_topic};
use crate::patterns::dead_letter::{marks_topic, source_of_letters};
use crate::patterns::{self, consumer};
pub(super) use live::run as run_live;

/// Says who acts, for the record. It is not believed: while there is no authentication everybody who can reach the gateway is an operator.
const OPERATOR: HeaderName = HeaderName::from_static("barnabas-operator");

/// Who acts when the header is missing.
const ANONYMOUS: &str = "anonymous";

/// Characters of an operator's name that are kept.
const MAX_OPERATOR: usize = 100;

pub(super) fn routes() -> Router<App> {
    groups::routes()
        .merge(retry_topics::routes())
        .merge(dead_letters::routes())
        .merge(tables::routes())
}

/// What has a control topic: the consumers of a group, an atomic store, or a projection.
#[derive(Clone, Debug)]
struct Operated {
    group: String,
    /// What it consumes, beside what its failures go to.
    sources: BTreeSet<String>,
    /// The consumer group of its name; `None`: it has never run, or not for long, or it is a projection, whose generations are groups.
    own: Option<GroupDescription>,
    /// The group of its retry topics.
    retries: Option<GroupDescription>,
    /// Whether its consumers take commands.
    takes_commands: bool,
}

/// The groups and topics of a log.
struct Groups {
    operated: Vec<Operated>,
    /// Those of other programs.
    others: Vec<GroupDescription>,
    /// Partitions by topic.
    topics: BTreeMap<String, i32>,
}

impl Groups {
    async fn read(log: &Log) -> log::Result<Self> {
        let by_name = |group: GroupDescription| (group.group.clone(), group);
        let mut others: BTreeMap<_, _> = log.groups().await?.into_iter().map(by_name).collect();
        let topics = log.topics().await?;
        let is_there = |topic: String| topics.contains_key(&topic);
        let controlled = topics.keys().filter_map(|topic| topic.strip_suffix(".control"));
        let operated = controlled
            .filter(|group| is_there(marks_topic(group)))
            .map(|group| {
                let own = others.remove(group);
                let consumed = own.iter().flat_map(|own| &own.partitions);
                let consumed = consumed.map(|lag| lag.partition.topic.to_string());
                let letters = topics.keys().filter_map(|topic| source_of_letters(topic, group));
                let letters = letters.filter(|source| topics.contains_key(*source));
                let sources = consumed.chain(letters.map(str::to_owned));
                Operated {
                    group: group.to_owned(),
                    sources: sources.collect(),
                    own,
                    retries: others.remove(&consumer::retry_group(group)),
                    takes_commands: is_there(blocked_topic(group)),
                }
            })
            .collect();
        Ok(Self {
            operated,
            others: others.into_values().collect(),
            topics,
        })
    }

    /// The partitions of a topic; none if it is not there.
    fn partitions(&self, topic: &str) -> Vec<TopicPartition> {
        let partitions = self.topics.get(topic).copied().unwrap_or(0);
        (0..partitions)
            .map(|number| TopicPartition::new(topic, number))
            .collect()
    }
}

/// What operators have asked for, for when they ask again.
#[derive(Debug)]
pub struct Admin {
    blocked: Remembered<String, BTreeMap<String, Blocked>>,
    /// The newest of each group.
    actions: Remembered<String, Vec<Value>>,
    letters: Remembered<String, Letters>,
    /// When the record was written that waits first on a partition of a retry topic.
    first_waiting_ms: Remembered<TopicPartition, Option<i64>>,
    /// Pages of tables that are read at a time: each reads a topic. More wait.
    pages: Semaphore,
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            blocked: Remembered::default(),
            actions: Remembered::default(),
            letters: Remembered::default(),
            first_waiting_ms: Remembered::default(),
            pages: Semaphore::new(PAGES_AT_ONCE),
        }
    }
}

/// Topics that are read at the same time to answer one request.
const READ_AT_ONCE: usize = 8;

/// Pages of tables that are read at the same time.
const PAGES_AT_ONCE: usize = 4;

fn operator(headers: &HeaderMap) -> String {
    let given = headers
        .get(OPERATOR)
        .and_then(|value| std::str::from_utf8(value.as_bytes()).ok());
    let name: String = given.unwrap_or_default().trim().chars().take(MAX_OPERATOR).collect();
    match name.is_empty() {
        true => ANONYMOUS.to_owned(),
        false => name,
    }
}

/// Puts bytes into an object: as text under `name` if they are, else as base64 under `{name}_base64`.
fn put_bytes(object: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    match Key::new(bytes) {
        Key::Text(text) => object.insert(name.to_owned(), text.into()),
        Key::Base64(text) => object.insert(format!("{name}_base64"), text.into()),
    };
}

/// A record as it is told: where it stands, key, value and headers.
fn told_record(partition: i32, record: &Record) -> Map<String, Value> {
    let mut told = Map::new();
    told.insert("partition".to_owned(), partition.into());
    told.insert("offset".to_owned(), record.offset.into());
    told.insert("timestamp_ms".to_owned(), record.timestamp_ms.into());
    if let Some(key) = &record.key {
        put_bytes(&mut told, "key", key);
    }
    if let Some(value) = &record.value {
        put_bytes(&mut told, "value", value);
    }
    let headers = record.headers.iter().map(|(name, value)| {
        let mut header = Map::new();
        header.insert("name".to_owned(), name.into());
        put_bytes(&mut header, "value", value);
        Value::Object(header)
    });
    told.insert("headers".to_owned(), headers.collect());
    told
}

impl From<patterns::Error> for Error {
    fn from(error: patterns::Error) -> Self {
        match error {
            patterns::Error::Log(error) => error.into(),
            error @ patterns::Error::NoAnswer { .. } => {
                Self::refused(http::StatusCode::GATEWAY_TIMEOUT, "no-answer", error.to_string())
            }
            error @ patterns::Error::NoWayBack(_) => {
                Self::refused(http::StatusCode::CONFLICT, "refused", error.to_string())
            }
            error => Self::internal(error),
        }
    }
}
