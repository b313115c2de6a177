//! Replays on both logs: the same range is the same records, whoever consumes and appends meanwhile, or an error that names the place.
//!
//! The oracle reads the topic and the groups' offsets with plain rdkafka or SQLite.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use barnabas::log::embedded::EmbeddedSettings;
use barnabas::log::kafka::KafkaSettings;
use barnabas::log::{
    CleanupPolicy, Error as LogError, Log, ProducerRecord, Record, StartAt, TopicPartition, TopicSpec,
};
use barnabas::patterns::Error;
use barnabas::patterns::consumer::{ConsumerBuilder, ConsumerHandle, Context, Handler, HandlerError};
use barnabas::patterns::replay::{Merge, Replay, Replayed};
use barnabas_tests::conformance::{append_all, make_topic, unique, within};
use barnabas_tests::on_both_logs;
use barnabas_tests::oracle::{OracleRecord, committed_embedded, committed_kafka, read_embedded, read_kafka};
use barnabas_tests::site::Engine;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use tempfile::TempDir;
use tokio::sync::Mutex;

on_both_logs!(
    the_same_times_are_the_same_bytes_while_a_group_consumes_and_others_append,
    a_fold_that_is_added_later_equals_the_one_that_ran_live,
    bounds_by_offset_are_exact,
    a_range_by_time_has_each_of_its_records_though_times_go_back,
    partitions_merge_by_timestamp_however_uneven_they_are,
    a_beginning_that_is_not_kept_is_an_error_that_names_it,
    a_beginning_in_time_that_may_have_been_cut_is_an_error_that_names_it,
    what_is_deleted_on_the_way_is_an_error_that_names_it,
    markers_aborted_records_and_empty_partitions_end_a_replay,
    compacted_gaps_end_a_replay,
);

const PARTITIONS: i32 = 3;
const NOON_MS: i64 = 1_790_000_000_000;

struct Bench {
    engine: Engine,
    log: Log,
    topic: String,
    folder: TempDir,
}

impl Bench {
    async fn new(engine: Engine) -> Self {
        Self::with(
            engine,
            TopicSpec {
                retention: None,
                ..TopicSpec::new(unique("events"), PARTITIONS)
            },
        )
        .await
    }

    async fn with(engine: Engine, topic: TopicSpec) -> Self {
        let folder = TempDir::new().expect("a folder");
        let log = match engine {
            Engine::Embedded => {
                let settings = EmbeddedSettings {
                    cleanup_interval: Duration::from_millis(20),
                    ..EmbeddedSettings::new(folder.path())
                };
                Log::open_embedded(settings).await
            }
            Engine::Kafka => Log::connect_kafka(KafkaSettings::new(barnabas_tests::kafka::brokers())).await,
        };
        let log = log.expect("a log");
        let topic = make_topic(&log, topic).await;
        Self {
            engine,
            log,
            topic,
            folder,
        }
    }

    fn replay(&self) -> Replay {
        Replay::topic(&self.topic)
    }

    async fn read(&self, replay: Replay) -> Result<Vec<Replayed>, Error> {
        let all = replay.fold(&self.log, Vec::new(), |all, record| all.push(record));
        within("the end of a replay", all).await
    }

    /// Partition and offset of each record of a replay.
    async fn places(&self, replay: Replay) -> Vec<(i32, i64)> {
        places(&self.read(replay).await.expect("a whole range"))
    }

    fn record(&self, partition: i32, value: impl ToString, timestamp_ms: i64) -> ProducerRecord {
        ProducerRecord::to(self.topic.as_str())
            .partition(partition)
            .value(value.to_string())
            .timestamp_ms(timestamp_ms)
    }

    /// Appends records with these timestamps after [`NOON_MS`] to a partition.
    async fn append(&self, partition: i32, times: impl IntoIterator<Item = i64>) {
        let record = |(number, time): (usize, i64)| self.record(partition, number, NOON_MS + time);
        append_all(&self.log, times.into_iter().enumerate().map(record)).await;
    }

    async fn delete_before(&self, partition: i32, offset: i64) {
        let partition = TopicPartition::new(self.topic.as_str(), partition);
        let deleted = self.log.delete_records(&partition, offset);
        within("a deletion", deleted).await.expect("deleted");
    }

    fn oracle(&self) -> Vec<OracleRecord> {
        match self.engine {
            Engine::Embedded => read_embedded(self.folder.path(), &self.topic),
            Engine::Kafka => read_kafka(&barnabas_tests::kafka::brokers(), &self.topic),
        }
    }

