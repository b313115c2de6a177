//! The event log: one narrow interface in Kafka's words, two engines.
//!
//! Topics have partitions; a record's partition is murmur2 of its key; an append answers with the offset. [`Log`] administers
//! topics and makes the four things that touch records:
//! [`Producer`] appends, [`TransactionalProducer`] appends to several topics and commits consumed offsets all at once,
//! [`Reader`] reads chosen partitions in no group, [`GroupMember`] shares a topic's partitions with the other members.
//!
//! The engines are [`embedded`] (a SQLite file, one process) and [`kafka`]. What the interface means is defined by the
//! conformance suite (`tests/tests/conformance`), which runs case for case against both.

pub mod embedded;
mod error;
mod group;
pub mod kafka;
mod partitioner;
mod producer;
mod reader;
mod record;
mod topic;
mod transaction;

use std::collections::BTreeMap;
use std::time::Duration;

pub use error::Error;
pub use group::{
    CommittedOffset, GroupDescription, GroupEvent, GroupMember, GroupMetadata, GroupProtocol, GroupSettings,
    MemberDescription, PartitionLag,
};
pub use partitioner::partition_for_key;
pub use producer::{Acks, Appended, Compression, Delivery, Producer, ProducerSettings};
pub use reader::{Reader, StartAt};
pub use record::{Batch, Headers, NextOffset, ProducerRecord, Record, TopicPartition};
pub use topic::{CleanupPolicy, Timestamps, TopicChange, TopicDescription, TopicId, TopicPlan, TopicSpec};
pub use transaction::{Transaction, TransactionalProducer};

/// What log operations return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A handle to the event log. Clones are cheap and share the engine.
#[derive(Clone, Debug)]
pub struct Log {
    engine: Engine,
}

#[derive(Clone, Debug)]
enum Engine {
    Embedded(embedded::EmbeddedLog),
    Kafka(kafka::KafkaLog),
}

impl Log {
    /// Opens, or creates, the embedded log in a folder. One process at a time may have it open.
    ///
    /// # Errors
    /// [`Error::Locked`] when another process has it open, [`Error::Storage`] when the file cannot be used.
    pub async fn open_embedded(settings: embedded::EmbeddedSettings) -> Result<Self> {
        Ok(Self {
            engine: Engine::Embedded(embedded::EmbeddedLog::open(settings).await?),
        })
    }

    /// Connects to Apache Kafka, or any broker of its protocol.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when no broker answers within the request deadline, [`Error::InvalidSetting`] for a setting that
    /// librdkafka refuses.
    pub async fn connect_kafka(settings: kafka::KafkaSettings) -> Result<Self> {
        Ok(Self {
            engine: Engine::Kafka(kafka::KafkaLog::connect(settings).await?),
        })
    }

    /// Compares the wanted topics with those that exist and says what would have to change. Changes nothing.
    ///
    /// # Errors
    /// [`Error::InvalidTopic`] for a change that would break readers: fewer partitions, or another partition count of a topic
    /// whose keys must not move ([`TopicSpec::fixed_partitions`]).
    pub async fn plan_topics(&self, wanted: &[TopicSpec]) -> Result<TopicPlan> {
        match &self.engine {
            Engine::Embedded(log) => log.plan_topics(wanted).await,
            Engine::Kafka(log) => log.plan_topics(wanted).await,
        }
    }

    /// Carries out a plan. Topics that another process created meanwhile are left as they are.
    pub async fn apply_topics(&self, plan: &TopicPlan) -> Result<()> {
        match &self.engine {
            Engine::Embedded(log) => log.apply_topics(plan).await,
            Engine::Kafka(log) => log.apply_topics(plan).await,
        }
    }

    /// What the log knows of a topic: its identity, partitions and cleanup policy.
    ///
    /// # Errors
    /// [`Error::UnknownTopic`].
    pub async fn describe_topic(&self, topic: &str) -> Result<TopicDescription> {
        match &self.engine {
            Engine::Embedded(log) => log.describe_topic(topic).await,
            Engine::Kafka(log) => log.describe_topic(topic).await,
        }
    }

    /// All topics that the log lets this process see, but Kafka's own (`__…`), with their partition counts.
    pub async fn topics(&self) -> Result<BTreeMap<String, i32>> {
        match &self.engine {
            Engine::Embedded(log) => Ok(log.partition_counts()),
            Engine::Kafka(log) => log.partition_counts().await,
        }
    }

    /// Those of [`Log::topics`] that are compacted, with or without deleting what is old: of each of their keys the last record is kept.
    pub async fn compacted_topics(&self) -> Result<BTreeMap<String, i32>> {
        match &self.engine {
            Engine::Embedded(log) => Ok(log.compacted_topics()),
            Engine::Kafka(log) => log.compacted_topics().await,
        }
    }

