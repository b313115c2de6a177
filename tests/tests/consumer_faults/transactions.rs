//! Transactions whose processes or brokers go away.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use barnabas_tests::ack_cutter::{AckCutter, Request};
use barnabas_tests::consumer::{Crew, SOON, assert_each_once};
use barnabas_tests::kafka::{KafkaCluster, KafkaNode, brokers, free_ports};
use barnabas_tests::oracle::TopicEnds;

use super::{pause_in_transaction, setting};

#[tokio::test(flavor = "multi_thread")]
async fn kafka_each_payment_is_seen_once_by_each_group_downstream_of_checkout() {
    let mut checkout = Crew::new(&brokers(), 4, |_| {}).await;
    let mut downstream = Vec::new();
    for _ in 0..3 {
        let source = checkout.output().to_owned();
        let mut group = Crew::new(&brokers(), 4, |settings| settings.topics = vec![source]).await;
        group.start("a");
        downstream.push(group);
    }
    checkout.start("a");
    checkout.start("b");
    checkout.append(5000, 500).await;
    checkout.kill("a");
    checkout.start("a");
    checkout.append(5000, 500).await;
    checkout.caught_up().await;
    checkout.stop_all();
    checkout.assert_exactly_once();
    for group in &mut downstream {
        group.caught_up().await;
        group.stop_all();
        assert_each_once(checkout.appended(), &group.read(group.output()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_broker_restarts_in_mid_run_lose_and_repeat_nothing() {
    let node = tokio::task::spawn_blocking(KafkaNode::start).await.expect("a broker");
    let mut crew = Crew::new(node.brokers(), 4, |settings| settings.work_max_us = 3000).await;
    for slot in ["a", "b", "c"] {
        crew.start(slot);
    }
    for round in 0..2 {
        crew.append(1000, 100).await;
        crew.until("it works", SOON, |crew| crew.count("done") > round * 1000 + 100)
            .await;
        tokio::task::block_in_place(|| {
            node.kill();
            node.restart();
        });
    }
    crew.append(200, 100).await;
    crew.caught_up().await;
    crew.assert_offsets(&[]);
    crew.stop_all();
    crew.assert_exactly_once();
}

/// Each of three brokers goes and comes back in turn, killed or asked to: who leads partitions and who coordinates groups and
/// transactions moves each time.
#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_rolling_restart_of_three_brokers_in_mid_run_loses_and_repeats_nothing() {
    let cluster = tokio::task::spawn_blocking(KafkaCluster::start).await.expect("brokers");
    let mut crew = Crew::new(&cluster.brokers(), 4, |settings| settings.work_max_us = 3000).await;
    for slot in ["a", "b", "c"] {
        crew.start(slot);
    }
    let goodbyes: [fn(&KafkaNode); 3] = [KafkaNode::kill, KafkaNode::stop, KafkaNode::kill];
    for (node, goodbye) in cluster.nodes.iter().zip(goodbyes) {
        work_on(&mut crew).await;
        tokio::task::block_in_place(|| {
            // A partition whose other replicas are behind may not lose this one.
            cluster.wait_in_sync();
            goodbye(node);
        });
        work_on(&mut crew).await;
        tokio::task::block_in_place(|| node.restart());
    }
    work_on(&mut crew).await;
    assert_eq!(crew.restart_crashed(), 0, "a broker that goes is no reason to end");
    crew.caught_up().await;
    crew.assert_offsets(&[]);
    crew.stop_all();
    crew.assert_exactly_once();
}

/// Appends and waits until a good part of it is done and something is committed.
async fn work_on(crew: &mut Crew) {
    crew.top_up(100).await;
    let (done, committed) = (crew.count("done"), crew.committed());
    crew.until("it works", SOON, |crew| crew.count("done") > done + 100)
        .await;
    let deadline = Instant::now() + SOON;
    // Each look is a client of its own.
    while crew.committed() == committed {
        assert!(
            Instant::now() < deadline,
            "nothing more than {committed:?} is committed"
        );
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_group_that_grows_and_shrinks_in_mid_run_loses_and_repeats_nothing() {
    let mut crew = Crew::new(&brokers(), 8, |settings| settings.work_max_us = 2000).await;
    crew.start("a");
    crew.append(1500, 100).await;
    crew.until("one works", SOON, |crew| crew.count("done") > 300).await;
    for slot in ["b", "c", "d"] {
        crew.start(slot);
        crew.append(500, 100).await;
    }
    let deadline = Instant::now() + SOON;
    let has_worked = |crew: &Crew, slot: &str| crew.ledger().iter().any(|line| line.slot == slot);
    while !["a", "b", "c", "d"].iter().all(|slot| has_worked(&crew, slot)) {
        assert!(Instant::now() < deadline, "not all four work: {:?}", crew.committed());
        crew.top_up(100).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    crew.append(1000, 100).await;
    crew.stop("a");
    crew.append(500, 100).await;
    crew.stop("c");
    crew.caught_up().await;
    crew.stop_all();
    crew.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_answers_that_are_cut_off_lose_and_repeat_nothing() {
    const CUTS: u64 = 60;
    let cuts = usize::try_from(setting("BARNABAS_TEST_CUTS").unwrap_or(CUTS)).expect("a small number");
    let [listener, proxy] = free_ports().map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let node = tokio::task::spawn_blocking(move || KafkaNode::start_behind(listener, proxy));
    let node = node.await.expect("a broker");
    let cutter = AckCutter::start(proxy, listener).await;
    let mut crew = Crew::new(node.brokers(), 4, |settings| settings.work_max_us = 2000).await;
    for slot in ["a", "b"] {
        crew.start_with(slot, |settings| {
            settings.log = proxy.to_string();
            // After so many cuts it would wait for ten seconds else.
            let quick = [("reconnect.backoff.ms", "10"), ("reconnect.backoff.max.ms", "100")];
            settings.overrides = quick.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        });
    }
    crew.append(200, 100).await;
    crew.until("it works", SOON, |crew| crew.count("done") > 100).await;
    cutter.cut_one_of(8);
    let (mut before, mut since) = (0, Instant::now());
    while cutter.cut_in_all() < cuts {
        crew.top_up(100).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(crew.restart_crashed(), 0, "a cut is no reason to end");
        if cutter.cut_in_all() > before {
            (before, since) = (cutter.cut_in_all(), Instant::now());
        }
        assert!(since.elapsed() < SOON, "nothing moves after {before} cuts");
    }
    cutter.cut_one_of(0);
    crew.caught_up().await;
    crew.stop_all();
    crew.assert_offsets(&[]);
    crew.assert_exactly_once();
    for request in [
        Request::Produce,
        Request::CommitOffsetsInTransaction,
        Request::EndTransaction,
    ] {
        assert!(cutter.cut(request) > 0, "no answer to {request:?} was cut off");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_what_a_killed_process_left_open_holds_its_next_one_up_for_seconds_only() {
    const SESSION: Duration = Duration::from_secs(1);
    const ROUNDS: u64 = 3;
    let mut crew = Crew::new(&brokers(), 1, |settings| {
        settings.session_timeout_ms = SESSION.as_millis() as u64;
        // Who waits for it to pass fails.
        settings.transaction_timeout_ms = 60_000;
        settings.work_max_us = 1000;
    })
    .await;
    let output = TopicEnds::new(&brokers(), crew.output());
    crew.start("a");
    for round in 1..=setting("BARNABAS_TEST_ROUNDS").unwrap_or(ROUNDS) {
        crew.append(3000, 40).await;
        crew.until("it works", SOON, |crew| {
            crew.count("done") as u64 > 3000 * (round - 1) + 300
        })
        .await;
        pause_in_transaction(&mut crew, "a", &output).await;
        crew.kill("a");
        let before = crew.committed();
        let since = Instant::now();
        crew.start("a");
        // Until its session is over the killed process has its partitions.
        crew.until("progress again", SESSION + Duration::from_secs(5), |crew| {
            crew.committed() != before
        })
        .await;
        eprintln!("a commit {:?} after the start", since.elapsed());
    }
    crew.caught_up().await;
    crew.stop_all();
    crew.assert_exactly_once();
}
