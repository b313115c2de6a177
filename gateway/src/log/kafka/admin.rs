//! Topics, offsets and groups, asked of and changed at the brokers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::Offset;
use rdkafka::TopicPartitionList;
use rdkafka::admin::{
    AdminOptions, ConfigResource, NewPartitions, NewTopic, OwnedResourceSpecifier, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::Client;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::groups::GroupMemberInfo;
use rdkafka::metadata::Metadata;

use super::admin_request::{self, GroupOffsets};
use super::assignment::assigned_partitions;
use super::error::Resource;
use super::event::LogContext;
use super::{KafkaLog, blocking};
use crate::log::{
    CleanupPolicy, Error, GroupDescription, MemberDescription, Result, StartAt, Timestamps, TopicChange,
    TopicDescription, TopicPartition, TopicPlan, TopicSpec,
};

const CLEANUP: &str = "cleanup.policy";
const RETENTION: &str = "retention.ms";
const MAX_MESSAGE: &str = "max.message.bytes";
const TIMESTAMPS: &str = "message.timestamp.type";

/// How long one request may take before it is sent anew: one that was on its way to a broker that went down waits out its time though
/// the broker is back, or another one does its work.
const ONE_TRY: Duration = Duration::from_secs(2);
/// Between two looks at whether a change of topics has reached the brokers.
const PROPAGATION_STEP: Duration = Duration::from_millis(20);

impl KafkaLog {
    pub(in crate::log) async fn plan_topics(&self, wanted: &[TopicSpec]) -> Result<TopicPlan> {
        let mut plan = TopicPlan::default();
        for spec in wanted {
            spec.check()?;
            match self.describe_topic(&spec.name).await {
                Err(Error::UnknownTopic(_)) => plan.changes.push(TopicChange::Create(spec.clone())),
                Err(error) => return Err(error),
                Ok(found) => plan.changes.extend(spec.changes_to(&found)?),
            }
        }
        Ok(plan)
    }

    pub(in crate::log) async fn apply_topics(&self, plan: &TopicPlan) -> Result<()> {
        for change in &plan.changes {
            match change {
                TopicChange::Create(spec) => self.create_topic(spec).await?,
                TopicChange::AddPartitions { topic, to, .. } => self.add_partitions(topic, *to).await?,
                TopicChange::Alter { topic, setting, to, .. } => self.alter_topic(topic, setting, to).await?,
            }
        }
        Ok(())
    }

    pub(in crate::log) async fn describe_topic(&self, topic: &str) -> Result<TopicDescription> {
        let deadline = Instant::now() + self.0.settings.request_timeout;
        loop {
            let within = deadline.saturating_duration_since(Instant::now()).min(ONE_TRY);
            match self.try_describe_topic(topic, within).await {
                Err(error) if error.is_retriable() && Instant::now() + PROPAGATION_STEP < deadline => {
                    tokio::time::sleep(PROPAGATION_STEP).await;
                    let (log, topic) = (self.clone(), topic.to_owned());
                    blocking(move || look_around(log.0.admin.inner(), Some(&topic))).await?;
                }
                answer => return answer,
            }
        }
    }

    async fn topic_settings(&self, topic: &str, within: Duration) -> Result<ConfigResource> {
        let attempt = self.attempt("describe", Resource::Topic(topic));
        let resource = [ResourceSpecifier::Topic(topic)];
        let options = AdminOptions::new().request_timeout(Some(within));
        let found = self.0.admin.describe_configs(&resource, &options).await;
        found
            .map_err(|error| attempt.error(&error))?
            .pop()
            .ok_or_else(|| attempt.code(RDKafkaErrorCode::UnknownTopicOrPartition))?
            .map_err(|code| attempt.code(code))
    }

    async fn try_describe_topic(&self, topic: &str, within: Duration) -> Result<TopicDescription> {
        let attempt = self.attempt("describe", Resource::Topic(topic));
        let (log, name) = (self.clone(), topic.to_owned());
        let (id, partitions) = blocking(move || admin_request::describe_topic(log.0.admin.inner(), &name, within))
            .await?
            .map_err(|error| attempt.error(&error))?;
        let settings = self.topic_settings(topic, within).await?;
        let value = |name: &str| {
            settings
                .get(name)
                .and_then(|entry| entry.value.as_deref())
                .unwrap_or_default()
        };
        // A topic that is deleted between the two requests has no settings.
        let max_message_bytes = value(MAX_MESSAGE)
            .parse()
            .map_err(|_| attempt.code(RDKafkaErrorCode::UnknownTopicOrPartition))?;
        Ok(TopicDescription {
            name: topic.to_owned(),
            id,
            partitions,
            cleanup: CleanupPolicy::parse(value(CLEANUP)).unwrap_or(CleanupPolicy::Delete),
            retention: value(RETENTION).parse().ok().map(Duration::from_millis),
            max_message_bytes,
            timestamps: Timestamps::parse(value(TIMESTAMPS)).unwrap_or_default(),
        })
    }

    pub(in crate::log) async fn partition_counts(&self) -> Result<BTreeMap<String, i32>> {
        let log = self.clone();
        let mut topics = blocking(move || log.read_partition_counts()).await??;
        topics.retain(|name, _| !name.starts_with("__"));
        Ok(topics)
    }

    pub(in crate::log) async fn compacted_topics(&self) -> Result<BTreeMap<String, i32>> {
        let mut topics = self.partition_counts().await?;
        if topics.is_empty() {
            return Ok(topics);
        }
        let attempt = self.attempt("describe topics of", Resource::Cluster);
        let asked: Vec<_> = topics.keys().map(|topic| ResourceSpecifier::Topic(topic)).collect();
        let answer = self.0.admin.describe_configs(&asked, &self.options()).await;
        let mut compacted = BTreeSet::new();
        // A topic that is deleted meanwhile has no settings.
        for settings in answer.map_err(|error| attempt.error(&error))?.into_iter().flatten() {
            let cleanup = settings.get(CLEANUP).and_then(|entry| entry.value.as_deref());
            if let OwnedResourceSpecifier::Topic(topic) = &settings.specifier
                && cleanup
                    .and_then(CleanupPolicy::parse)
                    .is_some_and(CleanupPolicy::compacts)
            {
                compacted.insert(topic.clone());
            }
        }
        topics.retain(|topic, _| compacted.contains(topic));
        Ok(topics)
    }

    pub(in crate::log) async fn delete_topic(&self, topic: &str) -> Result<()> {
        let attempt = self.attempt("delete", Resource::Topic(topic));
        let answer = self
            .0
            .admin
            .delete_topics(&[topic], &self.options())
            .await
            .map_err(|error| attempt.error(&error))?;
        self.forget_topic(topic);
        if let Some(Err((_, code))) = answer.into_iter().next() {
            return Err(attempt.code(code));
        }
        self.wait_for_topic("delete", topic, |partitions| partitions.is_none())
            .await
    }

    pub(in crate::log) async fn delete_records(&self, partition: &TopicPartition, before: i64) -> Result<()> {
        let attempt = self.attempt("delete records of", Resource::Partition(partition));
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&partition.topic, partition.partition, Offset::Offset(before))
            .map_err(|error| attempt.error(&error))?;
        let answer = self.0.admin.delete_records(&list, &self.options()).await;
        let failed = match answer {
            Ok(list) => list
                .elements()
                .first()
                .and_then(|element| element.error().err())
                .and_then(|error| error.rdkafka_error_code()),
            Err(KafkaError::AdminOp(code)) => Some(code),
            Err(error) => return Err(attempt.error(&error)),
        };
        match failed {
            None => Ok(()),
            Some(RDKafkaErrorCode::OffsetOutOfRange) => Err(self.out_of_range(partition, before).await?),
            Some(code) => Err(attempt.code(code)),
        }
    }

    pub(in crate::log) async fn offset(&self, partition: &TopicPartition, at: StartAt) -> Result<i64> {
        let offset = self.offsets(std::slice::from_ref(partition), at).await?.pop();
        offset.ok_or_else(|| Error::UnknownPartition(partition.clone()))
    }

    pub(in crate::log) async fn offsets(&self, partitions: &[TopicPartition], at: StartAt) -> Result<Vec<i64>> {
        let wanted = match at {
            StartAt::Start => Offset::Beginning,
            StartAt::End => Offset::End,
            StartAt::Offset(offset) => return Ok(vec![offset; partitions.len()]),
            StartAt::TimeMs(time_ms) => Offset::Offset(time_ms.max(0)),
        };
        let (log, of) = (self.clone(), partitions.to_vec());
        blocking(move || {
            let mut offsets = log.read_offsets(&of, wanted)?;
            // -1: no record has that timestamp or a later one.
            if offsets.contains(&-1) {
                let ends = log.read_offsets(&of, Offset::End)?;
                for (offset, end) in offsets.iter_mut().zip(ends) {
                    *offset = if *offset == -1 { end } else { *offset };
                }
            }
            Ok(offsets)
        })
        .await?
    }

    pub(in crate::log) async fn groups(&self) -> Result<Vec<GroupDescription>> {
        let log = self.clone();
        blocking(move || log.read_groups()).await?
    }

    /// The offsets of the partitions, in order, that a time, `Beginning` or `End` stands for; -1 for a time behind the last
    /// record. Blocks.
    pub(super) fn read_offsets(&self, partitions: &[TopicPartition], wanted: Offset) -> Result<Vec<i64>> {
        self.offsets_by(self.0.admin.inner(), partitions, wanted)
    }

    /// The end of a partition with what open transactions have written. Blocks.
    pub(super) fn uncommitted_end(&self, partition: &TopicPartition) -> Result<i64> {
        let attempt = self.attempt("ask for the end of", Resource::Partition(partition));
        let client = self.consumer().map_err(|error| attempt.error(&error))?;
        let end = self.offsets_by(client, std::slice::from_ref(partition), Offset::End)?;
        end.first()
            .copied()
            .ok_or_else(|| Error::UnknownPartition(partition.clone()))
    }

    /// The client that is a consumer's.
    fn consumer(&self) -> std::result::Result<&Client<LogContext>, KafkaError> {
        let consumer = match self.0.consumer.get() {
            Some(consumer) => consumer,
            None => {
                let made = BaseConsumer::from_config_and_context(&self.0.settings.asking_consumer(), LogContext)?;
                let made = Arc::new(made);
                self.0.bootstrap.keep(&made);
                self.0.consumer.get_or_init(|| made)
            }
        };
        Ok(consumer.client())
    }

    fn offsets_by(
        &self,
        client: &Client<LogContext>,
        partitions: &[TopicPartition],
        wanted: Offset,
    ) -> Result<Vec<i64>> {
        let Some(first) = partitions.first() else {
            return Ok(Vec::new());
        };
        let attempt = self.attempt("ask for an offset of", Resource::Partition(first));
        // The broker refuses to be asked twice for the same.
        let distinct: BTreeSet<_> = partitions.iter().collect();
        let deadline = Instant::now() + self.0.settings.request_timeout;
        loop {
            let within = deadline.saturating_duration_since(Instant::now()).min(ONE_TRY);
            let failed = match try_offsets(client, &distinct, wanted, within) {
                Ok(found) => return Ok(partitions.iter().map(|partition| found[partition]).collect()),
                Err(error) => error,
            };
            // While it knows of no leader librdkafka answers at once: go on until the time is over.
            let passing = matches!(
                failed.rdkafka_error_code(),
                Some(
                    RDKafkaErrorCode::LeaderNotAvailable
                        | RDKafkaErrorCode::NotLeaderForPartition
                        | RDKafkaErrorCode::OffsetNotAvailable
                        | RDKafkaErrorCode::FencedLeaderEpoch
                        | RDKafkaErrorCode::UnknownLeaderEpoch
                        | RDKafkaErrorCode::BrokerTransportFailure
                        | RDKafkaErrorCode::DestroyBroker
                        | RDKafkaErrorCode::OperationTimedOut
                )
            );
            // It says this too of partitions without a leader, and may have asked a broker that had not heard of the topic yet: what
            // it has heard it believes for a quarter of an hour.
            let unheard_of = matches!(
                failed.rdkafka_error_code(),
                Some(
                    RDKafkaErrorCode::UnknownTopicOrPartition
                        | RDKafkaErrorCode::UnknownTopic
                        | RDKafkaErrorCode::UnknownPartition
                )
            );
            if !passing && !unheard_of {
                return Err(attempt.error(&failed));
            }
            if Instant::now() + PROPAGATION_STEP >= deadline {
                return Err(attempt.code(RDKafkaErrorCode::OperationTimedOut));
            }
            std::thread::sleep(PROPAGATION_STEP);
            let is_one_topic = partitions.iter().all(|partition| partition.topic == first.topic);
            let seen = look_around(client, is_one_topic.then_some(&*first.topic));
            if unheard_of
                && let Some(seen) = seen
                && let Some(missing) = distinct.iter().find(|partition| !has(&seen, partition))
            {
                return Err(Error::UnknownPartition((**missing).clone()));
            }
        }
    }

    /// The error for an offset of a partition that is not kept.
    pub(super) async fn out_of_range(&self, partition: &TopicPartition, offset: i64) -> Result<Error> {
        Ok(Error::OffsetOutOfRange {
            partition: partition.clone(),
            offset,
            start: self.offset(partition, StartAt::Start).await?,
            end: self.offset(partition, StartAt::End).await?,
        })
    }

    async fn create_topic(&self, spec: &TopicSpec) -> Result<()> {
        let attempt = self.attempt("create", Resource::Topic(&spec.name));
        let retention = retention_value(spec.retention);
        let max_message = spec.max_message_bytes.to_string();
        let topic = NewTopic::new(
            &spec.name,
            spec.partitions,
            // -1: the broker's default.
            TopicReplication::Fixed(spec.replication.map_or(-1, i32::from)),
        )
        .set(CLEANUP, spec.cleanup.as_str())
        .set(RETENTION, &retention)
        .set(MAX_MESSAGE, &max_message)
        .set(TIMESTAMPS, spec.timestamps.as_str());
        let answer = self
            .0
            .admin
            .create_topics([&topic], &self.options())
            .await
            .map_err(|error| match error {
                KafkaError::AdminOpCreation(reason) => Error::InvalidTopic {
                    topic: spec.name.clone(),
                    reason,
                },
                error => attempt.error(&error),
            })?;
        match answer.into_iter().next() {
            Some(Err((_, code))) if code != RDKafkaErrorCode::TopicAlreadyExists => return Err(attempt.code(code)),
            _ => {}
        }
        self.forget_topic(&spec.name);
        self.wait_for_topic("create", &spec.name, |partitions| {
            partitions.is_some_and(|count| count > 0)
        })
        .await
    }

    async fn add_partitions(&self, topic: &str, to: i32) -> Result<()> {
        let attempt = self.attempt("add partitions to", Resource::Topic(topic));
        let wanted = NewPartitions::new(topic, usize::try_from(to).unwrap_or_default());
        let answer = self
            .0
            .admin
            .create_partitions([&wanted], &self.options())
            .await
            .map_err(|error| attempt.error(&error))?;
        if let Some(Err((_, code))) = answer.into_iter().next() {
            // Another process may have added them meanwhile.
            if self.describe_topic(topic).await?.partitions < to {
                return Err(attempt.code(code));
            }
        }
        self.forget_topic(topic);
        self.wait_for_topic("add partitions to", topic, |partitions| {
            partitions.is_some_and(|count| count >= to)
        })
        .await
    }

    async fn alter_topic(&self, topic: &str, setting: &'static str, value: &str) -> Result<()> {
        let attempt = self.attempt("alter", Resource::Topic(topic));
        let (log, name, to) = (self.clone(), topic.to_owned(), value.to_owned());
        let within = self.0.settings.request_timeout;
        blocking(move || admin_request::alter_topic(log.0.admin.inner(), &name, setting, &to, within))
            .await?
            .map_err(|error| attempt.error(&error))?;
        // A broker may answer with the setting of before for a moment, or not at all.
        let deadline = Instant::now() + within;
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            match self.topic_settings(topic, rest.min(ONE_TRY)).await {
                Ok(settings) if settings.get(setting).and_then(|entry| entry.value.as_deref()) == Some(value) => break,
                Err(error) if !error.is_retriable() && !matches!(error, Error::UnknownTopic(_)) => return Err(error),
                Ok(_) | Err(_) if rest.is_zero() => return Err(attempt.code(RDKafkaErrorCode::OperationTimedOut)),
                Ok(_) | Err(_) => tokio::time::sleep(PROPAGATION_STEP).await,
            }
        }
        self.forget_topic(topic);
        Ok(())
    }

    /// Waits until the brokers agree that a topic is as `done` wants it; it is given the number of partitions, 0 while
    /// one has no leader, or `None` if there is no such topic.
    async fn wait_for_topic(
        &self,
        operation: &'static str,
        topic: &str,
        done: impl Fn(Option<i32>) -> bool,
    ) -> Result<()> {
        let within = self.0.settings.request_timeout;
        let deadline = Instant::now() + within;
        loop {
            let (log, name) = (self.clone(), topic.to_owned());
            let seen = blocking(move || log.led_partitions(&name)).await??;
            if done(seen) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self
                    .attempt(operation, Resource::Topic(topic))
                    .code(RDKafkaErrorCode::OperationTimedOut));
            }
            tokio::time::sleep(PROPAGATION_STEP).await;
        }
    }

    fn led_partitions(&self, topic: &str) -> Result<Option<i32>> {
        let attempt = self.attempt("describe", Resource::Topic(topic));
        let metadata = self
            .0
            .admin
            .inner()
            .fetch_metadata(Some(topic), self.0.settings.request_timeout)
            .map_err(|error| attempt.error(&error))?;
        let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else {
            return Ok(None);
        };
        match found.error().map(RDKafkaErrorCode::from) {
            None => {}
            Some(RDKafkaErrorCode::UnknownTopicOrPartition) => return Ok(None),
            Some(RDKafkaErrorCode::LeaderNotAvailable) => return Ok(Some(0)),
            Some(code) => return Err(attempt.code(code)),
        }
        let all_led = found.partitions().iter().all(|partition| partition.leader() >= 0);
        let partitions = if all_led { found.partitions().len() } else { 0 };
        Ok(Some(i32::try_from(partitions).unwrap_or(i32::MAX)))
    }

    /// All topics, Kafka's own among them. Blocks.
    fn read_partition_counts(&self) -> Result<BTreeMap<String, i32>> {
        let attempt = self.attempt("list topics of", Resource::Cluster);
        let within = self.0.settings.request_timeout;
        let metadata = self.0.admin.inner().fetch_metadata(None, within);
        let metadata = metadata.map_err(|error| attempt.error(&error))?;
        let counts = metadata.topics().iter().map(|topic| {
            let partitions = i32::try_from(topic.partitions().len()).unwrap_or(i32::MAX);
            (topic.name().to_owned(), partitions)
        });
        Ok(counts.collect())
    }

    /// However many groups there are, it asks for the offsets of many at a time and for all ends at once. Blocks.
    fn read_groups(&self) -> Result<Vec<GroupDescription>> {
        let within = self.0.settings.request_timeout;
        let client = self.0.admin.inner();
        let attempt = self.attempt("list groups of", Resource::Cluster);
        let listed = client
            .fetch_group_list(None, within)
            .map_err(|error| attempt.error(&error))?;
        let names: Vec<_> = listed.groups().iter().map(|group| group.name()).collect();
        let committed = self.group_offsets(&names).map_err(|error| attempt.error(&error))?;
        // The list is in the words of the older protocol, in which a group of the newer one is dead.
        let unseen = listed.groups().iter().filter(|group| group.state() == "Dead");
        let unseen: Vec<_> = unseen.map(|group| group.name()).collect();
        let mut members =
            admin_request::group_members(client, &unseen, within).map_err(|error| attempt.error(&error))?;
        for group in listed.groups() {
            let known = members.entry(group.name().to_owned()).or_default();
            known.extend(group.members().iter().map(described));
        }
        // A group can have offsets of partitions that are no more.
        let topics = self.read_partition_counts()?;
        let is_there = |partition: &TopicPartition| {
            let partitions = topics.get(&*partition.topic);
            partitions.is_some_and(|partitions| partition.partition < *partitions)
        };
        let assigned = members.values().flatten().flat_map(|member| &member.partitions);
        let with_offset = committed.values().flatten().map(|(partition, _)| partition);
        let all: BTreeSet<_> = assigned.chain(with_offset).filter(|one| is_there(one)).collect();
        let all: Vec<_> = all.into_iter().cloned().collect();
        let ends = self.read_offsets(&all, Offset::End)?;
        let ends: HashMap<_, _> = all.iter().zip(ends).collect();
        let describe = |(group, members): (String, Vec<_>)| {
            let committed = committed.get(&group).map_or(&[][..], Vec::as_slice);
            GroupDescription::new(group, members, committed, |partition| ends.get(partition).copied())
        };
        Ok(members.into_iter().map(describe).collect())
    }

    fn group_offsets(&self, groups: &[&str]) -> std::result::Result<GroupOffsets, KafkaError> {
        // Not by the administrative client, which is a producer's: it crashes when it is told that a coordinator has moved.
        admin_request::group_offsets(self.consumer()?, groups, self.0.settings.request_timeout)
    }

    fn options(&self) -> AdminOptions {
        AdminOptions::new()
            .request_timeout(Some(self.0.settings.request_timeout))
            .operation_timeout(Some(self.0.settings.request_timeout))
    }
}

