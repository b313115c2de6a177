//! What becomes of records whose handler fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use barnabas::log::{self, ProducerRecord, Record, Timestamps};
use barnabas::patterns::Error;
use barnabas::patterns::consumer::{
    BatchError, BatchHandler, Context, DeliveryGuarantee, DlqLimit, HandlerError, ProcessingOrder,
};
use barnabas::patterns::control::{self, Action, Command, Key, Place};
use barnabas::patterns::dead_letter::{dead_letter_topic, header, redrive_topic};
use barnabas::patterns::retry::{BackOff, RetryPolicy, RetryTopics};
use barnabas_tests::conformance::make_topic;
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;
use futures_util::future::BoxFuture;

use super::support::{Bench, Call, Calls, TopicSpec, by_key, nothing, within};

on_both_logs!(
    a_blocked_partition_is_tried_again_in_time_and_keeps_its_order,
    a_blocked_key_delays_no_other_and_holds_the_offset,
    keys_that_stand_still_keep_no_other_from_being_read,
    a_blocked_partition_lets_the_others_go_on,
    errors_panics_and_timeouts_become_dead_letters,
    what_fails_goes_from_retry_topic_to_retry_topic_and_never_early,
    blocking_and_retry_topics_come_one_after_the_other,
    a_dead_letter_that_cannot_be_written_is_not_passed_over,
    in_a_transaction_a_dead_letter_that_cannot_be_written_is_waited_for,
    in_a_transaction_what_no_topic_takes_counts_for_the_limit,
    a_shutdown_does_not_wait_for_what_is_blocked,
    topics_that_do_not_exist_or_forget_too_early_or_have_their_writers_times_are_refused,
    in_a_transaction_what_fails_leaves_with_its_offset,
    in_a_batch_only_the_record_that_fails_is_a_dead_letter,
    a_batch_that_panics_or_is_too_slow_is_the_failure_of_one_record,
);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn unreachable_provider() -> HandlerError {
    HandlerError::retriable("the provider is away")
}

/// Fails for values with this beginning, so often as the second parameter says.
fn failing(
    value: &'static str,
    times: usize,
) -> impl Fn(&Call) -> BoxFuture<'static, Result<(), HandlerError>> + Send + Sync {
    let failed = Arc::new(AtomicUsize::new(0));
    move |call: &Call| -> BoxFuture<'static, _> {
        let fails = call.value == value && failed.fetch_add(1, Ordering::SeqCst) < times;
        Box::pin(async move { if fails { Err(unreachable_provider()) } else { Ok(()) } })
    }
}

fn header_of<'a>(record: &'a Record, name: &str) -> &'a str {
    record.headers.last_str(name).unwrap_or("none")
}

async fn a_blocked_partition_is_tried_again_in_time_and_keeps_its_order(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(20, |_| "user".to_owned()).await;
    let calls = Calls::default();
    let back_off = BackOff::exponential(ms(100), 2.0, ms(2000));
    let builder = bench.builder().retry(RetryPolicy::Blocking(back_off));
    let consumer = bench.note(builder, &calls, failing("7", 5)).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let all = calls.all();
    let tries = calls.of("7");
    assert_eq!(
        tries.iter().map(|call| call.attempt).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5, 6]
    );
    for (pair, least) in tries.windows(2).zip([100, 200, 400, 800, 1600]) {
        let waited = pair[1].at - pair[0].at;
        assert!(waited >= ms(least), "attempt {} came after {waited:?}", pair[1].attempt);
    }
    let mut numbers = by_key(&all).remove("user").expect("calls");
    numbers.dedup();
    assert_eq!(numbers, (0..20).collect::<Vec<_>>());
}

