//! What can go wrong in a pattern. The retry rule asks only [`Error::is_retriable`].

use std::time::Duration;

use crate::log::{self, StartAt, TopicPartition};

/// A pattern could not do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The log refused an operation.
    #[error(transparent)]
    Log(#[from] log::Error),
    /// Two topics whose keys must stand in the same partition have different partition counts.
    #[error(
        "topic {left} has {left_partitions} partitions and topic {right} has {right_partitions}: \
         they must have the same number, or what belongs together parts"
    )]
    PartitionCounts {
        /// One topic.
        left: String,
        /// Its partitions.
        left_partitions: i32,
        /// The other topic.
        right: String,
        /// Its partitions.
        right_partitions: i32,
    },
    /// Topics that the pattern needs do not exist. None is created unasked.
    #[error("topics do not exist and have to be planned and applied first: {}", .0.join(", "))]
    MissingTopics(Vec<String>),
    /// A topic would forget a record before its next attempt.
    #[error("topic {topic} keeps records for {retention:?}, and a record may wait {wait:?} for its next attempt")]
    RetentionTooShort {
        /// The topic.
        topic: String,
        /// How long it keeps records.
        retention: Duration,
        /// How long a record may wait.
        wait: Duration,
    },
    /// The writers of a topic say when its records were written, and it is the log that has to.
    #[error(
        "topic {0} takes the times of records from their writers: it needs message.timestamp.type=LogAppendTime, as planned"
    )]
    WritersTimes(String),
    /// A setting that does not go together with another.
    #[error("{setting}: {reason}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A state of an atomic store cannot be read as this aggregate's. It stands on the log all the same.
    #[error("the state of {key:?} at offset {offset} of {partition} cannot be read: {cause}")]
    UnreadableState {
        /// The partition of the topic of states, which is the store's name.
        partition: TopicPartition,
        /// The key.
        key: String,
        /// Where it stands.
        offset: i64,
        /// What is wrong with it.
        cause: serde_json::Error,
    },
    /// A view is of a newer version than the projection that would write it.
    #[error("the view {view} is of version {live} already, and this projection of version {version}")]
    Superseded {
        /// The view.
        view: String,
        /// The version of the projection.
        version: u32,
        /// The version of the view.
        live: i64,
    },
    /// The database of a projection refused.
    #[error(transparent)]
    Database(#[from] super::projection::DatabaseError),
    /// A cron expression that cannot be read, or that never comes.
    #[error("cron expression {expression:?}: {reason}")]
    Cron {
        /// The expression.
        expression: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A time zone that is not known.
    #[error("there is no time zone {0:?}; names are those of the IANA database, such as Europe/Berlin")]
    TimeZone(String),
    /// No consumer of the group answered a command: none owns the partition now, or it is away.
    #[error("no consumer of group {group} answered within {after_ms} ms; the command may still be carried out")]
    NoAnswer {
        /// The group.
        group: String,
        /// How long it was waited for.
        after_ms: u64,
    },
    /// Dead letters that cannot be redriven: their group takes none back.
    #[error(
        "the dead letters on topic {0} do not come back to their group: they can be looked at and discarded. \
         A projection meets them again when it is built anew"
    )]
    NoWayBack(String),
    /// What is to be replayed is not all there: retention, or somebody, has deleted its beginning.
    #[error("{} of {partition} is wanted, and only what stands from offset {first_kept} on is kept", place(.wanted))]
    Truncated {
        /// The partition.
        partition: TopicPartition,
        /// From where on it is wanted.
        wanted: StartAt,
        /// The first offset that is kept.
        first_kept: i64,
    },
    /// A value on the log is not of the type that was asked for.
    #[error("the value of key {key} cannot be read: {cause}")]
    Decode {
        /// Its key.
        key: String,
        /// What is wrong with it.
        #[source]
        cause: serde_json::Error,
    },
    /// A value cannot be written as JSON, such as a map whose keys are not text.
    #[error("cannot be written as JSON: {0}")]
    Encode(#[from] serde_json::Error),
}

impl Error {
    /// Whether the same call may succeed later with nothing changed.
    pub fn is_retriable(&self) -> bool {
        matches!(self, Self::Log(error) if error.is_retriable())
    }
}

fn place(at: &StartAt) -> String {
    match at {
        StartAt::Start => "the start".to_owned(),
        StartAt::End => "the end".to_owned(),
        StartAt::Offset(offset) => format!("offset {offset}"),
        StartAt::TimeMs(time_ms) => format!("what is not before {time_ms} ms since the Unix epoch"),
    }
}