/// The offset of each partition; -1 for a time behind the last record.
fn try_offsets<'a>(
    client: &Client<LogContext>,
    partitions: &BTreeSet<&'a TopicPartition>,
    wanted: Offset,
    within: Duration,
) -> std::result::Result<HashMap<&'a TopicPartition, i64>, KafkaError> {
    let mut list = TopicPartitionList::with_capacity(partitions.len());
    for partition in partitions {
        list.add_partition_offset(&partition.topic, partition.partition, wanted)?;
    }
    let list = admin_request::offsets_for_times(client, list, within)?;
    let elements = list.elements();
    let elements: HashMap<_, _> = elements
        .iter()
        .map(|element| ((element.topic(), element.partition()), element))
        .collect();
    let mut offsets = HashMap::with_capacity(partitions.len());
    for partition in partitions {
        let element = elements
            .get(&(&*partition.topic, partition.partition))
            .ok_or(KafkaError::OffsetFetch(RDKafkaErrorCode::UnknownPartition))?;
        element.error()?;
        let offset = match element.offset() {
            Offset::Offset(offset) => offset,
            _ => -1,
        };
        offsets.insert(*partition, offset);
    }
    Ok(offsets)
}

/// Has a client hear which broker leads a topic (`None`: each topic), and which takes administrative requests. Otherwise it goes on
/// sending to the one that did before, though that is down: it waits for it to come back, and does not ask who does its work meanwhile.
/// Returns what it hears, `None` while no broker answers.
fn look_around(client: &Client<LogContext>, topic: Option<&str>) -> Option<Metadata> {
    let seen = client.fetch_metadata(topic, ONE_TRY);
    seen.inspect_err(|error| tracing::debug!("no broker says how the cluster is: {error}"))
        .ok()
}

