//! Dead letters: where some wait, what they are, and what is done with them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::extract::{Path, Query, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::{StreamExt, TryStreamExt, stream};
use http::HeaderMap;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Groups, READ_AT_ONCE, operator, told_record};
use crate::log::{Log, StartAt};
use crate::patterns::control::LettersAction;
use crate::patterns::dead_letter::{
    self, Before, DeadLetter, Selection, dead_letter_topic, marks_topic, redrive_topic,
};
use crate::server::{App, Error};

/// Letters of one page at most.
const MAX_PAGE: usize = 500;

/// Topics with more letters are not read to count them.
const COUNTED: i64 = 20_000;

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/admin/dead-letters", get(topics))
        .route("/v1/admin/dead-letters/{topic}", get(list))
        .route("/v1/admin/dead-letters/{topic}/redrive", post(redrive))
        .route("/v1/admin/dead-letters/{topic}/discard", post(discard))
}

/// What is on a topic of dead letters.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Letters {
    all: i64,
    /// Neither redriven nor discarded.
    waiting: i64,
    /// They are too many to be counted, and marks of transactions are among them.
    is_estimate: bool,
}

impl Letters {
    async fn count(log: &Log, source: &str, group: &str, most: i64) -> Result<Self, Error> {
        if most == 0 {
            return Ok(Self::default());
        }
        if most > COUNTED {
            return Ok(Self {
                all: most,
                waiting: most,
                is_estimate: true,
            });
        }
        let (all, waiting) = dead_letter::count(log, source, group).await?;
        let count = |letters: usize| i64::try_from(letters).unwrap_or(i64::MAX);
        Ok(Self {
            all: count(all),
            waiting: count(waiting),
            is_estimate: false,
        })
    }
}

async fn topics(State(app): State<App>) -> Result<Json<Value>, Error> {
    let all = Groups::read(&app.log).await?;
    let mut sources = sources(&all);
    sources.retain(|(source, group)| all.topics.contains_key(&dead_letter_topic(source, group)));
    let mut partitions = Vec::new();
    for (source, group) in &sources {
        partitions.extend(all.partitions(&dead_letter_topic(source, group)));
        partitions.extend(all.partitions(&marks_topic(group)));
    }
    let starts = app.log.offsets(&partitions, StartAt::Start).await?;
    let ends = app.log.offsets(&partitions, StartAt::End).await?;
    let spans: HashMap<_, _> = partitions.into_iter().zip(starts.into_iter().zip(ends)).collect();

    let topics: Vec<Value> = stream::iter(sources)
        .map(|(source, group)| {
            let (app, all, spans) = (&app, &all, &spans);
            async move {
                let letters = dead_letter_topic(&source, &group);
                let span = |partition| spans[&partition];
                let own: Vec<(i64, i64)> = all.partitions(&letters).into_iter().map(span).collect();
                let marks = all
                    .partitions(&marks_topic(&group))
                    .into_iter()
                    .map(|partition| span(partition).1);
                let offsets = own
                    .iter()
                    .flat_map(|(start, end)| [*start, *end])
                    .chain(marks)
                    .collect();
                let most = own.iter().map(|(start, end)| end - start).sum();
                let has_redrive_topic = all.topics.contains_key(&redrive_topic(&source, &group));
                let count = Letters::count(&app.log, &source, &group, most);
                let found = app.admin.letters.get(letters.clone(), offsets, count).await?;
                let mut told = json!({
                    "topic": letters, "group": group, "source": source, "records": found.all, "waiting": found.waiting,
                    "redrives": dead_letter::way_back(&source, &group, has_redrive_topic).is_some(),
                });
                if found.is_estimate {
                    told["estimated"] = json!(true);
                }
                Ok::<_, Error>(told)
            }
        })
        .buffered(READ_AT_ONCE)
        .try_collect()
        .await?;
    app.admin.letters.retain(|letters| all.topics.contains_key(letters));
    Ok(Json(json!({ "topics": topics })))
}

/// What the groups consume: topic and group.
fn sources(all: &Groups) -> Vec<(String, String)> {
    let each = all.operated.iter().flat_map(|operated| {
        let with_group = |source: &String| (source.clone(), operated.group.clone());
        operated.sources.iter().map(with_group)
    });
    each.collect()
}

