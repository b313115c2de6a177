//! Where reading starts, and how a reader knows that it has caught up.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use barnabas::log::{Error, Log, ProducerRecord, ProducerSettings, Record, StartAt, TopicPartition, TopicSpec};

use super::{
    append_all, append_values, make_topic, new_compacted_topic, new_topic, next_records, read_partition, read_to_end,
    reader_at, texts, unique, within,
};

/// A Kafka that nobody has told otherwise looks for expired records every five minutes.
const RETENTION_DEADLINE: Duration = Duration::from_secs(6 * 60);

/// By offset, by time, from the start and from the end.
pub async fn reads_from_an_offset_and_from_a_time(log: Log) {
    let topic = new_topic(&log, 1).await;
    let partition = TopicPartition::new(topic.clone(), 0);
    let now = 1_790_000_000_000;
    let record = |i: i64| {
        ProducerRecord::to(topic.clone())
            .partition(0)
            .value(i.to_string())
            .timestamp_ms(now + i * 1000)
    };
    append_all(&log, (0..10).map(record)).await;
    for (at, offset) in [
        (StartAt::Start, 0),
        (StartAt::End, 10),
        (StartAt::Offset(7), 7),
        (StartAt::TimeMs(now - 1), 0),
        (StartAt::TimeMs(now + 3000), 3),
        (StartAt::TimeMs(now + 3001), 4),
        (StartAt::TimeMs(now + 99_000), 10),
    ] {
        assert_eq!(log.offset(&partition, at).await.expect("an offset"), offset, "{at:?}");
        let mut reader = log.reader(&topic).await.expect("a reader");
        assert_eq!(
            within("an assignment", reader.assign(0, at)).await.expect("assigned"),
            offset,
            "{at:?}"
        );
        let expected: Vec<String> = (offset..10).map(|i| i.to_string()).collect();
        assert_eq!(texts(&read_to_end(&mut reader).await), expected, "{at:?}");
    }
}

/// However many partitions are asked for, one of them twice, each answer is at the place of its question; one that is not there is
/// an error.
pub async fn of_many_partitions_is_found_at_once(log: Log) {
    let topics = [new_topic(&log, 3).await, new_topic(&log, 1).await];
    let now = 1_790_000_000_000;
    for (number, records) in [(0, 2), (1, 0), (2, 5)] {
        let record = |i: i64| {
            ProducerRecord::to(topics[0].clone())
                .partition(number)
                .timestamp_ms(now + i)
        };
        append_all(&log, (0..records).map(record)).await;
    }
    let of = |topic: &str, number: i32| TopicPartition::new(topic, number);
    let asked = [
        of(&topics[0], 2),
        of(&topics[1], 0),
        of(&topics[0], 1),
        of(&topics[0], 0),
        of(&topics[0], 2),
    ];
    for (at, offsets) in [
        (StartAt::Start, [0, 0, 0, 0, 0]),
        (StartAt::End, [5, 0, 0, 2, 5]),
        (StartAt::TimeMs(now + 1), [1, 0, 0, 1, 1]),
        (StartAt::TimeMs(now + 3), [3, 0, 0, 2, 3]),
        (StartAt::Offset(7), [7, 7, 7, 7, 7]),
    ] {
        assert_eq!(log.offsets(&asked, at).await.expect("offsets"), offsets, "{at:?}");
    }
    assert!(log.offsets(&[], StartAt::End).await.expect("none").is_empty());
    let missing = log.offsets(&[of(&topics[0], 0), of(&topics[0], 3)], StartAt::End).await;
    assert!(matches!(missing, Err(Error::UnknownPartition(_))), "{missing:?}");
}

/// No record has to come for a reader to know that there is none.
pub async fn an_empty_partition_is_caught_up_at_once(log: Log) {
    let topic = new_topic(&log, 1).await;
    let mut reader = reader_at(&log, &topic, 0, StartAt::Start).await;
    let batch = within("a batch", reader.next()).await.expect("a batch");
    assert!(batch.caught_up && batch.records.is_empty());
    assert_eq!(batch.next_offset.0, 0);
}

/// Once for each time the end is reached.
pub async fn says_once_that_it_has_caught_up(log: Log) {
    let topic = new_topic(&log, 1).await;
    let mut reader = reader_at(&log, &topic, 0, StartAt::Start).await;
    assert!(read_to_end(&mut reader).await.is_empty());
    for round in 0..3 {
        append_values(&log, &topic, [format!("{round}")]).await;
        assert_eq!(texts(&read_to_end(&mut reader).await), [format!("{round}")]);
    }
    let more = tokio::time::timeout(Duration::from_millis(300), reader.next()).await;
    assert!(more.is_err(), "nothing is left to say: {more:?}");
}

