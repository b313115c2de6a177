//! Opening a table: it is ready when all is there, and never waits for what may not come.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use barnabas::log::{CleanupPolicy, Log, ProducerRecord, ProducerSettings, TopicPartition, TopicSpec};
use barnabas::patterns::table::{self, Error, TableSettings};
use barnabas_tests::conformance::{make_topic, unique};
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;
use tokio::task::JoinHandle;

use super::support::{Bench, Numbers, held, until, within};

on_both_logs!(
    a_table_is_ready_only_when_every_key_is_there,
    a_table_on_an_empty_topic_is_ready_at_once,
    the_marks_of_transactions_at_the_end_hold_nobody_up,
    what_was_aborted_at_the_end_holds_nobody_up,
    what_compaction_has_taken_holds_nobody_up,
    a_writer_that_never_stops_holds_nobody_up,
    a_topic_that_is_not_exactly_compacted_is_refused,
    a_topic_that_is_not_there_is_an_error,
    records_that_cannot_be_read_are_passed_over_and_said,
    partitions_that_are_added_are_read,
    a_key_that_moves_to_a_new_partition_is_there_once,
    what_was_deleted_before_is_not_in_it,
    a_table_ends_when_its_topic_is_made_again,
);

async fn a_table_is_ready_only_when_every_key_is_there(engine: Engine) {
    let keys = match engine {
        Engine::Embedded => 100_000,
        Engine::Kafka => 50_000,
    };
    let bench = Bench::new(engine, 4).await;
    bench
        .append((0..keys).map(|number| bench.record(format!("key-{number}"), number)))
        .await;
    let table = bench.open().await;
    let state = table.state();
    assert_eq!((state.keys, state.unreadable, state.passed_over), (keys, 0, 0));
    assert_eq!(table.get("key-7").as_deref(), Some(&7));
    assert_eq!(held(&table), bench.expected());
}

async fn a_table_on_an_empty_topic_is_ready_at_once(engine: Engine) {
    let mut bench = Bench::new(engine, 3).await;
    let table = bench.open().await;
    assert_eq!(table.state().next_offsets, [0, 0, 0]);
    // Also when everything was deleted: then the start is the end, and neither is 0.
    delete_and_compact(&mut bench, 10).await;
    let table = bench.open().await;
    assert_eq!((table.state().keys, table.state().next_offsets), (0, vec![10]));
}

/// Makes a topic of one partition whose first of ten records are deleted. Kafka deletes none of a topic that is only compacted, so it
/// becomes that afterwards.
async fn delete_and_compact(bench: &mut Bench, deleted: i64) {
    bench.topic = make_topic(&bench.log, TopicSpec::new(unique("table"), 1)).await;
    bench
        .append((0..10).map(|number| bench.record(format!("key-{number}"), number)))
        .await;
    let place = TopicPartition::new(bench.topic.as_str(), 0);
    within("deleted", bench.log.delete_records(&place, deleted))
        .await
        .expect("deleted");
    make_topic(&bench.log, table::topic(&bench.topic, 1)).await;
}

async fn the_marks_of_transactions_at_the_end_hold_nobody_up(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    commit(&bench, &unique("writer"), 20).await;
    let table = bench.open().await;
    assert_eq!(held(&table), bench.expected());
    assert_eq!(table.state().keys, 20);
}

async fn what_was_aborted_at_the_end_holds_nobody_up(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    let writer = unique("writer");
    commit(&bench, &writer, 20).await;
    let mut producer = bench.log.transactional_producer(&writer).await.expect("a producer");
    let mut transaction = producer.begin();
    // So many that they are on the log before it is aborted.
    for number in 0..3000 {
        let record = bench.record(format!("aborted-{number}"), number);
        transaction.send(record).await.expect("sent");
    }
    within("aborted", transaction.abort()).await.expect("aborted");
    let table = bench.open().await;
    assert_eq!(table.state().keys, 20);
    assert_eq!(held(&table), bench.expected());
}

async fn what_compaction_has_taken_holds_nobody_up(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.hurry_compaction().await;
    let mut rounds = 0;
    while rounds < 3 || bench.records().len() > 500 {
        assert!(rounds < 1000, "nothing is compacted");
        bench
            .append((0..200).map(|number| bench.record(format!("key-{number}"), number + rounds)))
            .await;
        rounds += 1;
    }
    let table = bench.open().await;
    assert_eq!(held(&table), bench.expected());
    assert_eq!(table.state().keys, 200);
}