    fn committed(&self, group: &str) -> Vec<i64> {
        let committed = match self.engine {
            Engine::Embedded => committed_embedded(self.folder.path(), group, &self.topic, PARTITIONS),
            Engine::Kafka => committed_kafka(&barnabas_tests::kafka::brokers(), group, &self.topic, PARTITIONS),
        };
        committed.into_iter().map(|(offset, _)| offset).collect()
    }

    async fn consume(&self, group: &str, handler: impl Handler) -> ConsumerHandle {
        let builder = ConsumerBuilder::new(group, [&self.topic]).commit_interval(Duration::from_millis(20));
        for spec in builder.topics(&self.log).await.expect("topics") {
            make_topic(&self.log, spec).await;
        }
        builder.start(&self.log, handler).await.expect("a consumer")
    }

    /// Waits until the oracle sees that a group has committed this.
    async fn until_committed(&self, group: &str, offsets: &[i64]) {
        within("the group's offsets", async {
            while self.committed(group) != offsets {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}

fn places(records: &[Replayed]) -> Vec<(i32, i64)> {
    records.iter().map(|record| (record.partition, record.offset)).collect()
}

fn text(value: Option<&[u8]>) -> String {
    String::from_utf8_lossy(value.unwrap_or_default()).into_owned()
}

/// A fold that depends on the order: every place, time and value, one line each.
fn line(lines: &mut String, record: &Replayed) {
    let value = text(record.value.as_deref());
    *lines += &format!(
        "{} {} {} {value}\n",
        record.partition, record.offset, record.timestamp_ms
    );
}

/// The sums of the values by partition, as the group has them.
#[derive(Clone, Default)]
struct Sums(Arc<Mutex<[u64; PARTITIONS as usize]>>);

impl Handler for Sums {
    async fn handle(&self, context: &mut Context, record: &Record) -> Result<(), HandlerError> {
        add(&mut *self.0.lock().await, context.partition().partition, record);
        Ok(())
    }
}

fn add(sums: &mut [u64; PARTITIONS as usize], partition: i32, record: &Record) {
    let sum = &mut sums[usize::try_from(partition).expect("a partition")];
    *sum = sum.wrapping_mul(31) + text(record.value.as_deref()).parse::<u64>().expect("a number");
}

async fn the_same_times_are_the_same_bytes_while_a_group_consumes_and_others_append(engine: Engine) {
    const MINUTE: i64 = 60_000;
    let bench = Bench::new(engine).await;
    for partition in 0..PARTITIONS {
        bench
            .append(partition, (0..3000).map(|number| number * 10 * MINUTE / 3000))
            .await;
    }
    let group = unique("group");
    let consumer = bench.consume(&group, Sums::default()).await;
    bench.until_committed(&group, &[3000; 3]).await;
    let times = (NOON_MS + 5 * MINUTE)..(NOON_MS + 9 * MINUTE);
    for merge in [Merge::PartitionByPartition, Merge::ByTimestamp] {
        let replay = || bench.replay().from_ms(times.start).before_ms(times.end).merge(merge);
        let mut first = String::new();
        let mut replaying = replay().open(&bench.log).await.expect("a whole range");
        // Of the same times, and behind the end of the replay.
        for partition in 0..PARTITIONS {
            bench.append(partition, [6 * MINUTE]).await;
        }
        while let Some(record) = within("a record", replaying.next()).await.expect("a record") {
            line(&mut first, &record);
        }
        assert_eq!(replaying.progress().read(), replaying.progress().all());
        let again = replay().offsets(replaying.offsets().clone());
        let again = again.fold(&bench.log, String::new(), |lines, record| line(lines, &record));
        assert_eq!(within("the same again", again).await.expect("a whole range"), first);
        let wanted = bench.oracle().into_iter().filter(|record| {
            times.contains(&record.timestamp_ms) && replaying.offsets()[&record.partition].contains(&record.offset)
        });
        let wanted: Vec<_> = wanted
            .map(|record| {
                format!(
                    "{} {} {} {}",
                    record.partition,
                    record.offset,
                    record.timestamp_ms,
                    text(Some(&record.value))
                )
            })
            .collect();
        let mut lines: Vec<_> = first.lines().map(str::to_owned).collect();
        if merge == Merge::ByTimestamp {
            let order = |line: &String| {
                line.split(' ')
                    .take(3)
                    .map(|part| part.parse::<i64>().expect("a number"))
                    .collect::<Vec<_>>()
            };
            // The records of before come in order. Those that were appended late are of a time that has gone by.
            let on_time: Vec<_> = lines.iter().map(order).filter(|of| of[1] < 3000).collect();
            assert!(on_time.is_sorted_by_key(|of| (of[2], of[0], of[1])), "{first}");
            lines.sort_by_key(order);
        }
        assert_eq!(lines, wanted);
        assert!(lines.len() >= 3 * 1200);
    }
    bench.until_committed(&group, &[3002; 3]).await;
    within("a good end", consumer.shutdown()).await.expect("a good end");
    let before = bench.committed(&group);
    bench.read(bench.replay()).await.expect("all of it");
    assert_eq!(bench.committed(&group), before, "nobody's offsets move");
}

async fn a_fold_that_is_added_later_equals_the_one_that_ran_live(engine: Engine) {
    let bench = Bench::new(engine).await;
    let (group, live) = (unique("group"), Sums::default());
    let consumer = bench.consume(&group, live.clone()).await;
    for partition in 0..PARTITIONS {
        bench.append(partition, 0..2000).await;
    }
    bench.until_committed(&group, &[2000; 3]).await;
    let later = bench
        .replay()
        .fold(&bench.log, [0; 3], |sums, event| add(sums, event.partition, &event));
    let later = within("a fold", later).await.expect("all of it");
    assert_eq!(later, *live.0.lock().await);
    within("a good end", consumer.shutdown()).await.expect("a good end");
}

async fn bounds_by_offset_are_exact(engine: Engine) {
    let bench = Bench::new(engine).await;
    for partition in 0..PARTITIONS {
        bench.append(partition, 0..100).await;
    }
    let of = |partition: i32, offsets: Range<i64>| offsets.map(move |offset| (partition, offset));
    let some = bench
        .places(bench.replay().offsets([(2, 7..9), (0, 98..100), (1, 5..5)]))
        .await;
    assert_eq!(some, [(0, 98), (0, 99), (2, 7), (2, 8)]);
    assert_eq!(
        bench.places(bench.replay().offsets([(1, 97..)])).await,
        [(1, 97), (1, 98), (1, 99)]
    );
    assert_eq!(
        bench.places(bench.replay().offsets([(1, ..=1)])).await,
        [(1, 0), (1, 1)]
    );
    let all: Vec<_> = (0..PARTITIONS).flat_map(|partition| of(partition, 0..100)).collect();
    assert_eq!(bench.places(bench.replay()).await, all);
    assert_eq!(bench.places(bench.replay().offsets([(0, 100..100)])).await, []);
    match bench.read(bench.replay().offsets([(0, 50..101)])).await {
        Err(Error::Log(LogError::OffsetOutOfRange {
            partition, offset, end, ..
        })) => {
            assert_eq!((partition.partition, offset, end), (0, 101, 100));
        }
        other => panic!("what is not there yet is no part of the past: {other:?}"),
    }
    let missing = bench.read(bench.replay().offsets([(PARTITIONS, ..)])).await;
    assert!(
        matches!(missing, Err(Error::Log(LogError::UnknownPartition(_)))),
        "{missing:?}"
    );
}

async fn a_range_by_time_has_each_of_its_records_though_times_go_back(engine: Engine) {
    let bench = Bench::new(engine).await;
    bench.append(0, [10, 30, 20, 50, 20, 10, 29, 60]).await;
    bench.append(1, [90, 25, 80]).await;
    let range = |merge| {
        bench
            .replay()
            .from_ms(NOON_MS + 20)
            .before_ms(NOON_MS + 30)
            .merge(merge)
    };
    let wanted = [(0, 2), (0, 4), (0, 6), (1, 1)];
    assert_eq!(bench.places(range(Merge::PartitionByPartition)).await, wanted);
    let merged = [(0, 2), (0, 4), (1, 1), (0, 6)];
    assert_eq!(bench.places(range(Merge::ByTimestamp)).await, merged);
    assert_eq!(bench.places(bench.replay().from_ms(NOON_MS + 91)).await, []);
    assert_eq!(
        bench.places(bench.replay().before_ms(NOON_MS + 20)).await,
        [(0, 0), (0, 5)]
    );
}

async fn partitions_merge_by_timestamp_however_uneven_they_are(engine: Engine) {
    let bench = Bench::new(engine).await;
    // More than is held of a partition: it has to rest, again and again, while the others' turn comes.
    let large = "x".repeat(20_000);
    let times = [(0, 0..1000), (1, 1000..2000), (2, 500..1500)];
    for (partition, times) in times.clone() {
        let record = |time| bench.record(partition, &large, NOON_MS + time);
        append_all(&bench.log, times.map(record)).await;
    }
    let mut wanted: Vec<(i64, i32, i64)> = Vec::new();
    for (partition, times) in times {
        wanted.extend(
            times
                .clone()
                .map(|time| (NOON_MS + time, partition, time - times.start)),
        );
    }
    wanted.sort();
    let merged = bench
        .read(bench.replay().merge(Merge::ByTimestamp))
        .await
        .expect("all of it");
    let merged: Vec<_> = merged
        .iter()
        .map(|record| (record.timestamp_ms, record.partition, record.offset))
        .collect();
    assert_eq!(merged, wanted);
}

async fn a_beginning_that_is_not_kept_is_an_error_that_names_it(engine: Engine) {
    let bench = Bench::new(engine).await;
    bench.append(1, 0..20).await;
    bench.delete_before(1, 7).await;
    for (replay, wanted) in [
        (bench.replay(), 0),
        (bench.replay().offsets([(1, 6..)]), 6),
        (bench.replay().offsets([(1, 2..5)]), 2),
    ] {
        match bench.read(replay).await {
            Err(Error::Truncated {
                partition,
                wanted: place,
                first_kept,
            }) => {
                assert_eq!((&*partition.topic, partition.partition), (bench.topic.as_str(), 1));
                assert_eq!((place, first_kept), (StartAt::Offset(wanted), 7));
            }
            other => panic!("from {wanted}: {other:?}"),
        }
    }
    let kept: Vec<_> = (7..20).map(|offset| (1, offset)).collect();
    assert_eq!(bench.places(bench.replay().offsets([(1, 7..)])).await, kept);
    assert_eq!(bench.places(bench.replay().allow_truncated()).await, kept);
    assert_eq!(
        bench.places(bench.replay().offsets([(1, 3..3)])).await,
        [],
        "nothing is missing of an empty range"
    );
}

async fn a_beginning_in_time_that_may_have_been_cut_is_an_error_that_names_it(engine: Engine) {
    let bench = Bench::new(engine).await;
    bench.append(0, (0..10).map(|number| number * 10)).await;
    bench.append(1, (0..10).map(|number| number * 10)).await;
    bench.delete_before(0, 5).await;
    let since = |time: i64| bench.replay().from_ms(NOON_MS + time);
    // What is kept begins at 50: deleted records may be of 50 too, and none is of 51.
    for time in [0, 49, 50] {
        match bench.read(since(time)).await {
            Err(Error::Truncated {
                partition,
                wanted,
                first_kept,
            }) => {
                assert_eq!(
                    (partition.partition, wanted, first_kept),
                    (0, StartAt::TimeMs(NOON_MS + time), 5)
                );
            }
            other => panic!("from {time}: {other:?}"),
        }
    }
    assert_eq!(bench.places(since(71)).await, [(0, 8), (0, 9), (1, 8), (1, 9)]);
    assert_eq!(
        bench.places(since(70).allow_truncated().before_ms(NOON_MS + 80)).await,
        [(0, 7), (1, 7)]
    );
    // Nothing is left to tell how old the deleted ones were.
    bench.delete_before(0, 10).await;
    let refused = bench.read(since(71)).await;
    assert!(
        matches!(&refused, Err(Error::Truncated { first_kept: 10, .. })),
        "{refused:?}"
    );
    assert_eq!(bench.places(since(71).allow_truncated()).await, [(1, 8), (1, 9)]);
}

async fn what_is_deleted_on_the_way_is_an_error_that_names_it(engine: Engine) {
    // More than any reader has read ahead when the deletion comes.
    let (count, large) = (1500, "x".repeat(50_000));
    let bench = Bench::new(engine).await;
    append_all(&bench.log, (0..count).map(|_| bench.record(0, &large, NOON_MS))).await;
    bench.append(1, 0..10).await;
    let open = async |replay: Replay| {
        let mut replaying = replay.open(&bench.log).await.expect("a whole range");
        assert_eq!(replaying.next().await.expect("a record").expect("one").offset, 0);
        replaying
    };
    let mut replaying = open(bench.replay()).await;
    let mut tolerant = open(bench.replay().allow_truncated()).await;
    bench.delete_before(0, count - 10).await;
    let mut next = 1;
    let (wanted, first_kept) = loop {
        match within("a record, or an error", replaying.next()).await {
            Ok(record) => {
                let record = record.expect("no end in silence");
                assert_eq!((record.partition, record.offset), (0, next), "nothing is left out");
                next += 1;
            }
            Err(Error::Truncated {
                partition,
                wanted,
                first_kept,
            }) => {
                assert_eq!((&*partition.topic, partition.partition), (bench.topic.as_str(), 0));
                break (wanted, first_kept);
            }
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!((wanted, first_kept), (StartAt::Offset(next), count - 10));
    let again = within("an error", replaying.next()).await;
    assert!(
        matches!(again, Err(Error::Truncated { .. })),
        "and there is no way on: {again:?}"
    );
    let mut last = Vec::new();
    while let Some(record) = within("a record", tolerant.next()).await.expect("all that is kept") {
        last.push((record.partition, record.offset));
    }
    let kept = (count - 10..count)
        .map(|offset| (0, offset))
        .chain((0..10).map(|offset| (1, offset)));
    assert!(last.ends_with(&kept.collect::<Vec<_>>()), "{last:?}");
    assert!(last.len() < 1500, "something was deleted before it was read");
    assert_eq!(tolerant.progress().read(), tolerant.progress().all());
}

async fn markers_aborted_records_and_empty_partitions_end_a_replay(engine: Engine) {
    let bench = Bench::new(engine).await;
    for merge in [Merge::PartitionByPartition, Merge::ByTimestamp] {
        assert_eq!(
            bench.places(bench.replay().merge(merge)).await,
            [],
            "nothing was ever there"
        );
    }
    let mut producer = bench
        .log
        .transactional_producer(&unique("tx"))
        .await
        .expect("a producer");
    for (value, is_committed) in [("kept", true), ("aborted", false), ("kept", true), ("aborted", false)] {
        let mut transaction = producer.begin();
        for number in 0..1200 {
            let record = bench.record(0, value, NOON_MS + number);
            transaction.send(record).await.expect("sent");
        }
        match is_committed {
            true => within("a commit", transaction.commit()).await.expect("committed"),
            false => within("an abort", transaction.abort()).await.expect("aborted"),
        }
    }
    // On Kafka what was committed shows some milliseconds later: the oracle waits for it.
    let wanted: Vec<_> = bench
        .oracle()
        .iter()
        .map(|record| (record.partition, record.offset))
        .collect();
    assert_eq!(wanted.len(), 2400);
    bench.append(2, [5]).await;
    let with_last = |merge| bench.replay().merge(merge);
    let expected: Vec<_> = wanted.iter().copied().chain([(2, 0)]).collect();
    assert_eq!(bench.places(with_last(Merge::PartitionByPartition)).await, expected);
    // Six records of partition 0 have times up to that of the one of partition 2.
    let (before, behind) = wanted.split_at(6);
    assert_eq!(
        bench.places(with_last(Merge::ByTimestamp)).await,
        [before, &[(2, 0)], behind].concat()
    );
    // Where all is deleted but a marker.
    bench.delete_before(2, 1).await;
    assert_eq!(bench.places(bench.replay().offsets([(2, 1..1), (1, 0..0)])).await, []);
}

async fn compacted_gaps_end_a_replay(engine: Engine) {
    let spec = TopicSpec {
        cleanup: CleanupPolicy::Compact,
        ..TopicSpec::new(unique("compacted"), 1)
    };
    let bench = Bench::with(engine, spec).await;
    let put = |key: String| {
        ProducerRecord::to(bench.topic.as_str())
            .partition(0)
            .key(key)
            .value("v")
    };
    append_all(&bench.log, (0..5000).map(|number| put((number % 10).to_string()))).await;
    let end = 5000;
    if engine == Engine::Kafka {
        compact_soon(&bench.topic).await;
    }
    within("compaction", async {
        while bench.oracle().iter().filter(|record| record.offset < end).count() > 10 {
            append_all(&bench.log, [put("tick".to_owned())]).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let wanted: Vec<_> = (4990..5000).map(|offset| (0, offset)).collect();
    assert_eq!(bench.places(bench.replay().offsets([(0, 0..end)])).await, wanted);
    assert_eq!(
        bench.places(bench.replay().offsets([(0, 100..200)])).await,
        [],
        "all of it is a gap"
    );
    let all = bench.places(bench.replay()).await;
    assert_eq!(all[..10], wanted, "and what came later is behind it");
}

/// Kafka compacts what lies before the newest segment, so segments end soon.
async fn compact_soon(topic: &str) {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", barnabas_tests::kafka::brokers())
        .create()
        .expect("a client");
    let change = AlterConfig::new(ResourceSpecifier::Topic(topic))
        .set("cleanup.policy", "compact")
        .set("min.cleanable.dirty.ratio", "0.01")
        .set("segment.ms", "100");
    let answer = admin.alter_configs(&[change], &AdminOptions::new()).await;
    let answer = answer.expect("an answer");
    assert!(answer.iter().all(Result::is_ok), "{answer:?}");
}
