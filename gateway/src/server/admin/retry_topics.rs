//! What waits on retry topics, and until when.

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::all_groups;
use crate::log::{Log, PartitionLag, StartAt};
use crate::patterns::retry::delay_of_topic;
use crate::server::{App, Error};

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/admin/retry-topics", get(retry_topics))
}

async fn retry_topics(State(app): State<App>) -> Result<Json<Value>, Error> {
    let (operated, _) = all_groups(&app.log).await?;
    let mut topics = Vec::new();
    for group in operated {
        let Some(retries) = &group.retries else { continue };
        for source in &group.sources {
            let mut names: Vec<_> = retries
                .partitions
                .iter()
                .map(|lag| lag.partition.topic.clone())
                .collect();
            names.dedup();
            for name in names {
                let Some(delay) = delay_of_topic(&name, source, &group.group) else {
                    continue;
                };
                let delay_ms = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
                let lags = retries.partitions.iter().filter(|lag| lag.partition.topic == name);
                let (mut waiting, mut next_due_ms) = (0, None::<i64>);
                for lag in lags {
                    waiting += (lag.end - lag.committed.0).max(0);
                    if let Some(first_ms) = first_waiting_ms(&app.log, lag).await? {
                        let due_ms = first_ms.saturating_add(delay_ms);
                        next_due_ms = Some(next_due_ms.map_or(due_ms, |next| next.min(due_ms)));
                    }
                }
                topics.push(json!({
                    "topic": &*name, "group": group.group, "source": source, "delay_ms": delay_ms,
                    "waiting": waiting, "next_due_ms": next_due_ms,
                }));
            }
        }
    }
    Ok(Json(json!({ "topics": topics })))
}

/// When the record was written that waits first; `None`: none waits.
async fn first_waiting_ms(log: &Log, lag: &PartitionLag) -> Result<Option<i64>, Error> {
    let start = log.offset(&lag.partition, StartAt::Start).await?;
    if lag.committed.0.max(start) >= lag.end {
        return Ok(None);
    }
    let mut reader = log.reader(&lag.partition.topic).await?;
    let at = StartAt::Offset(lag.committed.0.max(start));
    reader.assign(lag.partition.partition, at).await?;
    loop {
        let batch = reader.next().await?;
        if let Some(record) = batch.records.first() {
            return Ok(Some(record.timestamp_ms));
        }
        // What stood there were the marks of transactions.
        if batch.caught_up {
            return Ok(None);
        }
    }
}
