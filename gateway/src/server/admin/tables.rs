//! Compacted topics, and what stands on them: tables, the states of atomic stores, schedules, and what Barnabas notes of groups.
//!
//! A page is read from the log, from the beginning of the topic to where it ended then, and holds no more than a page in memory
//! ([`Entries`]). What stops that early says so: the rest of the topic might hold other values.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::entries::{Bounds, Entries, Place};
use super::told_record;
use crate::log::{self, Log, Record, StartAt, TopicPartition};
use crate::patterns::control::control_topic;
use crate::patterns::scan::Scan;
use crate::patterns::{atomic_store, schedule};
use crate::server::config::TopicsConfig;
use crate::server::{App, Error};

/// Entries of a page, if the client does not say, and at most.
const PAGE: (usize, usize) = (100, 500);

/// Bytes of the entries of a page.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// How much of a topic is read for a page at most.
const READ: Bounds = Bounds {
    entries: 2_000_000,
    bytes: 512 * 1024 * 1024,
};

/// A page that is not read by then is given up.
const READ_WITHIN: Duration = Duration::from_secs(30);

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/admin/tables", get(tables))
        .route("/v1/admin/tables/{topic}", get(browse))
}

/// What a compacted topic holds, told by its name and those beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Table,
    /// The states of an atomic store.
    Store,
    Schedules,
    /// What stands still in a group.
    Blocked,
    /// What became of a group's dead letters.
    DeadLetterMarks,
}

impl Kind {
    fn of(topic: &str, topics: &BTreeMap<String, i32>) -> Self {
        let there = |name: String| topics.contains_key(&name);
        let has_letters = |owner: &str| there(control_topic(owner)) || there(atomic_store::dead_letters_topic(owner));
        if topic
            .strip_suffix(".blocked")
            .is_some_and(|group| there(control_topic(group)))
        {
            Self::Blocked
        } else if topic.strip_suffix(".dead-letters").is_some_and(has_letters) {
            Self::DeadLetterMarks
        } else if there(atomic_store::dead_letters_topic(topic)) {
            Self::Store
        } else if there(schedule::commands_topic(topic)) {
            Self::Schedules
        } else {
            Self::Table
        }
    }

    /// Whether it is Barnabas' own: of a group, or of the gateway.
    fn is_internal(self, topic: &str, own: &TopicsConfig) -> bool {
        matches!(self, Self::Blocked | Self::DeadLetterMarks)
            || [own.jobs(), own.schedules()].iter().any(|name| name == topic)
    }
}

