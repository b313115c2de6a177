//! What a table has under a key, and where it stands.

use std::fmt;
use std::hash::Hash;
use std::str::FromStr;
use std::sync::Arc;

/// What can be a table's key: whatever has a text that reads back as the same key. On the log it is that text.
pub trait Key: Clone + Eq + Hash + fmt::Display + FromStr + Send + Sync + 'static {}

impl<T: Clone + Eq + Hash + fmt::Display + FromStr + Send + Sync + 'static> Key for T {}

/// Where a write stands on the log. Revisions of one key grow; those of two keys say nothing of their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision {
    pub(super) partition: i32,
    pub(super) offset: i64,
}

impl Revision {
    /// The partition of the table's topic.
    pub fn partition(self) -> i32 {
        self.partition
    }

    /// The offset in it.
    pub fn offset(self) -> i64 {
        self.offset
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.partition, self.offset)
    }
}

/// A value and its revision.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry<V> {
    /// The value.
    pub value: Arc<V>,
    /// Where it stands.
    pub revision: Revision,
}

impl<V> Clone for Entry<V> {
    fn clone(&self) -> Self {
        Self {
            value: self.value.clone(),
            revision: self.revision,
        }
    }
}
