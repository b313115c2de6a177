//! What operators see of a group that stands still, and what they can do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barnabas::log::ProducerRecord;
use barnabas::patterns::Error;
use barnabas::patterns::consumer::{ConsumerBuilder, DlqLimit, HandlerError, PauseReason, ProcessingOrder};
use barnabas::patterns::control::{self, Action, Blocked, BlockedState, Command, Key, Outcome, Place};
use barnabas::patterns::dead_letter::dead_letter_topic;
use barnabas::patterns::retry::{BackOff, RetryPolicy};
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;
use futures_util::future::BoxFuture;

use super::support::{Bench, Call, Calls, failing_for_good, within};

on_both_logs!(
    a_blocked_key_is_seen_and_skipped_and_its_next_record_goes_through,
    a_blocked_partition_is_tried_again_at_once,
    a_blocked_record_without_order_goes_to_the_dead_letters,
    ignored_failures_are_passed_over_until_they_block_again,
    the_next_owner_goes_on_with_attempts_and_waiting,
    too_many_dead_letters_stop_the_consumer_until_an_operator_looks,
    a_consumer_that_has_stopped_goes_on_when_it_is_started_again,
    what_is_too_large_to_be_told_keeps_nothing_else_from_being_told,
    nobody_answers_for_a_partition_that_nobody_owns,
);

const HOUR: Duration = Duration::from_secs(3600);

/// Fails for these values while it is told to.
fn failing(
    values: &'static [&'static str],
    ill: &Arc<AtomicBool>,
) -> impl Fn(&Call) -> BoxFuture<'static, Result<(), HandlerError>> + Send + Sync + use<> {
    let ill = ill.clone();
    move |call: &Call| -> BoxFuture<'static, _> {
        let fails = ill.load(Ordering::SeqCst) && values.contains(&call.value.as_str());
        Box::pin(async move {
            if fails {
                Err(HandlerError::retriable("declined"))
            } else {
                Ok(())
            }
        })
    }
}

fn blocking(bench: &Bench, order: ProcessingOrder, wait: Duration) -> ConsumerBuilder {
    bench
        .builder()
        .order(order)
        .retry(RetryPolicy::Blocking(BackOff::fixed(wait).infinite()))
}