/// What was deleted is gone, and the offsets go on.
pub async fn a_truncated_partition_starts_later(log: Log) {
    let topic = new_topic(&log, 1).await;
    let partition = TopicPartition::new(topic.clone(), 0);
    append_values(&log, &topic, (0..10).map(|i| i.to_string())).await;
    within("a deletion", log.delete_records(&partition, 4))
        .await
        .expect("deleted");
    assert_eq!(log.offset(&partition, StartAt::Start).await.expect("start"), 4);
    assert_eq!(
        texts(&read_partition(&log, &topic, 0).await),
        ["4", "5", "6", "7", "8", "9"]
    );
    within("a deletion", log.delete_records(&partition, 10))
        .await
        .expect("deleted");
    let mut reader = reader_at(&log, &topic, 0, StartAt::Start).await;
    assert!(read_to_end(&mut reader).await.is_empty());
    assert_eq!(append_values(&log, &topic, ["ten"]).await, 10);
    assert_eq!(texts(&read_to_end(&mut reader).await), ["ten"]);
    let refused = log.delete_records(&partition, 99).await;
    assert!(matches!(refused, Err(Error::OffsetOutOfRange { .. })), "{refused:?}");
}

/// Neither before the start nor behind the end; never another place instead.
pub async fn an_offset_that_is_not_kept_is_refused(log: Log) {
    let topic = new_topic(&log, 1).await;
    let partition = TopicPartition::new(topic.clone(), 0);
    append_values(&log, &topic, (0..5).map(|i| i.to_string())).await;
    within("a deletion", log.delete_records(&partition, 3))
        .await
        .expect("deleted");
    let mut reader = log.reader(&topic).await.expect("a reader");
    for wanted in [0, 2, 6, 1000] {
        match within("a refusal", reader.assign(0, StartAt::Offset(wanted))).await {
            Err(Error::OffsetOutOfRange {
                partition,
                offset,
                start,
                end,
            }) => {
                assert_eq!((partition.partition, offset, start, end), (0, wanted, 3, 5));
            }
            other => panic!("{wanted}: {other:?}"),
        }
    }
    assert_eq!(
        within("an assignment", reader.assign(0, StartAt::Offset(3)))
            .await
            .expect("assigned"),
        3
    );
    assert_eq!(texts(&read_to_end(&mut reader).await), ["3", "4"]);
}

/// Markers and aborted records at the end leave nothing to be delivered there.
pub async fn a_partition_that_ends_in_transactions_is_caught_up(log: Log) {
    let topic = new_topic(&log, 1).await;
    let mut producer = log.transactional_producer(&unique("tx")).await.expect("a producer");
    let mut transaction = producer.begin();
    transaction
        .send(ProducerRecord::to(topic.clone()).partition(0).value("kept"))
        .await
        .expect("sent");
    within("a commit", transaction.commit()).await.expect("committed");
    let mut transaction = producer.begin();
    for _ in 0..1500 {
        transaction
            .send(ProducerRecord::to(topic.clone()).partition(0).value("aborted"))
            .await
            .expect("sent");
    }
    within("an abort", transaction.abort()).await.expect("aborted");
    let mut reader = reader_at(&log, &topic, 0, StartAt::Start).await;
    assert_eq!(texts(&read_to_end(&mut reader).await), ["kept"]);
    let end = log
        .offset(&TopicPartition::new(topic.clone(), 0), StartAt::End)
        .await
        .expect("end");
    let mut reader = reader_at(&log, &topic, 0, StartAt::Offset(end)).await;
    let batch = within("a batch", reader.next()).await.expect("a batch");
    assert!(batch.caught_up && batch.records.is_empty());
    assert_eq!(batch.next_offset.0, end);
}