async fn a_blocked_key_delays_no_other_and_holds_the_offset(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(100, |number| (number % 10).to_string()).await;
    let calls = Calls::default();
    let well = Arc::new(AtomicBool::new(false));
    let work = {
        let well = well.clone();
        move |call: &Call| -> BoxFuture<'static, _> {
            let fails = call.key == "3" && !well.load(Ordering::SeqCst);
            Box::pin(async move { if fails { Err(unreachable_provider()) } else { Ok(()) } })
        }
    };
    let builder = bench
        .builder()
        .order(ProcessingOrder::Key)
        .retry(RetryPolicy::Blocking(BackOff::fixed(ms(30)).infinite()));
    let consumer = bench.note(builder, &calls, work).await;
    calls
        .until("all other keys are handled", |calls| {
            calls.iter().filter(|call| call.key != "3").count() == 90
        })
        .await;
    calls
        .until("the key is tried again", |calls| {
            calls.iter().filter(|call| call.key == "3").count() > 3
        })
        .await;
    let partition = calls.all()[0].partition.clone();
    within("the offset before the key", async {
        while bench.committed(&partition).await != Some(3) {
            tokio::time::sleep(ms(10)).await;
        }
    })
    .await;
    let state = consumer.state().await.expect("a state");
    let blocked = &state.partitions[0].blocked[0];
    assert_eq!(
        (blocked.offset, blocked.key.as_deref(), blocked.waiting),
        (3, Some(&b"3"[..]), 9)
    );
    assert!(blocked.message.contains("the provider is away"));
    assert!(
        calls.all().iter().all(|call| call.key != "3" || call.value == "3"),
        "nothing passes the blocked record"
    );

    // A member that takes over does not do again what stands behind it.
    consumer.shutdown().await.expect("a good end");
    let before = calls.len();
    well.store(true, Ordering::SeqCst);
    let builder = bench.builder().order(ProcessingOrder::Key);
    let consumer = bench.note(builder, &calls, nothing).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let later: Vec<_> = calls.all().split_off(before);
    assert_eq!(
        later.iter().map(|call| call.key.as_str()).collect::<Vec<_>>(),
        ["3"; 10]
    );
}

async fn keys_that_stand_still_keep_no_other_from_being_read(engine: Engine) {
    const COUNT: usize = 20_000;
    let bench = Bench::new(engine, 1).await;
    let calls = Calls::default();
    let well = Arc::new(AtomicBool::new(false));
    let is_poisoned = |key: &str| key.parse::<usize>().is_ok_and(|key| key % 5 == 0);
    let work = {
        let well = well.clone();
        move |call: &Call| -> BoxFuture<'static, _> {
            let fails = is_poisoned(&call.key) && !well.load(Ordering::SeqCst);
            Box::pin(async move { if fails { Err(unreachable_provider()) } else { Ok(()) } })
        }
    };
    // Room for some 500 records; 4,000 come to stand behind the poisoned ones.
    let builder = bench
        .builder()
        .order(ProcessingOrder::Key)
        .buffer_bytes(100_000)
        .retry(RetryPolicy::Blocking(BackOff::fixed(ms(3_600_000)).infinite()));
    let consumer = bench.note(builder, &calls, work).await;
    // Some stand still before there is much, others when there is.
    bench.append_many(250, |number| (number % 25).to_string()).await;
    calls.until("some keys stand still", |calls| calls.len() == 205).await;
    bench.append_many(COUNT, |number| (number % 50).to_string()).await;
    calls
        .until("all other keys are handled", |calls| {
            calls.iter().filter(|call| !is_poisoned(&call.key)).count() == (COUNT + 250) / 5 * 4
        })
        .await;
    // A call is noted before its end is.
    let state = within("their ends are known", async {
        loop {
            let state = consumer.state().await.expect("a state");
            if state.partitions[0].open == (COUNT + 250) / 5 {
                return state;
            }
            tokio::time::sleep(ms(5)).await;
        }
    })
    .await;
    let partition = &state.partitions[0];
    assert!(
        partition.open_bytes <= 100_000,
        "{} bytes are held",
        partition.open_bytes
    );
    let waiting: usize = partition.blocked.iter().map(|blocked| blocked.waiting + 1).sum();
    assert_eq!(waiting, (COUNT + 250) / 5);

    let before = calls.len();
    well.store(true, Ordering::SeqCst);
    for blocked in &partition.blocked {
        let key = blocked.key.as_deref().map(Key::new);
        let command = Command {
            action: Action::Retry,
            place: Place {
                topic: bench.topic.clone(),
                partition: 0,
                key,
            },
            offset: blocked.offset,
            by: "tester".to_owned(),
        };
        let outcome = control::operate(&bench.log, &bench.group, command, Duration::from_secs(20)).await;
        assert!(outcome.expect("an answer").done);
    }
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let later = by_key(&calls.all().split_off(before));
    assert_eq!(later.len(), 10);
    for (key, numbers) in later {
        let key: usize = key.parse().expect("a number");
        let first = (0..if key < 25 { 10 } else { 0 }).map(|turn| turn * 25 + key);
        let expected: Vec<_> = first.chain((0..COUNT / 50).map(|turn| turn * 50 + key)).collect();
        assert_eq!(numbers, expected, "key {key}");
    }
}

