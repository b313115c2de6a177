//! Members that come and go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barnabas::patterns::consumer::{ConsumerHandle, ProcessingOrder};
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;
use futures_util::future::BoxFuture;

use super::support::{Bench, Call, Calls, nothing, within};

on_both_logs!(
    members_that_come_and_go_lose_and_repeat_nothing,
    a_handler_that_runs_past_the_bound_is_not_waited_for,
    a_partition_that_was_paused_goes_on_at_its_next_owner,
);

async fn until_owned(consumer: &ConsumerHandle, partitions: usize) {
    within("the partitions are shared", async {
        let owned = async || {
            let all = consumer.state().await.expect("a state").partitions;
            all.iter()
                .filter(|state| !state.partition.topic.ends_with(".redrive"))
                .count()
        };
        while owned().await != partitions {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

async fn members_that_come_and_go_lose_and_repeat_nothing(engine: Engine) {
    let bench = Arc::new(Bench::new(engine, 6).await);
    const COUNT: usize = 3000;
    let calls = Calls::default();
    let work = |_: &Call| -> BoxFuture<'static, _> {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok(())
        })
    };
    let builder = || bench.builder().order(ProcessingOrder::Key);
    let first = bench.note(builder(), &calls, work).await;
    let writer = tokio::spawn({
        let bench = bench.clone();
        async move {
            for _ in 0..30 {
                bench.append_many(COUNT / 30, |number| number.to_string()).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    until_owned(&first, 6).await;
    let second = bench.note(builder(), &calls, work).await;
    until_owned(&second, 3).await;
    let third = bench.note(builder(), &calls, work).await;
    until_owned(&third, 2).await;
    first.shutdown().await.expect("a good end");
    until_owned(&second, 3).await;
    writer.await.expect("all is written");
    bench.caught_up().await;
    second.shutdown().await.expect("a good end");
    third.shutdown().await.expect("a good end");
    let mut seen: Vec<_> = calls
        .all()
        .iter()
        .map(|call| (call.partition.partition, call.offset))
        .collect();
    let calls_made = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(
        (seen.len(), calls_made),
        (COUNT, COUNT),
        "each once: whoever left had committed what it did"
    );
}

async fn a_handler_that_runs_past_the_bound_is_not_waited_for(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    bench.append_many(40, |number| number.to_string()).await;
    let calls = Calls::default();
    let hang = Arc::new(AtomicBool::new(true));
    let gate = Arc::new(tokio::sync::Notify::new());
    let work = {
        let (hang, gate) = (hang.clone(), gate.clone());
        move |call: &Call| -> BoxFuture<'static, _> {
            let hangs = call.offset == 5 && hang.load(Ordering::SeqCst);
            let gate = gate.clone();
            Box::pin(async move {
                if hangs {
                    gate.notified().await;
                }
                Ok(())
            })
        }
    };
    let first = bench
        .note(bench.builder().drain_timeout(Duration::from_millis(300)), &calls, work)
        .await;
    calls
        .until("both hang", |calls| {
            calls.iter().filter(|call| call.offset == 4).count() == 2
        })
        .await;
    hang.store(false, Ordering::SeqCst);
    let second = bench.note(bench.builder(), &calls, nothing).await;
    until_owned(&second, 1).await;
    // The new owner goes on at the record whose handler hangs.
    calls
        .until("the rest of one partition", |calls| {
            let later = calls.iter().filter(|call| call.offset >= 5);
            later.count() >= 10
        })
        .await;
    let moved = calls
        .all()
        .iter()
        .find(|call| call.offset == 5)
        .expect("it goes on at the hanging record")
        .partition
        .clone();
    gate.notify_waiters();
    bench.caught_up().await;
    first.shutdown().await.expect("a good end");
    second.shutdown().await.expect("a good end");
    let of_moved: Vec<_> = calls
        .all()
        .iter()
        .filter(|call| call.partition == moved && call.offset == 5)
        .map(|call| call.offset)
        .collect();
    assert_eq!(
        of_moved,
        [5, 5],
        "once by the new owner, and once late, which changed nothing"
    );
}

async fn a_partition_that_was_paused_goes_on_at_its_next_owner(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let calls = Calls::default();
    let first = bench.note(bench.builder(), &calls, nothing).await;
    until_owned(&first, 1).await;
    first.pause_all().await.expect("paused");
    bench.append_many(10, |number| number.to_string()).await;
    first.shutdown().await.expect("a good end");
    assert_eq!(calls.len(), 0);
    let second = bench.note(bench.builder(), &calls, nothing).await;
    bench.caught_up().await;
    second.shutdown().await.expect("a good end");
    assert_eq!(calls.len(), 10);
}
