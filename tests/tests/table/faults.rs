//! Restarts, compaction, and brokers that go away: tables say what the log says.

use std::time::Duration;

use barnabas::log::Log;
use barnabas::log::kafka::KafkaSettings;
use barnabas::patterns::table::TableSettings;
use barnabas_tests::kafka::KafkaNode;
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::support::{Bench, Numbers, held, until, within};

on_both_logs!(tables_that_restart_while_the_topic_is_compacted_are_equal);

async fn tables_that_restart_while_the_topic_is_compacted_are_equal(engine: Engine) {
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let bench = Bench::new(engine, 3).await;
    bench.hurry_compaction().await;
    let stays = bench.open().await;
    let mut restarts: Vec<Option<Numbers>> = vec![None, None, None];
    let (mut written, mut kept) = (0, usize::MAX);
    let mut rounds = 0;
    while rounds < 12 || kept > written / 2 {
        assert!(
            rounds < 500,
            "nothing is compacted: {kept} of {written} records are left"
        );
        let records = (0..400).map(|_| {
            let mut record = bench.record(format!("key-{}", random.random_range(0..150)), random.random::<u32>());
            if random.random_range(0..5) == 0 {
                record.value = None;
            }
            record
        });
        let records: Vec<_> = records.collect();
        written += records.len();
        bench.append(records).await;
        let index = random.random_range(0..restarts.len());
        restarts[index] = match restarts[index] {
            Some(_) => None,
            None => Some(bench.open().await),
        };
        rounds += 1;
        kept = bench.records().len();
    }
    let expected = bench.expected();
    let fresh = bench.open().await;
    assert_eq!(held(&fresh), expected);
    for table in restarts.iter().flatten().chain([&stays]) {
        until("it is equal", || held(table) == expected).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_restarts_while_a_table_is_loaded_and_written() {
    let node = KafkaNode::start();
    let bench = Bench::on(Some(node.brokers().to_owned()), 3).await;
    let keys = 150_000;
    bench
        .append((0..keys).map(|number| bench.record(format!("key-{number}"), number)))
        .await;
    let log = Log::connect_kafka(KafkaSettings::new(node.brokers()))
        .await
        .expect("a log");
    let checked = Numbers::open(&log, bench.settings().checked()).await.expect("a table");
    let table = Numbers::open(&log, bench.settings()).await.expect("a table");
    assert!(table.state().keys < keys, "it is loading");
    node.kill();
    node.restart();
    within("ready all the same", table.ready()).await.expect("ready");
    assert_eq!(held(&table), bench.expected());
    within("ready", checked.ready()).await.expect("ready");
    // Writes go on too, those that are checked among them, with the broker away in their midst.
    let writing = {
        let checked = checked.clone();
        tokio::spawn(async move {
            for number in 1..=60u64 {
                within("written", checked.put(&"checked".to_owned(), &number))
                    .await
                    .expect("written");
            }
        })
    };
    until("it has begun", || checked.get("checked").is_some()).await;
    node.kill();
    node.restart();
    writing.await.expect("no panic");
    let expected = bench.expected();
    assert_eq!(expected["checked"], 60);
    until("both are equal", || {
        held(&table) == expected && held(&checked) == expected
    })
    .await;
}

/// What becomes of a write whose commit nobody answers has to be looked up, which takes the broker too.
#[tokio::test(flavor = "multi_thread")]
async fn kafka_stands_still_and_checked_writes_are_answered_all_the_same() {
    let node = KafkaNode::start();
    let bench = Bench::on(Some(node.brokers().to_owned()), 1).await;
    let settings = TableSettings {
        write_timeout: Duration::from_secs(2),
        ..bench.settings().checked()
    };
    let table = bench.open_with(settings).await;
    table.put(&"before".to_owned(), &1).await.expect("written");
    node.pause();
    let writes = (0..3u64).map(|number| {
        let table = table.clone();
        tokio::spawn(async move { table.put(&format!("key-{number}"), &number).await })
    });
    for write in writes.collect::<Vec<_>>() {
        let answer = within("answered", write).await.expect("no panic");
        assert!(answer.is_err(), "the broker stands still");
    }
    node.resume();
    let after = within("written", async {
        while table.put(&"after".to_owned(), &2).await.is_err() {}
    });
    after.await;
    let expected = bench.expected();
    assert_eq!((expected["before"], expected["after"]), (1, 2));
    until("it is equal", || held(&table) == expected).await;
}
