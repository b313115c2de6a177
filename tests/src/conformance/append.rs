//! Appending and reading back.

use std::time::Duration;

use barnabas::log::{
    Acks, Error, Headers, Log, ProducerRecord, ProducerSettings, Timestamps, TopicPartition, TopicSpec,
    partition_for_key,
};

use super::{append_all, append_values, make_topic, new_topic, read_partition, texts, unique, within};

/// Offsets begin at 0 and every field comes back.
pub async fn reads_back_what_was_appended(log: Log) {
    let topic = new_topic(&log, 1).await;
    let record = ProducerRecord::to(topic.clone())
        .key("k")
        .value("v")
        .header("h", "1")
        .timestamp_ms(1_700_000_000_123);
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let appended = within("an append", producer.append(record)).await.expect("appended");
    assert_eq!(
        (appended.partition, appended.offset),
        (TopicPartition::new(topic.clone(), 0), 0)
    );
    let records = read_partition(&log, &topic, 0).await;
    assert_eq!(records.len(), 1);
    assert_eq!((records[0].offset, records[0].timestamp_ms), (0, 1_700_000_000_123));
    assert_eq!(
        (records[0].key.as_deref(), records[0].value.as_deref()),
        (Some(&b"k"[..]), Some(&b"v"[..]))
    );
    assert_eq!(records[0].headers, Headers::new().with("h", "1"));
}

/// The time of a record is its writer's or the log's, as its topic says, and the answer tells it.
pub async fn stamps_records_by_the_clock_that_the_topic_names(log: Log) {
    const LONG_AGO_MS: i64 = 1_700_000_000_123;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    for timestamps in [Timestamps::Create, Timestamps::LogAppend] {
        let topic = make_topic(
            &log,
            TopicSpec {
                retention: None,
                timestamps,
                ..TopicSpec::new(unique("stamped"), 1)
            },
        )
        .await;
        let record = ProducerRecord::to(topic.clone()).value("v");
        let mut told = Vec::new();
        for record in [record.clone(), record.clone().timestamp_ms(LONG_AGO_MS)] {
            let appended = within("an append", producer.append(record)).await.expect("appended");
            told.push(appended.timestamp_ms);
        }
        let mut transactional = log
            .transactional_producer(&unique("stamper"))
            .await
            .expect("a producer");
        let mut transaction = transactional.begin();
        transaction.send(record.timestamp_ms(LONG_AGO_MS)).await.expect("taken");
        within("a commit", transaction.commit()).await.expect("committed");
        let read: Vec<i64> = read_partition(&log, &topic, 0)
            .await
            .iter()
            .map(|record| record.timestamp_ms)
            .collect();
        assert_eq!(read[..2], told);
        // The log's clock need not agree with this one.
        let is_now: Vec<bool> = read
            .iter()
            .map(|timestamp_ms| *timestamp_ms > LONG_AGO_MS + 1000)
            .collect();
        match timestamps {
            Timestamps::Create => assert_eq!((is_now[0], &read[1..]), (true, &[LONG_AGO_MS; 2][..])),
            Timestamps::LogAppend => assert_eq!(is_now, [true; 3], "{read:?}"),
        }
    }
}

/// Records are read in the order of the calls that appended them.
pub async fn keeps_the_order_within_a_partition(log: Log) {
    let topic = new_topic(&log, 3).await;
    let record = |i: usize| {
        ProducerRecord::to(topic.clone())
            .partition((i % 3) as i32)
            .value(i.to_string())
    };
    append_all(&log, (0..3000).map(record)).await;
    for partition in 0..3 {
        let expected: Vec<String> = (0..3000)
            .filter(|i| i % 3 == partition)
            .map(|i| i.to_string())
            .collect();
        assert_eq!(texts(&read_partition(&log, &topic, partition).await), expected);
    }
}

/// murmur2 vectors of Kafka's Java client, over 1000 partitions' worth of arithmetic and a real topic of 7.
pub async fn places_keys_as_the_java_client_does(log: Log) {
    // Utils.toPositive(Utils.murmur2(key)) % 7, from the hashes in Kafka's UtilsTest.
    let hash = [
        ("21", -973932308i64),
        ("foobar", -790332482),
        ("abc", 479470107),
        ("a-little-bit-long-string", -985981536),
    ];
    let topic = new_topic(&log, 7).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    for (key, murmur2) in hash {
        let expected = ((murmur2 & 0x7fff_ffff) % 7) as i32;
        assert_eq!(partition_for_key(key.as_bytes(), 7), expected);
        let record = ProducerRecord::to(topic.clone()).key(key).value("v");
        let appended = within("an append", producer.append(record)).await.expect("appended");
        assert_eq!(appended.partition.partition, expected, "{key}");
    }
}

