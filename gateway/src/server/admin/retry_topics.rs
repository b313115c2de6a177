//! What waits on retry topics, and until when.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};

use super::{Groups, READ_AT_ONCE};
use crate::log::{Log, PartitionLag, StartAt, TopicPartition};
use crate::patterns::retry::{delay_of_topic, is_clock_record};
use crate::server::{App, Error};

pub(super) fn routes() -> Router<App> {
    Router::new().route("/v1/admin/retry-topics", get(retry_topics))
}

async fn retry_topics(State(app): State<App>) -> Result<Json<Value>, Error> {
    let all = Groups::read(&app.log).await?;
    let lags = all.operated.iter().filter_map(|group| group.retries.as_ref());
    let lags: Vec<_> = lags.flat_map(|retries| retries.partitions.clone()).collect();
    let partitions: Vec<_> = lags.iter().map(|lag| lag.partition.clone()).collect();
    let there: HashSet<_> = partitions.iter().collect();
    app.admin.first_waiting_ms.retain(|partition| there.contains(partition));
    let starts = app.log.offsets(&partitions, StartAt::Start).await?;
    let starts: HashMap<_, _> = partitions.iter().cloned().zip(starts).collect();
    let first_waiting_ms: HashMap<_, _> = stream::iter(lags)
        .map(|lag| {
            let (app, start) = (&app, starts[&lag.partition]);
            async move {
                let from = waits_from(&lag, start);
                let first = first_waiting_ms(&app.log, &lag.partition, from..lag.end);
                let known = &app.admin.first_waiting_ms;
                let first = known.get(lag.partition.clone(), vec![from, lag.end], first).await?;
                Ok::<_, Error>((lag.partition, first))
            }
        })
        .buffered(READ_AT_ONCE)
        .try_collect()
        .await?;

    let mut topics = Vec::new();
    for group in &all.operated {
        let Some(retries) = &group.retries else { continue };
        let mut by_topic: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for lag in &retries.partitions {
            by_topic.entry(&*lag.partition.topic).or_default().push(lag);
        }
        for (topic, lags) in by_topic {
            let mut delays = group
                .sources
                .iter()
                .map(|source| (source, delay_of_topic(topic, source, &group.group)));
            let Some((source, Some(delay))) = delays.find(|(_, delay)| delay.is_some()) else {
                continue;
            };
            let delay_ms = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
            let waiting: i64 = lags
                .iter()
                .map(|lag| (lag.end - waits_from(lag, starts[&lag.partition])).max(0))
                .sum();
            let first_ms = lags.iter().filter_map(|lag| first_waiting_ms[&lag.partition]).min();
            topics.push(json!({
                "topic": topic, "group": group.group, "source": source, "delay_ms": delay_ms,
                "waiting": waiting, "next_due_ms": first_ms.map(|first_ms| first_ms.saturating_add(delay_ms)),
            }));
        }
    }
    Ok(Json(json!({ "topics": topics })))
}

/// Where what waits on a partition of a retry topic begins: its group has begun at the start.
fn waits_from(lag: &PartitionLag, start: i64) -> i64 {
    lag.committed.map_or(start, |committed| committed.0.max(start))
}

/// When the first record of these offsets was written; `None`: there is none.
async fn first_waiting_ms(log: &Log, partition: &TopicPartition, offsets: Range<i64>) -> Result<Option<i64>, Error> {
    if offsets.is_empty() {
        return Ok(None);
    }
    let mut reader = log.reader(&partition.topic).await?;
    reader
        .assign(partition.partition, StartAt::Offset(offsets.start))
        .await?;
    loop {
        let batch = reader.next().await?;
        if let Some(record) = batch.records.iter().find(|record| !is_clock_record(record)) {
            return Ok(Some(record.timestamp_ms));
        }
        // What stood there were the marks of transactions.
        if batch.caught_up {
            return Ok(None);
        }
    }
}
