//! What a processor makes of records, over failures and a restart.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use barnabas::log::{ProducerRecord, Record};
use barnabas::patterns::consumer::{DeliveryGuarantee, HandlerError, ProcessingOrder};
use barnabas::patterns::processor::Processor;
use barnabas::patterns::retry::{BackOff, RetryPolicy};
use barnabas_tests::conformance::{make_topic, unique};
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;

use super::support::{Bench, TopicSpec};

on_both_logs!(what_its_function_returns_stands_there_once_over_failures_and_a_restart);

/// Before the restart, and again after it.
const RECORDS: usize = 150;
const KEYS: usize = 7;

fn number(record: &Record) -> usize {
    let value = record.value.as_deref().unwrap_or_default();
    std::str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok())
        .expect("a number")
}

/// How many records follow from one.
fn copies(number: usize) -> usize {
    number % 3
}

fn is_hopeless(number: usize) -> bool {
    number % 10 == 3
}

async fn what_its_function_returns_stands_there_once_over_failures_and_a_restart(engine: Engine) {
    let bench = Bench::new(engine, 3).await;
    let output = make_topic(&bench.log, TopicSpec::new(unique("copies"), 3)).await;
    let failed = Arc::new(Mutex::new(HashSet::new()));
    let to = output.clone();
    let transform = move |record: &Record| {
        let number = number(record);
        if is_hopeless(number) {
            return Err(HandlerError::non_retriable("nothing can be made of it"));
        }
        if number % 10 == 5 && failed.lock().expect("no panic").insert(number) {
            return Err(HandlerError::retriable("not yet"));
        }
        let copy = |_| {
            let mut copy = ProducerRecord::to(to.as_str()).value(number.to_string());
            copy.key.clone_from(&record.key);
            copy
        };
        Ok((0..copies(number)).map(copy).collect())
    };
    let consumer = bench
        .builder()
        .order(ProcessingOrder::Key)
        // It is exactly once all the same.
        .guarantee(DeliveryGuarantee::AtMostOnce)
        .retry(RetryPolicy::Blocking(
            BackOff::fixed(Duration::from_millis(5)).max_attempts(2),
        ));
    bench.make_topics(&consumer).await;
    let append = || bench.append_many(RECORDS, |number| format!("key {}", number % KEYS));
    append().await;

    let processor = Processor::new(consumer, transform);
    let first = processor.clone().start(&bench.log).await.expect("a processor");
    bench.read_until(&output, 1).await;
    first.shutdown().await.expect("a good end");
    append().await;
    let second = processor.start(&bench.log).await.expect("a processor");
    bench.caught_up().await;
    second.shutdown().await.expect("a good end");

    let mut sent: HashMap<_, Vec<usize>> = HashMap::new();
    for (_, record) in bench.read(&output).await {
        sent.entry(record.key.clone()).or_default().push(number(&record));
    }
    let expected = |number: usize| if is_hopeless(number) { 0 } else { copies(number) };
    let mut wanted: HashMap<_, Vec<usize>> = HashMap::new();
    for number in (0..RECORDS).chain(0..RECORDS) {
        let of_key = wanted.entry(Some(format!("key {}", number % KEYS).into())).or_default();
        of_key.extend(std::iter::repeat_n(number, expected(number)));
    }
    assert_eq!(sent, wanted);
    let letters = bench.read(&format!("{}.{}.dlt", bench.topic, bench.group)).await;
    assert_eq!(letters.len(), 2 * RECORDS / 10);
}
