//! Topics as they are wanted and as they are, and the plan that leads from one to the other.

use std::fmt;
use std::time::Duration;

use super::{Error, Result};

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

    /// Whether the last record of each key is kept, for some time at least.
    pub fn compacts(self) -> bool {
        matches!(self, Self::Compact | Self::CompactDelete)
    }

    /// The policy that Kafka writes so; the order of the two words does not matter. `None` for anything else.
    pub fn parse(value: &str) -> Option<Self> {
        match value {
            "delete" => Some(Self::Delete),
            "compact" => Some(Self::Compact),
            "compact,delete" | "delete,compact" => Some(Self::CompactDelete),
            _ => None,
        }
    }
}

/// Whose clock says when a record was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Timestamps {
    /// The writer's, or whatever time it gives ([`super::ProducerRecord::timestamp_ms`]).
    #[default]
    Create,
    /// The log's, when it appends the record. What the writer says does not count.
    LogAppend,
}

impl Timestamps {
    /// Kafka's value of `message.timestamp.type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "CreateTime",
            Self::LogAppend => "LogAppendTime",
        }
    }

    /// What Kafka writes so; `None` for anything else.
    pub fn parse(value: &str) -> Option<Self> {
        match value {
            "CreateTime" => Some(Self::Create),
            "LogAppendTime" => Some(Self::LogAppend),
            _ => None,
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
    /// Whose clock says when a record was written (`message.timestamp.type`). Records keep the time that they have when it is changed.
    pub timestamps: Timestamps,
}

impl TopicSpec {
    /// Kafka's default of `max.message.bytes`.
    pub const DEFAULT_MAX_MESSAGE_BYTES: usize = 1_048_588;

    /// A topic with retention of 7 days (Kafka's default), records of up to 1 MiB, and their writers' times.
    pub fn new(name: impl Into<String>, partitions: i32) -> Self {
        Self {
            name: name.into(),
            partitions,
            fixed_partitions: false,
            replication: None,
            cleanup: CleanupPolicy::Delete,
            retention: Some(Duration::from_secs(7 * 24 * 60 * 60)),
            max_message_bytes: Self::DEFAULT_MAX_MESSAGE_BYTES,
            timestamps: Timestamps::default(),
        }
    }

    /// Whether Kafka would take it.
    pub(super) fn check(&self) -> Result<()> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let reason = if self.name.is_empty() || self.name.len() > 249 {
            "a name has 1 to 249 characters"
        } else if self.name == "." || self.name == ".." || !self.name.bytes().all(legal) {
            "a name is made of A-Za-z0-9._- and is neither . nor .."
        } else if self.partitions < 1 {
            "at least one partition is needed"
        } else if self.max_message_bytes == 0 || i32::try_from(self.max_message_bytes).is_err() {
            "max.message.bytes is 1 to 2147483647"
        } else {
            return Ok(());
        };
        Err(self.invalid(reason))
    }

    /// What would have to change about a topic that exists.
    pub(super) fn changes_to(&self, topic: &TopicDescription) -> Result<Vec<TopicChange>> {
        let mut changes = Vec::new();
        if self.partitions < topic.partitions {
            return Err(self.invalid(&format!(
                "it has {} partitions, which cannot become fewer",
                topic.partitions
            )));
        }
        if self.partitions > topic.partitions {
            if self.fixed_partitions {
                let reason = format!(
                    "its {} partitions cannot become {}: keys would move",
                    topic.partitions, self.partitions
                );
                return Err(self.invalid(&reason));
            }
            let (from, to) = (topic.partitions, self.partitions);
            changes.push(TopicChange::AddPartitions {
                topic: self.name.clone(),
                from,
                to,
            });
        }
        let retention = |retention: Option<Duration>| retention.map_or("-1".to_owned(), |d| d.as_millis().to_string());
        for (setting, from, to) in [
            (
                "cleanup.policy",
                topic.cleanup.as_str().to_owned(),
                self.cleanup.as_str().to_owned(),
            ),
            ("retention.ms", retention(topic.retention), retention(self.retention)),
            (
                "max.message.bytes",
                topic.max_message_bytes.to_string(),
                self.max_message_bytes.to_string(),
            ),
            (
                "message.timestamp.type",
                topic.timestamps.as_str().to_owned(),
                self.timestamps.as_str().to_owned(),
            ),
        ] {
            let is_unused = setting == "retention.ms" && self.cleanup == CleanupPolicy::Compact;
            if from != to && !is_unused {
                changes.push(TopicChange::Alter {
                    topic: self.name.clone(),
                    setting,
                    from,
                    to,
                });
            }
        }
        Ok(changes)
    }

    fn invalid(&self, reason: &str) -> Error {
        Error::InvalidTopic {
            topic: self.name.clone(),
            reason: reason.to_owned(),
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
    /// Whose clock says when a record was written.
    pub timestamps: Timestamps,
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