/// Older records of a key go, the last of each key and all offsets stay, and a reader in the middle misses none of those.
/// `hurry` makes the engine compact a topic soon.
pub async fn a_compacted_partition_keeps_the_last_of_each_key(log: Log, hurry: impl AsyncFn(&str)) {
    const RECORDS: usize = 20_000;
    const KEYS: usize = 10;
    let topic = new_compacted_topic(&log, 1).await;
    let put = |key: String, value: Option<String>| {
        let mut record = ProducerRecord::to(topic.clone()).partition(0).key(key);
        record.value = value.map(Into::into);
        record
    };
    let last: HashMap<String, (i64, Option<String>)> = (RECORDS - KEYS..RECORDS)
        .map(|i| ((i % KEYS).to_string(), (i as i64, Some(i.to_string()))))
        .chain([("deleted".to_owned(), (RECORDS as i64 + 1, None))])
        .collect();
    append_all(
        &log,
        (0..RECORDS).map(|i| put((i % KEYS).to_string(), Some(i.to_string()))),
    )
    .await;
    append_all(
        &log,
        [
            put("deleted".to_owned(), Some("v".to_owned())),
            put("deleted".to_owned(), None),
        ],
    )
    .await;
    let mut in_the_middle = reader_at(&log, &topic, 0, StartAt::Start).await;
    let mut seen = latest(next_records(&mut in_the_middle).await.records);
    hurry(&topic).await;
    // Kafka leaves the newest segment alone: more records, by and by, let it at those before.
    let mut ticks = 0;
    let compacted = async {
        loop {
            append_all(&log, [put("tick".to_owned(), Some("t".to_owned()))]).await;
            ticks += 1;
            let mut records = read_partition(&log, &topic, 0).await;
            records.retain(|record| record.key.as_deref() != Some(b"tick"));
            if records.len() == last.len() {
                break records;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let records = within("compaction", compacted).await;
    assert!(records.is_sorted_by_key(|record| record.offset));
    assert_eq!(latest(records), last);
    // Neither the ends nor an offset move, and an offset that is gone leads to the next that is there.
    let partition = TopicPartition::new(topic.clone(), 0);
    let end = (RECORDS + 2 + ticks) as i64;
    assert_eq!(log.offset(&partition, StartAt::Start).await.expect("start"), 0);
    assert_eq!(log.offset(&partition, StartAt::End).await.expect("end"), end);
    let mut gone = reader_at(&log, &topic, 0, StartAt::Offset(1)).await;
    assert_eq!(next_records(&mut gone).await.records[0].offset, (RECORDS - KEYS) as i64);
    seen.extend(latest(read_to_end(&mut in_the_middle).await));
    seen.remove("tick");
    assert_eq!(seen, last);
}

/// The last offset and value of each key.
fn latest(records: Vec<Record>) -> HashMap<String, (i64, Option<String>)> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let entry = |record: &Record| {
        let key = text(record.key.as_deref().expect("a key"));
        (key, (record.offset, record.value.as_deref().map(text)))
    };
    records.iter().map(entry).collect()
}

/// What has no key could never be replaced. The topic takes others afterwards.
pub async fn a_compacted_topic_refuses_a_record_without_a_key(log: Log) {
    let topic = new_compacted_topic(&log, 1).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let record = || ProducerRecord::to(topic.clone()).partition(0).value("v");
    let refused = match producer.send(record()).await {
        Ok(delivery) => within("a refusal", delivery).await,
        Err(error) => Err(error),
    };
    let is_named = |refused: &Result<(), Error>| matches!(refused, Err(Error::InvalidTopic { topic: named, .. }) if *named == topic);
    let refused = refused.map(|_| ());
    assert!(is_named(&refused), "{refused:?}");
    let mut transactional = log.transactional_producer(&unique("tx")).await.expect("a producer");
    let mut transaction = transactional.begin();
    transaction.send(record()).await.expect("sent");
    let refused = within("a refusal", transaction.commit()).await;
    assert!(is_named(&refused), "{refused:?}");
    within("an append", producer.append(record().key("k")))
        .await
        .expect("appended");
    assert_eq!(texts(&read_partition(&log, &topic, 0).await), ["v"]);
}

/// Records older than retention go by themselves, the start moves on, and whoever stands before it is told.
pub async fn retention_moves_the_start(log: Log) {
    const OLD: i64 = 5000;
    let spec = TopicSpec {
        retention: Some(Duration::from_secs(60 * 60)),
        ..TopicSpec::new(unique("short"), 1)
    };
    let topic = make_topic(&log, spec).await;
    let partition = TopicPartition::new(topic.clone(), 0);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock")
        .as_millis() as i64;
    let record = |i: i64| ProducerRecord::to(topic.clone()).partition(0).value(i.to_string());
    let old = |i: i64| record(i).timestamp_ms(now - 2 * 60 * 60 * 1000 + i);
    append_all(&log, (0..OLD).map(old)).await;
    let expired = async {
        while log.offset(&partition, StartAt::Start).await.expect("start") < OLD {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(RETENTION_DEADLINE, expired)
        .await
        .expect("expired in time");
    assert_eq!(log.offset(&partition, StartAt::End).await.expect("end"), OLD);
    let mut reader = reader_at(&log, &topic, 0, StartAt::Start).await;
    assert!(read_to_end(&mut reader).await.is_empty());
    let refused = within("a refusal", reader.assign(0, StartAt::Offset(OLD - 1))).await;
    assert!(
        matches!(&refused, Err(Error::OffsetOutOfRange { start, end, .. }) if (*start, *end) == (OLD, OLD)),
        "{refused:?}"
    );
    // Offsets go on, and what is young stays.
    append_all(&log, [record(OLD), record(OLD + 1)]).await;
    let kept = read_partition(&log, &topic, 0).await;
    assert_eq!(texts(&kept), [OLD.to_string(), (OLD + 1).to_string()]);
    assert_eq!(kept[0].offset, OLD);
    assert_eq!(
        log.offset(&partition, StartAt::TimeMs(now - 1)).await.expect("by time"),
        OLD
    );
}

/// What was read ahead under an earlier assignment is not returned under a later one.
pub async fn a_reassigned_partition_returns_nothing_of_before(log: Log) {
    let topic = new_topic(&log, 2).await;
    append_values(&log, &topic, (0..5000).map(|i| i.to_string())).await;
    let mut reader = reader_at(&log, &topic, 0, StartAt::Start).await;
    next_records(&mut reader).await;
    within("an assignment", reader.assign(0, StartAt::Offset(4990)))
        .await
        .expect("assigned");
    assert_eq!(next_records(&mut reader).await.records[0].offset, 4990);
    reader.unassign(0).await.expect("unassigned");
    within("an assignment", reader.assign(1, StartAt::Start))
        .await
        .expect("assigned");
    let batch = within("a batch", reader.next()).await.expect("a batch");
    assert_eq!((batch.partition.partition, batch.caught_up), (1, true));
}
