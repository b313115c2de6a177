//! Restarts, compaction, and brokers that go away: tables say what the log says.

use std::net::SocketAddr;
use std::time::Duration;

use barnabas::log::Log;
use barnabas::log::kafka::KafkaSettings;
use barnabas::patterns::table::{Error, TableSettings};
use barnabas_tests::kafka::{KafkaNode, free_ports};
use barnabas_tests::on_both_logs;
use barnabas_tests::proxy::{Proxy, Weather};
use barnabas_tests::site::Engine;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

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

/// Two processes count in one key: one whose way to the broker fails, and one beside it.
struct Rivals {
    bench: Bench,
    cut_off: Numbers,
    other: Numbers,
}

/// What became of increments.
#[derive(Debug, Default)]
struct Counted {
    made: usize,
    unknown: usize,
}

impl Rivals {
    async fn start(node: &KafkaNode, through: SocketAddr) -> Self {
        let bench = Bench::on(Some(node.brokers().to_owned()), 1).await;
        let cut_off = Log::connect_kafka(KafkaSettings::new(through.to_string())).await;
        let cut_off = cut_off.expect("a log");
        let cut_off = Numbers::open(&cut_off, bench.settings().checked())
            .await
            .expect("a table");
        within("ready", cut_off.ready()).await.expect("ready");
        let other = bench.open_checked().await;
        Self { bench, cut_off, other }
    }

    /// Each number stands there once, and as many as were made.
    fn assert_counts(&self, counted: &[Counted]) {
        let values: Vec<String> = self.bench.records().into_iter().map(|record| record.3).collect();
        let numbers: Vec<String> = (1..=values.len()).map(|number| number.to_string()).collect();
        assert_eq!(values, numbers, "{counted:?}");
        let made: usize = counted.iter().map(|counted| counted.made).sum();
        let unknown: usize = counted.iter().map(|counted| counted.unknown).sum();
        assert!(
            (made..=made + unknown).contains(&values.len()),
            "{}: {counted:?}",
            values.len()
        );
    }
}

/// Adds one to the key until it is told to stop.
fn count(table: &Numbers, stop: &CancellationToken) -> JoinHandle<Counted> {
    let (table, stop) = (table.clone(), stop.clone());
    tokio::spawn(async move {
        let mut counted = Counted::default();
        while !stop.is_cancelled() {
            let entry = table.entry("key").expect("readable");
            let key = "key".to_owned();
            let written = match entry {
                None => table.create(&key, &1).await,
                Some(entry) => table.update(&key, &(*entry.value + 1), entry.revision).await,
            };
            match written {
                Ok(_) => counted.made += 1,
                Err(Error::Conflict { .. }) => {}
                Err(Error::Unknown { .. }) => counted.unknown += 1,
                Err(error) => panic!("{error}"),
            }
        }
        counted
    })
}

/// Who was away for longer than a transaction may be open has been replaced, and must not go by what it knew before.
#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_writer_that_was_cut_off_overwrites_nothing_that_was_written_meanwhile() {
    let [listener] = free_ports().map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let proxy = Proxy::start([listener]).await;
    let through = proxy.address();
    let node = tokio::task::spawn_blocking(move || KafkaNode::start_behind(listener, through));
    let node = node.await.expect("a broker");
    let rivals = Rivals::start(&node, through).await;
    let mut counted = Vec::new();
    for _ in 0..2 {
        let stop = CancellationToken::new();
        let cut_off = count(&rivals.cut_off, &stop);
        until("it writes", || rivals.other.get("key").is_some()).await;
        proxy.set(Weather::Silent);
        let other = count(&rivals.other, &stop);
        tokio::time::sleep(Duration::from_secs(13)).await;
        proxy.set(Weather::Clear);
        tokio::time::sleep(Duration::from_secs(5)).await;
        stop.cancel();
        for counting in [cut_off, other] {
            counted.push(within("it ends", counting).await.expect("no panic"));
        }
        rivals.assert_counts(&counted);
    }
}
