//! What the Kafka engine does beyond the conformance suite: a broker that goes and comes, fatal errors of librdkafka, rebalances,
//! and what its own facts about Kafka are.

use std::time::{Duration, Instant};

use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{
    Batch, CleanupPolicy, CommittedOffset, Error, GroupEvent, GroupMember, GroupProtocol, GroupSettings, Log,
    NextOffset, Producer, ProducerRecord, ProducerSettings, Reader, StartAt, TopicPartition, TopicSpec,
    partition_for_key,
};
use barnabas_tests::conformance::unique;
use barnabas_tests::kafka::{self, KafkaNode};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use tokio::time::timeout;

/// Longer than anything here takes.
const DEADLINE: Duration = Duration::from_secs(60);

async fn connect(brokers: &str) -> Log {
    Log::connect_kafka(KafkaSettings::new(brokers))
        .await
        .expect("a connection")
}

async fn make_topic(log: &Log, partitions: i32) -> String {
    let name = unique("topic");
    let spec = TopicSpec {
        // Some records here have old timestamps.
        retention: None,
        ..TopicSpec::new(&name, partitions)
    };
    let plan = log.plan_topics(&[spec]).await.expect("a plan");
    log.apply_topics(&plan).await.expect("the topic is made");
    name
}

async fn append(producer: &Producer, topic: &str, partition: i32, value: &str) -> i64 {
    let record = ProducerRecord::to(topic).partition(partition).value(value.to_owned());
    producer.append(record).await.expect("appended").offset
}

/// Reads until `count` values have come.
async fn read_values(reader: &mut Reader, count: usize) -> Vec<String> {
    let mut values = Vec::new();
    while values.len() < count {
        let batch = timeout(DEADLINE, reader.next())
            .await
            .expect("in time")
            .expect("a batch");
        values.extend(values_of(&batch));
    }
    values
}

fn values_of(batch: &Batch) -> Vec<String> {
    let value = |record: &barnabas::log::Record| {
        String::from_utf8_lossy(record.value.as_deref().unwrap_or_default()).into_owned()
    };
    batch.records.iter().map(value).collect()
}

/// The next event that is not an empty batch.
async fn next_event(member: &mut GroupMember) -> GroupEvent {
    loop {
        match timeout(DEADLINE, member.next())
            .await
            .expect("in time")
            .expect("an event")
        {
            GroupEvent::Records(batch) if batch.records.is_empty() => {}
            event => return event,
        }
    }
}

async fn next_assigned(member: &mut GroupMember) -> Vec<(TopicPartition, NextOffset)> {
    match next_event(member).await {
        GroupEvent::Assigned(partitions) => partitions
            .into_iter()
            .map(|(partition, start)| (partition, start.next_offset))
            .collect(),
        event => panic!("assigned, not {event:?}"),
    }
}

/// Waits until what has been written to partition 0, committed or not, ends at `end`, as a client of its own sees it.
async fn wait_for_uncommitted_end(topic: &str, end: i64) {
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka::brokers())
        .set("isolation.level", "read_uncommitted")
        .create()
        .expect("a client");
    let seen = || {
        let (_, high) = client.fetch_watermarks(topic, 0, DEADLINE).expect("watermarks");
        high
    };
    timeout(DEADLINE, async {
        while seen() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("in time");
}

/// Changes settings of a topic that the log's interface does not know, as a client of its own.
async fn set_topic(topic: &str, settings: &[(&str, &str)]) {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", kafka::brokers())
        .create()
        .expect("a client");
    let mut change = AlterConfig::new(ResourceSpecifier::Topic(topic)).set("cleanup.policy", "compact");
    for (name, value) in settings {
        change = change.set(name, value);
    }
    let answer = admin
        .alter_configs(&[change], &AdminOptions::new())
        .await
        .expect("an answer");
    assert!(answer.iter().all(Result::is_ok), "{answer:?}");
}

fn done(offset: i64) -> CommittedOffset {
    CommittedOffset {
        next_offset: NextOffset(offset),
        metadata: String::new(),
    }
}

#[tokio::test]
async fn records_come_back_as_they_were_sent() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 4).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let record = ProducerRecord::to(topic.as_str())
        .key("key")
        .value("value")
        .header("name", "one")
        .header("name", "two")
        .timestamp_ms(1_795_443_296_789);
    let appended = producer.append(record.clone()).await.expect("appended");
    assert_eq!(appended.partition.partition, partition_for_key(b"key", 4));
    let tombstone = producer
        .append(ProducerRecord::to(topic.as_str()).key("key"))
        .await
        .expect("appended");
    assert_eq!(tombstone.offset, appended.offset + 1);

    let mut reader = log.reader(&topic).await.expect("a reader");
    reader
        .assign(appended.partition.partition, StartAt::Start)
        .await
        .expect("assigned");
    let mut records = Vec::new();
    while records.len() < 2 {
        records.extend(
            timeout(DEADLINE, reader.next())
                .await
                .expect("in time")
                .expect("a batch")
                .records,
        );
    }
    assert_eq!(records[0].headers, record.headers);
    assert_eq!((&records[0].key, &records[0].value), (&record.key, &record.value));
    assert_eq!(records[0].timestamp_ms, 1_795_443_296_789);
    assert_eq!(
        (records[1].key.as_deref(), &records[1].value),
        (Some(&b"key"[..]), &None)
    );
    log.close().await;
    assert!(matches!(reader.next().await, Err(Error::Closed)));
}

