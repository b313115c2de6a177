//! Engine: kafka. Not built in yet: every call answers with [`Error::Unavailable`].

use super::{
    Delivery, Error, GroupDescription, GroupMember, GroupSettings, Producer, ProducerRecord, ProducerSettings, Reader,
    Result, StartAt, TopicDescription, TopicPartition, TopicPlan, TopicSpec, TransactionalProducer,
};

/// Where and how the log is kept.
#[derive(Clone, Debug)]
pub struct KafkaSettings {
    /// `bootstrap.servers`.
    pub brokers: String,
}

#[derive(Clone, Debug)]
pub(super) struct KafkaLog;

#[derive(Clone, Debug)]
pub(super) struct KafkaProducer;

#[derive(Clone, Debug)]
pub(super) struct KafkaGroupMetadata;

fn missing<T>() -> Result<T> {
    Err(Error::Unavailable("this engine is not built in yet".to_owned()))
}

impl KafkaLog {
    pub(super) async fn connect(_: KafkaSettings) -> Result<Self> {
        missing()
    }

    pub(super) async fn plan_topics(&self, _: &[TopicSpec]) -> Result<TopicPlan> {
        missing()
    }

    pub(super) async fn apply_topics(&self, _: &TopicPlan) -> Result<()> {
        missing()
    }

    pub(super) async fn describe_topic(&self, _: &str) -> Result<TopicDescription> {
        missing()
    }

    pub(super) async fn delete_topic(&self, _: &str) -> Result<()> {
        missing()
    }

    pub(super) async fn delete_records(&self, _: &TopicPartition, _: i64) -> Result<()> {
        missing()
    }

    pub(super) async fn offset(&self, _: &TopicPartition, _: StartAt) -> Result<i64> {
        missing()
    }

    pub(super) async fn producer(&self, _: ProducerSettings) -> Result<Producer> {
        missing()
    }

    pub(super) async fn transactional_producer(&self, _: &str) -> Result<TransactionalProducer> {
        missing()
    }

    pub(super) async fn reader(&self, _: &str) -> Result<Reader> {
        missing()
    }

    pub(super) async fn join_group(&self, _: GroupSettings) -> Result<GroupMember> {
        missing()
    }

    pub(super) async fn groups(&self) -> Result<Vec<GroupDescription>> {
        missing()
    }

    pub(super) async fn close(&self) {}
}

impl KafkaProducer {
    pub(super) async fn send(&self, _: ProducerRecord) -> Result<Delivery> {
        missing()
    }
}