async fn a_blocked_partition_lets_the_others_go_on(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    bench.append_many(200, |number| number.to_string()).await;
    let calls = Calls::default();
    let well = Arc::new(AtomicBool::new(false));
    let work = {
        let well = well.clone();
        move |call: &Call| -> BoxFuture<'static, _> {
            let fails = call.partition.partition == 0 && !well.load(Ordering::SeqCst);
            Box::pin(async move { if fails { Err(unreachable_provider()) } else { Ok(()) } })
        }
    };
    let builder = bench
        .builder()
        .pool(1)
        .retry(RetryPolicy::Blocking(BackOff::fixed(ms(20)).infinite()));
    let consumer = bench.note(builder, &calls, work).await;
    let in_second = bench
        .read(&bench.topic)
        .await
        .iter()
        .filter(|(partition, _)| partition.partition == 1)
        .count();
    let handled = |calls: &[Call]| calls.iter().filter(|call| call.partition.partition == 1).count();
    calls
        .until("the other partition is handled", |calls| handled(calls) == in_second)
        .await;
    assert!(
        calls
            .all()
            .iter()
            .all(|call| call.partition.partition == 1 || call.offset == 0)
    );
    well.store(true, Ordering::SeqCst);
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
}

async fn errors_panics_and_timeouts_become_dead_letters(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    for value in ["well", "hopeless", "panics", "hangs", "fails", "skipped", "well too"] {
        let record = ProducerRecord::to(bench.topic.as_str())
            .key("key")
            .value(value)
            .header("mine", "kept");
        bench.append(record).await;
    }
    let calls = Calls::default();
    let work = |call: &Call| -> BoxFuture<'static, _> {
        let value = call.value.clone();
        Box::pin(async move {
            match value.as_str() {
                "hopeless" => Err(HandlerError::non_retriable("not JSON")),
                "panics" => panic!("a bug"),
                "hangs" => std::future::pending().await,
                "fails" => Err(unreachable_provider()),
                "skipped" => Err(HandlerError::Skip),
                _ => Ok(()),
            }
        })
    };
    let consumer = bench.note(bench.builder().handler_timeout(ms(100)), &calls, work).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let letters = bench.read(&dead_letter_topic(&bench.topic, &bench.group)).await;
    let lines: Vec<_> = letters
        .iter()
        .map(|(_, record)| {
            let value = String::from_utf8_lossy(record.value.as_ref().expect("a value"));
            assert_eq!(record.key.as_deref(), Some(&b"key"[..]));
            assert_eq!(
                (header_of(record, "mine"), header_of(record, header::ORIGIN_TOPIC)),
                ("kept", bench.topic.as_str())
            );
            assert_eq!(
                (header_of(record, header::GROUP), header_of(record, header::ATTEMPT)),
                (bench.group.as_str(), "1")
            );
            let of = |name| header_of(record, name);
            format!(
                "{value}, {}: {}, {}",
                of(header::ORIGIN_OFFSET),
                of(header::ERROR_KIND),
                of(header::ERROR_MESSAGE)
            )
        })
        .collect();
    assert_eq!(
        lines,
        [
            "hopeless, 1: non-retriable, not JSON",
            "panics, 2: panic, the handler panicked: a bug",
            "hangs, 3: timeout, the handler took longer than 100 ms",
            "fails, 4: retriable, the provider is away",
        ]
    );
}

