//! Transactions.

use barnabas::log::{
    Error, GroupEvent, GroupSettings, Log, NextOffset, ProducerRecord, StartAt, TopicPartition, TopicSpec,
};

use super::{
    append_values, make_topic, new_topic, next_event, next_records, read_partition, read_to_end, reader_at, texts,
    unique, within,
};

/// Records of several topics and partitions appear together at the commit; nothing of an aborted one ever does.
pub async fn is_visible_as_a_whole_or_not_at_all(log: Log) {
    let (first, second) = (new_topic(&log, 2).await, new_topic(&log, 1).await);
    let mut producer = log.transactional_producer(&unique("tx")).await.expect("a producer");
    let mut transaction = producer.begin();
    for partition in 0..2 {
        transaction
            .send(ProducerRecord::to(first.clone()).partition(partition).value("a"))
            .await
            .expect("sent");
    }
    transaction
        .send(ProducerRecord::to(second.clone()).partition(0).value("b"))
        .await
        .expect("sent");
    within("a commit", transaction.commit()).await.expect("committed");
    let mut transaction = producer.begin();
    // More than a slice, so that the engine has some of it when it is aborted.
    for _ in 0..2500 {
        transaction
            .send(ProducerRecord::to(first.clone()).partition(0).value("aborted"))
            .await
            .expect("sent");
    }
    within("an abort", transaction.abort()).await.expect("aborted");
    let mut transaction = producer.begin();
    transaction
        .send(ProducerRecord::to(first.clone()).partition(0).value("c"))
        .await
        .expect("sent");
    within("a commit", transaction.commit()).await.expect("committed");
    assert_eq!(texts(&read_partition(&log, &first, 0).await), ["a", "c"]);
    assert_eq!(texts(&read_partition(&log, &first, 1).await), ["a"]);
    assert_eq!(texts(&read_partition(&log, &second, 0).await), ["b"]);
}

/// A transaction that is forgotten holds nobody up.
pub async fn dropped_is_aborted(log: Log) {
    let topic = new_topic(&log, 1).await;
    let mut producer = log.transactional_producer(&unique("tx")).await.expect("a producer");
    let mut transaction = producer.begin();
    for _ in 0..2500 {
        transaction
            .send(ProducerRecord::to(topic.clone()).partition(0).value("dropped"))
            .await
            .expect("sent");
    }
    drop(transaction);
    append_values(&log, &topic, ["after"]).await;
    let mut reader = reader_at(&log, &topic, 0, StartAt::Start).await;
    assert_eq!(texts(&next_records(&mut reader).await.records), ["after"]);
    let mut transaction = producer.begin();
    transaction
        .send(ProducerRecord::to(topic.clone()).partition(0).value("next"))
        .await
        .expect("sent");
    within("a commit", transaction.commit()).await.expect("committed");
    assert_eq!(texts(&next_records(&mut reader).await.records), ["next"]);
}

/// Consumed offsets are committed with the records, or not at all.
pub async fn commits_offsets_with_its_records(log: Log) {
    let (input, output, group) = (new_topic(&log, 1).await, new_topic(&log, 1).await, unique("group"));
    let partition = TopicPartition::new(input.clone(), 0);
    append_values(&log, &input, ["0", "1"]).await;
    let mut member = log
        .join_group(GroupSettings::new(group.clone(), [input.clone()]))
        .await
        .expect("a member");
    while !matches!(next_event(&mut member).await, GroupEvent::Records(_)) {}
    let mut producer = log.transactional_producer(&unique("tx")).await.expect("a producer");
    for (value, next, commit) in [("lost", 2, false), ("kept", 1, true)] {
        let mut transaction = producer.begin();
        transaction
            .send(ProducerRecord::to(output.clone()).partition(0).value(value))
            .await
            .expect("sent");
        let metadata = within("metadata", member.metadata()).await.expect("metadata");
        transaction.send_offsets(metadata, [(partition.clone(), NextOffset(next))]);
        if commit {
            within("a commit", transaction.commit()).await.expect("committed");
        } else {
            within("an abort", transaction.abort()).await.expect("aborted");
        }
    }
    assert_eq!(texts(&read_partition(&log, &output, 0).await), ["kept"]);
    let committed = member.committed(vec![partition.clone()]).await.expect("an answer");
    assert_eq!(
        committed[0].as_ref().map(|committed| committed.next_offset),
        Some(NextOffset(1))
    );
    // A member that has left cannot commit for the group.
    let metadata = member.metadata().await.expect("metadata");
    drop(member);
    let mut other = log
        .join_group(GroupSettings::new(group, [input]))
        .await
        .expect("a member");
    while !matches!(next_event(&mut other).await, GroupEvent::Records(_)) {}
    let mut transaction = producer.begin();
    transaction
        .send(ProducerRecord::to(output.clone()).partition(0).value("zombie"))
        .await
        .expect("sent");
    transaction.send_offsets(metadata, [(partition, NextOffset(2))]);
    let refused = within("a refusal", transaction.commit()).await;
    assert!(matches!(refused, Err(Error::UnknownMember { .. })), "{refused:?}");
    assert_eq!(texts(&read_partition(&log, &output, 0).await), ["kept"]);
}

