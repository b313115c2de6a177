//! What is kept in order, and what goes on beside it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use barnabas::log::{StartAt, TopicPartition, TopicSpec};
use barnabas::patterns::consumer::{ConsumerBuilder, DeliveryGuarantee, ProcessingOrder};
use barnabas_tests::conformance::make_topic;
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;
use rand::RngExt as _;
use tokio::sync::Semaphore;

use super::support::{Bench, Call, Calls, by_key, nothing, within};

on_both_logs!(
    a_pattern_takes_in_topics_that_turn_up_once_they_are_whole,
    keeps_the_order_of_a_partition,
    keeps_the_order_of_a_key_and_handles_keys_side_by_side,
    without_order_handles_as_many_as_the_pool_has,
    at_most_once_is_committed_before_it_is_handled,
    at_most_once_a_drain_ends_though_records_wait,
    at_most_once_what_a_handler_is_at_is_not_handled_again,
    paused_it_handles_nothing_and_drained_it_has_committed_all,
    a_slow_handler_keeps_its_member_and_memory_is_bounded,
);

const RECORDS: usize = 400;

/// A handler that takes up to some milliseconds, and counts how many of its calls go on at the same time.
fn busy(
    most_ms: u64,
) -> (
    impl Fn(&Call) -> futures_util::future::BoxFuture<'static, Result<(), barnabas::patterns::consumer::HandlerError>>
    + Send
    + Sync,
    Arc<AtomicUsize>,
) {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let seen = most.clone();
    let work = move |_: &Call| -> futures_util::future::BoxFuture<'static, _> {
        let (now, most) = (now.clone(), most.clone());
        Box::pin(async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let ms = rand::rng().random_range(0..=most_ms);
            tokio::time::sleep(Duration::from_millis(ms)).await;
            now.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        })
    };
    (work, seen)
}

async fn a_pattern_takes_in_topics_that_turn_up_once_they_are_whole(engine: Engine) {
    let mut bench = Bench::new(engine, 2).await;
    let first = bench.topic.clone();
    let builder = ConsumerBuilder::new(&bench.group, [""; 0])
        .pattern(format!("{first}(-later)?"), Duration::from_millis(100))
        .commit_interval(Duration::from_millis(20));
    let calls = Calls::default();
    bench.append_many(20, |number| number.to_string()).await;
    let consumer = bench.note(builder.clone(), &calls, nothing).await;
    calls.until("what is there is handled", |calls| calls.len() == 20).await;

    // One that lacks its dead letters is not consumed, and stops nobody.
    let later = make_topic(&bench.log, TopicSpec::new(format!("{first}-later"), 2)).await;
    make_topic(&bench.log, TopicSpec::new(format!("{first}-else"), 2)).await;
    bench.topic = format!("{first}-else");
    bench.append_many(5, |number| number.to_string()).await;
    bench.topic = later.clone();
    bench.append_many(20, |number| number.to_string()).await;
    bench.topic = first.clone();
    bench.append_many(20, |number| number.to_string()).await;
    calls.until("the first is consumed on", |calls| calls.len() == 40).await;
    assert!(calls.all().iter().all(|call| *call.partition.topic == first));

    bench.make_topics(&builder).await;
    calls
        .until("the later one is consumed", |calls| calls.len() == 60)
        .await;
    bench.topic = later.clone();
    bench.append_many(20, |number| number.to_string()).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let of_later = calls.all().iter().filter(|call| *call.partition.topic == later).count();
    assert_eq!((calls.len(), of_later), (80, 40), "each once, and no other topic");
}

async fn keeps_the_order_of_a_partition(engine: Engine) {
    let bench = Bench::new(engine, 3).await;
    bench.append_many(RECORDS, |number| (number % 20).to_string()).await;
    let (work, at_once) = busy(3);
    let calls = Calls::default();
    let consumer = bench.note(bench.builder(), &calls, work).await;
    calls.until("all are handled", |calls| calls.len() == RECORDS).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let mut last: HashMap<i32, i64> = HashMap::new();
    for call in calls.all() {
        let before = last.insert(call.partition.partition, call.offset);
        assert!(
            before.is_none_or(|before| before < call.offset),
            "{call:?} after {before:?}"
        );
    }
    assert_eq!(calls.len(), RECORDS);
    assert_eq!(at_once.load(Ordering::SeqCst), 3, "one of each partition");
}

