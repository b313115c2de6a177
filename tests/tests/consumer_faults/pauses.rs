//! Processes that are stopped for a while and go on as if nothing had been.

use std::time::Duration;

use barnabas_tests::consumer::{Crew, Guarantee, Order, SOON};
use barnabas_tests::kafka::brokers;
use barnabas_tests::oracle::TopicEnds;
use rand::RngExt as _;

use super::{pause_in_transaction, seeded};

/// Stops each of two members in turn for longer than its session, while the other takes over.
async fn crew_after_pauses(guarantee: Guarantee) -> Crew {
    let mut random = seeded("pauses");
    let mut crew = Crew::new(&brokers(), 4, |settings| {
        settings.guarantee = guarantee;
        settings.order = Order::Key;
        settings.session_timeout_ms = 1000;
        settings.work_max_us = 20_000;
        settings.drain_timeout_ms = 1000;
    })
    .await;
    crew.append(300, 40).await;
    crew.start("a");
    crew.start("b");
    for (stopped, heir) in [("a", "b"), ("b", "a"), ("a", "b")] {
        let by = |crew: &Crew, slot: &str| crew.ledger().iter().filter(|line| line.slot == slot).count();
        let before = by(&crew, stopped);
        crew.append(600, 40).await;
        crew.until("the one to be stopped works", SOON, |crew| {
            by(crew, stopped) > before + 5
        })
        .await;
        tokio::time::sleep(Duration::from_millis(random.random_range(0..100))).await;
        crew.worker(stopped).pause();
        crew.caught_up().await;
        let done = by(&crew, heir);
        crew.append(200, 40).await;
        crew.until("the heir works", SOON, |crew| by(crew, heir) > done + 5)
            .await;
        crew.worker(stopped).resume();
    }
    crew.append(200, 40).await;
    crew.caught_up().await;
    crew
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_member_that_wakes_after_its_session_adds_nothing_to_a_transaction() {
    let mut crew = crew_after_pauses(Guarantee::ExactlyOnce).await;
    crew.assert_offsets(&[]);
    crew.stop_all();
    crew.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_member_that_wakes_after_its_session_moves_no_offset() {
    let mut crew = crew_after_pauses(Guarantee::AtLeastOnce).await;
    crew.assert_offsets(&[]);
    crew.stop_all();
    crew.assert_at_least_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_what_was_in_a_transaction_past_its_timeout_is_there_once() {
    let mut crew = Crew::new(&brokers(), 2, |settings| {
        settings.transaction_timeout_ms = 1500;
        settings.session_timeout_ms = 30_000;
        settings.work_max_us = 3000;
    })
    .await;
    let output = TopicEnds::new(&brokers(), crew.output());
    crew.append(6000, 20).await;
    crew.start("a");
    for round in 1..=2 {
        crew.until("it works", SOON, |crew| crew.count("done") > 200 * round)
            .await;
        pause_in_transaction(&mut crew, "a", &output).await;
        crew.until("the broker has ended it", SOON, |_| !output.is_open()).await;
        crew.worker("a").resume();
    }
    crew.caught_up().await;
    crew.stop_all();
    crew.assert_exactly_once();
}