async fn what_fails_goes_from_retry_topic_to_retry_topic_and_never_early(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    bench.append_many(40, |number| number.to_string()).await;
    let delays = [100, 300, 700].map(ms);
    let topics = RetryTopics::new(delays);
    let names = topics.names(&bench.topic, &bench.group);
    let calls = Calls::default();
    let work = |call: &Call| -> BoxFuture<'static, _> {
        let fails = call.key.ends_with('5');
        Box::pin(async move { if fails { Err(unreachable_provider()) } else { Ok(()) } })
    };
    let builder = bench.builder().retry(RetryPolicy::NonBlocking(topics));
    let consumer = bench.note(builder, &calls, work).await;
    let dead = bench
        .read_until(&dead_letter_topic(&bench.topic, &bench.group), 4)
        .await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    assert_eq!(calls.len(), 36 + 4 * 4);
    for name in &names {
        let mut waited = bench.read(name).await;
        waited.retain(|(_, record)| record.headers.last(header::CLOCK).is_none());
        assert_eq!(waited.len(), 4, "on {name}");
    }
    for (partition, record) in &dead {
        assert_eq!(header_of(record, header::ATTEMPT), "4");
        assert_eq!(
            header_of(record, header::ORIGIN_PARTITION),
            partition.partition.to_string()
        );
        let value = String::from_utf8_lossy(record.value.as_ref().expect("a value")).into_owned();
        let tries = calls.of(&value);
        let first = &tries[0];
        assert_eq!(header_of(record, header::ORIGIN_OFFSET), first.offset.to_string());
        assert_eq!(tries.iter().map(|call| call.attempt).collect::<Vec<_>>(), [1, 2, 3, 4]);
        for (pair, delay) in tries.windows(2).zip(delays) {
            let waited = pair[1].at - pair[0].at;
            assert!(waited >= delay, "attempt {} came after {waited:?}", pair[1].attempt);
        }
    }
}

async fn blocking_and_retry_topics_come_one_after_the_other(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(3, |_| "key".to_owned()).await;
    let calls = Calls::default();
    let policy =
        RetryPolicy::BlockingThenNonBlocking(BackOff::fixed(ms(10)).max_attempts(2), RetryTopics::new([ms(20)]));
    let consumer = bench.note(bench.builder().retry(policy), &calls, failing("1", 3)).await;
    let dead = bench
        .read_until(&dead_letter_topic(&bench.topic, &bench.group), 1)
        .await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    assert_eq!(
        calls.of("1").iter().map(|call| call.attempt).collect::<Vec<_>>(),
        [1, 2, 3]
    );
    assert_eq!(header_of(&dead[0].1, header::ATTEMPT), "3");
}

