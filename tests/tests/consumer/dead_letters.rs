//! Dead letters as operators handle them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use barnabas::log;
use barnabas::patterns;
use barnabas::patterns::control::LettersAction;
use barnabas::patterns::dead_letter::{self, DeadLetter, Selection, dead_letter_topic, header, redrive_topic};
use barnabas_tests::on_both_logs;
use barnabas_tests::site::Engine;

use super::support::{Bench, Calls, failing_for_good, nothing};

on_both_logs!(
    are_listed_from_the_newest_page_by_page,
    come_back_to_their_group_alone_and_once,
    a_redrive_that_is_broken_off_sends_nothing_twice,
);

/// Lets so many records become dead letters, and returns what is left of the handler's calls to come.
async fn with_dead_letters(
    bench: &Bench,
    count: usize,
) -> (Arc<AtomicBool>, Calls, barnabas::patterns::consumer::ConsumerHandle) {
    let (ill, calls) = (Arc::new(AtomicBool::new(true)), Calls::default());
    bench.append_many(count, |number| format!("user-{number}")).await;
    let consumer = bench
        .note(bench.builder(), &calls, failing_for_good("hopeless", &ill))
        .await;
    bench
        .read_until(&dead_letter_topic(&bench.topic, &bench.group), count)
        .await;
    bench.caught_up().await;
    (ill, calls, consumer)
}

async fn list(bench: &Bench, most: usize, is_wanted: impl Fn(&DeadLetter) -> bool) -> Vec<Vec<DeadLetter>> {
    let (mut pages, mut before) = (Vec::new(), dead_letter::Before::new());
    loop {
        let page = dead_letter::list(&bench.log, &bench.topic, &bench.group, &before, most, &is_wanted).await;
        let (page, next) = page.expect("a page");
        pages.push(page);
        match next {
            Some(next) => before = next,
            None => return pages,
        }
    }
}

async fn settle(bench: &Bench, selection: Selection, action: LettersAction) -> usize {
    let settled = dead_letter::settle(&bench.log, &bench.topic, &bench.group, &selection, action, "tester").await;
    settled.expect("settled")
}

async fn are_listed_from_the_newest_page_by_page(engine: Engine) {
    let bench = Bench::new(engine, 3).await;
    let (_, _, consumer) = with_dead_letters(&bench, 25).await;
    consumer.shutdown().await.expect("a good end");
    let pages = list(&bench, 10, |_| true).await;
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [10, 10, 5]);
    for page in &pages {
        assert!(page.is_sorted_by_key(|letter| std::cmp::Reverse(letter.record.timestamp_ms)));
    }
    let mut seen: Vec<_> = pages
        .concat()
        .iter()
        .map(|letter| (letter.partition, letter.record.offset))
        .collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 25);
    let some = Selection::Containing("user-2".to_owned());
    let pages = list(&bench, 10, |letter| some.contains(letter.partition, &letter.record)).await;
    assert_eq!(pages.concat().len(), 6, "2 and 20 to 24");
}

async fn come_back_to_their_group_alone_and_once(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    let other = Calls::default();
    let mut elsewhere = Bench::new(engine, 1).await;
    elsewhere.log = bench.log.clone();
    elsewhere.topic = bench.topic.clone();
    let other_group = elsewhere.note(elsewhere.builder(), &other, nothing).await;
    let (ill, calls, consumer) = with_dead_letters(&bench, 20).await;
    other
        .until("the other group has seen all", |calls| calls.len() == 20)
        .await;

    let first = list(&bench, 1, |_| true).await.concat()[0].clone();
    let one = Selection::Records(vec![(first.partition, first.record.offset)]);
    assert_eq!(settle(&bench, one.clone(), LettersAction::Discard).await, 1);
    assert_eq!(settle(&bench, one, LettersAction::Redrive).await, 0, "it is done with");
    ill.store(false, Ordering::SeqCst);
    assert_eq!(
        settle(&bench, Selection::Containing(String::new()), LettersAction::Redrive).await,
        19
    );
    calls.until("they are handled again", |calls| calls.len() == 39).await;
    assert_eq!(
        settle(&bench, Selection::Containing(String::new()), LettersAction::Redrive).await,
        0
    );
    for (_, record) in bench.read(&redrive_topic(&bench.topic, &bench.group)).await {
        assert_eq!(
            record.headers.last_str(header::ORIGIN_TOPIC),
            Some(bench.topic.as_str())
        );
        assert_eq!(record.headers.last(header::ERROR_KIND), None);
    }
    let again: Vec<_> = calls.all().split_off(20);
    assert!(again.iter().all(|call| call.attempt == 1));
    let settled = list(&bench, 100, |_| true).await.concat();
    let by = |action| {
        let of = |letter: &&DeadLetter| letter.settled.as_ref().is_some_and(|settled| settled.action == action);
        settled.iter().filter(of).count()
    };
    assert_eq!((by(LettersAction::Redrive), by(LettersAction::Discard)), (19, 1));
    consumer.shutdown().await.expect("a good end");
    other_group.shutdown().await.expect("a good end");
    assert_eq!(other.len(), 20, "nobody else sees them again");
}

async fn a_redrive_that_is_broken_off_sends_nothing_twice(engine: Engine) {
    let bench = Bench::new(engine, 2).await;
    const COUNT: usize = 3000;
    let (ill, calls, consumer) = with_dead_letters(&bench, COUNT).await;
    ill.store(false, Ordering::SeqCst);
    let all = Selection::Containing(String::new());
    let mut broken_off = 0;
    for ms in [5, 20, 40, 80, 120] {
        let redrive = dead_letter::settle(
            &bench.log,
            &bench.topic,
            &bench.group,
            &all,
            LettersAction::Redrive,
            "tester",
        );
        broken_off += usize::from(tokio::time::timeout(Duration::from_millis(ms), redrive).await.is_err());
    }
    assert!(broken_off > 0, "the shortest time is too short for all of them");
    // One that was broken off may still be on its way to its producer, and fences who has come before it arrives.
    loop {
        let redrive = dead_letter::settle(
            &bench.log,
            &bench.topic,
            &bench.group,
            &all,
            LettersAction::Redrive,
            "tester",
        );
        match redrive.await {
            Ok(_) => break,
            Err(patterns::Error::Log(log::Error::Fenced(_))) => {}
            Err(error) => panic!("{error}"),
        }
    }
    calls
        .until("they are handled again", |calls| calls.len() >= 2 * COUNT)
        .await;
    consumer.drain().await.expect("drained");
    consumer.shutdown().await.expect("a good end");
    let mut times: HashMap<String, usize> = HashMap::new();
    for call in calls.all() {
        *times.entry(call.value).or_default() += 1;
    }
    assert_eq!(times.len(), COUNT);
    assert!(times.values().all(|times| *times == 2), "each once, and once again");
}
