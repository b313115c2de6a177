//! A process with an embedded log and a consumer on it, killed at any moment and started again.

use std::time::Duration;

use barnabas_tests::consumer::{At, Crew, Fault, FaultKind, Guarantee, Order, Retry, WorkerSettings};
use rand::RngExt as _;

use super::{kills, seeded};

async fn crew_after_kills(test: &str, change: impl FnOnce(&mut WorkerSettings)) -> Crew {
    let mut random = seeded(test);
    let mut crew = Crew::embedded(6, |settings| {
        settings.work_max_us = 20_000;
        settings.commit_interval_ms = 20;
        change(settings);
    })
    .await;
    for _ in 0..kills() {
        crew.top_up(60).await;
        crew.start("a");
        let pause = Duration::from_millis(random.random_range(0..300));
        tokio::time::sleep(pause).await;
        crew.kill_at_work("a", 60).await;
        if crew.settings.guarantee != Guarantee::AtMostOnce {
            crew.assert_offsets(&[]);
        }
    }
    crew.start("a");
    crew.caught_up().await;
    crew.stop_all();
    crew.assert_kills_told(usize::try_from(kills()).expect("a small number"));
    crew
}

#[tokio::test(flavor = "multi_thread")]
async fn exactly_once_on_an_embedded_log_stays_so_under_random_kills() {
    let crew = crew_after_kills("embedded exactly once", |_| {}).await;
    crew.assert_offsets(&[]);
    crew.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn exactly_once_by_keys_with_retries_on_an_embedded_log_stays_so_under_random_kills() {
    let crew = crew_after_kills("embedded exactly once by keys", |settings| {
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
    crew.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn at_least_once_on_an_embedded_log_loses_nothing_under_random_kills() {
    let crew = crew_after_kills("embedded at least once", |settings| {
        settings.guarantee = Guarantee::AtLeastOnce;
        settings.order = Order::Key;
        settings.output = None;
    })
    .await;
    crew.assert_offsets(&[]);
    crew.assert_at_least_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn at_most_once_on_an_embedded_log_repeats_nothing_under_random_kills() {
    let crew = crew_after_kills("embedded at most once", |settings| {
        settings.guarantee = Guarantee::AtMostOnce;
        settings.output = None;
    })
    .await;
    crew.assert_at_most_once();
    assert!(crew.count("done") > 100, "most is done all the same");
}