async fn a_dead_letter_that_cannot_be_written_is_not_passed_over(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(3, |_| "key".to_owned()).await;
    let builder = bench.builder();
    bench.make_topics(&builder).await;
    let dead = dead_letter_topic(&bench.topic, &bench.group);
    let calls = Calls::default();
    let deleted = Arc::new(AtomicBool::new(false));
    let work = {
        let (log, dead, deleted) = (bench.log.clone(), dead.clone(), deleted.clone());
        move |call: &Call| -> BoxFuture<'static, _> {
            let (log, dead, deleted, fails) = (log.clone(), dead.clone(), deleted.clone(), call.value == "1");
            Box::pin(async move {
                if fails {
                    if !deleted.swap(true, Ordering::SeqCst) {
                        log.delete_topic(&dead).await.expect("deleted");
                    }
                    return Err(HandlerError::non_retriable("hopeless"));
                }
                Ok(())
            })
        }
    };
    let consumer = bench.note(builder, &calls, work).await;
    calls.until("it has failed", |calls| calls.len() == 2).await;
    let partition = calls.all()[0].partition.clone();
    within("what stands before it is committed", async {
        while bench.committed(&partition).await != Some(1) {
            tokio::time::sleep(ms(10)).await;
        }
    })
    .await;
    assert_eq!(calls.len(), 2, "nothing is handled behind it");
    bench.make_topics(&bench.builder()).await;
    let letters = bench.read_until(&dead, 1).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    assert_eq!(letters.len(), 1);
    assert_eq!(calls.of("1").len(), 1, "its handler is not called again for that");
    assert_eq!(calls.len(), 3);
}

async fn in_a_transaction_a_dead_letter_that_cannot_be_written_is_waited_for(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(3, |_| "key".to_owned()).await;
    let dead = dead_letter_topic(&bench.topic, &bench.group);
    let calls = Calls::default();
    let work = {
        let (log, dead) = (bench.log.clone(), dead.clone());
        move |call: &Call| -> BoxFuture<'static, _> {
            let (log, dead, fails) = (log.clone(), dead.clone(), call.value == "1");
            Box::pin(async move {
                if fails {
                    log.delete_topic(&dead).await.expect("deleted");
                    return Err(HandlerError::non_retriable("hopeless"));
                }
                Ok(())
            })
        }
    };
    let builder = bench.builder().guarantee(DeliveryGuarantee::ExactlyOnce);
    let consumer = bench.note(builder, &calls, work).await;
    calls
        .until("those behind it are handled", |calls| calls.len() == 3)
        .await;
    // Longer than a transaction takes that may succeed.
    let early = tokio::time::timeout(ms(1000), bench.caught_up()).await;
    assert!(early.is_err(), "nothing is passed over");
    bench.make_topics(&bench.builder()).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    assert_eq!(bench.read(&dead).await.len(), 1);
    assert_eq!(calls.len(), 3, "no handler is called again for that");
}

async fn in_a_transaction_what_no_topic_takes_counts_for_the_limit(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(50, |_| "key".to_owned()).await;
    let missing = format!("{}.no-such-topic", bench.topic);
    let handle = move |_: Call| -> BoxFuture<'static, _> {
        let answer = ProducerRecord::to(missing.as_str()).value("1");
        Box::pin(async move { Ok(vec![answer]) })
    };
    let builder = bench.builder().guarantee(DeliveryGuarantee::ExactlyOnce);
    let limit = DlqLimit {
        ratio: 1.0,
        consecutive: Some(3),
    };
    let consumer = bench.start(builder.dead_letter_limit(limit), handle).await;
    match within("the consumer ends", consumer.ended()).await {
        Err(Error::Log(log::Error::UnknownTopic(topic))) => assert_eq!(topic, format!("{}.no-such-topic", bench.topic)),
        ended => panic!("{ended:?}"),
    }
    let letters = bench.read(&dead_letter_topic(&bench.topic, &bench.group)).await;
    assert!(letters.len() < 25, "{} dead letters", letters.len());
    assert!(bench.lag().await >= 25);
}

async fn a_shutdown_does_not_wait_for_what_is_blocked(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(5, |_| "key".to_owned()).await;
    let calls = Calls::default();
    let hour = Duration::from_secs(3600);
    let builder = bench.builder().retry(RetryPolicy::Blocking(BackOff::fixed(hour)));
    let consumer = bench.note(builder, &calls, failing("2", 1)).await;
    calls.until("it has failed", |calls| calls.len() == 3).await;
    within("the shutdown", consumer.shutdown()).await.expect("a good end");
    assert_eq!(bench.lag().await, 3);
}