#[tokio::test]
async fn a_reader_learns_the_end_behind_markers_and_aborted_records() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 1).await;
    let mut producer = log.transactional_producer(&unique("id")).await.expect("a producer");
    let mut committed = producer.begin();
    committed
        .send(ProducerRecord::to(topic.as_str()).partition(0).value("kept"))
        .await
        .expect("sent");
    committed.commit().await.expect("committed");
    let mut aborted = producer.begin();
    for _ in 0..1001 {
        let record = ProducerRecord::to(topic.as_str()).partition(0).value("dropped");
        aborted.send(record).await.expect("sent");
    }
    wait_for_uncommitted_end(&topic, 1002).await;
    aborted.abort().await.expect("aborted");

    let partition = TopicPartition::new(topic.as_str(), 0);
    // One record and its marker, a thousand and theirs. Kafka writes markers a moment after it has answered.
    let end = 1003;
    timeout(DEADLINE, async {
        while log.offset(&partition, StartAt::End).await.expect("an end") < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("in time");
    let mut reader = log.reader(&topic).await.expect("a reader");
    reader.assign(0, StartAt::Start).await.expect("assigned");
    let mut values = Vec::new();
    loop {
        let batch = timeout(DEADLINE, reader.next())
            .await
            .expect("in time")
            .expect("a batch");
        values.extend(values_of(&batch));
        if batch.caught_up {
            assert_eq!(batch.next_offset, NextOffset(end));
            break;
        }
    }
    assert_eq!(values, ["kept"]);
}

#[tokio::test]
async fn what_cannot_be_done_is_said_by_name() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 1).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let missing = unique("missing");
    let unknown = producer.append(ProducerRecord::to(missing.as_str()).value("v")).await;
    assert!(matches!(unknown, Err(Error::UnknownTopic(name)) if name == missing));
    let unknown = producer
        .append(ProducerRecord::to(topic.as_str()).partition(1).value("v"))
        .await;
    assert!(matches!(unknown, Err(Error::UnknownPartition(_))));
    let large = vec![b'x'; TopicSpec::DEFAULT_MAX_MESSAGE_BYTES + 1];
    let refused = producer.append(ProducerRecord::to(topic.as_str()).value(large)).await;
    assert!(matches!(refused, Err(Error::RecordTooLarge { .. })), "{refused:?}");
    // It fits without what Kafka adds to it: only the broker can say so.
    let large = vec![b'x'; TopicSpec::DEFAULT_MAX_MESSAGE_BYTES - 10];
    let refused = producer.append(ProducerRecord::to(topic.as_str()).value(large)).await;
    assert!(matches!(refused, Err(Error::RecordTooLarge { .. })), "{refused:?}");
    append(&producer, &topic, 0, "after").await;

    assert!(matches!(log.reader(&missing).await, Err(Error::UnknownTopic(_))));
    assert!(matches!(
        log.describe_topic(&missing).await,
        Err(Error::UnknownTopic(_))
    ));
    assert!(matches!(log.delete_topic(&missing).await, Err(Error::UnknownTopic(_))));
    let mut reader = log.reader(&topic).await.expect("a reader");
    assert!(matches!(
        reader.assign(1, StartAt::Start).await,
        Err(Error::UnknownPartition(_))
    ));
    assert!(matches!(
        reader.assign(0, StartAt::Offset(2)).await,
        Err(Error::OffsetOutOfRange {
            offset: 2,
            start: 0,
            end: 1,
            ..
        })
    ));
}