async fn tables(State(app): State<App>) -> Result<Json<Value>, Error> {
    let topics = app.log.topics().await?;
    let compacted = app.log.compacted_topics().await?;
    let partitions: Vec<_> = compacted
        .iter()
        .flat_map(|(topic, count)| (0..*count).map(move |number| TopicPartition::new(topic.as_str(), number)))
        .collect();
    let starts = app.log.offsets(&partitions, StartAt::Start).await?;
    let ends = app.log.offsets(&partitions, StartAt::End).await?;
    let mut records: BTreeMap<&str, i64> = BTreeMap::new();
    for (partition, (start, end)) in partitions.iter().zip(starts.iter().zip(&ends)) {
        *records.entry(&partition.topic).or_default() += end - start;
    }
    let told = compacted.iter().map(|(topic, partitions)| {
        let kind = Kind::of(topic, &topics);
        json!({
            "topic": topic, "kind": kind, "internal": kind.is_internal(topic, &app.config.topics),
            "partitions": partitions, "records": records.get(topic.as_str()),
        })
    });
    let tables: Vec<_> = told.collect();
    Ok(Json(json!({ "tables": tables })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    prefix: Option<String>,
    after: Option<String>,
    limit: Option<usize>,
}

async fn browse(
    State(app): State<App>,
    Path(topic): Path<String>,
    wanted: Result<Query<Wanted>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Value>, Error> {
    let bad_query = |detail: String| Error::bad_request("bad-query", detail);
    let Query(wanted) = wanted.map_err(|error| bad_query(error.body_text()))?;
    let limit = wanted.limit.unwrap_or(PAGE.0);
    if limit == 0 || limit > PAGE.1 {
        return Err(bad_query(format!("limit must be 1 to {}", PAGE.1)));
    }
    let from = match &wanted.after {
        None => None,
        Some(text) => {
            let not_one = || bad_query("after must be what `next` of another page was".to_owned());
            Some(read_cursor(text).ok_or_else(not_one)?)
        }
    };
    let prefix = wanted.prefix.unwrap_or_default();
    let read = async {
        check_compacted(&app.log, &topic).await?;
        let _permit = app.admin.pages.acquire().await;
        // Twice as many: of those that are held, some may end further on.
        let held = Bounds {
            entries: 2 * limit,
            bytes: PAGE_BYTES,
        };
        read_entries(&app.log, &topic, Entries::new(prefix, from, held), READ).await
    };
    let read = timeout(READ_WITHIN, read).await;
    let (entries, is_cut) = read.map_err(|elapsed| Error::unavailable("log-unavailable", elapsed))??;
    let (page, next) = entries.into_page(limit);
    let records: Vec<_> = page
        .iter()
        .map(|(partition, record)| told_record(*partition, record))
        .collect();
    Ok(Json(
        json!({ "records": records, "next": next.as_ref().map(write_cursor), "cut": is_cut }),
    ))
}

async fn check_compacted(log: &Log, topic: &str) -> Result<(), Error> {
    match log.describe_topic(topic).await {
        Ok(found) if found.cleanup.compacts() => Ok(()),
        Ok(_) | Err(log::Error::UnknownTopic(_) | log::Error::InvalidTopic { .. }) => Err(Error::not_found(
            "unknown-topic",
            format!("there is no compacted topic {topic}"),
        )),
        Err(error) => Err(error.into()),
    }
}

/// Reads a topic into `entries`, and says whether it stopped before the end since that is more than `most`.
async fn read_entries(log: &Log, topic: &str, mut entries: Entries, most: Bounds) -> Result<(Entries, bool), Error> {
    let mut scan = Scan::new(log, topic).await?;
    let (mut records, mut bytes) = (0, 0);
    while let Some(batch) = scan.next().await? {
        records += batch.records.len();
        bytes += batch.records.iter().map(Record::size_bytes).sum::<usize>();
        entries.put(batch);
        if records > most.entries || bytes > most.bytes {
            return Ok((entries, true));
        }
    }
    Ok((entries, false))
}

/// A cursor is the partition, a point, and the key in base64 (RFC 4648, section 5).
fn write_cursor((key, partition): &Place) -> String {
    format!("{partition}.{}", BASE64URL_NOPAD.encode(key))
}

fn read_cursor(text: &str) -> Option<Place> {
    let (partition, key) = text.split_once('.')?;
    let key = BASE64URL_NOPAD.decode(key.as_bytes()).ok()?;
    Some((Bytes::from(key), partition.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::embedded::EmbeddedSettings;
    use crate::log::{ProducerRecord, ProducerSettings};
    use crate::patterns::table;

    #[test]
    fn cursors_come_back_as_they_were() {
        for place in [(Bytes::new(), 0), (Bytes::from_static(b"user.7/\xff"), 12)] {
            assert_eq!(read_cursor(&write_cursor(&place)), Some(place));
        }
        for text in ["", "0", "a.YQ", "0.!"] {
            assert_eq!(read_cursor(text), None, "{text}");
        }
    }

    #[test]
    fn what_a_topic_holds_is_told_by_those_beside_it() {
        let names = [
            "prices",
            "billing.blocked",
            "billing.control",
            "billing.dead-letters",
            "red.blocked",
            "orders",
            "orders.commands",
            "orders.commands.orders.dlt",
            "renewals",
            "renewals.commands",
        ];
        let topics: BTreeMap<_, _> = names.iter().map(|name| ((*name).to_owned(), 1)).collect();
        for (topic, kind) in [
            ("prices", Kind::Table),
            ("billing.blocked", Kind::Blocked),
            ("billing.dead-letters", Kind::DeadLetterMarks),
            ("red.blocked", Kind::Table),
            ("orders", Kind::Store),
            ("renewals", Kind::Schedules),
        ] {
            assert_eq!(Kind::of(topic, &topics), kind, "{topic}");
        }
    }

    #[tokio::test]
    async fn reading_stops_at_its_bound_and_says_so() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = Log::open_embedded(EmbeddedSettings::new(folder.path()))
            .await
            .expect("a log");
        let plan = log.plan_topics(&[table::topic("prices", 1)]).await.expect("a plan");
        log.apply_topics(&plan).await.expect("topics");
        let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
        let record = |key: &str| ProducerRecord::to("prices").key(key.to_owned()).value("1");
        let all = Bounds { entries: 2, bytes: 100 };
        let read = async |most| {
            let entries = Entries::new("", None, READ);
            let (_, is_cut) = read_entries(&log, "prices", entries, most).await.expect("read");
            is_cut
        };
        for key in ["a", "b"] {
            producer.append(record(key)).await.expect("appended");
        }
        assert!(!read(all).await);
        assert!(read(Bounds { bytes: 3, ..all }).await);
        producer.append(record("c")).await.expect("appended");
        assert!(read(all).await);
        log.close().await;
    }
}