async fn topics_that_do_not_exist_or_forget_too_early_or_have_their_writers_times_are_refused(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let handler = || super::support::Call1(|_| -> BoxFuture<'static, _> { Box::pin(async { Ok(Vec::new()) }) });
    let topics = RetryTopics::new([ms(1000)]);
    let builder = bench.builder().retry(RetryPolicy::NonBlocking(topics.clone()));
    match builder.start(&bench.log, handler()).await {
        Err(Error::MissingTopics(missing)) => {
            let expected = [
                format!("{}.blocked", bench.group),
                format!("{}.control", bench.group),
                format!("{}.dead-letters", bench.group),
                redrive_topic(&bench.topic, &bench.group),
                topics.names(&bench.topic, &bench.group).remove(0),
                dead_letter_topic(&bench.topic, &bench.group),
            ];
            assert_eq!(missing, expected);
        }
        other => panic!("{other:?}"),
    }
    let long = BackOff::fixed(Duration::from_secs(8 * 24 * 3600));
    let builder = bench.builder().retry(RetryPolicy::Blocking(long));
    bench.make_topics(&builder).await;
    match builder.start(&bench.log, handler()).await {
        Err(Error::RetentionTooShort { topic, .. }) => assert_eq!(topic, bench.topic),
        other => panic!("{other:?}"),
    }
    let builder = bench.builder().retry(RetryPolicy::NonBlocking(topics.clone()));
    let retry = topics.names(&bench.topic, &bench.group).remove(0);
    for mut spec in builder.topics(&bench.log).await.expect("topics") {
        if spec.name == retry {
            assert_eq!(spec.timestamps, Timestamps::LogAppend);
            spec.timestamps = Timestamps::Create;
        }
        make_topic(&bench.log, spec).await;
    }
    match builder.start(&bench.log, handler()).await {
        Err(Error::WritersTimes(topic)) => assert_eq!(topic, retry),
        other => panic!("{other:?}"),
    }
    let builder = bench
        .builder()
        .guarantee(DeliveryGuarantee::AtMostOnce)
        .retry(RetryPolicy::NonBlocking(topics));
    assert!(matches!(
        builder.start(&bench.log, handler()).await,
        Err(Error::Setting { .. })
    ));
}

async fn in_a_transaction_what_fails_leaves_with_its_offset(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    let out = make_topic(&bench.log, TopicSpec::new(format!("{}.out", bench.topic), 2)).await;
    bench.append_many(100, |number| number.to_string()).await;
    let answers = out.clone();
    let handle = move |call: Call| -> BoxFuture<'static, _> {
        let out = answers.clone();
        Box::pin(async move {
            let number: usize = call.value.parse().expect("a number");
            let answer = ProducerRecord::to(out.as_str()).key(call.key).value(call.value);
            match number {
                // It sends, and fails: what it sent must not be seen.
                number if number % 10 == 3 => Err(HandlerError::non_retriable("hopeless")),
                // It sends what no topic takes.
                number if number % 10 == 7 => {
                    let too_large = vec![b'x'; 2 * TopicSpec::DEFAULT_MAX_MESSAGE_BYTES];
                    Ok(vec![answer, ProducerRecord::to(out.as_str()).value(too_large)])
                }
                _ => Ok(vec![answer]),
            }
        })
    };
    let builder = bench
        .builder()
        .guarantee(DeliveryGuarantee::ExactlyOnce)
        .order(ProcessingOrder::Key);
    let consumer = bench.start(builder, handle).await;
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let (dead, well): (Vec<_>, Vec<_>) = (0..100).partition(|number| [3, 7].contains(&(number % 10)));
    assert_eq!(numbers(bench.read(&out).await), well);
    assert_eq!(
        numbers(bench.read(&dead_letter_topic(&bench.topic, &bench.group)).await),
        dead
    );
}