/// The source and the group of a topic of dead letters.
async fn source_of(log: &Log, letters: &str) -> Result<(String, String), Error> {
    let sources = sources(&Groups::read(log).await?);
    let found = sources
        .into_iter()
        .find(|(source, group)| dead_letter_topic(source, group) == letters);
    found.ok_or_else(|| {
        Error::not_found(
            "unknown-topic",
            format!("no group has its dead letters on topic {letters}"),
        )
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    limit: Option<usize>,
    before: Option<String>,
    filter: Option<String>,
    state: Option<String>,
}

async fn list(
    State(app): State<App>,
    Path(topic): Path<String>,
    wanted: Result<Query<Wanted>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Value>, Error> {
    let Query(wanted) = wanted.map_err(|error| Error::bad_request("bad-query", error.body_text()))?;
    let waiting_only = match wanted.state.as_deref() {
        None | Some("all") => false,
        Some("waiting") => true,
        Some(other) => {
            return Err(Error::bad_request(
                "bad-query",
                format!("state is waiting or all, not {other}"),
            ));
        }
    };
    let before = match &wanted.before {
        None => Before::new(),
        Some(text) => read_before(text).ok_or_else(|| Error::bad_request("bad-query", "before is not a cursor"))?,
    };
    let (source, group) = source_of(&app.log, &topic).await?;
    let selection = Selection::Containing(wanted.filter.unwrap_or_default());
    let matching = AtomicUsize::new(0);
    let is_wanted = |letter: &DeadLetter| {
        let is_wanted =
            (!waiting_only || letter.settled.is_none()) && selection.contains(letter.partition, &letter.record);
        matching.fetch_add(is_wanted.into(), Ordering::Relaxed);
        is_wanted
    };
    let most = wanted.limit.unwrap_or(50).clamp(1, MAX_PAGE);
    let (page, next) = dead_letter::list(&app.log, &source, &group, &before, most, is_wanted).await?;
    let records: Vec<_> = page.iter().map(told).collect();
    Ok(Json(
        json!({ "records": records, "matching": matching.into_inner(), "next": next.as_ref().map(write_before) }),
    ))
}

fn told(letter: &DeadLetter) -> Value {
    let mut told = told_record(letter.partition, &letter.record);
    let state = match letter.settled.as_ref().map(|settled| settled.action) {
        None => "waiting",
        Some(LettersAction::Redrive) => "redriven",
        Some(LettersAction::Discard) => "discarded",
    };
    told.insert("state".to_owned(), state.into());
    if let Some(settled) = &letter.settled {
        told.insert("by".to_owned(), settled.by.clone().into());
        told.insert("at_ms".to_owned(), settled.at_ms.into());
    }
    Value::Object(told)
}

/// A cursor is `partition-offset` for each partition, with points between.
fn write_before(before: &Before) -> String {
    let places: Vec<_> = before
        .iter()
        .map(|(partition, offset)| format!("{partition}-{offset}"))
        .collect();
    places.join(".")
}

fn read_before(text: &str) -> Option<Before> {
    let place = |place: &str| {
        let (partition, offset) = place.split_once('-')?;
        Some((partition.parse().ok()?, offset.parse().ok()?))
    };
    text.split('.').map(place).collect()
}

#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Selected {
    Records { records: Vec<Letter> },
    Filter { filter: String },
}

#[derive(Deserialize)]
struct Letter {
    partition: i32,
    offset: i64,
}

async fn redrive(
    State(app): State<App>,
    Path(topic): Path<String>,
    headers: HeaderMap,
    body: axum::body::Bytes,
) -> Result<Json<Value>, Error> {
    settle(&app, &topic, &headers, &body, LettersAction::Redrive).await
}

async fn discard(
    State(app): State<App>,
    Path(topic): Path<String>,
    headers: HeaderMap,
    body: axum::body::Bytes,
) -> Result<Json<Value>, Error> {
    settle(&app, &topic, &headers, &body, LettersAction::Discard).await
}

async fn settle(
    app: &App,
    topic: &str,
    headers: &HeaderMap,
    body: &[u8],
    action: LettersAction,
) -> Result<Json<Value>, Error> {
    let selection = match serde_json::from_slice(body) {
        Ok(Selected::Records { records }) => {
            Selection::Records(records.iter().map(|one| (one.partition, one.offset)).collect())
        }
        Ok(Selected::Filter { filter }) => Selection::Containing(filter),
        Err(_) => {
            let detail = r#"the body is {"records":[{"partition":0,"offset":0}]} or {"filter":"text"}"#;
            return Err(Error::bad_request("bad-selection", detail));
        }
    };
    let (source, group) = source_of(&app.log, topic).await?;
    let (log, by) = (app.log.clone(), operator(headers));
    // It goes on when the client does not wait for its end: broken off on its way to a producer it would fence the next one.
    let settling = async move { dead_letter::settle(&log, &source, &group, &selection, action, &by).await };
    let settled = app.tasks.spawn(settling).await.map_err(Error::internal)?;
    match settled {
        Ok(records) => Ok(Json(json!({ "records": records }))),
        Err(crate::patterns::Error::Log(crate::log::Error::Fenced(_))) => {
            let detail = "another redrive of the group has begun meanwhile; what was done until then is done";
            Err(Error::refused(http::StatusCode::CONFLICT, "refused", detail))
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_come_back_as_they_were() {
        for before in [Before::from([(0, 17)]), Before::from([(0, 17), (3, 0), (12, 1 << 40)])] {
            assert_eq!(read_before(&write_before(&before)), Some(before));
        }
        for text in ["", "0", "0-", "-1", "a-1", "0-1.", "0-1,1-2"] {
            assert_eq!(read_before(text), None, "{text}");
        }
    }
}
