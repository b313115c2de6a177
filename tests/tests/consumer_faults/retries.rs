//! Failing handlers whose processes are killed too.

use barnabas_tests::consumer::{At, Crew, Fault, FaultKind, Guarantee, Order, Retry, SOON, assert_each_once};
use barnabas_tests::kafka::brokers;

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
    ends.sort_by_key(|record| String::from_utf8_lossy(&record.value).parse::<u64>().expect("a number"));
    assert_each_once(crew.appended(), &ends);
    for line in crew.ledger() {
        let waits = [0, 300, 600][line.attempt as usize - 1];
        let waited = line.at_ms - line.timestamp_ms;
        assert!(waited >= waits, "{waited} ms are too early: {line:?}");
    }
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
    other.start("a");
    blocked.append(500, 50).await;
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
        let of = lines.iter().filter(|line| (line.partition == 0) == is_blocked);
        of.cloned().collect::<Vec<_>>()
    };
    // Attempts 200 ms apart: more than twice the poll interval.
    crew.until("the partition has stood still for long", SOON, |crew| {
        of(crew, true).len() > 22
    })
    .await;
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
async fn kafka_errors_panics_and_hangs_are_each_a_dead_letter_and_no_offset_runs_ahead() {
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
    crew.append(100, 10).await;
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
    assert_eq!(kinds, ["10 timeout", "20 panic", "30 non-retriable", "40 retriable"]);
    assert_eq!(crew.read(crew.output()).len(), 96);
}
