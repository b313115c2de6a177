//! Whether a job that the view does not have was submitted all the same: its registration stands on the commands topic, at the
//! time that its id carries.
//!
//! A submitter is answered before the job store has seen the job. While the store is behind, or nobody owns the partition, the
//! view must not call such a job unknown.

use uuid::Uuid;

use super::Job;
use crate::log::{self, Log, Record, StartAt, partition_for_key};
use crate::server::config::TopicsConfig;
use crate::server::job_store::{JobCommand, new_state};

/// A registration is written after the id was made, by the same clock unless that was set back meanwhile.
const BEFORE_MS: i64 = 1000;

/// How long after the id was made the registration may have been written: a large job is long on its way.
const AFTER_MS: i64 = 300_000;

/// Commands that are looked at before a job is taken for unknown.
const MAX_SCANNED: usize = 100_000;

/// The job as it was registered, if it was.
///
/// # Errors
/// The log cannot be read.
pub(super) async fn find(log: &Log, topics: &TopicsConfig, id: Uuid, submitted_ms: i64) -> log::Result<Option<Job>> {
    let topic = topics.job_commands();
    let key = id.to_string();
    let partitions = log.describe_topic(&topic).await?.partitions;
    let mut reader = log.reader(&topic).await?;
    let start = StartAt::TimeMs(submitted_ms.saturating_sub(BEFORE_MS));
    reader
        .assign(partition_for_key(key.as_bytes(), partitions), start)
        .await?;
    let last_ms = submitted_ms.saturating_add(AFTER_MS);
    let mut scanned = 0;
    loop {
        let batch = reader.next().await?;
        if let Some(job) = batch.records.iter().find_map(|record| registered(record, &key)) {
            return Ok(Some(job));
        }
        scanned += batch.records.len();
        let is_past = batch.records.last().is_some_and(|record| record.timestamp_ms > last_ms);
        if batch.caught_up || is_past || scanned >= MAX_SCANNED {
            return Ok(None);
        }
    }
}

fn registered(record: &Record, key: &str) -> Option<Job> {
    if record.key.as_deref() != Some(key.as_bytes()) {
        return None;
    }
    let command: JobCommand = serde_json::from_slice(record.value.as_ref()?).ok()?;
    Some(Job {
        state: new_state(command)?,
        updated_ms: record.timestamp_ms,
    })
}