#[tokio::test]
async fn a_topic_is_altered_without_losing_its_other_settings_and_known_by_its_identity() {
    let log = connect(&kafka::brokers()).await;
    let name = unique("topic");
    let mut spec = TopicSpec::new(&name, 2);
    spec.retention = Some(Duration::from_secs(3600));
    log.apply_topics(&log.plan_topics(std::slice::from_ref(&spec)).await.expect("a plan"))
        .await
        .expect("applied");
    spec.partitions = 3;
    spec.max_message_bytes = 2_000_000;
    let plan = log.plan_topics(std::slice::from_ref(&spec)).await.expect("a plan");
    assert_eq!(plan.changes.len(), 2, "{plan:?}");
    log.apply_topics(&plan).await.expect("applied");
    let plan = log.plan_topics(std::slice::from_ref(&spec)).await.expect("a plan");
    assert!(plan.changes.is_empty(), "{plan:?}");
    let first = log.describe_topic(&name).await.expect("described");
    assert_eq!((first.partitions, first.retention), (3, spec.retention));
    log.delete_topic(&name).await.expect("deleted");
    log.apply_topics(&log.plan_topics(std::slice::from_ref(&spec)).await.expect("a plan"))
        .await
        .expect("applied");
    assert_ne!(log.describe_topic(&name).await.expect("described").id, first.id);
}

#[tokio::test]
async fn a_reader_that_retention_overtakes_is_told() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 1).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    for i in 0..10 {
        append(&producer, &topic, 0, &i.to_string()).await;
    }
    let partition = TopicPartition::new(topic.as_str(), 0);
    log.delete_records(&partition, 5).await.expect("deleted");
    assert!(matches!(
        log.delete_records(&partition, 50).await,
        Err(Error::OffsetOutOfRange { .. })
    ));
    let mut reader = log.reader(&topic).await.expect("a reader");
    assert!(matches!(
        reader.assign(0, StartAt::Offset(4)).await,
        Err(Error::OffsetOutOfRange { start: 5, end: 10, .. })
    ));
    assert_eq!(reader.assign(0, StartAt::Start).await.expect("assigned"), 5);
    assert_eq!(read_values(&mut reader, 5).await, ["5", "6", "7", "8", "9"]);
}

/// Far more than a consumer reads ahead: its application can be overtaken by retention.
async fn append_more_than_is_read_ahead(log: &Log, topic: &str) -> i64 {
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let mut deliveries = Vec::new();
    for _ in 0..60_000 {
        let record = ProducerRecord::to(topic).partition(0).value(vec![b'x'; 1000]);
        deliveries.push(producer.send(record).await.expect("sent"));
    }
    let mut last = 0;
    for delivery in deliveries {
        last = delivery.await.expect("appended").offset;
    }
    last + 1
}

#[tokio::test]
async fn a_reader_that_is_overtaken_while_it_reads_is_told_and_can_go_on() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 1).await;
    let end = append_more_than_is_read_ahead(&log, &topic).await;
    let mut reader = log.reader(&topic).await.expect("a reader");
    reader.assign(0, StartAt::Start).await.expect("assigned");
    let first = timeout(DEADLINE, reader.next())
        .await
        .expect("in time")
        .expect("a batch");
    let partition = TopicPartition::new(topic.as_str(), 0);
    log.delete_records(&partition, end - 1).await.expect("deleted");
    let mut next = first.next_offset;
    let gone = loop {
        match timeout(DEADLINE, reader.next()).await.expect("in time") {
            Ok(batch) => {
                assert_eq!(batch.records[0].offset, next.0, "no record is jumped over");
                next = batch.next_offset;
            }
            Err(error) => break error,
        }
    };
    assert!(
        matches!(gone, Error::OffsetOutOfRange { offset, start, .. } if offset == next.0 && start == end - 1),
        "{gone:?} after {next:?}"
    );
    reader.assign(0, StartAt::Start).await.expect("assigned");
    assert_eq!(read_values(&mut reader, 1).await.len(), 1);
}

