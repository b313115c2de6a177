//! Transactions whose processes or brokers go away.

use std::time::{Duration, Instant};

use barnabas_tests::consumer::{Crew, SOON, assert_each_once};
use barnabas_tests::kafka::{KafkaNode, brokers};

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
    for slot in ["a", "b"] {
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
    crew.until("all four work", SOON, |crew| {
        let lines = crew.ledger();
        ["a", "b", "c", "d"]
            .iter()
            .all(|slot| lines.iter().any(|line| line.slot == *slot))
    })
    .await;
    crew.append(1000, 100).await;
    crew.stop("a");
    crew.append(500, 100).await;
    crew.stop("c");
    crew.caught_up().await;
    crew.stop_all();
    crew.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_what_a_killed_process_left_open_holds_its_next_one_up_for_seconds_only() {
    let mut crew = Crew::new(&brokers(), 1, |settings| {
        settings.session_timeout_ms = 1000;
        // Who waits for it to pass fails.
        settings.transaction_timeout_ms = 60_000;
        settings.work_max_us = 1000;
    })
    .await;
    crew.start("a");
    for round in 1..=3 {
        crew.append(1000, 40).await;
        crew.until("it works", SOON, |crew| {
            crew.count("done") as u64 > 1000 * (round - 1) + 300
        })
        .await;
        crew.kill("a");
        let before = crew.committed();
        let since = Instant::now();
        crew.start("a");
        // Five seconds beyond the session of the killed process.
        crew.until("progress again", Duration::from_secs(10), |crew| {
            crew.committed() != before
        })
        .await;
        eprintln!("a commit {:?} after the start", since.elapsed());
    }
    crew.caught_up().await;
    crew.stop_all();
    crew.assert_exactly_once();
}