/// The numbers that are the values of records, sorted.
fn numbers(records: Vec<(barnabas::log::TopicPartition, Record)>) -> Vec<usize> {
    let mut numbers: Vec<_> = records.iter().map(|(_, record)| number(record)).collect();
    numbers.sort_unstable();
    numbers
}

fn number(record: &Record) -> usize {
    let value = record.value.as_ref().expect("a value");
    String::from_utf8_lossy(value).parse().expect("a number")
}

/// Sends one record for all of a batch, unless one of them is hopeless.
struct Sums {
    out: String,
    largest: Arc<AtomicUsize>,
}

impl BatchHandler for Sums {
    async fn handle(&self, context: &mut Context, records: &[Record]) -> Result<(), BatchError> {
        self.largest.fetch_max(records.len(), Ordering::SeqCst);
        // Longer than a turn of the pool.
        tokio::time::sleep(ms(30)).await;
        for record in records {
            context.send(ProducerRecord::to(self.out.as_str()).value(number(record).to_string()));
        }
        match records.iter().position(|record| number(record) % 10 == 3) {
            Some(index) => Err(BatchError {
                index,
                error: HandlerError::non_retriable("hopeless"),
            }),
            None => Ok(()),
        }
    }
}

/// Panics at some records and is too slow at others, without a word about which.
struct Silent;

impl BatchHandler for Silent {
    async fn handle(&self, _: &mut Context, records: &[Record]) -> Result<(), BatchError> {
        for record in records {
            assert!(number(record) % 20 != 3, "one of them is hopeless");
            if number(record) % 20 == 13 {
                std::future::pending::<()>().await;
            }
        }
        Ok(())
    }
}

async fn a_batch_that_panics_or_is_too_slow_is_the_failure_of_one_record(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    bench.append_many(60, |number| number.to_string()).await;
    let builder = bench
        .builder()
        .order(ProcessingOrder::Partition)
        .handler_timeout(ms(100));
    bench.make_topics(&builder).await;
    let consumer = builder.start_batches(&bench.log, 16, Silent).await.expect("a consumer");
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let dead: Vec<_> = (0..60).filter(|number| number % 10 == 3).collect();
    assert_eq!(
        numbers(bench.read(&dead_letter_topic(&bench.topic, &bench.group)).await),
        dead
    );
}

async fn in_a_batch_only_the_record_that_fails_is_a_dead_letter(engine: Engine) {
    let bench = Bench::new(engine, 1).await;
    let out = make_topic(&bench.log, TopicSpec::new(format!("{}.out", bench.topic), 1)).await;
    bench.append_many(100, |number| number.to_string()).await;
    let builder = bench
        .builder()
        .guarantee(DeliveryGuarantee::ExactlyOnce)
        .order(ProcessingOrder::Partition);
    bench.make_topics(&builder).await;
    let largest = Arc::new(AtomicUsize::new(0));
    let sums = Sums {
        out: out.clone(),
        largest: largest.clone(),
    };
    let consumer = builder.start_batches(&bench.log, 16, sums).await.expect("a consumer");
    bench.caught_up().await;
    consumer.shutdown().await.expect("a good end");
    let (dead, well): (Vec<_>, Vec<_>) = (0..100).partition(|number| number % 10 == 3);
    let written: Vec<_> = bench
        .read(&out)
        .await
        .iter()
        .map(|(_, record)| number(record))
        .collect();
    assert_eq!(written, well, "once and in order");
    assert_eq!(
        numbers(bench.read(&dead_letter_topic(&bench.topic, &bench.group)).await),
        dead
    );
    let largest = largest.load(Ordering::SeqCst);
    assert!((2..=16).contains(&largest), "batches of up to {largest}");
}