#[tokio::test]
async fn a_member_that_is_overtaken_while_it_reads_goes_on_where_its_settings_say() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 1).await;
    let end = append_more_than_is_read_ahead(&log, &topic).await;
    let settings = GroupSettings::new(unique("group"), [topic.as_str()]);
    let mut member = log.join_group(settings).await.expect("a member");
    next_assigned(&mut member).await;
    assert!(matches!(next_event(&mut member).await, GroupEvent::Records(_)));
    let partition = TopicPartition::new(topic.as_str(), 0);
    log.delete_records(&partition, end - 1).await.expect("deleted");
    loop {
        match next_event(&mut member).await {
            GroupEvent::Records(batch) if batch.records.iter().any(|record| record.offset == end - 1) => break,
            GroupEvent::Records(_) => {}
            event => panic!("records, not {event:?}"),
        }
    }
}

#[tokio::test]
async fn a_newer_transactional_producer_fences_the_older() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 1).await;
    let id = unique("id");
    let record = |value: &'static str| ProducerRecord::to(topic.as_str()).partition(0).value(value);
    let mut old = log.transactional_producer(&id).await.expect("a producer");
    let mut first = old.begin();
    first.send(record("first")).await.expect("sent");
    first.commit().await.expect("committed");
    let mut new = log.transactional_producer(&id).await.expect("a producer");
    let mut zombie = old.begin();
    zombie.send(record("zombie")).await.expect("sent");
    assert!(matches!(zombie.commit().await, Err(Error::Fenced(_))));
    let mut again = old.begin();
    again.send(record("zombie")).await.expect("sent");
    assert!(matches!(again.commit().await, Err(Error::Fenced(_))));
    let mut second = new.begin();
    second.send(record("second")).await.expect("sent");
    second.commit().await.expect("committed");
    let mut reader = log.reader(&topic).await.expect("a reader");
    reader.assign(0, StartAt::Start).await.expect("assigned");
    assert_eq!(read_values(&mut reader, 2).await, ["first", "second"]);
}

#[tokio::test]
async fn a_failed_transaction_leaves_the_producer_usable() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 1).await;
    let missing = unique("missing");
    let mut producer = log.transactional_producer(&unique("id")).await.expect("a producer");
    let mut transaction = producer.begin();
    let record = |topic: &str, value: &'static str| ProducerRecord::to(topic).partition(0).value(value);
    transaction.send(record(&topic, "dropped")).await.expect("sent");
    transaction.send(record(&missing, "dropped")).await.expect("sent");
    assert!(matches!(transaction.commit().await, Err(Error::UnknownTopic(name)) if name == missing));
    let mut transaction = producer.begin();
    let large = vec![b'x'; TopicSpec::DEFAULT_MAX_MESSAGE_BYTES - 10];
    transaction.send(record(&topic, "dropped")).await.expect("sent");
    transaction
        .send(ProducerRecord::to(topic.as_str()).partition(0).value(large))
        .await
        .expect("sent");
    let refused = transaction.commit().await;
    assert!(matches!(refused, Err(Error::RecordTooLarge { .. })), "{refused:?}");
    let mut dropped = producer.begin();
    for _ in 0..1001 {
        dropped.send(record(&topic, "dropped")).await.expect("sent");
    }
    drop(dropped);
    let mut transaction = producer.begin();
    transaction.send(record(&topic, "kept")).await.expect("sent");
    transaction.commit().await.expect("committed");
    let mut reader = log.reader(&topic).await.expect("a reader");
    reader.assign(0, StartAt::Start).await.expect("assigned");
    assert_eq!(read_values(&mut reader, 1).await, ["kept"]);
}

#[tokio::test]
async fn a_transaction_that_is_open_for_too_long_is_aborted_and_the_producer_goes_on() {
    let mut settings = KafkaSettings::new(kafka::brokers());
    settings.transaction_timeout = Duration::from_secs(2);
    let log = Log::connect_kafka(settings).await.expect("a connection");
    let topic = make_topic(&log, 1).await;
    let record = |value: &'static str| ProducerRecord::to(topic.as_str()).partition(0).value(value);
    let mut producer = log.transactional_producer(&unique("id")).await.expect("a producer");
    let mut slow = producer.begin();
    for _ in 0..1001 {
        slow.send(record("dropped")).await.expect("sent");
    }
    // Its records hold the reader back until it is aborted; what the reader then sees is the end behind them.
    let mut reader = log.reader(&topic).await.expect("a reader");
    reader.assign(0, StartAt::Start).await.expect("assigned");
    while timeout(DEADLINE, reader.next())
        .await
        .expect("in time")
        .expect("a batch")
        .next_offset
        < NextOffset(1000)
    {}
    assert!(matches!(slow.commit().await, Err(Error::Aborted(_))));
    let mut next = producer.begin();
    next.send(record("kept")).await.expect("sent");
    next.commit().await.expect("committed");
    assert_eq!(read_values(&mut reader, 1).await, ["kept"]);
}