/// The older producer with the same id can commit nothing more.
pub async fn is_fenced_by_a_newer_producer(log: Log) {
    let (topic, id) = (new_topic(&log, 1).await, unique("tx"));
    let mut older = log.transactional_producer(&id).await.expect("a producer");
    let mut open = older.begin();
    for _ in 0..1500 {
        open.send(ProducerRecord::to(topic.clone()).partition(0).value("older"))
            .await
            .expect("sent");
    }
    let mut newer = within("a newer producer", log.transactional_producer(&id))
        .await
        .expect("a producer");
    let mut transaction = newer.begin();
    transaction
        .send(ProducerRecord::to(topic.clone()).partition(0).value("newer"))
        .await
        .expect("sent");
    within("a commit", transaction.commit()).await.expect("committed");
    let refused = within("a refusal", open.commit()).await;
    assert!(matches!(refused, Err(Error::Fenced(_))), "{refused:?}");
    let mut transaction = older.begin();
    transaction
        .send(ProducerRecord::to(topic.clone()).partition(0).value("older"))
        .await
        .expect("sent");
    let refused = within("a refusal", transaction.commit()).await;
    assert!(matches!(refused, Err(Error::Fenced(_))), "{refused:?}");
    assert_eq!(texts(&read_partition(&log, &topic, 0).await), ["newer"]);
}

/// 64 MiB in one transaction, byte for byte.
pub async fn can_be_larger_than_memory_would_like(log: Log) {
    let topic = new_topic(&log, 2).await;
    let mut producer = log.transactional_producer(&unique("tx")).await.expect("a producer");
    let value = |i: usize| vec![(i % 251) as u8; 256 * 1024];
    let mut transaction = producer.begin();
    for i in 0..256 {
        transaction
            .send(
                ProducerRecord::to(topic.clone())
                    .partition((i % 2) as i32)
                    .value(value(i)),
            )
            .await
            .expect("sent");
    }
    within("a commit", transaction.commit()).await.expect("committed");
    for partition in 0..2 {
        let mut reader = reader_at(&log, &topic, partition, StartAt::Start).await;
        let records = read_to_end(&mut reader).await;
        assert_eq!(records.len(), 128);
        for (n, record) in records.iter().enumerate() {
            let expected = value(2 * n + partition as usize);
            assert!(
                record.value.as_deref() == Some(&expected[..]),
                "record {n} of partition {partition}"
            );
        }
    }
}

/// One record that cannot be written, and nothing is; the next transaction goes through.
pub async fn with_a_bad_record_leaves_nothing(log: Log) {
    let topic = make_topic(
        &log,
        TopicSpec {
            max_message_bytes: 10_000,
            ..TopicSpec::new(unique("small"), 1)
        },
    )
    .await;
    let mut producer = log.transactional_producer(&unique("tx")).await.expect("a producer");
    let mut transaction = producer.begin();
    transaction
        .send(ProducerRecord::to(topic.clone()).partition(0).value("good"))
        .await
        .expect("sent");
    transaction
        .send(ProducerRecord::to(topic.clone()).partition(0).value(vec![b'x'; 20_000]))
        .await
        .expect("sent");
    let refused = within("a refusal", transaction.commit()).await;
    assert!(matches!(refused, Err(Error::RecordTooLarge { .. })), "{refused:?}");
    let mut transaction = producer.begin();
    transaction
        .send(ProducerRecord::to(topic.clone()).partition(0).value("next"))
        .await
        .expect("sent");
    within("a commit", transaction.commit()).await.expect("committed");
    assert_eq!(texts(&read_partition(&log, &topic, 0).await), ["next"]);
}