async fn keeps_the_order_of_a_key_and_handles_keys_side_by_side(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(RECORDS, |number| (number % 7).to_string()).await;
    let (work, at_once) = busy(3);
    let calls = Calls::default();
    let builder = bench.builder().order(ProcessingOrder::Key).pool(5);
    let consumer = bench.note(builder, &calls, work).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let keys = by_key(&calls.all());
    assert_eq!(keys.len(), 7);
    for (key, numbers) in keys {
        let expected: Vec<_> = (0..RECORDS).filter(|number| (number % 7).to_string() == key).collect();
        assert_eq!(numbers, expected, "of key {key}");
    }
    assert_eq!(at_once.load(Ordering::SeqCst), 5, "as many as the pool has");
}

async fn without_order_handles_as_many_as_the_pool_has(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(RECORDS, |_| "one key".to_owned()).await;
    let (work, at_once) = busy(3);
    let calls = Calls::default();
    let builder = bench.builder().order(ProcessingOrder::Unordered).pool(9);
    let consumer = bench.note(builder, &calls, work).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let mut numbers = by_key(&calls.all()).remove("one key").expect("calls");
    numbers.sort_unstable();
    assert_eq!(numbers, (0..RECORDS).collect::<Vec<_>>(), "each once");
    assert_eq!(at_once.load(Ordering::SeqCst), 9);
}

async fn at_most_once_is_committed_before_it_is_handled(engine: Engine) {
    let bench = Arc::new(Bench::new(engine, 1).await);
    bench.append_many(50, |_| "key".to_owned()).await;
    let calls = Calls::default();
    let early = Arc::new(AtomicUsize::new(0));
    let work = {
        let (bench, early) = (bench.clone(), early.clone());
        move |call: &Call| -> futures_util::future::BoxFuture<'static, _> {
            let (bench, early, call) = (bench.clone(), early.clone(), call.clone());
            Box::pin(async move {
                let committed = bench.committed(&call.partition).await;
                if committed.is_some_and(|committed| committed > call.offset) {
                    early.fetch_add(1, Ordering::SeqCst);
                }
                Ok(())
            })
        }
    };
    let builder = bench.builder().guarantee(DeliveryGuarantee::AtMostOnce);
    let consumer = bench.note(builder, &calls, work).await;
    calls.until("all are handled", |calls| calls.len() == 50).await;
    consumer.shutdown().await.expect("a good end");
    assert_eq!(early.load(Ordering::SeqCst), 50);
    assert_eq!(bench.lag().await, 0);
}

