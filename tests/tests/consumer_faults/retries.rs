//! Failing handlers whose processes are killed too.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Instant;

use barnabas_tests::consumer::{
    At, Crew, Fault, FaultKind, Guarantee, Line, Order, Retry, SOON, assert_each_once, assert_once,
};
use barnabas_tests::fault::TopicRefused;
use barnabas_tests::http::post;
use barnabas_tests::kafka::brokers;
use barnabas_tests::oracle::{OracleRecord, TopicEnds};
use barnabas_tests::site::Site;
use hyper::StatusCode;

use super::setting;

fn fault(at: At, attempts: u32, kind: FaultKind) -> Fault {
    Fault {
        at,
        attempts,
        until: None,
        kind,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_hop_to_a_retry_topic_and_its_offset_are_one_transaction_under_kills() {
    let mut crew = Crew::new(&brokers(), 4, |settings| {
        settings.retry = Retry::NonBlocking(vec![300, 600]);
        settings.work_max_us = 2000;
        settings.session_timeout_ms = 1000;
        // One record of seven is retried, one of 70 as often as it can be, and then is a dead letter.
        settings.faults = vec![
            fault(At::Every(70), u32::MAX, FaultKind::Panic),
            fault(At::Every(35), u32::MAX, FaultKind::Fail),
            fault(At::Every(7), 2, FaultKind::Fail),
        ];
    })
    .await;
    for slot in ["a", "b"] {
        crew.start(slot);
    }
    for slot in ["a", "b", "a"] {
        crew.append(700, 100).await;
        let done = crew.count("done");
        crew.until("it works", SOON, |crew| crew.count("done") > done + 100)
            .await;
        crew.kill(slot);
        crew.start(slot);
    }
    crew.caught_up().await;
    let dead = format!("{}.{}.dlt", crew.input(), crew.settings.group);
    crew.until("each has an end", SOON, |crew| {
        let ends = crew.read(crew.output()).len() + crew.read(&dead).len();
        ends as u64 >= crew.appended()
    })
    .await;
    crew.stop_all();
    let mut ends = crew.read(crew.output());
    let letters = crew.read(&dead);
    assert_eq!(
        letters.len() as u64,
        crew.appended() / 35,
        "what fails always is a dead letter"
    );
    // Across a retry topic there is no order.
    ends.extend(letters);
    assert_once(0..crew.appended(), &ends);
    for line in crew.ledger().iter() {
        let waits = [0, 300, 600][line.attempt as usize - 1];
        let waited = line.at_ms - line.timestamp_ms;
        assert!(waited >= waits, "{waited} ms are too early: {line:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_none_of_many_retried_records_comes_early_over_restarts_with_clocks_that_are_off() {
    const DELAY_MS: u64 = 1500;
    const OFF_MS: i64 = 3000;
    let records = setting("BARNABAS_TEST_RETRIED").unwrap_or(10_000);
    let mut crew = Crew::new(&brokers(), 4, |settings| {
        settings.retry = Retry::NonBlocking(vec![DELAY_MS]);
        settings.order = Order::Unordered;
        settings.pool = 32;
        settings.session_timeout_ms = 1000;
        settings.faults = vec![fault(At::All, 1, FaultKind::Fail)];
    })
    .await;
    crew.append(records, 1000).await;
    let start = |crew: &mut Crew, slot: &str, ahead_ms: i64| {
        crew.start_with(slot, |settings| settings.clock_ahead_ms = ahead_ms);
    };
    start(&mut crew, "a", OFF_MS);
    start(&mut crew, "b", -OFF_MS);
    let again = |crew: &Crew| crew.ledger().iter().filter(|line| line.attempt == 2).count();
    // Who was ahead is behind, and the other way round.
    for (slot, part, ahead_ms) in [("a", 10, -OFF_MS), ("b", 3, OFF_MS)] {
        let some = usize::try_from(records / part).expect("a small number");
        crew.until("some are tried again", SOON, |crew| again(crew) > some)
            .await;
        crew.kill(slot);
        start(&mut crew, slot, ahead_ms);
    }
    crew.until("all are done", SOON, |crew| {
        crew.read(crew.output()).len() as u64 >= records
    })
    .await;
    crew.stop_all();
    assert_once(0..records, &crew.read(crew.output()));
    // All by the machine's clock: when the first attempt failed, when the broker took the record, and when it came again.
    let ledger = crew.ledger();
    let mut failed: HashMap<u64, i64> = HashMap::new();
    for line in ledger.iter().filter(|line| line.what == "failed") {
        let first = failed.entry(line.number).or_insert(line.at_ms);
        *first = line.at_ms.min(*first);
    }
    let waited_on = format!("{}.{}.retry.{DELAY_MS}ms", crew.input(), crew.settings.group);
    let waited = crew.read(&waited_on);
    let stamps: HashMap<_, _> = waited
        .iter()
        .map(|record| ((record.partition, record.offset), record.timestamp_ms))
        .collect();
    let delay_ms = i64::try_from(DELAY_MS).expect("small");
    let is_early = |line: &&Line| {
        let since = failed[&line.number].max(stamps[&(line.partition, line.offset)]);
        line.at_ms < since + delay_ms
    };
    let retried = ledger.iter().filter(|line| line.attempt == 2);
    let early: Vec<&Line> = retried.filter(is_early).collect();
    assert!(
        early.is_empty(),
        "{} are early, such as {:?}",
        early.len(),
        &early[..early.len().min(3)]
    );
    let is_clock = |record: &&OracleRecord| record.headers.iter().any(|(name, _)| name == "bn-clock");
    assert!(
        waited.iter().any(|record| is_clock(&record)),
        "nobody asked the log what time it is"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_blocked_record_does_not_come_early_to_successors_whose_clocks_are_off() {
    const DELAY_MS: u64 = 2000;
    const OFF_MS: i64 = 3000;
    let mut crew = Crew::new(&brokers(), 1, |settings| {
        settings.guarantee = Guarantee::AtLeastOnce;
        settings.output = None;
        settings.retry = Retry::Blocking(DELAY_MS);
        settings.session_timeout_ms = 1000;
        settings.faults = vec![fault(At::All, 2, FaultKind::Fail)];
    })
    .await;
    crew.append(1, 1).await;
    let blocked = format!("{}.blocked", crew.settings.group);
    for (attempts, ahead_ms) in [(1, -OFF_MS), (2, OFF_MS)] {
        crew.start_with("a", |settings| settings.clock_ahead_ms = ahead_ms);
        crew.until("it is told that it stands still", SOON, |crew| {
            let told = crew.read(&blocked);
            let told = told.iter().rev().find(|record| !record.value.is_empty());
            told.is_some_and(|record| {
                let place: serde_json::Value = serde_json::from_slice(&record.value).expect("JSON");
                place["attempts"] == attempts
            })
        })
        .await;
        crew.kill("a");
    }
    crew.start_with("a", |settings| settings.clock_ahead_ms = OFF_MS);
    crew.caught_up().await;
    crew.stop_all();
    let ledger = crew.ledger();
    let calls: Vec<&Line> = ledger.iter().filter(|line| line.what == "call").collect();
    assert_eq!(calls.iter().map(|line| line.attempt).collect::<Vec<_>>(), [1, 2, 3]);
    for (failed, next) in ledger.iter().filter(|line| line.what == "failed").zip(&calls[1..]) {
        let waited_ms = next.at_ms - failed.at_ms;
        assert!(
            waited_ms >= i64::try_from(DELAY_MS).expect("small"),
            "{waited_ms} ms are too early: {next:?}"
        );
    }
}

/// A record whose dead letter is refused is not done, whoever owns its partition.
async fn dead_letters_are_refused_for_a_while(guarantee: Guarantee) {
    let mut crew = Crew::new(&brokers(), 2, |settings| {
        settings.guarantee = guarantee;
        settings.session_timeout_ms = 1000;
        settings.faults = vec![fault(At::Every(50), u32::MAX, FaultKind::Hopeless)];
        if guarantee != Guarantee::ExactlyOnce {
            settings.output = None;
        }
    })
    .await;
    let dead = format!("{}.{}.dlt", crew.input(), crew.settings.group);
    let refused = TopicRefused::new(&brokers(), &dead).await;
    crew.append(200, 20).await;
    let attempts_at_first = |crew: &Crew| {
        let lines = crew.ledger();
        lines
            .iter()
            .filter(|line| line.what == "failed" && line.number == 0)
            .count()
    };
    for (slot, attempts) in [("a", 1), ("b", 2), ("a", 3)] {
        crew.start(slot);
        crew.until("it fails", SOON, |crew| {
            // One that cannot commit its transaction ends, and is started again as a service is.
            crew.restart_crashed();
            attempts_at_first(crew) >= attempts
        })
        .await;
        crew.assert_offsets(std::slice::from_ref(&dead));
        crew.kill(slot);
    }
    assert_eq!(crew.read(&dead).len(), 0);
    let others = crew.committed();
    crew.start("a");
    crew.start("b");
    refused.accept().await;
    let ends = crew.ends();
    crew.until("all is committed", SOON, |crew| {
        crew.restart_crashed();
        crew.committed()
            .iter()
            .zip(&ends)
            .all(|((offset, _), end)| offset >= end)
    })
    .await;
    crew.restart_crashed();
    crew.stop_all();
    assert_ne!(crew.committed(), others);
    crew.assert_offsets(std::slice::from_ref(&dead));
    let mut letters: Vec<String> = crew
        .read(&dead)
        .iter()
        .map(|letter| String::from_utf8_lossy(&letter.value).into_owned())
        .collect();
    letters.sort();
    if guarantee != Guarantee::ExactlyOnce {
        letters.dedup();
    }
    assert_eq!(letters, ["0", "100", "150", "50"]);
    match guarantee {
        Guarantee::ExactlyOnce => assert_eq!(crew.read(crew.output()).len(), 196),
        Guarantee::AtLeastOnce | Guarantee::AtMostOnce => assert_eq!(crew.count("done"), 196),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_while_dead_letters_are_refused_no_offset_passes_them() {
    dead_letters_are_refused_for_a_while(Guarantee::AtLeastOnce).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_while_dead_letters_are_refused_no_transaction_passes_them() {
    dead_letters_are_refused_for_a_while(Guarantee::ExactlyOnce).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_redrive_whose_gateway_is_killed_brings_each_dead_letter_back_once() {
    const LETTERS: u64 = 5000;
    let mut crew = Crew::new(&brokers(), 4, |settings| {
        settings.order = Order::Unordered;
        settings.pool = 32;
    })
    .await;
    let mended = crew.folder().join("mended");
    crew.settings.faults = vec![Fault {
        until: Some(mended.clone()),
        ..fault(At::All, u32::MAX, FaultKind::Hopeless)
    }];
    crew.append(LETTERS, 500).await;
    crew.start("a");
    crew.caught_up().await;
    let dead = format!("{}.{}.dlt", crew.input(), crew.settings.group);
    let redriven = format!("{}.{}.redrive", crew.input(), crew.settings.group);
    assert_eq!(crew.read(&dead).len() as u64, LETTERS);
    std::fs::write(&mended, "").expect("written");
    let site = Site::on_kafka(brokers());
    let mut gateway = tokio::task::block_in_place(|| site.gateway("gateway"));
    let path = format!("/v1/admin/dead-letters/{dead}/redrive");
    let redrive = |to: SocketAddr| {
        let path = path.clone();
        async move { post(to, &path, "application/json", r#"{"filter":""}"#).await }
    };
    let first = tokio::spawn(redrive(gateway.address()));
    // A redrive is several transactions: the kill falls between the first and the last.
    let ends = TopicEnds::new(&brokers(), &redriven);
    let deadline = Instant::now() + SOON;
    tokio::task::block_in_place(|| {
        while ends.committed() == 0 {
            assert!(Instant::now() < deadline, "nothing is redriven");
        }
        gateway.kill();
    });
    let before = crew.read(&redriven).len() as u64;
    assert!(before < LETTERS, "all was redriven before the kill");
    assert!(
        first.await.expect("no panic").is_err(),
        "it was killed before it answered"
    );
    tokio::task::block_in_place(|| gateway.start());
    let answer = redrive(gateway.address()).await.expect("an answer");
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    let rest = answer.json()["records"].as_u64().expect("a number");
    assert!(
        rest > 0 && rest + before <= LETTERS,
        "{before} and {rest} were redriven"
    );
    crew.until("all are done", SOON, |crew| {
        crew.read(crew.output()).len() as u64 >= LETTERS
    })
    .await;
    crew.stop_all();
    assert_eq!(crew.read(&redriven).len() as u64, LETTERS);
    // A redrive gives order up.
    assert_once(0..LETTERS, &crew.read(crew.output()));
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_group_that_stands_still_holds_no_other_up() {
    let mut blocked = Crew::new(&brokers(), 2, |settings| {
        settings.guarantee = Guarantee::AtLeastOnce;
        settings.output = None;
        settings.retry = Retry::Blocking(50);
    })
    .await;
    let well = blocked.folder().join("well");
    blocked.settings.faults = vec![Fault {
        until: Some(well.clone()),
        ..fault(At::All, u32::MAX, FaultKind::Fail)
    }];
    let source = blocked.input().to_owned();
    let mut other = Crew::new(&brokers(), 2, |settings| settings.topics = vec![source]).await;
    blocked.start("a");
    blocked.append(500, 50).await;
    blocked
        .until("it fails", SOON, |blocked| blocked.count("failed") > 0)
        .await;
    other.start("a");
    other.caught_up().await;
    assert_eq!(blocked.count("done"), 0);
    assert_each_once(500, &other.read(other.output()));
    std::fs::write(&well, "").expect("written");
    blocked.caught_up().await;
    blocked.stop_all();
    other.stop_all();
    blocked.assert_at_least_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_a_partition_that_stands_still_past_the_poll_interval_leaves_its_group_stable() {
    let mut crew = Crew::new(&brokers(), 4, |settings| {
        settings.guarantee = Guarantee::AtLeastOnce;
        settings.order = Order::Partition;
        settings.output = None;
        settings.retry = Retry::Blocking(200);
        // It may not be shorter than the session of any consumer that the process has.
        let shorter = [("session.timeout.ms", "1500"), ("max.poll.interval.ms", "2000")];
        settings.overrides = shorter.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    })
    .await;
    let well = crew.folder().join("well");
    crew.settings.faults = vec![Fault {
        until: Some(well.clone()),
        ..fault(At::Partition(0), u32::MAX, FaultKind::Fail)
    }];
    crew.start("a");
    crew.append(100, 40).await;
    let of = |crew: &Crew, is_blocked: bool| {
        let lines = crew.ledger();
        let of = lines
            .iter()
            .filter(|line| line.what != "failed" && (line.partition == 0) == is_blocked);
        of.cloned().collect::<Vec<_>>()
    };
    crew.until("it fails", SOON, |crew| !of(crew, true).is_empty()).await;
    let members = crew.members().await;
    assert_eq!(members.len(), 1);
    // Attempts 200 ms apart: six times the poll interval.
    crew.until("the partition has stood still for long", SOON, |crew| {
        of(crew, true).len() > 60
    })
    .await;
    assert_eq!(crew.members().await, members, "the member is the one that it was");
    crew.append(100, 40).await;
    let others = crew
        .read(crew.input())
        .iter()
        .filter(|record| record.partition != 0)
        .count();
    crew.until("the others go on", SOON, |crew| {
        of(crew, false).iter().filter(|line| line.what == "done").count() >= others
    })
    .await;
    assert!(
        of(&crew, true).iter().all(|line| line.offset == 0),
        "nothing passes what is blocked"
    );
    let attempts: Vec<u32> = of(&crew, true).iter().map(|line| line.attempt).collect();
    assert!(attempts.is_sorted(), "the partition never moved: {attempts:?}");
    let done = of(&crew, false).iter().filter(|line| line.what == "done").count();
    assert_eq!(done, others, "the others were not done again");
    std::fs::write(&well, "").expect("written");
    crew.caught_up().await;
    crew.stop_all();
    crew.assert_at_least_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_errors_panics_hangs_and_what_cannot_be_read_are_each_a_dead_letter_and_no_offset_runs_ahead() {
    let mut crew = Crew::new(&brokers(), 2, |settings| {
        settings.handler_timeout_ms = Some(300);
        settings.session_timeout_ms = 1000;
        settings.faults = vec![
            fault(At::Number(10), u32::MAX, FaultKind::Hang),
            fault(At::Number(20), u32::MAX, FaultKind::Panic),
            fault(At::Number(30), u32::MAX, FaultKind::Hopeless),
            fault(At::Number(40), u32::MAX, FaultKind::Fail),
        ];
    })
    .await;
    crew.append(50, 10).await;
    crew.append_unreadable("fifty").await;
    crew.append(50, 10).await;
    crew.start("a");
    crew.caught_up().await;
    crew.stop_all();
    let dead = format!("{}.{}.dlt", crew.input(), crew.settings.group);
    crew.assert_offsets(std::slice::from_ref(&dead));
    let mut kinds: Vec<String> = crew
        .read(&dead)
        .iter()
        .map(|letter| {
            format!(
                "{} {}",
                String::from_utf8_lossy(&letter.value),
                letter.header("bn-error-kind")
            )
        })
        .collect();
    kinds.sort();
    assert_eq!(
        kinds,
        [
            "10 timeout",
            "20 panic",
            "30 non-retriable",
            "40 retriable",
            "fifty non-retriable"
        ]
    );
    assert_eq!(crew.read(crew.output()).len(), 96);
}