async fn a_writer_that_never_stops_holds_nobody_up(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    bench
        .append((0..5000).map(|number| bench.record(format!("key-{number}"), number)))
        .await;
    let stop = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicU64::new(0));
    let writers = [
        write_on(bench.log.clone(), bench.topic.clone(), stop.clone(), written.clone()).await,
        abort_on(bench.log.clone(), bench.topic.clone(), stop.clone(), written.clone()).await,
    ];
    until("both write", || written.load(Ordering::Relaxed) > 2000).await;
    for _ in 0..3 {
        let table = bench.open().await;
        assert!(table.state().keys >= 5000);
        let before = written.load(Ordering::Relaxed);
        until("they write on", || written.load(Ordering::Relaxed) > before).await;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.expect("no panic");
    }
}

async fn a_topic_that_is_not_exactly_compacted_is_refused(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    for cleanup in [CleanupPolicy::Delete, CleanupPolicy::CompactDelete] {
        let spec = TopicSpec {
            cleanup,
            ..TopicSpec::new(unique("not-a-table"), 1)
        };
        let topic = make_topic(&bench.log, spec).await;
        match Numbers::open(&bench.log, TableSettings::new(&topic)).await {
            Err(Error::NotCompacted { topic: of, cleanup: is }) => assert_eq!((of, is), (topic, cleanup)),
            other => panic!("{other:?}"),
        }
    }
}

async fn a_topic_that_is_not_there_is_an_error(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let opened = Numbers::open(&bench.log, TableSettings::new(unique("nowhere"))).await;
    assert!(
        matches!(opened, Err(Error::Log(barnabas::log::Error::UnknownTopic(_)))),
        "{opened:?}"
    );
}