#[tokio::test]
async fn a_producer_of_large_transactions_has_the_time_that_it_asks_for() {
    let mut settings = KafkaSettings::new(kafka::brokers());
    settings.transaction_timeout = Duration::from_secs(1);
    let log = Log::connect_kafka(settings).await.expect("a connection");
    let topic = make_topic(&log, 2).await;
    let record = |value: &'static str, partition| {
        let record = ProducerRecord::to(topic.as_str());
        record.partition(partition).value(value)
    };
    let mut usual = log.transactional_producer(&unique("id")).await.expect("a producer");
    let mut patient = log
        .transactional_producer_within(&unique("id"), Duration::from_secs(60))
        .await
        .expect("a producer");
    let (mut dropped, mut kept) = (usual.begin(), patient.begin());
    for _ in 0..1001 {
        kept.send(record("kept", 0)).await.expect("sent");
        dropped.send(record("dropped", 1)).await.expect("sent");
    }
    // Both are open since the same moment; the reader comes to the end of the second partition when the usual one is aborted.
    let mut reader = log.reader(&topic).await.expect("a reader");
    reader.assign(1, StartAt::Start).await.expect("assigned");
    while timeout(DEADLINE, reader.next())
        .await
        .expect("in time")
        .expect("a batch")
        .next_offset
        < NextOffset(1000)
    {}
    assert!(matches!(dropped.commit().await, Err(Error::Aborted(_))));
    kept.commit().await.expect("committed");
    let mut reader = log.reader(&topic).await.expect("a reader");
    reader.assign(0, StartAt::Start).await.expect("assigned");
    assert_eq!(read_values(&mut reader, 1001).await, ["kept"; 1001]);
}

