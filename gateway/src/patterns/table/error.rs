//! What can go wrong with a table.

use super::Revision;
use crate::log::{self, CleanupPolicy};

/// A table could not do its work.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The log refused an operation. After [`log::Error::Timeout`] or [`log::Error::Unavailable`] from a write of a table whose last
    /// write wins, the write may still happen.
    #[error(transparent)]
    Log(#[from] log::Error),
    /// The topic would forget keys, or keep all of their records: its `cleanup.policy` has to be exactly `compact`.
    #[error("topic {topic} has cleanup.policy={}: a table needs exactly compact", .cleanup.as_str())]
    NotCompacted {
        /// The topic.
        topic: String,
        /// What its policy is.
        cleanup: CleanupPolicy,
    },
    /// The expectation of a conditional write did not hold. Nothing was written.
    #[error("{key} is not as expected: {}", .current.map_or_else(|| "it is not there".to_owned(), |at| format!("it is at {at}")))]
    Conflict {
        /// The key.
        key: String,
        /// Where its record stands now; `None`: it has none.
        current: Option<Revision>,
    },
    /// A conditional write on a table that is not [`super::Writes::Checked`].
    #[error("create and update need a table that was opened with Writes::Checked")]
    NotChecked,
    /// It cannot be known whether the write was made, though it was looked for: a later one of the same key hides it, or the table has
    /// ended. Never [`super::Writes::LastWins`].
    #[error("whether {key} was written is not known: {reason}")]
    Unknown {
        /// The key.
        key: String,
        /// Why it is not known.
        reason: String,
    },
    /// The key does not read back from its own text as the same key. Nothing was written.
    #[error("the key {0:?} does not read back as the same key")]
    Key(String),
    /// The value of the key cannot be read as this table's values. It stands there all the same.
    #[error("the value of {key} at {revision} cannot be read: {reason}")]
    Unreadable {
        /// The key.
        key: String,
        /// Where it stands.
        revision: Revision,
        /// What is wrong with it.
        reason: String,
    },
    /// The value cannot be written as JSON, such as a map whose keys are not text. Nothing was written.
    #[error("cannot be written as JSON: {0}")]
    Encode(String),
    /// The topic was given more partitions while a checked table was open, which moves keys. It has to be opened again.
    #[error(
        "topic {topic} has {partitions} partitions now: a checked table has to be opened again before it can write"
    )]
    PartitionsRaised {
        /// The topic.
        topic: String,
        /// How many it has.
        partitions: i32,
    },
    /// The topic was deleted, or made again under its name.
    #[error("topic {0} is no longer the one that the table was opened on")]
    Replaced(String),
}

impl Error {
    /// Whether the same call may succeed later with nothing changed.
    pub fn is_retriable(&self) -> bool {
        matches!(self, Self::Log(error) if error.is_retriable())
    }
}