/// Records without a key reach every partition.
pub async fn spreads_records_without_a_key(log: Log) {
    let topic = new_topic(&log, 3).await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let mut seen = [false; 3];
    for _ in 0..300 {
        let record = ProducerRecord::to(topic.clone()).value("v");
        let appended = within("an append", producer.append(record)).await.expect("appended");
        seen[appended.partition.partition as usize] = true;
    }
    assert_eq!(seen, [true; 3]);
}

/// A missing key or value is another thing than an empty one, and headers may repeat or be empty.
pub async fn keeps_headers_and_null_keys_and_values(log: Log) {
    let topic = new_topic(&log, 1).await;
    let headers = Headers::new().with("a", "1").with("b", "").with("a", vec![0u8, 255]);
    let mut bare = ProducerRecord::to(topic.clone()).partition(0);
    bare.headers = headers.clone();
    append_all(&log, [bare, ProducerRecord::to(topic.clone()).key("").value("")]).await;
    let records = read_partition(&log, &topic, 0).await;
    assert_eq!(
        (&records[0].key, &records[0].value, &records[0].headers),
        (&None, &None, &headers)
    );
    assert_eq!(
        (records[1].key.as_deref(), records[1].value.as_deref()),
        (Some(&b""[..]), Some(&b""[..]))
    );
    assert_eq!(
        records[0].headers.last("a").map(|value| value.to_vec()),
        Some(vec![0, 255])
    );
}

/// The record is named as too large, and the topic takes others afterwards.
pub async fn refuses_a_record_that_is_too_large(log: Log) {
    let topic = make_topic(
        &log,
        TopicSpec {
            max_message_bytes: 10_000,
            ..TopicSpec::new(unique("small"), 1)
        },
    )
    .await;
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    let refused = match producer
        .send(ProducerRecord::to(topic.clone()).value(vec![b'x'; 20_000]))
        .await
    {
        Ok(delivery) => within("a refusal", delivery).await,
        Err(error) => Err(error),
    };
    assert!(matches!(refused, Err(Error::RecordTooLarge { .. })), "{refused:?}");
    append_values(&log, &topic, ["fits"]).await;
    assert_eq!(texts(&read_partition(&log, &topic, 0).await), ["fits"]);
}

/// Topics are never created by using them.
pub async fn refuses_an_unknown_topic_and_partition(log: Log) {
    let producer = log.producer(ProducerSettings {
        delivery_timeout: Duration::from_secs(10),
        ..ProducerSettings::default()
    });
    let producer = producer.await.expect("a producer");
    let missing = unique("missing");
    let refused = match producer.send(ProducerRecord::to(missing.clone()).value("v")).await {
        Ok(delivery) => within("a refusal", delivery).await,
        Err(error) => Err(error),
    };
    assert!(
        matches!(&refused, Err(Error::UnknownTopic(topic)) if *topic == missing),
        "{refused:?}"
    );
    assert!(matches!(
        log.describe_topic(&missing).await,
        Err(Error::UnknownTopic(_))
    ));
    assert!(matches!(log.reader(&missing).await, Err(Error::UnknownTopic(_))));
    let topic = new_topic(&log, 1).await;
    let refused = match producer
        .send(ProducerRecord::to(topic.clone()).partition(5).value("v"))
        .await
    {
        Ok(delivery) => within("a refusal", delivery).await,
        Err(error) => Err(error),
    };
    assert!(
        matches!(&refused, Err(Error::UnknownPartition(partition)) if partition.partition == 5),
        "{refused:?}"
    );
    let mut reader = log.reader(&topic).await.expect("a reader");
    let refused = within("a refusal", reader.assign(5, barnabas::log::StartAt::Start)).await;
    assert!(matches!(&refused, Err(Error::UnknownPartition(_))), "{refused:?}");
}

/// acks = 0: the answer comes at once, the record soon.
pub async fn acknowledges_without_waiting_when_asked(log: Log) {
    let topic = new_topic(&log, 1).await;
    let settings = ProducerSettings {
        acks: Acks::None,
        ..ProducerSettings::default()
    };
    let producer = log.producer(settings).await.expect("a producer");
    let appended = within(
        "an append",
        producer.append(ProducerRecord::to(topic.clone()).value("v")),
    )
    .await
    .expect("sent");
    assert_eq!(appended.offset, -1);
    let mut reader = super::reader_at(&log, &topic, 0, barnabas::log::StartAt::Start).await;
    assert_eq!(texts(&super::next_records(&mut reader).await.records), ["v"]);
}