#[tokio::test]
async fn members_to_whom_the_broker_assigns_are_seen_with_what_they_have() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 2).await;
    let settings = GroupSettings {
        protocol: GroupProtocol::Consumer,
        ..GroupSettings::new(unique("group"), [topic.as_str()])
    };
    let described = async |members: usize| {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let groups = log.groups().await.expect("groups");
            let found = groups.into_iter().find(|group| group.group == settings.group);
            let found = found.expect("the group");
            let has_each = found.members.iter().all(|member| !member.partitions.is_empty());
            if found.members.len() == members && has_each {
                return found;
            }
            assert!(Instant::now() < deadline, "{found:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let mut first = log.join_group(settings.clone()).await.expect("a member");
    let all: Vec<_> = next_assigned(&mut first)
        .await
        .into_iter()
        .map(|(partition, _)| partition)
        .collect();
    let alone = described(1).await;
    let member = &alone.members[0];
    assert_eq!(member.partitions, all);
    assert!(!member.member.is_empty() && !member.host.is_empty() && !member.host.starts_with('/'));
    assert!(!member.client.is_empty());
    // Nothing is committed, and they are seen all the same.
    assert!(alone.partitions.iter().map(|lag| &lag.partition).eq(&all));
    assert!(alone.partitions.iter().all(|lag| lag.committed.is_none()));

    let mut second = log.join_group(settings.clone()).await.expect("a member");
    match next_event(&mut first).await {
        GroupEvent::Revoked(revoked) => first.release(revoked).await.expect("released"),
        event => panic!("revoked, not {event:?}"),
    }
    next_assigned(&mut second).await;
    let both = described(2).await;
    let mut owned: Vec<_> = both.members.into_iter().flat_map(|member| member.partitions).collect();
    owned.sort();
    assert_eq!(owned, all);

    drop((first, second));
    assert_eq!(described(0).await.members, []);
}

#[tokio::test]
async fn partitions_move_when_they_are_released_and_go_on_where_they_were_committed() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 2).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    for partition in 0..2 {
        append(&producer, &topic, partition, "a").await;
        append(&producer, &topic, partition, "b").await;
    }
    let settings = GroupSettings::new(unique("group"), [topic.as_str()]);
    let mut first = log.join_group(settings.clone()).await.expect("a member");
    let assigned = next_assigned(&mut first).await;
    assert_eq!(assigned.len(), 2);
    assert!(assigned.iter().all(|(_, next)| *next == NextOffset(0)));
    // A pause ends with the assignment: the next owner, and this one when it comes back, starts unpaused.
    let all: Vec<_> = assigned.iter().map(|(partition, _)| partition.clone()).collect();
    let mut read = 0;
    while read < 4 {
        match next_event(&mut first).await {
            GroupEvent::Records(batch) => read += batch.records.len(),
            event => panic!("records, not {event:?}"),
        }
    }
    first.pause(all.clone()).await.expect("paused");

    let mut second = log.join_group(settings.clone()).await.expect("a member");
    let revoked = match next_event(&mut first).await {
        GroupEvent::Revoked(partitions) => partitions,
        event => panic!("revoked, not {event:?}"),
    };
    assert_eq!(revoked.len(), 1);
    let committed = CommittedOffset {
        next_offset: NextOffset(1),
        metadata: "half".to_owned(),
    };
    first
        .commit(vec![(revoked[0].clone(), committed.clone())])
        .await
        .expect("committed while not released");
    let as_owner = first.metadata();
    first.release(revoked.clone()).await.expect("released");
    let moved = next_assigned(&mut second).await;
    assert_eq!(moved, [(revoked[0].clone(), NextOffset(1))]);
    // Kafka would take offsets of the released partition from it, for it is a member still.
    assert!(matches!(as_owner.await, Err(Error::UnknownMember { .. })));
    first.metadata().await.expect("a member without the partition");
    assert_eq!(
        second.committed(revoked.clone()).await.expect("read"),
        [Some(committed)]
    );
    match next_event(&mut second).await {
        GroupEvent::Records(batch) => assert_eq!(values_of(&batch), ["b"]),
        event => panic!("records, not {event:?}"),
    }
    assert!(matches!(
        first.commit(vec![(revoked[0].clone(), done(2))]).await,
        Err(Error::UnknownMember { .. })
    ));
    second
        .commit(vec![(revoked[0].clone(), done(2))])
        .await
        .expect("committed");
    let lag = log.groups().await.expect("groups");
    let group = lag
        .iter()
        .find(|group| group.group == settings.group)
        .expect("the group");
    let mut owners: Vec<_> = group.members.iter().flat_map(|member| &member.partitions).collect();
    owners.sort();
    assert_eq!((group.members.len(), owners), (2, all.iter().collect()));
    let lag = |of: &TopicPartition| {
        group
            .partitions
            .iter()
            .find(|lag| lag.partition == *of)
            .expect("the partition")
    };
    assert_eq!(
        (lag(&revoked[0]).committed, lag(&revoked[0]).end),
        (Some(NextOffset(2)), 2)
    );

    drop(second);
    assert_eq!(next_assigned(&mut first).await, [(revoked[0].clone(), NextOffset(2))]);
    append(&producer, &topic, revoked[0].partition, "c").await;
    match next_event(&mut first).await {
        GroupEvent::Records(batch) => assert_eq!(values_of(&batch), ["c"]),
        event => panic!("records of the partition that came back unpaused, not {event:?}"),
    }
    let kept = all
        .into_iter()
        .find(|partition| *partition != revoked[0])
        .expect("the other");
    append(&producer, &topic, kept.partition, "c").await;
    first.resume(vec![kept.clone()]).await.expect("resumed");
    match next_event(&mut first).await {
        GroupEvent::Records(batch) => {
            assert_eq!(
                (batch.partition.clone(), values_of(&batch)),
                (kept.clone(), vec!["c".to_owned()])
            );
        }
        event => panic!("records of the resumed partition, not {event:?}"),
    }
    first.seek(kept.clone(), NextOffset(1)).await.expect("sought");
    let mut again = Vec::new();
    while again.len() < 2 {
        match next_event(&mut first).await {
            GroupEvent::Records(batch) => again.extend(values_of(&batch)),
            event => panic!("records, not {event:?}"),
        }
    }
    assert_eq!(again, ["b", "c"]);
}

