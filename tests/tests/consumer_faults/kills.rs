//! Processes that are killed at any moment.

use std::time::Duration;

use barnabas_tests::consumer::{At, Crew, Fault, FaultKind, Guarantee, Membership, Order, Retry, SOON, WorkerSettings};
use barnabas_tests::kafka::brokers;
use rand::RngExt as _;

use super::{kills, seeded, setting};

const SLOTS: [&str; 3] = ["a", "b", "c"];
const KEYS: u64 = 60;

/// A crew of three whose members are killed with handlers at work and started again in their slots, then left to finish.
async fn crew_after_kills(test: &str, change: impl FnOnce(&mut WorkerSettings)) -> Crew {
    let mut random = seeded(test);
    let mut crew = Crew::new(&brokers(), 6, |settings| {
        settings.work_max_us = 20_000;
        settings.session_timeout_ms = 1000;
        change(settings);
    })
    .await;
    for slot in SLOTS {
        crew.start(slot);
    }
    for _ in 0..kills() {
        crew.top_up(KEYS).await;
        let pause = Duration::from_millis(random.random_range(0..1200));
        tokio::time::sleep(pause).await;
        crew.restart_crashed();
        let slot = SLOTS[random.random_range(0..SLOTS.len())];
        crew.kill_at_work(slot, KEYS).await;
        crew.start(slot);
    }
    crew.caught_up().await;
    crew.assert_kills_told(usize::try_from(kills()).expect("a small number"));
    crew
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_exactly_once_stays_so_under_random_kills() {
    let mut crew = crew_after_kills("exactly once", |_| {}).await;
    crew.assert_offsets(&[]);
    crew.stop_all();
    crew.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_exactly_once_by_keys_with_retries_and_crashes_stays_so_under_random_kills() {
    let mut crew = crew_after_kills("exactly once by keys", |settings| {
        settings.order = Order::Key;
        settings.retry = Retry::Blocking(30);
        settings.faults = vec![Fault {
            at: At::Every(17),
            attempts: 2,
            until: None,
            kind: FaultKind::Fail,
        }];
    })
    .await;
    crew.assert_offsets(&[]);
    crew.stop_all();
    crew.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_exactly_once_stays_so_for_instances_that_keep_their_partitions_over_kills() {
    let mut crew = crew_after_kills("exactly once, static", |settings| {
        settings.membership = Membership::Static;
        settings.order = Order::Key;
        // Each partition holds more than this: keys that wait are let go and read again.
        settings.buffer_bytes = Some(10_000);
        settings.retry = Retry::Blocking(200);
        settings.faults = vec![Fault {
            at: At::Every(7),
            attempts: 2,
            until: None,
            kind: FaultKind::Fail,
        }];
    })
    .await;
    crew.assert_offsets(&[]);
    crew.stop_all();
    crew.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_exactly_once_stays_so_when_the_broker_assigns_partitions_under_kills() {
    let mut crew = crew_after_kills("exactly once, broker", |settings| {
        settings.membership = Membership::Broker;
    })
    .await;
    crew.assert_offsets(&[]);
    crew.stop_all();
    crew.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_at_least_once_loses_nothing_under_random_kills() {
    let mut crew = crew_after_kills("at least once", |settings| {
        settings.guarantee = Guarantee::AtLeastOnce;
        settings.order = Order::Key;
        settings.output = None;
    })
    .await;
    crew.assert_offsets(&[]);
    crew.stop_all();
    crew.assert_at_least_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_at_most_once_repeats_nothing_under_random_kills() {
    let mut crew = crew_after_kills("at most once", |settings| {
        settings.guarantee = Guarantee::AtMostOnce;
        settings.output = None;
    })
    .await;
    crew.stop_all();
    crew.assert_at_most_once();
    assert!(crew.count("done") > 100, "most is done all the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_no_committed_offset_is_above_an_unfinished_record_after_a_kill() {
    let mut random = seeded("offsets");
    let mut crew = Crew::new(&brokers(), 4, |settings| {
        settings.guarantee = Guarantee::AtLeastOnce;
        settings.order = Order::Unordered;
        settings.output = None;
        settings.pool = 64;
        settings.work_max_us = 60_000;
        settings.commit_interval_ms = 10;
        settings.session_timeout_ms = 1000;
    })
    .await;
    // Each starts alone, when the session of the one before is over.
    let kills = setting("BARNABAS_TEST_KILLS").unwrap_or(5);
    for _ in 0..kills {
        crew.top_up(800).await;
        let before = crew.count("done");
        crew.start("a");
        let more = random.random_range(1..400);
        crew.until("some are done", SOON, |crew| crew.count("done") > before + more)
            .await;
        crew.kill_at_work("a", 800).await;
        crew.assert_offsets(&[]);
    }
    crew.start("a");
    crew.caught_up().await;
    crew.stop_all();
    crew.assert_kills_told(usize::try_from(kills).expect("a small number"));
    crew.assert_at_least_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_an_idle_member_takes_over_after_a_kill() {
    let mut crew = Crew::new(&brokers(), 1, |settings| {
        settings.output = None;
        settings.guarantee = Guarantee::AtLeastOnce;
    })
    .await;
    crew.start("a");
    crew.append(50, 5).await;
    crew.caught_up().await;
    crew.start("b");
    crew.start("c");
    crew.append(50, 5).await;
    crew.caught_up().await;
    let last = crew.ledger().last().expect("lines").slot.clone();
    crew.kill(&last);
    crew.append(50, 5).await;
    crew.caught_up().await;
    let heir = crew.ledger().last().expect("lines").slot.clone();
    assert_ne!(heir, last);
    crew.stop_all();
    crew.assert_at_least_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_handler_that_ends_its_process_is_called_again_and_leaves_nothing_twice() {
    let mut crew = Crew::new(&brokers(), 3, |settings| {
        settings.work_max_us = 500;
        settings.session_timeout_ms = 1000;
    })
    .await;
    let mended = crew.folder().join("mended");
    crew.settings.faults = vec![Fault {
        at: At::Every(150),
        attempts: 1,
        until: Some(mended.clone()),
        kind: FaultKind::Abort,
    }];
    crew.append(600, 30).await;
    crew.start("a");
    crew.start("b");
    let mut crashes = 0;
    crew.until("some crashes", SOON, |crew| {
        crashes += crew.restart_crashed();
        crashes >= 4
    })
    .await;
    std::fs::write(&mended, "").expect("written");
    crew.until("no more crashes", SOON, |crew| {
        crew.restart_crashed();
        crew.count("done") == 600
    })
    .await;
    crew.restart_crashed();
    crew.caught_up().await;
    crew.stop_all();
    crew.assert_exactly_once();
}
