//! Appending without transactions. A [`Producer`] hands records to its engine in order; each answers through a [`Delivery`].

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Error, ProducerRecord, Result, TopicPartition, embedded, kafka};

/// Whose acknowledgement an append waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Acks {
    /// Nobody's: the append succeeds when the record is handed over, and may be lost.
    None,
    /// The partition leader's.
    Leader,
    /// All in-sync replicas' (embedded: on disk). With it the producer is idempotent.
    #[default]
    All,
}

/// How a producer's batches are compressed on their way and at the broker. The embedded engine compresses nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// By LZ4: little work for text that repeats itself.
    Lz4,
}

/// How a [`Producer`] behaves. The default is for commands: each goes at once.
#[derive(Clone, Debug)]
pub struct ProducerSettings {
    /// Default [`Acks::All`].
    pub acks: Acks,
    /// How long a record may wait for others to share its batch. Default 0. The embedded engine always commits all that waits.
    pub linger: Duration,
    /// Default [`Compression::None`].
    pub compression: Compression,
    /// Within it a record is acknowledged or fails with [`Error::Timeout`]. Default 30 s.
    pub delivery_timeout: Duration,
}

impl Default for ProducerSettings {
    fn default() -> Self {
        Self {
            acks: Acks::All,
            linger: Duration::ZERO,
            compression: Compression::None,
            delivery_timeout: Duration::from_secs(30),
        }
    }
}

impl ProducerSettings {
    /// For telemetry, many small records of which none is urgent: they wait 50 ms for each other and go in compressed batches. They
    /// are acknowledged as all others are.
    pub fn telemetry() -> Self {
        Self {
            linger: Duration::from_millis(50),
            compression: Compression::Lz4,
            ..Self::default()
        }
    }
}

/// Where a record was appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    /// The partition.
    pub partition: TopicPartition,
    /// The offset; -1 with [`Acks::None`], where it is not known.
    pub offset: i64,
    /// The record's timestamp, in milliseconds since the Unix epoch: on a topic with [`super::Timestamps::LogAppend`] the log's time of
    /// the append. With [`Acks::None`] the writer's.
    pub timestamp_ms: i64,
}

/// The answer to one append, to be awaited. Dropping it does not take the record back.
#[derive(Debug)]
pub struct Delivery(pub(crate) oneshot::Receiver<Result<Appended>>);

impl Future for Delivery {
    type Output = Result<Appended>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // The sender is dropped unanswered only when the engine ends with the record still in its queue.
        Pin::new(&mut self.0)
            .poll(cx)
            .map(|answer| answer.unwrap_or(Err(Error::Closed)))
    }
}

/// Appends records. Clones share one queue, in which records keep the order of their [`Producer::send`] calls.
#[derive(Clone, Debug)]
pub struct Producer {
    pub(super) engine: ProducerEngine,
}

#[derive(Clone, Debug)]
pub(super) enum ProducerEngine {
    Embedded(embedded::EmbeddedProducer),
    Kafka(kafka::KafkaProducer),
}

impl Producer {
    /// Whether the log takes a record, as far as that is known before it is tried. [`Producer::send`] finds out by itself; this is for
    /// who has to know it of several records before the first is sent.
    ///
    /// # Errors
    /// [`Error::UnknownTopic`], [`Error::UnknownPartition`], [`Error::RecordTooLarge`]; [`Error::InvalidTopic`] for a record without a key
    /// on a compacted topic.
    pub async fn check(&self, record: &ProducerRecord) -> Result<()> {
        match &self.engine {
            ProducerEngine::Embedded(producer) => producer.check(record),
            ProducerEngine::Kafka(producer) => producer.check(record).await,
        }
    }

    /// Hands a record over, waiting only while the producer's queue is full, and returns its delivery.
    ///
    /// # Errors
    /// Those of [`Producer::check`], which may also come from the delivery; [`Error::Timeout`] when the queue stays full for the
    /// delivery timeout.
    pub async fn send(&self, record: ProducerRecord) -> Result<Delivery> {
        match &self.engine {
            ProducerEngine::Embedded(producer) => producer.send(record).await,
            ProducerEngine::Kafka(producer) => producer.send(record).await,
        }
    }

    /// Appends a record and waits for its acknowledgement.
    ///
    /// # Errors
    /// Those of [`Producer::send`] and of the delivery: [`Error::Timeout`] or [`Error::Unavailable`] mean that the record may
    /// still have been written.
    pub async fn append(&self, record: ProducerRecord) -> Result<Appended> {
        self.send(record).await?.await
    }
}