#[tokio::test]
async fn a_member_that_takes_nothing_stays_in_its_group_and_loses_what_it_does_not_release() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 2).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let mut settings = GroupSettings::new(unique("group"), [topic.as_str()]);
    settings.release_timeout = Duration::from_secs(1);
    let mut first = log.join_group(settings.clone()).await.expect("a member");
    assert_eq!(next_assigned(&mut first).await.len(), 2);
    // Far more than its queue holds, and it takes none of them.
    let mut deliveries = Vec::new();
    for i in 0..60_000 {
        let record = ProducerRecord::to(topic.as_str()).partition(i % 2).value(i.to_string());
        deliveries.push(producer.send(record).await.expect("sent"));
    }
    for delivery in deliveries {
        delivery.await.expect("appended");
    }
    let mut second = log.join_group(settings).await.expect("a member");
    let moved = next_assigned(&mut second).await;
    assert_eq!(moved.len(), 1, "the release timeout has passed");
    let lost = loop {
        match next_event(&mut first).await {
            GroupEvent::Lost(partitions) => break partitions,
            GroupEvent::Records(_) | GroupEvent::Revoked(_) => {}
            event @ GroupEvent::Assigned(_) => panic!("lost, not {event:?}"),
        }
    };
    assert_eq!(lost, [moved[0].0.clone()]);
}

#[tokio::test]
async fn offsets_are_committed_with_the_transaction_or_not_at_all() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 1).await;
    let output = make_topic(&log, 1).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    append(&producer, &topic, 0, "a").await;
    let settings = GroupSettings::new(unique("group"), [topic.as_str()]);
    let mut member = log.join_group(settings.clone()).await.expect("a member");
    let (partition, _) = next_assigned(&mut member).await.remove(0);
    let metadata = member.metadata().await.expect("metadata");
    let mut transactional = log.transactional_producer(&unique("id")).await.expect("a producer");
    let record = || ProducerRecord::to(output.as_str()).partition(0).value("out");

    let mut aborted = transactional.begin();
    aborted.send(record()).await.expect("sent");
    aborted.send_offsets(metadata.clone(), [(partition.clone(), NextOffset(1))]);
    aborted.abort().await.expect("aborted");
    assert_eq!(member.committed(vec![partition.clone()]).await.expect("read"), [None]);

    let mut committed = transactional.begin();
    committed.send(record()).await.expect("sent");
    committed.send_offsets(metadata.clone(), [(partition.clone(), NextOffset(1))]);
    committed.commit().await.expect("committed");
    assert_eq!(
        member.committed(vec![partition.clone()]).await.expect("read"),
        [Some(done(1))]
    );

    // Once another member has the partition, the old one's transaction is refused as a whole.
    drop(member);
    let mut next = log.join_group(settings).await.expect("a member");
    assert_eq!(next_assigned(&mut next).await, [(partition.clone(), NextOffset(1))]);
    let mut zombie = transactional.begin();
    zombie.send(record()).await.expect("sent");
    zombie.send_offsets(metadata, [(partition.clone(), NextOffset(2))]);
    assert!(matches!(zombie.commit().await, Err(Error::UnknownMember { .. })));
    assert_eq!(next.committed(vec![partition]).await.expect("read"), [Some(done(1))]);
    let mut reader = log.reader(&output).await.expect("a reader");
    reader.assign(0, StartAt::Start).await.expect("assigned");
    let mut outputs = 0;
    loop {
        let batch = timeout(DEADLINE, reader.next())
            .await
            .expect("in time")
            .expect("a batch");
        outputs += batch.records.len();
        if batch.caught_up {
            break;
        }
    }
    assert_eq!(outputs, 1);
}

#[tokio::test]
async fn a_reassigned_partition_never_shows_records_of_its_earlier_assignment() {
    let log = connect(&kafka::brokers()).await;
    let topic = make_topic(&log, 1).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let mut deliveries = Vec::new();
    for i in 0..5000 {
        let record = ProducerRecord::to(topic.as_str()).partition(0).value(i.to_string());
        deliveries.push(producer.send(record).await.expect("sent"));
    }
    for delivery in deliveries {
        delivery.await.expect("appended");
    }
    let mut reader = log.reader(&topic).await.expect("a reader");
    for start in [0, 4000, 100, 2500, 0, 4999] {
        reader.assign(0, StartAt::Offset(start)).await.expect("assigned");
        let batch = loop {
            let batch = timeout(DEADLINE, reader.next())
                .await
                .expect("in time")
                .expect("a batch");
            if !batch.records.is_empty() {
                break batch;
            }
        };
        assert_eq!(batch.records[0].offset, start);
    }
}