async fn records_that_cannot_be_read_are_passed_over_and_said(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    // A compacted topic takes no record without a key; one that becomes compacted later may have some.
    let spec = TopicSpec::new(unique("table"), 1);
    let topic = make_topic(&bench.log, spec).await;
    let to = || ProducerRecord::to(topic.as_str());
    bench
        .append([
            to().value("1"),
            to().key(vec![0xff]).value("2"),
            to().key("good").value("3"),
            to().key("bad").value("4"),
            to().key("bad").value("not a number"),
            to().key("worse").value("-5"),
            to().key("mended").value("{}"),
            to().key("mended").value("6"),
        ])
        .await;
    make_topic(&bench.log, table::topic(&topic, 1)).await;
    let table = bench.open_with(TableSettings::new(&topic)).await;
    let state = table.state();
    assert_eq!((state.keys, state.unreadable, state.passed_over), (4, 2, 2));
    assert_eq!(table.get("good").as_deref(), Some(&3));
    assert_eq!(table.get("mended").as_deref(), Some(&6));
    // Not the value before: who starts after compaction could not know it.
    assert_eq!(table.get("bad"), None);
    match table.entry("bad") {
        Err(Error::Unreadable { key, revision, .. }) => {
            assert_eq!((key.as_str(), revision.partition(), revision.offset()), ("bad", 0, 4));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(held(&table).len(), 2);
}

async fn partitions_that_are_added_are_read(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append([bench.record("old", 1)]).await;
    let (table, writer) = (bench.open().await, bench.open().await);
    bench.set_partitions(6).await;
    until("both know", || {
        [&table, &writer]
            .iter()
            .all(|table| table.state().next_offsets.len() == 6)
    })
    .await;
    for number in 0..100 {
        let revision = writer.put(&format!("new-{number}"), &number).await.expect("put");
        within("it is there", table.wait_applied(revision))
            .await
            .expect("applied");
        assert_eq!(table.get(&format!("new-{number}")).as_deref(), Some(&number));
    }
    let partitions: std::collections::BTreeSet<_> = bench.records().iter().map(|record| record.0).collect();
    assert_eq!(partitions.len(), 6, "new partitions have keys");
    assert_eq!(held(&table), bench.expected());
    assert_eq!(held(&bench.open().await), bench.expected());
}

async fn a_key_that_moves_to_a_new_partition_is_there_once(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let keys = 50;
    bench
        .append((0..keys).map(|number| bench.record(format!("key-{number}"), 1)))
        .await;
    let table = bench.open().await;
    bench.set_partitions(5).await;
    until("it knows", || table.state().next_offsets.len() == 5).await;
    // Three in ten are deleted, the others get another value.
    for number in 0..keys {
        let key = format!("key-{number}");
        let written = match number % 10 {
            0..3 => table.delete(&key).await,
            _ => table.put(&key, &2).await,
        };
        within("applied", table.wait_applied(written.expect("written")))
            .await
            .expect("applied");
    }
    let expected: std::collections::BTreeMap<_, _> = (0..keys)
        .filter(|number| number % 10 >= 3)
        .map(|number| (format!("key-{number}"), 2))
        .collect();
    assert_eq!(held(&table), expected);
    // Whatever the order in which partitions are read.
    for _ in 0..5 {
        assert_eq!(held(&bench.open().await), expected);
    }
}

async fn what_was_deleted_before_is_not_in_it(engine: Engine) {
    let mut bench = Bench::new(engine, 1).await;
    delete_and_compact(&mut bench, 4).await;
    let table = bench.open().await;
    assert_eq!(held(&table), bench.expected());
    assert_eq!(table.state().keys, 6);
}

async fn a_table_ends_when_its_topic_is_made_again(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let table = bench.open().await;
    let mut watch = table.watch("key".to_owned());
    assert!(matches!(watch.next().await, Ok(None)));
    bench.log.delete_topic(&bench.topic).await.expect("deleted");
    within("made again", async {
        // Kafka deletes in its own time.
        loop {
            let plan = bench
                .log
                .plan_topics(&[table::topic(&bench.topic, 1)])
                .await
                .expect("a plan");
            if !plan.changes.is_empty() && bench.log.apply_topics(&plan).await.is_ok() {
                return;
            }
            tokio::time::sleep(super::support::LOOK_AGAIN).await;
        }
    })
    .await;
    let told = within("the watcher is told", watch.next()).await;
    assert!(matches!(told, Err(Error::Replaced(_))), "{told:?}");
    let waited = within("so is who asks", table.ready()).await;
    assert!(matches!(waited, Err(Error::Replaced(_))), "{waited:?}");
}

/// Puts so many keys in one transaction.
async fn commit(bench: &Bench, writer: &str, keys: u32) {
    let mut producer = bench.log.transactional_producer(writer).await.expect("a producer");
    let mut transaction = producer.begin();
    for number in 0..keys {
        let record = bench.record(format!("key-{number}"), number);
        transaction.send(record).await.expect("sent");
    }
    within("committed", transaction.commit()).await.expect("committed");
}

async fn write_on(log: Log, topic: String, stop: Arc<AtomicBool>, written: Arc<AtomicU64>) -> JoinHandle<()> {
    let producer = log.producer(ProducerSettings::default()).await.expect("a producer");
    tokio::spawn(async move {
        while !stop.load(Ordering::Relaxed) {
            let number = written.fetch_add(1, Ordering::Relaxed);
            let record = ProducerRecord::to(topic.as_str())
                .key(format!("hot-{}", number % 1000))
                .value(number.to_string());
            drop(producer.send(record).await.expect("sent"));
            if number.is_multiple_of(100) {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        }
    })
}

/// Writes to the topic in transactions, and aborts every other.
async fn abort_on(log: Log, topic: String, stop: Arc<AtomicBool>, written: Arc<AtomicU64>) -> JoinHandle<()> {
    let mut producer = log.transactional_producer(&unique("writer")).await.expect("a producer");
    tokio::spawn(async move {
        for round in 0u32.. {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let mut transaction = producer.begin();
            for number in 0..1000 {
                let record = ProducerRecord::to(topic.as_str())
                    .key(format!("hot-{number}"))
                    .value(number.to_string());
                transaction.send(record).await.expect("sent");
            }
            match round.is_multiple_of(2) {
                true => transaction.abort().await.expect("aborted"),
                false => transaction.commit().await.expect("committed"),
            }
            written.fetch_add(1, Ordering::Relaxed);
        }
    })
}
