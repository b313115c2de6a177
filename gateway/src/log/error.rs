//! What can go wrong with the log. Engines map their own errors to these; the retry rule asks only [`Error::is_retriable`].

use super::TopicPartition;

/// An operation on the log failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The topic does not exist. It is never created silently: see [`crate::log::Log::apply_topics`].
    #[error("topic {0} does not exist")]
    UnknownTopic(String),
    /// The topic has no such partition.
    #[error("partition {0} does not exist")]
    UnknownPartition(TopicPartition),
    /// A topic's name or settings are not allowed, or cannot be changed as wanted.
    #[error("topic {topic}: {reason}")]
    InvalidTopic {
        /// The topic.
        topic: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The record is larger than its topic takes. Nothing of it was written.
    #[error("a record of {size_bytes} bytes is larger than topic {topic} takes ({max_bytes} bytes)")]
    RecordTooLarge {
        /// The topic.
        topic: String,
        /// Size of the record.
        size_bytes: usize,
        /// What the topic takes.
        max_bytes: usize,
    },
    /// The offset is before the first kept record, or behind the end.
    #[error("offset {offset} of {partition} is out of range: {start} to {end} are kept")]
    OffsetOutOfRange {
        /// The partition.
        partition: TopicPartition,
        /// The wanted offset.
        offset: i64,
        /// The first offset that is kept.
        start: i64,
        /// The end: the offset of the next record.
        end: i64,
    },
    /// A newer producer has the same transactional id. This one can do nothing more: make a new one.
    #[error("a newer producer with transactional id {0} has taken over")]
    Fenced(String),
    /// The transaction cannot be committed; it was aborted. The caller may try it again from its beginning.
    #[error("the transaction was aborted: {0}")]
    Aborted(String),
    /// It is not known whether the transaction was committed. The producer has been re-initialised; what the transaction
    /// held must be looked up or be harmless to repeat.
    #[error("the outcome of the transaction is not known: {0}")]
    Indefinite(String),
    /// The member is no longer part of the group's generation, or does not own the partition that it commits.
    #[error("group {group}: no longer a member that owns what it commits")]
    UnknownMember {
        /// The group.
        group: String,
    },
    /// Another member has the same instance id, see [`crate::log::GroupSettings::instance_id`]. This one can do nothing more: make a
    /// new one.
    #[error("group {group}: another member has the instance id {instance_id}, or an answer to this one was lost")]
    FencedMember {
        /// The group.
        group: String,
        /// The instance id.
        instance_id: String,
    },
    /// The log did not answer within the deadline.
    #[error("{operation} got no answer within {after_ms} ms")]
    Timeout {
        /// What was tried.
        operation: &'static str,
        /// How long it was waited for.
        after_ms: u64,
    },
    /// The log cannot be reached, or not enough of it to do this.
    #[error("the log is unavailable: {0}")]
    Unavailable(String),
    /// The credentials are not enough for this. Never retried.
    #[error("not authorised: {0}")]
    Unauthorized(String),
    /// A setting that the engine refuses.
    #[error("setting {name}: {reason}")]
    InvalidSetting {
        /// The setting's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process has the embedded log open.
    #[error("{0} is in use by another process; the embedded log serves one process at a time")]
    Locked(String),
    /// The embedded log's file, or its disk, failed.
    #[error("storage: {0}")]
    Storage(String),
    /// The log, reader or member was closed.
    #[error("closed")]
    Closed,
}

impl Error {
    /// A record without a key is for a topic that keeps the last record of each key.
    pub(crate) fn keyless(topic: &str) -> Self {
        Self::InvalidTopic {
            topic: topic.to_owned(),
            reason: "it is compacted and takes no record without a key".to_owned(),
        }
    }

    /// Whether the same call may succeed later with nothing changed.
    pub fn is_retriable(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Unavailable(_) | Self::Aborted(_))
    }
}