async fn at_most_once_a_drain_ends_though_records_wait(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(50, |_| "key".to_owned()).await;
    let calls = Calls::default();
    let (begun, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let builder = bench.builder().guarantee(DeliveryGuarantee::AtMostOnce);
    let consumer = bench.note(builder, &calls, waiting_for(&begun, &gate)).await;
    let drain = async {
        within("a handler is at work", begun.acquire())
            .await
            .expect("never closed")
            .forget();
        let drained = consumer.drain();
        tokio::pin!(drained);
        let early = tokio::time::timeout(Duration::from_millis(200), &mut drained).await;
        assert!(early.is_err(), "the record in hand is not done");
        gate.add_permits(1);
        within("the drain", drained).await.expect("drained");
    };
    drain.await;
    assert_eq!(calls.len(), 1);
    gate.add_permits(50);
    consumer.resume_all().await.expect("resumed");
    calls.until("the others are handled", |calls| calls.len() == 50).await;
    consumer.shutdown().await.expect("a good end");
}

async fn at_most_once_what_a_handler_is_at_is_not_handled_again(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(5, |_| "key".to_owned()).await;
    let (begun, gate) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let builder = || {
        let builder = bench.builder().guarantee(DeliveryGuarantee::AtMostOnce);
        builder.drain_timeout(Duration::from_millis(100))
    };
    let consumer = bench
        .note(builder(), &Calls::default(), waiting_for(&begun, &gate))
        .await;
    within("a handler is at work", begun.acquire())
        .await
        .expect("never closed")
        .forget();
    within("the shutdown", consumer.shutdown()).await.expect("a good end");

    bench.append_many(6, |_| "key".to_owned()).await;
    let calls = Calls::default();
    let consumer = bench.note(builder(), &calls, nothing).await;
    calls
        .until("the last is handled", |calls| {
            calls.iter().any(|call| call.value == "5")
        })
        .await;
    consumer.shutdown().await.expect("a good end");
    let first = calls.all().into_iter().find(|call| call.offset == 0);
    assert!(first.is_none(), "{first:?}");
}

/// Says that it has begun, and ends when it may.
fn waiting_for(
    begun: &Arc<Semaphore>,
    gate: &Arc<Semaphore>,
) -> impl Fn(&Call) -> futures_util::future::BoxFuture<'static, Result<(), barnabas::patterns::consumer::HandlerError>>
+ Send
+ Sync
+ use<> {
    let (begun, gate) = (begun.clone(), gate.clone());
    move |_: &Call| {
        let (begun, gate) = (begun.clone(), gate.clone());
        Box::pin(async move {
            begun.add_permits(1);
            gate.acquire().await.expect("never closed").forget();
            Ok(())
        })
    }
}

async fn paused_it_handles_nothing_and_drained_it_has_committed_all(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    let calls = Calls::default();
    let consumer = bench.note(bench.builder(), &calls, nothing).await;
    bench.append_many(20, |number| number.to_string()).await;
    calls.until("the first are handled", |calls| calls.len() == 20).await;
    consumer.drain().await.expect("drained");
    assert_eq!(bench.lag().await, 0);
    bench.append_many(20, |number| number.to_string()).await;
    // What comes while it is paused is read, and waits.
    within("the records are read", async {
        loop {
            let state = consumer.state().await.expect("a state");
            let open: usize = state.partitions.iter().map(|partition| partition.open).sum();
            if open == 20 {
                assert!(state.partitions.iter().all(|partition| !partition.pauses.is_empty()));
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(calls.len(), 20);
    let lag = consumer.lag().await.expect("a lag");
    assert_eq!(lag.iter().map(|(_, behind)| behind).sum::<i64>(), 20);
    let one = TopicPartition::new(bench.topic.as_str(), 1);
    consumer.resume(vec![one.clone()]).await.expect("resumed");
    let end = bench.log.offset(&one, StartAt::End).await.expect("an end");
    within("one partition goes on", async {
        while bench.committed(&one).await != Some(end) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(
        calls.all()[20..].iter().all(|call| call.partition == one),
        "and no other"
    );
    assert!(calls.len() < 40);
    consumer.resume_all().await.expect("resumed");
    calls.until("the others are handled", |calls| calls.len() == 40).await;
    consumer.pause(vec![one.clone()]).await.expect("paused");
    consumer.pause_all().await.expect("paused");
    consumer.resume_all().await.expect("resumed");
    let state = consumer.state().await.expect("a state");
    assert!(state.partitions.iter().all(|partition| partition.pauses.is_empty()));
    consumer.shutdown().await.expect("a good end");
    assert_eq!(bench.lag().await, 0);
}

async fn a_slow_handler_keeps_its_member_and_memory_is_bounded(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    // Much more than the log's client reads ahead: some ten batches of up to 4000 records.
    const COUNT: usize = 120_000;
    bench.append_many(COUNT, |number| number.to_string()).await;
    let gate = Arc::new(Semaphore::new(0));
    let calls = Calls::default();
    let opened = gate.clone();
    let work = move |_: &Call| -> futures_util::future::BoxFuture<'static, _> {
        let gate = gate.clone();
        Box::pin(async move {
            gate.acquire().await.expect("never closed").forget();
            Ok(())
        })
    };
    let consumer = bench.note(bench.builder().buffer_bytes(100_000), &calls, work).await;
    within("the buffer is full", async {
        loop {
            let state = consumer.state().await.expect("a state");
            if state.partitions.iter().any(|partition| !partition.pauses.is_empty()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let state = consumer.state().await.expect("a state");
    let open = state.partitions[0].open;
    assert!(
        open < COUNT / 2,
        "{open}: what the log's client had read by then, and no more"
    );
    opened.add_permits(COUNT);
    calls.until("all are handled", |calls| calls.len() == COUNT).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let numbers: Vec<usize> = calls
        .all()
        .iter()
        .map(|call| call.value.parse().expect("a number"))
        .collect();
    assert_eq!(numbers, (0..COUNT).collect::<Vec<_>>());
}