fn has(seen: &Metadata, partition: &TopicPartition) -> bool {
    let mut topics = seen.topics().iter().filter(|topic| topic.name() == &*partition.topic);
    topics.any(|topic| topic.partitions().iter().any(|found| found.id() == partition.partition))
}

fn described(member: &GroupMemberInfo) -> MemberDescription {
    MemberDescription {
        member: member.id().to_owned(),
        client: member.client_id().to_owned(),
        host: member.client_host().trim_start_matches('/').to_owned(),
        partitions: assigned_partitions(member.assignment().unwrap_or_default()),
    }
}

/// Kafka's value of `retention.ms`; -1 is for ever.
fn retention_value(retention: Option<Duration>) -> String {
    retention.map_or_else(|| "-1".to_owned(), |retention| retention.as_millis().to_string())
}

#[cfg(test)]
mod tests {
    use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

    use crate::log::kafka::tests::on_mock_broker;

    /// librdkafka's mock broker is enough here: nothing of it is proved but that the process goes on.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_coordinator_that_has_moved_is_an_error_and_not_the_end() {
        let (cluster, log) = on_mock_broker().await;
        let moved = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_COORDINATOR;
        cluster.request_errors(RDKafkaApiKey::OffsetFetch, &[moved]);
        tokio::task::block_in_place(|| {
            let answers = [log.group_offsets(&["g"]), log.group_offsets(&["g"])];
            assert!(answers[0].is_err() && answers[1].is_ok(), "{answers:?}");
        });
    }
}