/// Waits until something can be said of what stands still.
async fn blocked(bench: &Bench, what: &str, is_so: impl Fn(&[Blocked]) -> bool) -> Vec<Blocked> {
    within(what, async {
        loop {
            let blocked = control::blocked(&bench.log, &bench.group)
                .await
                .expect("what is blocked");
            if is_so(&blocked) {
                return blocked;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

async fn operate(bench: &Bench, action: Action, place: &Place, offset: i64) -> Result<Outcome, Error> {
    let command = Command {
        action,
        place: place.clone(),
        offset,
        by: "tester".to_owned(),
    };
    control::operate(&bench.log, &bench.group, command, Duration::from_secs(20)).await
}

async fn done(bench: &Bench, action: Action, place: &Place, offset: i64) {
    let outcome = operate(bench, action, place, offset).await.expect("an answer");
    assert!(outcome.done, "{}", outcome.reason);
}

async fn a_blocked_key_is_seen_and_skipped_and_its_next_record_goes_through(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(10, |number| format!("user-{}", number % 2)).await;
    let ill = Arc::new(AtomicBool::new(true));
    let calls = Calls::default();
    let consumer = bench
        .note(
            blocking(&bench, ProcessingOrder::Key, HOUR),
            &calls,
            failing(&["3"], &ill),
        )
        .await;
    let seen = blocked(&bench, "the key is blocked", |blocked| blocked.len() == 1).await;
    let place = seen[0].place.clone();
    assert_eq!(place.key, Some(Key::Text("user-1".to_owned())));
    assert_eq!(
        (seen[0].offset, seen[0].attempts, seen[0].state),
        (3, 1, BlockedState::Blocked)
    );
    assert_eq!(
        (seen[0].kind.as_str(), seen[0].message.as_str()),
        ("retriable", "declined")
    );
    for (offset, key) in [(4, Some(Key::Text("user-0".to_owned()))), (5, place.key.clone())] {
        let other = Place { key, ..place.clone() };
        let outcome = operate(&bench, Action::Skip, &other, offset).await.expect("an answer");
        assert!(!outcome.done, "what is not blocked is not skipped");
    }
    done(&bench, Action::Skip, &place, 3).await;
    bench.caught_up().await;
    blocked(&bench, "nothing is blocked", <[Blocked]>::is_empty).await;
    consumer.shutdown().await.expect("a good end");
    assert_eq!(calls.of("3").len(), 1);
    assert_eq!(calls.len(), 10);
}

async fn a_blocked_partition_is_tried_again_at_once(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(5, |_| "key".to_owned()).await;
    let ill = Arc::new(AtomicBool::new(true));
    let calls = Calls::default();
    let consumer = bench
        .note(
            blocking(&bench, ProcessingOrder::Partition, HOUR),
            &calls,
            failing(&["2"], &ill),
        )
        .await;
    let seen = blocked(&bench, "the partition is blocked", |blocked| blocked.len() == 1).await;
    assert_eq!((seen[0].place.key.clone(), seen[0].waiting), (None, 2));
    done(&bench, Action::Retry, &seen[0].place, 2).await;
    calls.until("it is tried again", |calls| calls.len() == 4).await;
    blocked(&bench, "it has failed twice", |blocked| {
        blocked.iter().any(|blocked| blocked.attempts == 2)
    })
    .await;
    ill.store(false, Ordering::SeqCst);
    done(&bench, Action::Retry, &seen[0].place, 2).await;
    bench.caught_up().await;
    blocked(&bench, "nothing is blocked", <[Blocked]>::is_empty).await;
    consumer.shutdown().await.expect("a good end");
}

async fn a_blocked_record_without_order_goes_to_the_dead_letters(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(6, |_| "key".to_owned()).await;
    let ill = Arc::new(AtomicBool::new(true));
    let calls = Calls::default();
    let consumer = bench
        .note(
            blocking(&bench, ProcessingOrder::Unordered, HOUR),
            &calls,
            failing(&["1", "4"], &ill),
        )
        .await;
    let seen = blocked(&bench, "both are blocked", |blocked| blocked.len() == 2).await;
    done(&bench, Action::DeadLetter, &seen[0].place, seen[0].offset).await;
    let letters = bench
        .read_until(&dead_letter_topic(&bench.topic, &bench.group), 1)
        .await;
    assert_eq!(
        letters[0].1.value.as_deref(),
        Some(seen[0].offset.to_string().as_bytes())
    );
    let left = blocked(&bench, "one is left", |blocked| blocked.len() == 1).await;
    done(&bench, Action::Skip, &left[0].place, left[0].offset).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    assert_eq!(calls.len(), 6);
}

async fn ignored_failures_are_passed_over_until_they_block_again(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(3, |_| "user".to_owned()).await;
    let ill = Arc::new(AtomicBool::new(true));
    let calls = Calls::default();
    let failing = || failing(&["0", "1", "2"], &ill);
    let builder = || blocking(&bench, ProcessingOrder::Key, HOUR);
    let first = bench.note(builder(), &calls, failing()).await;
    let seen = blocked(&bench, "the key is blocked", |blocked| blocked.len() == 1).await;
    let place = seen[0].place.clone();
    done(&bench, Action::Ignore, &place, 0).await;
    bench.caught_up().await;
    let ignoring = |blocked: &[Blocked]| blocked.iter().any(|blocked| blocked.state == BlockedState::Ignoring);
    blocked(&bench, "the key is ignored", ignoring).await;
    first.shutdown().await.expect("a good end");
    // It stays so at the next owner.
    let second = bench.note(builder(), &calls, failing()).await;
    bench.append_many(3, |_| "user".to_owned()).await;
    bench.caught_up().await;
    assert_eq!(calls.len(), 6);
    done(&bench, Action::Block, &place, 0).await;
    blocked(&bench, "nothing is ignored", <[Blocked]>::is_empty).await;
    bench.append_many(1, |_| "user".to_owned()).await;
    blocked(&bench, "it blocks again", |blocked| blocked.len() == 1).await;
    second.shutdown().await.expect("a good end");
}

async fn the_next_owner_goes_on_with_attempts_and_waiting(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(4, |number| format!("user-{}", number % 2)).await;
    let ill = Arc::new(AtomicBool::new(true));
    let calls = Calls::default();
    let wait = Duration::from_millis(1500);
    let builder = || blocking(&bench, ProcessingOrder::Key, wait);
    let first = bench.note(builder(), &calls, failing(&["1"], &ill)).await;
    blocked(&bench, "the key is blocked", |blocked| blocked.len() == 1).await;
    let failed_at = calls.of("1")[0].at;
    first.shutdown().await.expect("a good end");
    let second = bench.note(builder(), &calls, failing(&["1"], &ill)).await;
    calls
        .until("it is tried again", |calls| {
            calls.iter().filter(|call| call.value == "1").count() == 2
        })
        .await;
    let again = calls.of("1")[1].clone();
    assert_eq!(again.attempt, 2, "its attempts are counted on");
    assert!(
        again.at - failed_at >= wait,
        "tried again after {:?}",
        again.at - failed_at
    );
    ill.store(false, Ordering::SeqCst);
    bench.caught_up().await;
    blocked(&bench, "nothing is blocked", <[Blocked]>::is_empty).await;
    second.shutdown().await.expect("a good end");
}

async fn too_many_dead_letters_stop_the_consumer_until_an_operator_looks(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(20, |_| "key".to_owned()).await;
    let ill = Arc::new(AtomicBool::new(true));
    let calls = Calls::default();
    let limit = DlqLimit {
        ratio: 1.0,
        consecutive: Some(5),
    };
    let consumer = bench
        .note(
            bench.builder().dead_letter_limit(limit),
            &calls,
            failing_for_good("a bad deployment", &ill),
        )
        .await;
    let seen = blocked(&bench, "it has stopped", |blocked| blocked.len() == 1).await;
    assert_eq!((seen[0].offset, seen[0].due_ms), (5, 0));
    assert!(seen[0].message.contains("no further dead letters") && seen[0].message.contains("a bad deployment"));
    let state = consumer.state().await.expect("a state");
    assert!(state.partitions[0].pauses.contains(&PauseReason::DeadLetters));
    assert_eq!(
        bench.read(&dead_letter_topic(&bench.topic, &bench.group)).await.len(),
        5
    );
    ill.store(false, Ordering::SeqCst);
    done(&bench, Action::Retry, &seen[0].place, 5).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    assert_eq!(calls.len(), 21);
    assert_eq!(
        bench.read(&dead_letter_topic(&bench.topic, &bench.group)).await.len(),
        5
    );
}

async fn a_consumer_that_has_stopped_goes_on_when_it_is_started_again(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(20, |_| "key".to_owned()).await;
    let ill = Arc::new(AtomicBool::new(true));
    let builder = || {
        bench.builder().dead_letter_limit(DlqLimit {
            ratio: 1.0,
            consecutive: Some(5),
        })
    };
    let calls = Calls::default();
    let consumer = bench
        .note(builder(), &calls, failing_for_good("a bad deployment", &ill))
        .await;
    blocked(&bench, "it has stopped", |blocked| blocked.len() == 1).await;
    consumer.shutdown().await.expect("a good end");
    ill.store(false, Ordering::SeqCst);
    let consumer = bench
        .note(builder(), &calls, failing_for_good("a bad deployment", &ill))
        .await;
    bench.caught_up().await;
    blocked(&bench, "nothing is blocked", <[Blocked]>::is_empty).await;
    consumer.shutdown().await.expect("a good end");
    assert_eq!(calls.len(), 21);
    let letters = bench.read(&dead_letter_topic(&bench.topic, &bench.group)).await;
    assert_eq!(letters.len(), 5);
}

async fn what_is_too_large_to_be_told_keeps_nothing_else_from_being_told(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let record = |key: String| ProducerRecord::to(bench.topic.as_str()).key(key).value("1");
    bench.append(record("k".repeat(600_000))).await;
    bench.append(record("b".to_owned())).await;
    let work = |_: &Call| -> BoxFuture<'static, _> {
        let page = "<html>".repeat(500_000);
        Box::pin(async move { Err(HandlerError::retriable(page)) })
    };
    let builder = blocking(&bench, ProcessingOrder::Key, HOUR);
    let consumer = bench.note(builder, &Calls::default(), work).await;
    let seen = blocked(&bench, "the other is told", |blocked| !blocked.is_empty()).await;
    assert_eq!(seen[0].place.key, Some(Key::new(b"b")));
    assert!((1..=1024).contains(&seen[0].message.len()));
    let place = seen[0].place.clone();
    done(&bench, Action::Skip, &place, seen[0].offset).await;
    blocked(
        &bench,
        "that it is no longer blocked is told too",
        <[Blocked]>::is_empty,
    )
    .await;
    consumer.shutdown().await.expect("a good end");
}

async fn nobody_answers_for_a_partition_that_nobody_owns(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.make_topics(&bench.builder()).await;
    let command = Command {
        action: Action::Skip,
        place: Place {
            topic: bench.topic.clone(),
            partition: 0,
            key: None,
        },
        offset: 0,
        by: "tester".to_owned(),
    };
    let answer = control::operate(&bench.log, &bench.group, command, Duration::from_millis(300)).await;
    assert!(matches!(answer, Err(Error::NoAnswer { .. })), "{answer:?}");
}