#[tokio::test]
async fn a_compacted_partition_is_caught_up_though_nothing_is_left_at_its_end() {
    let log = connect(&kafka::brokers()).await;
    let name = unique("compacted");
    let spec = TopicSpec {
        cleanup: CleanupPolicy::Compact,
        ..TopicSpec::new(&name, 1)
    };
    let plan = log.plan_topics(&[spec]).await.expect("a plan");
    log.apply_topics(&plan).await.expect("applied");
    set_topic(&name, &[("segment.ms", "100"), ("delete.retention.ms", "0")]).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let put = |key: i32, value: Option<&'static str>| {
        let mut record = ProducerRecord::to(name.as_str()).partition(0).key(key.to_string());
        record.value = value.map(Into::into);
        producer.append(record)
    };
    for key in 0..100 {
        put(key, Some("value")).await.expect("appended");
    }
    for key in 0..100 {
        put(key, None).await.expect("appended");
    }
    // A record in a later segment lets the cleaner at those before; it takes the tombstones in a second round.
    let records = timeout(DEADLINE, async {
        loop {
            tokio::time::sleep(Duration::from_millis(150)).await;
            put(1000, Some("last")).await.expect("appended");
            let mut reader = log.reader(&name).await.expect("a reader");
            reader.assign(0, StartAt::Start).await.expect("assigned");
            let end = log
                .offset(&TopicPartition::new(name.as_str(), 0), StartAt::End)
                .await
                .expect("an end");
            let mut records = Vec::new();
            loop {
                let batch = reader.next().await.expect("a batch");
                records.extend(batch.records);
                if batch.caught_up {
                    assert_eq!(batch.next_offset, NextOffset(end));
                    break;
                }
            }
            if records.iter().all(|record| record.key.as_deref() == Some(b"1000")) {
                break records;
            }
        }
    })
    .await
    .expect("compacted in time");
    assert!(records[0].offset >= 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_broker_comes_back_with_everything_acknowledged_and_all_goes_on() {
    let node = KafkaNode::start();
    let log = connect(node.brokers()).await;
    let topic = make_topic(&log, 1).await;
    let producer = log
        .producer(ProducerSettings {
            delivery_timeout: Duration::from_secs(2),
            ..ProducerSettings::default()
        })
        .await
        .expect("a producer");
    let settings = GroupSettings::new(unique("group"), [topic.as_str()]);
    let mut member = log.join_group(settings).await.expect("a member");
    let (partition, _) = next_assigned(&mut member).await.remove(0);
    let mut transactional = log.transactional_producer(&unique("id")).await.expect("a producer");
    let mut reader = log.reader(&topic).await.expect("a reader");
    reader.assign(0, StartAt::Start).await.expect("assigned");
    append(&producer, &topic, 0, "before").await;
    member
        .commit(vec![(partition.clone(), done(1))])
        .await
        .expect("committed");
    assert_eq!(read_values(&mut reader, 1).await, ["before"]);

    node.kill();
    let record = |value: &'static str| ProducerRecord::to(topic.as_str()).partition(0).value(value);
    let refused = producer.append(record("lost")).await;
    assert!(
        matches!(refused, Err(Error::Timeout { .. } | Error::Unavailable(_))),
        "{refused:?}"
    );
    let mut settings = KafkaSettings::new(node.brokers());
    settings.request_timeout = Duration::from_secs(1);
    assert!(matches!(Log::connect_kafka(settings).await, Err(Error::Unavailable(_))));
    let mut transaction = transactional.begin();
    transaction.send(record("lost")).await.expect("sent");
    let refused = transaction.commit().await;
    assert!(
        matches!(
            refused,
            Err(Error::Aborted(_) | Error::Unavailable(_) | Error::Indefinite(_) | Error::Timeout { .. })
        ),
        "{refused:?}"
    );
    node.restart();

    let mut transaction = transactional.begin();
    transaction.send(record("transaction")).await.expect("sent");
    transaction.commit().await.expect("committed");
    append(&producer, &topic, 0, "after").await;
    assert_eq!(read_values(&mut reader, 2).await, ["transaction", "after"]);
    assert_eq!(member.committed(vec![partition]).await.expect("read"), [Some(done(1))]);
    let mut values = Vec::new();
    while values.len() < 3 {
        match timeout(DEADLINE, member.next()).await.expect("in time") {
            Ok(GroupEvent::Records(batch)) => values.extend(values_of(&batch)),
            // It may have been out of the group for a while, and is told when no broker answers.
            Ok(_) | Err(Error::Unavailable(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(values[values.len() - 2..], ["transaction", "after"]);
    log.close().await;
}
