//! Records and where they stand: [`ProducerRecord`] on the way in, [`Record`] and [`Batch`] on the way out.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

/// A partition of a topic.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicPartition {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The partition, from 0.
    pub partition: i32,
}

impl TopicPartition {
    /// Partition `partition` of `topic`.
    pub fn new(topic: impl Into<Arc<str>>, partition: i32) -> Self {
        Self {
            topic: topic.into(),
            partition,
        }
    }
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.topic, self.partition)
    }
}

/// The offset at which reading goes on: last processed + 1. It is what consumers commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NextOffset(pub i64);

impl NextOffset {
    /// The offset to go on from when the record at `offset` is done.
    pub fn after(offset: i64) -> Self {
        Self(offset + 1)
    }
}

/// Header names and values in order. A name may repeat, as in Kafka.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(Arc<str>, Bytes)>);

impl Headers {
    /// No headers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a header behind those that are there.
    pub fn push(&mut self, name: impl Into<Arc<str>>, value: impl Into<Bytes>) {
        self.0.push((name.into(), value.into()));
    }

    /// Adds a header and returns the headers, for building them in one expression.
    #[must_use]
    pub fn with(mut self, name: impl Into<Arc<str>>, value: impl Into<Bytes>) -> Self {
        self.push(name, value);
        self
    }

    /// The value of the last header of this name, the one that counts where only one is expected.
    pub fn last(&self, name: &str) -> Option<&Bytes> {
        self.0
            .iter()
            .rev()
            .find(|(n, _)| n.as_ref() == name)
            .map(|(_, value)| value)
    }

    /// The value of the last header of this name, if it is UTF-8.
    pub fn last_str(&self, name: &str) -> Option<&str> {
        self.last(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Names and values in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Bytes)> {
        self.0.iter().map(|(name, value)| (name.as_ref(), value))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A record to append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProducerRecord {
    /// The topic.
    pub topic: Arc<str>,
    /// The partition; `None`: chosen by the key ([`crate::log::partition_for_key`]), or in turn for a record without one.
    pub partition: Option<i32>,
    /// The key. Records of one key stay in order; on a compacted topic the last of a key is kept.
    pub key: Option<Bytes>,
    /// The value; `None` is a tombstone on a compacted topic.
    pub value: Option<Bytes>,
    /// The headers.
    pub headers: Headers,
    /// Milliseconds since the Unix epoch; `None`: the time of the append.
    pub timestamp_ms: Option<i64>,
}

impl ProducerRecord {
    /// A record for `topic` with neither key nor value.
    pub fn to(topic: impl Into<Arc<str>>) -> Self {
        Self {
            topic: topic.into(),
            partition: None,
            key: None,
            value: None,
            headers: Headers::new(),
            timestamp_ms: None,
        }
    }

    /// Sets the key.
    #[must_use]
    pub fn key(mut self, key: impl Into<Bytes>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Sets the value.
    #[must_use]
    pub fn value(mut self, value: impl Into<Bytes>) -> Self {
        self.value = Some(value.into());
        self
    }

    /// Sets the partition.
    #[must_use]
    pub fn partition(mut self, partition: i32) -> Self {
        self.partition = Some(partition);
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: impl Into<Arc<str>>, value: impl Into<Bytes>) -> Self {
        self.headers.push(name, value);
        self
    }

    /// Sets the timestamp, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn timestamp_ms(mut self, timestamp_ms: i64) -> Self {
        self.timestamp_ms = Some(timestamp_ms);
        self
    }

    /// Bytes of key, value and headers: what counts against the topic's `max.message.bytes`.
    pub fn size_bytes(&self) -> usize {
        size_bytes(&self.key, &self.value, &self.headers)
    }
}

/// A record as it was read. Its partition is that of the [`Batch`] around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its place in the partition.
    pub offset: i64,
    /// Milliseconds since the Unix epoch.
    pub timestamp_ms: i64,
    /// The key.
    pub key: Option<Bytes>,
    /// The value; `None` is a tombstone on a compacted topic.
    pub value: Option<Bytes>,
    /// The headers.
    pub headers: Headers,
}

impl Record {
    /// Bytes of key, value and headers.
    pub fn size_bytes(&self) -> usize {
        size_bytes(&self.key, &self.value, &self.headers)
    }
}

fn size_bytes(key: &Option<Bytes>, value: &Option<Bytes>, headers: &Headers) -> usize {
    let headers: usize = headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    key.as_ref().map_or(0, Bytes::len) + value.as_ref().map_or(0, Bytes::len) + headers
}

/// What one read of one partition brought, in order. It may be empty: then it says only how far the reader has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The partition of all its records.
    pub partition: TopicPartition,
    /// The records in the order of their offsets, which may have gaps.
    pub records: Vec<Record>,
    /// Where reading goes on. It can lie further than one behind the last record: transaction markers, aborted and compacted
    /// records take offsets too.
    pub next_offset: NextOffset,
    /// Whether the end of the partition was reached with this batch: nothing committed stood behind it when it was read.
    /// Said once each time the end is reached.
    pub caught_up: bool,
}