    /// Deletes a topic with all its records and the offsets committed for it.
    ///
    /// # Errors
    /// [`Error::UnknownTopic`].
    pub async fn delete_topic(&self, topic: &str) -> Result<()> {
        match &self.engine {
            Engine::Embedded(log) => log.delete_topic(topic).await,
            Engine::Kafka(log) => log.delete_topic(topic).await,
        }
    }

    /// Deletes the records of a partition before an offset, as Kafka's DeleteRecords does.
    ///
    /// # Errors
    /// [`Error::OffsetOutOfRange`] when the offset lies behind the end.
    pub async fn delete_records(&self, partition: &TopicPartition, before: i64) -> Result<()> {
        match &self.engine {
            Engine::Embedded(log) => log.delete_records(partition, before).await,
            Engine::Kafka(log) => log.delete_records(partition, before).await,
        }
    }

    /// The offset that a [`StartAt`] stands for now: the first kept, the end (of what is committed), or the first whose
    /// timestamp is not before a time (the end if there is none). [`StartAt::Offset`] is returned as it is.
    ///
    /// # Errors
    /// [`Error::UnknownTopic`], [`Error::UnknownPartition`].
    pub async fn offset(&self, partition: &TopicPartition, at: StartAt) -> Result<i64> {
        let offsets = self.offsets(std::slice::from_ref(partition), at).await?;
        let offset = offsets.first().copied();
        offset.ok_or_else(|| Error::UnknownPartition(partition.clone()))
    }

    /// Like [`Log::offset`], of many partitions at once and in their order; on Kafka with one request to each broker that leads some.
    ///
    /// # Errors
    /// Those of [`Log::offset`], when one of the partitions has one.
    pub async fn offsets(&self, partitions: &[TopicPartition], at: StartAt) -> Result<Vec<i64>> {
        match &self.engine {
            Engine::Embedded(log) => log.offsets(partitions, at).await,
            Engine::Kafka(log) => log.offsets(partitions, at).await,
        }
    }

    /// A producer without transactions. One serves a whole process: it is cheap to clone.
    pub async fn producer(&self, settings: ProducerSettings) -> Result<Producer> {
        match &self.engine {
            Engine::Embedded(log) => log.producer(settings).await,
            Engine::Kafka(log) => log.producer(settings).await,
        }
    }

    /// A producer of transactions under a transactional id. It fences every earlier producer with the same id.
    pub async fn transactional_producer(&self, transactional_id: &str) -> Result<TransactionalProducer> {
        match &self.engine {
            Engine::Embedded(log) => log.transactional_producer(transactional_id).await,
            Engine::Kafka(log) => log.transactional_producer(transactional_id, None).await,
        }
    }

    /// Like [`Log::transactional_producer`], for transactions that are large: each may be open for `timeout`. When this process
    /// dies, one that is open holds back the readers of its partitions for as long, or until its id is used again. The embedded
    /// engine has no such limit, and holds nobody back.
    pub async fn transactional_producer_within(
        &self,
        transactional_id: &str,
        timeout: Duration,
    ) -> Result<TransactionalProducer> {
        match &self.engine {
            Engine::Embedded(log) => log.transactional_producer(transactional_id).await,
            Engine::Kafka(log) => log.transactional_producer(transactional_id, Some(timeout)).await,
        }
    }

    /// A reader of one topic, in no group, with nothing assigned yet. It sees committed records only.
    ///
    /// # Errors
    /// [`Error::UnknownTopic`].
    pub async fn reader(&self, topic: &str) -> Result<Reader> {
        match &self.engine {
            Engine::Embedded(log) => log.reader(topic).await,
            Engine::Kafka(log) => log.reader(topic).await,
        }
    }

    /// Joins a consumer group. It sees committed records only.
    ///
    /// # Errors
    /// [`Error::UnknownTopic`].
    pub async fn join_group(&self, settings: GroupSettings) -> Result<GroupMember> {
        match &self.engine {
            Engine::Embedded(log) => log.join_group(settings).await,
            Engine::Kafka(log) => log.join_group(settings).await,
        }
    }

    /// The consumer groups that have members or committed offsets, with their lag. Of groups of other programs too.
    pub async fn groups(&self) -> Result<Vec<GroupDescription>> {
        match &self.engine {
            Engine::Embedded(log) => log.groups().await,
            Engine::Kafka(log) => log.groups().await,
        }
    }

    /// Ends the engine: what producers have accepted is written first, then readers and members end with
    /// [`Error::Closed`].
    pub async fn close(&self) {
        match &self.engine {
            Engine::Embedded(log) => log.close().await,
            Engine::Kafka(log) => log.close().await,
        }
    }
}
