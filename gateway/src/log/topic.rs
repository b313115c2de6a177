//! Topics as they are wanted and as they are, and the plan that leads from one to the other.

use std::fmt;
use std::time::Duration;

/// What becomes of old records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CleanupPolicy {
    /// They are deleted when retention has passed.
    Delete,
    /// The last record of each key is kept.
    Compact,
    /// The last record of each key is kept until retention has passed.
    CompactDelete,
}

impl CleanupPolicy {
    /// Kafka's value of `cleanup.policy`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Delete => "delete",
            Self::Compact => "compact",
            Self::CompactDelete => "compact,delete",
        }
    }
}

/// A topic as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicSpec {
    /// The name: 1 to 249 of `A-Za-z0-9._-`.
    pub name: String,
    /// Number of partitions.
    pub partitions: i32,
    /// Whether the partition count must stay as it is, because keys or tokens would move.
    pub fixed_partitions: bool,
    /// Copies of each record; `None`: the broker's default. The embedded engine has one.
    pub replication: Option<i16>,
    /// What becomes of old records.
    pub cleanup: CleanupPolicy,
    /// How long records are kept; `None`: for ever. A compacted topic without `Delete` ignores it.
    pub retention: Option<Duration>,
    /// Largest record in bytes (`max.message.bytes`).
    pub max_message_bytes: usize,
}

impl TopicSpec {
    /// Kafka's default of `max.message.bytes`.
    pub const DEFAULT_MAX_MESSAGE_BYTES: usize = 1_048_588;

    /// A topic with retention of 7 days (Kafka's default) and records of up to 1 MiB.
    pub fn new(name: impl Into<String>, partitions: i32) -> Self {
        Self {
            name: name.into(),
            partitions,
            fixed_partitions: false,
            replication: None,
            cleanup: CleanupPolicy::Delete,
            retention: Some(Duration::from_secs(7 * 24 * 60 * 60)),
            max_message_bytes: Self::DEFAULT_MAX_MESSAGE_BYTES,
        }
    }
}

/// The identity of a topic: another one for a topic that was deleted and made again under the same name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TopicId(pub [u8; 16]);

impl fmt::Debug for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// A topic as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicDescription {
    /// The name.
    pub name: String,
    /// The identity.
    pub id: TopicId,
    /// Number of partitions.
    pub partitions: i32,
    /// What becomes of old records.
    pub cleanup: CleanupPolicy,
    /// How long records are kept; `None`: for ever.
    pub retention: Option<Duration>,
    /// Largest record in bytes.
    pub max_message_bytes: usize,
}

/// One step of a [`TopicPlan`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TopicChange {
    /// The topic does not exist and would be created.
    Create(TopicSpec),
    /// Partitions would be added.
    AddPartitions {
        /// The topic.
        topic: String,
        /// Partitions now.
        from: i32,
        /// Partitions then.
        to: i32,
    },
    /// A topic setting would be changed.
    Alter {
        /// The topic.
        topic: String,
        /// Kafka's name of the setting, such as `retention.ms`.
        setting: &'static str,
        /// The value now.
        from: String,
        /// The value then.
        to: String,
    },
}

impl fmt::Display for TopicChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create(spec) => write!(
                f,
                "create topic {} ({} partitions, cleanup {})",
                spec.name,
                spec.partitions,
                spec.cleanup.as_str()
            ),
            Self::AddPartitions { topic, from, to } => write!(f, "topic {topic}: partitions {from} -> {to}"),
            Self::Alter {
                topic,
                setting,
                from,
                to,
            } => write!(f, "topic {topic}: {setting} {from} -> {to}"),
        }
    }
}

/// What would have to change for topics to be as wanted. Empty when nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TopicPlan {
    /// The steps, in the order in which they are carried out.
    pub changes: Vec<TopicChange>,
}
